"""The alignment of the gradients of a loss's terms: dense truth, which terms there are, and words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from newtonopt.curvature import Alignment, Measured, measure
from newtonopt.curvature.measurements.alignment import TermGradients, summands
from newtonopt.curvature.measurements.measurement import Plan


class Pinn:
    """A convection closure: an equation inside the domain, initial values, periodic ends."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        self.inside = torch.rand(20, 2, dtype=torch.float64).requires_grad_()
        self.start = torch.cat([torch.rand(10, 1), torch.zeros(10, 1)], dim=1).double()
        times = torch.rand(8, 1, dtype=torch.float64)
        self.ends = [torch.cat([torch.full_like(times, x), times], dim=1) for x in (0.0, 1.0)]

    def terms(self) -> list[Tensor]:
        slopes = torch.autograd.grad(self.model(self.inside).sum(), self.inside, create_graph=True)[0]
        return [
            (slopes[:, 1] + 10.0 * slopes[:, 0]).square().mean(),
            F.mse_loss(self.model(self.start)[:, 0], self.start[:, 0].sin()),
            F.mse_loss(*map(self.model, self.ends)),
        ]

    def closure(self) -> Tensor:
        equation, start, ends = self.terms()
        return 0.5 * (equation + 100.0 * start + ends)

    def gradients(self, *weights: float) -> Tensor:
        """Return the terms' gradients `(k, n)`, each by itself."""
        rows = []
        for weight, term in zip(weights, self.terms(), strict=True):
            found = torch.autograd.grad(weight * term, list(self.model.parameters()), materialize_grads=True)
            rows.append(torch.cat([g.reshape(-1) for g in found]))
        return torch.stack(rows)


def of(closure: Callable[[], Any], params: Any, measurement: Alignment | None = None, **settings: Any) -> Measured:
    settings = {"sharpness": None, "gradient": False, "top": 1, "bottom": 0, **settings}
    return measure(closure, params, measurements=[measurement or Alignment()], **settings)


def test_values_are_those_of_each_terms_own_gradient() -> None:
    pinn = Pinn()
    names = ["equation", "start", "ends"]
    found = of(pinn.closure, pinn.model.parameters(), Alignment(names), tolerance=1e-9, max_products=300)
    gradients = pinn.gradients(0.5, 50.0, 0.5)
    cosines = F.normalize(gradients) @ F.normalize(gradients).T
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert found[f"curvature/alignment_of/{names[i]}_{names[j]}"] == pytest.approx(float(cosines[i, j]), rel=1e-9)
    assert found["curvature/alignment_min"] == pytest.approx(float(cosines.min()), rel=1e-9)
    share = gradients.sum(0).norm() / gradients.norm(dim=1).sum()
    assert found["curvature/conflict"] == pytest.approx(1.0 - float(share), rel=1e-9)
    hessian = torch.func.hessian(lambda theta: call(pinn, theta))(flat(pinn.model))
    vector = torch.linalg.eigh(hessian)[1][:, -1]
    vector = vector * (vector @ gradients.sum(0)).sign()
    for name, g in zip(names, gradients, strict=True):
        assert found[f"curvature/gradient_norm_of/{name}"] == pytest.approx(float(g.norm()), rel=1e-9)
        assert found[f"curvature/top_alignment_of/{name}"] == pytest.approx(float(vector @ g / g.norm()), abs=1e-5)


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def call(pinn: Pinn, theta: Tensor) -> Tensor:
    """Return the loss at other parameters, with the slopes of the network written out."""
    w, b, v, c = (part.view_as(p) for part, p in zip(theta.split([12, 6, 6, 1]), pinn.model.parameters(), strict=True))
    hidden = lambda x: torch.tanh(x @ w.T + b)  # noqa: E731
    slopes = ((1 - hidden(pinn.inside.detach()) ** 2) * v) @ w
    u = lambda x: (hidden(x) @ v.T + c)[:, 0]  # noqa: E731
    equation = (slopes[:, 1] + 10.0 * slopes[:, 0]).square().mean()
    start = (u(pinn.start) - pinn.start[:, 0].sin()).square().mean()
    return 0.5 * (equation + 100.0 * start + (u(pinn.ends[0]) - u(pinn.ends[1])).square().mean())


def test_losses_that_are_differentiated_one_by_one_are_terms() -> None:
    pinn = Pinn()

    def closure() -> None:
        for term in pinn.terms():
            term.backward()

    found = of(closure, pinn.model.parameters())
    norms = pinn.gradients(1.0, 1.0, 1.0).norm(dim=1)
    assert [found[f"curvature/gradient_norm_of/{i}"] for i in (1, 2, 3)] == pytest.approx(norms.tolist(), rel=1e-9)


def test_names_add_up_the_terms_of_several_batches() -> None:
    model = nn.Linear(3, 2).double()
    inputs = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def terms(batch: Tensor) -> tuple[Tensor, Tensor]:
        z = model(batch)
        return F.mse_loss(z[:, 0], batch[:, 0].sin()), 3.0 * F.mse_loss(z[:, 1], batch[:, 1].cos())

    def closure() -> None:
        for batch in inputs.split(4):
            (sum(terms(batch)) / 3).backward()

    found = of(closure, model.parameters(), Alignment(["one", "other"]))
    for name, term in zip(("one", "other"), terms(inputs), strict=True):
        parts = torch.autograd.grad(term, list(model.parameters()), retain_graph=True)
        norm = math.sqrt(sum(float(g.square().sum()) for g in parts))
        assert found[f"curvature/gradient_norm_of/{name}"] == pytest.approx(norm, rel=1e-9)


def test_losses_for_parameters_of_their_own_are_terms_too() -> None:
    u, v = (nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64)) for _ in range(2))

    def closure() -> None:
        (u * v).square().sum().backward(inputs=[u])
        (u - v.exp()).square().sum().backward(inputs=[v])

    found = of(closure, [u, v], products="cached")
    # By hand: d(u v)^2/du = 2 u v^2, and d(u - e^v)^2/dv = -2 (u - e^v) e^v.
    x, y = u.detach(), v.detach()
    first, second = 2 * x * y**2, -2 * (x - y.exp()) * y.exp()
    norms = [float(first.norm()), float(second.norm())]
    assert [found[f"curvature/gradient_norm_of/{i}"] for i in (1, 2)] == pytest.approx(norms, rel=1e-9)
    assert found["curvature/alignment_of/1_2"] == 0.0


@pytest.mark.parametrize(
    ("total", "weights"),
    [
        (lambda a, b, c: a + b + c, [1, 1, 1]),
        (lambda a, b, c: sum([a, b, c]) / 2, [0.5, 0.5, 0.5]),
        (lambda a, b, c: (a - 2 * b).float() - c.mean(), [1, -2, -1]),
        (lambda a, b, c: 1 - a + 3 * (b + c)[None].squeeze(), [-1, 3, 3]),
        (lambda a, b, c: a + a + b, [2, 1]),
        (lambda a, b, c: a + b * c, [1, 1]),
        (lambda a, b, c: a + torch.tensor(2.0) / b, [1, 1]),
        (lambda a, b, c: torch.stack([a, b]).sum() + c, [1, 1]),
        (lambda a, b, c: a, [1]),
    ],
)
def test_terms_are_the_summands_of_the_loss(total: Callable[..., Tensor], weights: list[float]) -> None:
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    loss = total(*(w * torch.eye(3, dtype=torch.float64) @ w).pow(2).unbind())
    found = torch.autograd.grad(loss, summands(get_gradient_edge(loss)), retain_graph=True)
    assert [float(weight) for weight in found] == weights


def test_a_learned_weight_that_is_added_is_no_term() -> None:
    s, w = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, 2.0))
    found = of(lambda: (-s).exp() * w.square() + s + (w - 1.0).square(), [s, w])
    norms = [math.exp(-0.3) * math.hypot(4.0, 4.0), 2.0]
    assert [found[f"curvature/gradient_norm_of/{i}"] for i in (1, 2)] == pytest.approx(norms, rel=1e-9)


@pytest.mark.parametrize(
    ("loss", "names", "settings", "why"),
    [
        (lambda w: w.square().sum(), None, {}, "must be a sum of two terms or more, got one. Add them up as a + b"),
        (
            lambda w: sum(w[i % 2] ** i for i in range(2, 11)),
            None,
            {},
            "must have at most 8 summands where names is None, got 9",
        ),
        (lambda w: w[0] ** 2 + w[1] ** 2, ["a", "b", "c"], {}, "must have 3 summands, as many as names, got 2"),
        # A sum of Python's, of which half the summands would be taken for the other term.
        (lambda w: (w[0] - 2) ** 2 + 0.1 * sum(w[i] ** 2 for i in range(3)), ["a", "b"], {}, "as many as names, got 4"),
        (lambda w: (a := w[0] ** 2 + 0 * w[1].exp()) + (a * 5).exp(), None, {}, "is computed from another one"),
        (
            lambda w: w[0] ** 2 + w[1] ** 2,
            None,
            {"products": "finite_difference"},
            'which only products="cached" keeps',
        ),
    ],
)
def test_words_say_why_there_are_no_terms(loss: Any, names: Any, settings: Any, why: str) -> None:
    w = torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64, requires_grad=True)
    found = of(lambda: loss(w), [w], Alignment(names), **settings)
    assert why in found.unmeasurable()["Alignment"]
    assert not [tag for tag in found if "alignment" in tag]


@pytest.mark.parametrize("names", ["ab", ["a"], ["a", "a"], ["a", 1], ["a", "b c"], list("abcdefghi")])
def test_what_are_no_names_is_refused(names: Any) -> None:
    with pytest.raises(ValueError, match=r"names must be a list of 2 to 8 different names .*, got .*\. Write \['equa"):
        Alignment(names)


def test_a_term_without_gradient_has_no_cosine() -> None:
    w = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    found = of(lambda: w[0] ** 2 + w[1] ** 2, [w])
    assert not [tag for tag in found if "alignment_" in tag and not tag.endswith("top_alignment_of/1")]
    assert found["curvature/conflict"] == 0.0 and found["curvature/gradient_norm_of/2"] == 0.0


def gradients(cosine: float, norms: tuple[float, float], conflict: float = 0.4) -> TermGradients:
    return TermGradients(("pde", "start"), norms, ((1.0, cosine), (cosine, 1.0)), conflict, (0.9, cosine))


@pytest.mark.parametrize(
    ("result", "sentences"),
    [
        (
            gradients(-0.83, (1.0, 2.0)),
            [
                "The gradients of the terms pde and start point against each other (cosine -0.83): a gradient step "
                "that lowers one raises the other, and 40% of the terms' gradients cancels. Change the weights of the "
                "terms, or take second-order steps."
            ],
        ),
        (gradients(0.5, (1.0, 2.0)), ["The gradients of all terms agree: the smallest cosine is 0.5."]),
        (
            gradients(0.104, (1.0, 2.0)),
            [
                "The gradients of the terms pde and start agree only in part (cosine 0.1): a gradient step that lowers "
                "one lowers the other less."
            ],
        ),
        (
            gradients(0.02, (1.0, 45.0)),
            [
                "The gradients of the terms pde and start are nearly orthogonal (cosine 0.02): neither term helps the "
                "other, and none is in the way.",
                "The gradient of the term start is 45 times as long as that of pde, which a gradient step hardly "
                "trains. Where pde matters, raise its weight.",
            ],
        ),
        (gradients(math.nan, (1.0, 0.0)), []),
    ],
)
def test_words_say_which_terms_conflict(result: TermGradients, sentences: list[str]) -> None:
    measurement = Alignment()
    assert measurement.sentences(result, Measured(Plan((measurement,)), {}, "auto", {}, "", {}, {})) == sentences


def test_the_heat_map_holds_the_cosines_and_those_with_the_top_eigenvector() -> None:
    result = gradients(-0.83, (1.0, 2.0))
    (figure,) = Alignment().figures(result).values()
    (image,) = figure.axes[0].images
    assert image.get_array().tolist() == [[1.0, -0.83, 0.9], [-0.83, 1.0, -0.83]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.00", "-0.83", "0.90", "-0.83", "1.00", "-0.83"]
