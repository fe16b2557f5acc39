"""The margin of a step is that of a closed form, and of the loss computed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optimizer_db import OPTIMIZERS
from problems import unseen
from torch import Tensor, nn
from torch.optim import Optimizer

from newtonopt.curvature import StepMargin, step_margin
from newtonopt.curvature.step_margins import critical_step

FIRST_ORDER: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.3, momentum=0.9, weight_decay=1e-2),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2),
    "lbfgs": lambda params: torch.optim.LBFGS(params, max_iter=3),
}


def quadratic(scales: Tensor, w: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        w.grad = None
        loss = 0.5 * (scales * w.square()).sum()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.19, 0.2, 0.4])
def test_gradient_descent_on_a_quadratic(rate: float) -> None:
    scales = torch.tensor([10.0, 3.0, 0.5], dtype=torch.float64)
    w = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    gradient = scales * w.detach()
    found = step_margin(torch.optim.SGD([w], lr=rate), quadratic(scales, w), critical=True)
    quotient = float(gradient @ (scales * gradient) / gradient.square().sum())
    assert found.slope == pytest.approx(-rate * float(gradient.square().sum()), rel=1e-12)
    assert found.margin == pytest.approx(rate / 2 * quotient, rel=1e-9)
    if found.margin > 1 / 256:
        assert 2 / (rate * found.critical_step) == pytest.approx(quotient, rel=1e-9)


def test_the_critical_learning_rate_along_the_top_eigenvector_is_two_over_its_eigenvalue() -> None:
    scales = torch.tensor([8.0, 3.0], dtype=torch.float64)
    w = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    found = step_margin(torch.optim.SGD([w], lr=2.0 / 8.0), quadratic(scales, w), critical=True)
    assert found.margin == pytest.approx(1.0, abs=1e-12)
    assert found.critical_step == pytest.approx(1.0, abs=1e-12)


def test_gradients_left_over_are_no_part_of_the_slope() -> None:
    scales = torch.tensor([10.0, 3.0], dtype=torch.float64)
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    w.grad = torch.tensor([5.0, -7.0], dtype=torch.float64)
    gradient, step = scales * w.detach(), -0.1 * (scales * w.detach() + w.grad)

    def closure() -> Tensor:
        loss = 0.5 * (scales * w.square()).sum()
        loss.backward()
        return loss

    found = step_margin(torch.optim.SGD([w], lr=0.1), closure)
    assert found.slope == pytest.approx(float(gradient @ step), rel=1e-12)
    assert found.margin == pytest.approx(float(0.5 * step @ (scales * step) / -(gradient @ step)), rel=1e-9)


@pytest.mark.parametrize("way", ["hook", "clipping"])
def test_a_changed_gradient_takes_the_step_and_is_not_the_slope(way: str) -> None:
    scales = torch.tensor([10.0, 3.0], dtype=torch.float64)
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    gradient, plain = scales * w.detach(), quadratic(scales, w)
    if way == "hook":
        w.register_hook(lambda g: g.clamp(-1.0, 1.0))

    def closure() -> Tensor:
        loss = plain()
        nn.utils.clip_grad_value_([w], 1.0)
        return loss

    found = step_margin(torch.optim.SGD([w], lr=0.1), plain if way == "hook" else closure)
    step = -0.1 * gradient.sign()
    assert w.detach().tolist() == pytest.approx([0.9, -1.9], rel=1e-12)
    assert found.slope == pytest.approx(float(gradient @ step), rel=1e-12)
    assert found.margin == pytest.approx(float(0.5 * step @ (scales * step) / -(gradient @ step)), rel=1e-9)
    plain()
    assert (w.grad.abs().max() == 1.0) == (way == "hook"), "hooks stay"


@pytest.mark.parametrize("bound", [1.0, 1.5])
def test_a_step_that_the_closure_clamps_ends_where_it_is_clamped_to(bound: float) -> None:
    w = torch.tensor([3.0, 0.5], dtype=torch.float64, requires_grad=True)

    def closure() -> Tensor:
        with torch.no_grad():
            w.clamp_(-bound, bound)
        w.grad = None
        loss = (w - 5.0).square().sum()
        loss.backward()
        return loss

    found = step_margin(torch.optim.SGD([w], lr=0.1), closure)
    # The first entry is clamped back to the bound; the second goes from 0.5 to 1.4.
    end = min(1.4, bound)
    assert w.detach().tolist() == pytest.approx([bound + 0.2 * (5.0 - bound), 1.4], rel=1e-12)
    assert found.loss == pytest.approx((bound - 5.0) ** 2 + 4.5**2, rel=1e-12)
    assert found.slope == pytest.approx(-9.0 * (end - 0.5), rel=1e-12)
    assert found.margin == pytest.approx((end - 0.5) / 9.0, rel=1e-9)


class Network:
    """A small network with Dropout and BatchNorm, a counter and a closure."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)]
        self.model = nn.Sequential(*layers).double()
        self.x, self.y = torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 3, (20,))
        self.calls = 0

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def closure(self) -> Tensor:
        self.calls += 1
        self.model.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

    def bits(self) -> list[bytes]:
        tensors = [*self.model.state_dict().values(), *(p.grad for p in self.model.parameters()), torch.get_rng_state()]
        return [t.detach().numpy().tobytes() for t in tensors if t is not None] + [bytes(self.calls)]


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_a_network(name: str) -> None:
    network = Network()
    optimizer = FIRST_ORDER[name](network.model.parameters())
    for _ in range(3):
        before, state = network.flat(), torch.get_rng_state()
        found = step_margin(optimizer, network.closure, critical=True)
        after, ended = network.flat(), torch.get_rng_state()

        def loss_at(place: Tensor, state: Tensor = state) -> Tensor:
            torch.set_rng_state(state)
            offset = 0
            for p in network.model.parameters():
                p.data.copy_(place[offset : offset + p.numel()].view_as(p))
                offset += p.numel()
            return network.loss()

        start = loss_at(before)
        slope = torch.autograd.grad(start, list(network.model.parameters()))
        step, start = after - before, start.detach()
        expected = float(torch.cat([g.reshape(-1) for g in slope]) @ step)
        assert found.slope == pytest.approx(expected, rel=1e-9)
        assert found.margin == pytest.approx(1.0 - float(loss_at(after).detach() - start) / expected, rel=1e-9)
        if found.critical_step is not None:
            # The loss crosses within three percent of there.
            near, far = (float(loss_at(before + s * found.critical_step * step).detach() - start) for s in (0.97, 1.03))
            assert near < 0.0 < far
        loss_at(after)
        torch.set_rng_state(ended)


@pytest.mark.parametrize("name", [*FIRST_ORDER, *OPTIMIZERS])
def test_training_is_the_same_to_the_bit(name: str) -> None:
    ends = []
    for measured in (False, True):
        network = Network()
        optimizer = {**FIRST_ORDER, **OPTIMIZERS}[name](network.model.parameters())
        for _ in range(3):
            if measured:
                step_margin(optimizer, network.closure, critical=True)
            else:
                optimizer.step(network.closure)
        ends.append(network.bits())
    assert ends[0] == ends[1]


def test_a_newton_step_has_the_change_of_the_loss_that_its_report_says() -> None:
    network = Network()
    optimizer = OPTIMIZERS["hessian_free"](network.model.parameters())
    for _ in range(3):
        found = step_margin(optimizer, network.closure)
        report = optimizer.last_step
        assert found.loss == pytest.approx(report.loss, rel=1e-9)
        assert found.rise == pytest.approx(report.trial_loss - report.loss, rel=1e-6)


def test_a_step_costs_two_forward_passes_and_the_crossing_at_most_five_more() -> None:
    for critical, most in ((False, 2), (True, 7)):
        network, runs = Network(), unseen([])
        network.model.register_forward_hook(lambda *_, runs=runs: runs().append(1))
        step_margin(torch.optim.SGD(network.model.parameters(), lr=0.1), network.closure, critical)
        assert 1 + 2 <= len(runs()) <= 1 + most


@pytest.mark.parametrize(
    ("curve", "crossing"),
    [
        (lambda s: -s + 0.5 * s**2, 2.0),
        (lambda s: -s + s**2 / 400, None),
        (lambda s: -s + 0.2 * s**3, 5**0.5),
        (lambda s: -s + s**2 / 8 + (math.inf if s > 9 else 0.0), 8.0),
        (lambda s: -s + 4 * s**2, 0.25),
        (lambda s: -s - s**2 if s < 4 else -20 + (s - 4) ** 2, 4 + 20**0.5),
    ],
)
def test_the_crossing_of_known_curves(curve: Callable[[float], float], crossing: float | None) -> None:
    places: list[float] = []

    def rise(s: float) -> float:
        places.append(s)
        return curve(s)

    found = critical_step(rise, -1.0, curve(1.0))
    assert len(places) <= 5
    assert found is None if crossing is None else found == pytest.approx(crossing, rel=0.02)


def test_a_step_uphill_or_to_infinity_has_no_margin() -> None:
    for slope, rise in ((0.0, 0.0), (1.0, 1.0), (-1.0, math.inf), (-1.0, math.nan), (math.nan, 1.0)):
        found = StepMargin(1.0, slope, rise, None, 1)
        assert found.margin is None
        assert ("is not finite" if slope < 0.0 else "did not go downhill") in found.in_words()
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    ascent = torch.optim.SGD([w], lr=0.1, maximize=True)
    assert step_margin(ascent, quadratic(torch.ones(2, dtype=torch.float64), w), critical=True).margin is None


def test_words_say_what_to_do() -> None:
    assert "lower the learning rate" in StepMargin(1.0, -1.0, 0.1, 0.95, 2).in_words()
    assert "would rise from 4 steps on" in StepMargin(1.0, -1.0, -0.75, 4.0, 2).in_words()
    assert "Around 1 is normal" in StepMargin(1.0, -1.0, 0.1, 0.95, 2).in_words()


@pytest.mark.parametrize(("crossing", "words"), [(0.04, "than 0.04 of it"), (None, "than about 0.067 of it")])
def test_words_say_how_far_a_step_is_too_long(crossing: float | None, words: str) -> None:
    said = StepMargin(1.0, -1.0, 14.0, crossing, 2).in_words()
    assert "(step margin 15)" in said and words in said and "normal" not in said
    assert said.endswith(f"Divide the learning rate by {15 if crossing is None else 25} or more.")


def test_a_margin_shows_itself() -> None:
    found = StepMargin(1.0, -0.25, -0.125, None, 1)
    assert repr(found) == "StepMargin(margin=0.5, loss=1, slope=-0.25, rise=-0.125, critical_step=None, losses=1)"
    assert "The last step kept its margin" in found._repr_html_()


def test_mistakes() -> None:
    w = torch.ones(2, requires_grad=True)
    sgd = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got .*Write torch.optim.SGD"):
        step_margin([w], lambda: w.sum())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="closure must be"):
        step_margin(sgd, w.sum())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="critical must be True or False, got 1"):
        step_margin(sgd, lambda: w.sum(), critical=1)  # type: ignore[arg-type]

    class Deaf(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            """Leave the closure alone."""

    with pytest.raises(RuntimeError, match="has not run the closure"):
        step_margin(Deaf([w], lr=0.1), lambda: w.sum())
