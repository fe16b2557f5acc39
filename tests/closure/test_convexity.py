"""Which outputs a loss is a function of, and what is called convex in them, against dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import error
from torch import Tensor, nn

from newtonopt import HessianFree, evaluate, gauss_newton, hessian, jacobian, mark_outputs

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
