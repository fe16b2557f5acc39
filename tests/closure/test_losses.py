"""Which calls are convex losses of which outputs, against dense matrices, and what to write instead of other losses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import build, error
from torch import Tensor, nn

from newtonopt import HessianFree, evaluate, gauss_newton, hessian, jacobian, mark_outputs
from newtonopt.closure.losses import REMEDIES, mean_over

Loss = Callable[[Tensor], Tensor]
FORMS = ("cached", "streamed", "finite_difference")

torch.manual_seed(2)
X, Y = torch.randn(6, 3).double(), torch.randn(6, 3).double()
SOFT = Y.softmax(1)
T = torch.arange(6) % 3


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def closure_of(network: nn.Module, loss: Loss) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        network.zero_grad()
        value = loss(network(X))
        value.backward()
        return value

    return closure


def dense(outputs: Tensor, curvature: Tensor, params: list[nn.Parameter]) -> Tensor:
    """`J' H J`, row by row."""
    rows = []
    for entry in outputs.reshape(-1):
        found = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)
        pieces = [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]
        rows.append(torch.cat([piece.reshape(-1) for piece in pieces]))
    J = torch.stack(rows)
    return J.T @ curvature.reshape(len(rows), len(rows)) @ J


def dense_at(loss: Loss, z: Tensor, params: list[nn.Parameter]) -> Tensor:
    return dense(z, torch.autograd.functional.hessian(loss, z.detach()), params)


@pytest.mark.parametrize("products", FORMS)
def test_a_loss_of_the_results_of_another_counts_once(products: Any) -> None:
    network = model()
    prototypes = nn.Parameter(torch.randn(3, 3).double())
    params = [*network.parameters(), prototypes]

    def logits(z: Tensor) -> Tensor:
        pairs = z[:, None].expand(6, 3, 3), prototypes[None].expand(6, 3, 3)
        return -F.mse_loss(*pairs, reduction="none").sum(-1)

    def classify(s: Tensor) -> Tensor:
        return F.cross_entropy(s, T)

    evaluation = evaluate(closure_of(network, lambda z: classify(logits(z))), params, products=products)
    G, J = gauss_newton(evaluation), jacobian(evaluation)
    v = torch.randn(40).double()
    assert error(G @ v, dense_at(classify, logits(network(X)), params) @ v) < 1e-6
    assert G.psd and J.shape[0] == 18
    zeros = torch.zeros(6).double()
    squared = lambda z: F.mse_loss(F.cross_entropy(z, T, reduction="none"), zeros)  # noqa: E731
    G = gauss_newton(evaluate(closure_of(network, squared), network.parameters(), products=products))
    losses = F.cross_entropy(network(X), T, reduction="none")
    truth = dense(losses, torch.eye(6).double() / 3, list(network.parameters()))
    assert error(G @ v[:31], truth @ v[:31]) < 1e-6


@pytest.mark.parametrize("products", FORMS)
@pytest.mark.parametrize(
    "loss",
    [
        lambda z: (lambda d: F.cross_entropy(-d, T) + d.mean())(F.mse_loss(z, Y, reduction="none")),
        lambda z: (lambda p: F.nll_loss(p.log(), T) + F.mse_loss(p, SOFT))(z.softmax(1)),
        lambda z: (lambda d: F.cross_entropy(-d, T) + F.huber_loss(d, Y) + d.mean())(
            F.mse_loss(z, Y, reduction="none")
        ),
    ],
)
def test_a_loss_that_enters_within_another_and_beside_it_counts_once(loss: Loss, products: Any) -> None:
    network = model()
    G = gauss_newton(evaluate(closure_of(network, loss), network.parameters(), products=products))
    v = torch.randn(31).double()
    assert error(G @ v, dense_at(loss, network(X), list(network.parameters())) @ v) < 1e-6
    assert not G.psd


@pytest.mark.parametrize("products", FORMS)
def test_losses_of_an_output_and_of_what_is_computed_from_it_both_count(products: Any) -> None:
    network = model()
    params = list(network.parameters())
    loss = lambda z: F.mse_loss(z, Y) + F.cross_entropy(z.tanh() * 3, T)  # noqa: E731
    G = gauss_newton(evaluate(closure_of(network, loss), params, products=products))
    z = network(X)
    truth = dense_at(lambda z: F.mse_loss(z, Y), z, params)
    truth += dense_at(lambda s: F.cross_entropy(s, T), z.tanh() * 3, params)
    v = torch.randn(31).double()
    assert error(G @ v, truth @ v) < 1e-6
    assert G.psd


@pytest.mark.parametrize("products", FORMS)
def test_one_mark_behind_another_counts_once(products: Any) -> None:
    network = model()
    by_hand = lambda z: z.logsumexp(1).mean() - z[torch.arange(6), T].mean()  # noqa: E731
    both = lambda z: by_hand(mark_outputs(mark_outputs(z).tanh()))  # noqa: E731
    G = gauss_newton(evaluate(closure_of(network, both), network.parameters(), products=products))
    v = torch.randn(31).double()
    assert error(G @ v, dense_at(by_hand, network(X).tanh(), list(network.parameters())) @ v) < 1e-6


def entropy(lp: Tensor) -> Tensor:
    return -(lp.exp() * lp).sum(1).mean()


CONVEX: dict[str, Loss] = {
    "temperature": lambda z: F.nll_loss((z / 0.3).log_softmax(1), T),
    "ignored": lambda z: F.nll_loss(z.log_softmax(1), T.where(T > 0, -1), ignore_index=-1),
    "reshaped": lambda z: F.nll_loss(z.log_softmax(1).view(2, 3, 3).transpose(1, 2), T.view(2, 3)),
    "twice": lambda z: (lambda lp: F.nll_loss(lp, T) + F.nll_loss(lp.flip(0), T))(z.log_softmax(1)),
    "two kinds": lambda z: (lambda lp: F.nll_loss(lp, T) + F.kl_div(lp, SOFT, reduction="batchmean"))(z.log_softmax(1)),
    "smoothed": lambda z: F.cross_entropy(z, T, label_smoothing=0.2),
    "weights": lambda z: F.cross_entropy(z, T, weight=SOFT[0]),
    "positive weights": lambda z: F.binary_cross_entropy_with_logits(z, SOFT, pos_weight=3 * SOFT[0]),
    "soft targets": lambda z: F.cross_entropy(z, SOFT - 0.1, weight=None),
}
OTHERS: dict[str, Loss] = {
    "entropy": lambda z: (lambda lp: F.nll_loss(lp, T) - 2 * entropy(lp))(z.log_softmax(1)),
    "entropy of the logarithm of a softmax": lambda z: (lambda lp: F.nll_loss(lp, T) - entropy(lp))(z.softmax(1).log()),
    "smoothed by hand": lambda z: (lambda lp: 0.9 * F.nll_loss(lp, T) + 0.3 * lp.mean())(z.log_softmax(1)),
    "mixture": lambda z: F.nll_loss(z.view(2, 3, 3).log_softmax(-1).logsumexp(1), T[:2]),
    "negated": lambda z: F.nll_loss(-z.log_softmax(1), T),
    "scaled": lambda z: F.nll_loss(-0.5 * z.log_softmax(1), T),
    "clamped": lambda z: F.nll_loss(z.log_softmax(1).clamp(min=-1.0), T),
    "squared": lambda z: F.nll_loss(z.log_softmax(1) ** 2, T),
    "differences": lambda z: (lambda lp: F.nll_loss(lp, T) - 2 * F.kl_div(lp, SOFT, reduction="sum"))(z.log_softmax(1)),
    "targets of the same": lambda z: (lambda p: F.kl_div(p.log(), p.roll(1, 0), reduction="sum"))(z.softmax(1)),
    "targets of the same logarithms": lambda z: (
        lambda lp: F.kl_div(lp, lp.roll(1, 0), log_target=True, reduction="batchmean")
    )(z.log_softmax(1)),
    "negative class weights": lambda z: F.cross_entropy(z, T, weight=Y[0], reduction="sum"),
    "negative weights of nll_loss": lambda z: F.nll_loss(z.log_softmax(1), T, weight=Y[0], reduction="sum"),
    "negative targets": lambda z: F.cross_entropy(z, Y),
    "negative positive weights": lambda z: F.binary_cross_entropy_with_logits(z, SOFT, pos_weight=-5 * SOFT[0]),
    "negative weights of labels": lambda z: F.multilabel_soft_margin_loss(z, SOFT.round(), weight=Y[0]),
    "negative counts": lambda z: F.poisson_nll_loss(z.exp(), Y, log_input=False),
}


@pytest.mark.parametrize("name", [*CONVEX, *OTHERS])
def test_what_stands_around_log_probabilities_decides_what_is_called_convex(name: str) -> None:
    network, loss = model(), {**CONVEX, **OTHERS}[name]
    params = list(network.parameters())
    inner: Loss = Tensor.exp if name == "negative counts" else lambda z: z
    outer: Loss = (lambda r: F.poisson_nll_loss(r, Y, log_input=False)) if name == "negative counts" else loss
    truth = dense_at(outer, inner(network(X)), params)
    assert name in OTHERS or float(torch.linalg.eigvalsh(truth)[0]) > -1e-12
    for products in FORMS:
        G = gauss_newton(evaluate(closure_of(network, loss), params, products=products))
        v = torch.randn(31).double()
        assert error(G @ v, truth @ v) < 1e-6
        assert G.psd == (name in CONVEX)


def test_metrics_are_no_outputs_in_any_form() -> None:
    network = model()

    def loss(z: Tensor) -> Tensor:
        metrics = F.mse_loss(z, Y), F.nll_loss(z.log_softmax(1), T), ((z - Y) ** 2).mean(), mark_outputs(z).abs().sum()
        assert all(metric.item() > 0 for metric in metrics)
        return F.cross_entropy(z, T)

    plain = gauss_newton(evaluate(closure_of(network, lambda z: F.cross_entropy(z, T)), network.parameters()))
    for products in FORMS:
        evaluation = evaluate(closure_of(network, loss), network.parameters(), products=products)
        assert jacobian(evaluation).shape == (18, 31)
        v = torch.randn(31).double()
        assert error(gauss_newton(evaluation) @ v, plain @ v) < 1e-6


@pytest.mark.parametrize("products", FORMS)
@pytest.mark.parametrize(
    "loss",
    [
        lambda z: mark_outputs(F.cross_entropy(z, T)),
        lambda z: mark_outputs(F.cross_entropy(z, T, reduction="none")).mean(),
        lambda z: F.cross_entropy(z, T) + 0.1 * mark_outputs((z**4).sum()),
        lambda z: -mark_outputs(z).mean(),
    ],
)
def test_a_mark_in_which_the_loss_is_linear_is_an_error_that_says_what_to_mark(loss: Loss, products: Any) -> None:
    network = model()
    evaluation = evaluate(closure_of(network, loss), network.parameters(), products=products)
    with pytest.raises(RuntimeError, match=r"linear in a tensor that was given to .*mark_outputs.* raw predictions"):
        gauss_newton(evaluation)
    assert jacobian(evaluation).shape[1] == hessian(evaluation).shape[1] == 31
    before = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(RuntimeError, match='use curvature="hessian"'):
        HessianFree(network.parameters(), products=products).step(closure_of(network, loss))
    assert all(torch.equal(p, q) for p, q in zip(before, network.parameters(), strict=True))


def test_nll_without_log_softmax_is_not_recorded_as_zero_curvature() -> None:
    case = build("mlp", "cross_entropy")
    labels = torch.zeros(6, dtype=torch.long)
    loss = lambda: F.nll_loss(torch.softmax(case.model(case.inputs), 1).sqrt().log(), labels)  # noqa: E731
    with pytest.raises(RuntimeError, match="mark_outputs"):
        gauss_newton(evaluate(loss, case.params))


def test_kl_div_is_taken_at_the_logits() -> None:
    case = build("mlp", "probabilities")
    soft = torch.softmax(torch.randn(6, 3, dtype=torch.float64), 1)
    by_kl = evaluate(
        lambda: F.kl_div(F.log_softmax(case.model(case.inputs), 1), soft, reduction="batchmean"), case.params
    )
    by_cross_entropy = evaluate(lambda: F.cross_entropy(case.model(case.inputs), soft), case.params)
    torch.testing.assert_close(gauss_newton(by_kl).dense(), gauss_newton(by_cross_entropy).dense())


def test_what_losses_are_means_over() -> None:
    z, y, w = torch.randn(4, 3), torch.tensor([0, 1, -100, 2]), torch.tensor([1.0, 2.0, 4.0])
    assert float(mean_over(F.cross_entropy, {"input": z, "target": y})) == 3
    assert float(mean_over(F.cross_entropy, {"input": z, "target": y, "weight": w})) == 7
    assert mean_over(F.kl_div, {"input": z, "target": z, "reduction": "batchmean"}) == 4
    assert mean_over(F.mse_loss, {"input": z, "target": z}) == 12
    assert mean_over(F.mse_loss, {"input": z, "target": z, "reduction": "sum"}) is None


# Losses of which no output is recorded.

LABELS = torch.tensor([0, 2, 1, 2, 0, 1])
HALF = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
TARGETS = torch.linspace(-1, 1, 18, dtype=torch.float64).view(6, 3)


def rows(z: Tensor) -> Tensor:
    return torch.arange(len(z))


# Losses of outputs `z`, `(6, 3)`, and what their error must say.
LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nll on probabilities": (lambda z: F.nll_loss(z.softmax(1), LABELS), r"nll_loss was given .*CrossEntropyLoss\)"),
    "nll on log of clamped": (
        lambda z: F.nll_loss(z.softmax(1).clamp_min(1e-7).log(), LABELS),
        r"nll_loss was given .*return logits",
    ),
    "log of probabilities by hand": (
        lambda z: -z.softmax(1)[rows(z), LABELS].log().mean(),
        "a logarithm.*return logits",
    ),
    "log of probabilities plus eps": (
        lambda z: -(torch.log(z.softmax(1) + 1e-9) * F.one_hot(LABELS, 3)).sum(1).mean(),
        "a logarithm.*return logits",
    ),
    "log_softmax by hand": (
        lambda z: -z.log_softmax(1)[rows(z), LABELS].mean(),
        "log-probabilities: use cross_entropy",
    ),
    "critic": (lambda z: -z.mean(), 'a critic\'s loss does: such a loss is linear.*curvature="hessian"'),
    "two critics": (lambda z: z[:3].mean() - z[3:].mean(), "a critic's loss does: such a loss is linear"),
    "hinge by hand": (lambda z: F.relu(1 - HALF * z[:, 0]).mean(), 'a hinge: use curvature="hessian"'),
    "hinge by clamp": (lambda z: (1 - HALF * z[:, 0]).clamp(min=0).mean(), "a hinge"),
    "absolute value": (lambda z: (z - TARGETS).abs().mean(), "an absolute value: use smooth_l1_loss"),
    "root": (
        lambda z: F.softplus(z).sum().sqrt(),
        "a square root: if there is a single one for all the data, minimise its square",
    ),
    "cubes": (lambda z: (z - TARGETS).pow(4).mean(), "a power: .*DeepXDE"),
    "logistic by hand": (lambda z: F.softplus(-HALF * z[:, 0]).mean(), "a softplus: use binary_cross_entropy_with"),
    "log sigmoid": (lambda z: -F.logsigmoid(z).mean(), "a log-sigmoid: use binary_cross_entropy_with_logits"),
    "logsumexp": (lambda z: (z.logsumexp(1) - z[:, 0]).mean(), "a logsumexp: use cross_entropy"),
    "l1_loss": (lambda z: F.l1_loss(z, TARGETS), "called l1_loss.*piecewise linear.*smooth_l1_loss"),
    "hinge_embedding_loss": (lambda z: F.hinge_embedding_loss(z[:, 0], HALF), 'piecewise linear.*curvature="hessian"'),
    "margin_ranking_loss": (
        lambda z: F.margin_ranking_loss(z[:, 0], z[:, 1], HALF),
        "margin_ranking_loss is piecewise",
    ),
    "multi_margin_loss": (lambda z: F.multi_margin_loss(z, LABELS), "or use cross_entropy on the same scores"),
    "multilabel_margin_loss": (
        lambda z: F.multilabel_margin_loss(z, LABELS[:, None].expand(6, 3).contiguous()),
        "multilabel_soft_margin_loss",
    ),
    "triplet_margin_loss": (lambda z: F.triplet_margin_loss(z, TARGETS, TARGETS + 1), "not convex in the embeddings"),
    "triplet_margin_with_distance_loss": (
        lambda z: F.triplet_margin_with_distance_loss(z, TARGETS, TARGETS + 1),
        "not convex in the embeddings",
    ),
    "cosine_embedding_loss": (lambda z: F.cosine_embedding_loss(z, TARGETS, HALF), "not convex in the embeddings"),
    "cosine_similarity": (lambda z: -F.cosine_similarity(z, TARGETS).mean(), "not convex in the embeddings"),
    "gaussian_nll_loss": (
        lambda z: F.gaussian_nll_loss(z[:, 0], TARGETS[:, 0], F.softplus(z[:, 1])),
        "convex in the mean but not in mean and variance together.*mark the mean",
    ),
    "ctc_loss": (
        lambda z: F.ctc_loss(z.log_softmax(1)[:, None], LABELS[:1] + 1, [6], [1]),
        "ctc_loss has no second derivative.*finite differences",
    ),
}
WITHOUT_SECOND_DERIVATIVE = {"ctc_loss", "multi_margin_loss", "multilabel_margin_loss"}


def grid_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def closure_on_a_grid(network: nn.Module, loss: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(6, 2)

    def closure() -> Tensor:
        network.zero_grad()
        value = loss(network(x))
        value.backward()
        return value

    return closure


@pytest.mark.parametrize("products", ["auto", "streamed"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_error_says_what_was_seen_and_what_to_write(name: str, products: Any) -> None:
    loss, words = LOSSES[name]
    network = grid_model()
    before = [p.detach().clone() for p in network.parameters()]
    optimizer = HessianFree(network.parameters(), products=products)
    with pytest.raises(RuntimeError, match=r"No model output was recorded.*" + words + r".*mark_outputs"):
        optimizer.step(closure_on_a_grid(network, loss))
    assert all(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_each_trains_with_the_hessian(name: str) -> None:
    network = grid_model()
    optimizer = HessianFree(network.parameters(), curvature="hessian")
    closure = closure_on_a_grid(network, LOSSES[name][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name in WITHOUT_SECOND_DERIVATIVE else "error")
        losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert losses[-1] < losses[0]


def test_each_function_with_a_remedy_is_tried() -> None:
    assert set(REMEDIES) <= {"kl_div", "nll_loss", *LOSSES}


@pytest.mark.parametrize("products", ["cached", "streamed", "finite_difference"])
@pytest.mark.parametrize("eps", [None, 0.0, 1e-7])
@pytest.mark.parametrize("kind", ["classes", "pixels", "one"])
def test_nll_of_the_log_of_a_softmax_is_taken_at_the_logits(kind: str, eps: float | None, products: Any) -> None:
    network, plain = grid_model(), grid_model()
    shaped = {"classes": lambda z: z, "pixels": lambda z: z.view(2, 3, 3), "one": lambda z: z[0]}[kind]
    labels = {"classes": LABELS, "pixels": LABELS.view(2, 3), "one": LABELS[0]}[kind]

    def loss(z: Tensor) -> Tensor:
        p = F.softmax(shaped(z), dim=0 if kind == "one" else 1)
        return F.nll_loss(torch.log(p if eps is None else p + eps), labels)

    found = evaluate(closure_on_a_grid(network, loss), network.parameters(), products=products)
    wanted = evaluate(closure_on_a_grid(plain, lambda z: F.cross_entropy(shaped(z), labels)), plain.parameters())
    A, B = gauss_newton(found), gauss_newton(wanted)
    torch.testing.assert_close(A.dense(), B.dense(), rtol=1e-5, atol=1e-6 if eps else 1e-8)
    # With a summand in the logarithm the loss is not convex where probabilities are smaller still.
    assert A.psd == (eps is None)


def test_the_logarithm_of_summed_probabilities_is_not_called_convex() -> None:
    network = grid_model()

    def loss(z: Tensor) -> Tensor:
        p = F.softmax(z, dim=1)
        return F.nll_loss(torch.stack([p[:, :2].sum(1), p[:, 2]], dim=1).log(), LABELS % 2)

    with pytest.raises(RuntimeError, match="nll_loss was given"):
        gauss_newton(evaluate(closure_on_a_grid(network, loss), network.parameters()))
    pairs = lambda z: F.nll_loss(F.softmax(z, dim=1).view(6, 3).cumsum(1).log(), LABELS)  # noqa: E731
    assert not gauss_newton(evaluate(closure_on_a_grid(network, pairs), network.parameters())).psd
