"""A loss of which no output is recorded is answered with what to write instead; what can be recognised is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newtonopt import HessianFree, evaluate, gauss_newton
from newtonopt.closure.losses import REMEDIES

LABELS = torch.tensor([0, 2, 1, 2, 0, 1])
HALF = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
Y = torch.linspace(-1, 1, 18, dtype=torch.float64).view(6, 3)


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
        "log-probabilities: take cross_entropy",
    ),
    "critic": (lambda z: -z.mean(), 'a critic\'s does: it is linear.*curvature="hessian"'),
    "two critics": (lambda z: z[:3].mean() - z[3:].mean(), "a critic's does: it is linear"),
    "hinge by hand": (lambda z: F.relu(1 - HALF * z[:, 0]).mean(), 'a hinge: use curvature="hessian"'),
    "hinge by clamp": (lambda z: (1 - HALF * z[:, 0]).clamp(min=0).mean(), "a hinge"),
    "absolute value": (lambda z: (z - Y).abs().mean(), "an absolute value: take smooth_l1_loss"),
    "root": (lambda z: F.softplus(z).sum().sqrt(), "a square root: if it is one for all the data, minimise its square"),
    "cubes": (lambda z: (z - Y).pow(4).mean(), "a power: .*DeepXDE"),
    "logistic by hand": (lambda z: F.softplus(-HALF * z[:, 0]).mean(), "a softplus: take binary_cross_entropy_with"),
    "log sigmoid": (lambda z: -F.logsigmoid(z).mean(), "a log-sigmoid: take binary_cross_entropy_with_logits"),
    "logsumexp": (lambda z: (z.logsumexp(1) - z[:, 0]).mean(), "a logsumexp: take cross_entropy"),
    "l1_loss": (lambda z: F.l1_loss(z, Y), "called l1_loss.*piecewise linear.*smooth_l1_loss"),
    "hinge_embedding_loss": (lambda z: F.hinge_embedding_loss(z[:, 0], HALF), 'piecewise linear.*curvature="hessian"'),
    "margin_ranking_loss": (
        lambda z: F.margin_ranking_loss(z[:, 0], z[:, 1], HALF),
        "margin_ranking_loss is piecewise",
    ),
    "multi_margin_loss": (lambda z: F.multi_margin_loss(z, LABELS), "or use cross_entropy of the same scores"),
    "multilabel_margin_loss": (
        lambda z: F.multilabel_margin_loss(z, LABELS[:, None].expand(6, 3).contiguous()),
        "multilabel_soft_margin_loss",
    ),
    "triplet_margin_loss": (lambda z: F.triplet_margin_loss(z, Y, Y + 1), "not convex in the embeddings"),
    "triplet_margin_with_distance_loss": (
        lambda z: F.triplet_margin_with_distance_loss(z, Y, Y + 1),
        "not convex in the embeddings",
    ),
    "cosine_embedding_loss": (lambda z: F.cosine_embedding_loss(z, Y, HALF), "not convex in the embeddings"),
    "cosine_similarity": (lambda z: -F.cosine_similarity(z, Y).mean(), "not convex in the embeddings"),
    "gaussian_nll_loss": (
        lambda z: F.gaussian_nll_loss(z[:, 0], Y[:, 0], F.softplus(z[:, 1])),
        "convex in the mean but not in mean and variance together.*mark the mean",
    ),
    "ctc_loss": (
        lambda z: F.ctc_loss(z.log_softmax(1)[:, None], LABELS[:1] + 1, [6], [1]),
        "ctc_loss has no second derivative.*finite differences",
    ),
}
WITHOUT_SECOND_DERIVATIVE = {"ctc_loss", "multi_margin_loss", "multilabel_margin_loss"}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def closure_of(network: nn.Module, loss: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
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
    network = model()
    before = [p.detach().clone() for p in network.parameters()]
    optimizer = HessianFree(network.parameters(), products=products)
    with pytest.raises(RuntimeError, match=r"No model output was recorded.*" + words + r".*mark_outputs"):
        optimizer.step(closure_of(network, loss))
    assert all(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_each_trains_with_the_hessian(name: str) -> None:
    network = model()
    optimizer = HessianFree(network.parameters(), curvature="hessian")
    closure = closure_of(network, LOSSES[name][0])
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
    network, plain = model(), model()
    shaped = {"classes": lambda z: z, "pixels": lambda z: z.view(2, 3, 3), "one": lambda z: z[0]}[kind]
    labels = {"classes": LABELS, "pixels": LABELS.view(2, 3), "one": LABELS[0]}[kind]

    def loss(z: Tensor) -> Tensor:
        p = F.softmax(shaped(z), dim=0 if kind == "one" else 1)
        return F.nll_loss(torch.log(p if eps is None else p + eps), labels)

    found = evaluate(closure_of(network, loss), network.parameters(), products=products)
    wanted = evaluate(closure_of(plain, lambda z: F.cross_entropy(shaped(z), labels)), plain.parameters())
    A, B = gauss_newton(found), gauss_newton(wanted)
    torch.testing.assert_close(A.dense(), B.dense(), rtol=1e-5, atol=1e-6 if eps else 1e-8)
    # With a summand in the logarithm the loss is not convex where probabilities are smaller still.
    assert A.psd == (eps is None)


def test_the_logarithm_of_summed_probabilities_is_not_called_convex() -> None:
    network = model()

    def loss(z: Tensor) -> Tensor:
        p = F.softmax(z, dim=1)
        return F.nll_loss(torch.stack([p[:, :2].sum(1), p[:, 2]], dim=1).log(), LABELS % 2)

    with pytest.raises(RuntimeError, match="nll_loss was given"):
        gauss_newton(evaluate(closure_of(network, loss), network.parameters()))
    pairs = lambda z: F.nll_loss(F.softmax(z, dim=1).view(6, 3).cumsum(1).log(), LABELS)  # noqa: E731
    assert not gauss_newton(evaluate(closure_of(network, pairs), network.parameters())).psd
