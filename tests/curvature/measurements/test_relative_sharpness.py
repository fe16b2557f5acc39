"""The relative critical sharpness: closed forms of quadratics, crossings of other losses, and words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from newtonopt.curvature import Measured, RelativeSharpness, measure
from newtonopt.curvature.measurements.measurement import Plan
from newtonopt.curvature.measurements.relative_sharpness import CriticalRates

SCALES = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
OTHER = torch.tensor([2.0, 3.0, 40.0], dtype=torch.float64)
PLACE = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def quadratic(theta: Tensor, scales: Tensor, bottom: float = 0.0) -> Tensor:
    return 0.5 * (scales * (theta - bottom).square()).sum()


def of(
    loss: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], optimizer: Any = None, **settings: Any
) -> Measured:
    theta = nn.Parameter(PLACE.clone())
    made = optimizer and optimizer(theta)
    settings = {"sharpness": None, "measurements": [RelativeSharpness(lambda: other(theta))], **settings}
    found = measure(lambda: loss(theta), [theta], made, **settings)
    assert not torch.equal(theta.detach(), PLACE) or made is None or not made.state
    return found


def rates(found: Measured) -> tuple[float | None, ...]:
    return tuple(found.read(name) for name in ("critical_rate", "other_critical_rate", "relative_critical_sharpness"))


def truth(scales: Tensor, direction: Tensor, theta: Tensor = PLACE, bottom: float = 0.0) -> float:
    """Return -2 g'd / d'H d of a quadratic."""
    return float(-2 * (scales * (theta - bottom)) @ direction / (direction @ (scales * direction)))


def test_rates_of_quadratics_are_closed_forms() -> None:
    found = of(lambda w: quadratic(w, SCALES), lambda w: quadratic(w, OTHER, 0.3))
    own = truth(SCALES, -SCALES * PLACE)
    other = truth(OTHER, -SCALES * PLACE, bottom=0.3)
    assert rates(found) == pytest.approx((own, other, own / other), rel=1e-6)
    assert found["curvature/critical_rate"] == pytest.approx(2 / found["curvature-more/gradient_curvature"], rel=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.SGD])
def test_the_step_is_divided_where_the_optimizer_divides(kind: type[torch.optim.Optimizer]) -> None:
    state: dict[str, Tensor] = {}

    def stepped(theta: nn.Parameter) -> torch.optim.Optimizer:
        optimizer = kind([theta], lr=0.01)
        quadratic(theta, SCALES).backward()
        optimizer.step()
        theta.grad = None
        root = optimizer.state[theta]["square_avg"].sqrt() + 1e-8 if kind is torch.optim.RMSprop else torch.ones(3)
        state.update(theta=theta.detach().clone(), divisor=root)
        return optimizer

    found = of(lambda w: quadratic(w, SCALES), lambda w: quadratic(w, OTHER), stepped)
    direction = -SCALES * state["theta"] / state["divisor"]
    own, other = (truth(scales, direction, state["theta"]) for scales in (SCALES, OTHER))
    assert rates(found) == pytest.approx((own, other, own / other), rel=1e-6)


def test_crossings_of_losses_that_are_not_quadratic_are_those_on_a_fine_grid() -> None:
    losses = (lambda w: (SCALES * w).exp().sum() - w.sum(), lambda w: (w - 0.2).pow(4).sum() + w.square().sum())
    found = of(*losses)
    theta = PLACE.clone().requires_grad_()
    (g,) = torch.autograd.grad(losses[0](theta), theta)
    for rate, loss in zip(rates(found), losses, strict=False):
        steps = torch.linspace(0.0, 3.0, 3001, dtype=torch.float64)[1:] * rate
        rises = torch.stack([loss(PLACE - step * g) for step in steps]) > loss(PLACE)
        assert float(steps[rises][0]) == pytest.approx(rate, rel=0.03)


def test_an_other_loss_that_rises_at_once_has_a_rate_of_zero_and_no_ratio() -> None:
    found = of(lambda w: quadratic(w, SCALES), lambda w: -quadratic(w, SCALES))
    assert found["curvature/other_critical_rate"] == 0.0
    assert "curvature/relative_critical_sharpness" not in found
    assert "raises the loss of the other data at once" in found.in_words()


def test_a_loss_that_never_rises_has_no_rate() -> None:
    found = of(lambda w: quadratic(w, SCALES), lambda w: w.sum() * 0 + (w * SCALES * PLACE).sum())
    assert rates(found)[0] == pytest.approx(truth(SCALES, -SCALES * PLACE), rel=1e-6)
    assert rates(found)[1:] == (None, 0.0)


def test_what_rounding_hides_is_left_out() -> None:
    found = of(lambda w: quadratic(w, SCALES), lambda w: quadratic(w, OTHER, 0.3) + 1e16)
    assert found.read("critical_rate") is not None
    assert rates(found)[1:] == (None, None)


def test_a_flat_loss_has_no_direction() -> None:
    assert rates(of(lambda w: (w * 0).sum(), lambda w: quadratic(w, OTHER))) == (None, None, None)


def test_other_data_leave_no_trace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    data, other = torch.randn(2, 8, 3, dtype=torch.float64)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    measurement = RelativeSharpness(lambda: (model(other) - 1).square().mean())
    found = measure(lambda: model(data).square().mean(), model.parameters(), sharpness=None, measurements=[measurement])
    assert found["curvature/critical_rate"] > 0.0
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="closure must be"):
        RelativeSharpness(3.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (
            CriticalRates(0.6, 0.2),
            [
                "The loss of the other data is 3 times as sharp along a training step: a step raises it from a "
                "learning rate of 0.2 on, the training loss from 0.6 on. Keep the learning rate below the first of "
                "these, or train on some of these data too."
            ],
        ),
        (
            CriticalRates(0.2, 0.4),
            [
                "The loss of the other data is flatter along a training step than the training loss: a step raises it "
                "from a learning rate of 0.4 on, the training loss from 0.2 on."
            ],
        ),
        (
            CriticalRates(0.2, 0.21),
            [
                "The loss of the other data is as sharp along a training step as the training loss: a step raises it "
                "from a learning rate of 0.21 on, the training loss from 0.2 on."
            ],
        ),
        (
            CriticalRates(0.2, 0.0),
            [
                "A step along the training loss's gradient raises the loss of the other data at once: train on some of "
                "these data too, or stop."
            ],
        ),
        (CriticalRates(0.2, math.inf), []),
        (CriticalRates(math.nan, 0.2), []),
    ],
)
def test_words_say_which_loss_limits_the_learning_rate(result: CriticalRates, words: list[str]) -> None:
    measurement = RelativeSharpness(lambda: torch.zeros(()))
    assert measurement.sentences(result, Measured(Plan((measurement,)), {}, "auto", {}, "", {}, {})) == words
