"""Predicted decreases, slopes and bends, against the dense model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.optimizers.model import Line, QuadraticModel, with_more_damping, without_damping
from newtonopt.solvers.solution import Iterate

N = 6


class Dense:
    """A model, its matrix, and its value at a step."""

    def __init__(self, rates: float | Tensor = 1.0) -> None:
        self.A, self.g, self.s, self.d = (torch.randn(*size).double() for size in ((N, N), (N,), (N,), (N,)))
        self.A = self.A + self.A.T
        self.operator = LinearOperator(lambda v: self.A @ v, (N, N), self.g)
        self.model = QuadraticModel(self.g, rates, 1.0, 1e-16, self.operator)

    def decrease(self, s: Tensor, damping: float = 0.0) -> float:
        return -float(self.g @ s + s @ (self.A + damping * torch.eye(N).double()) @ s / 2)

    @property
    def known(self) -> Iterate:
        return Iterate(self.s, self.decrease(self.s))


def test_a_decrease_and_the_gradient_after_a_step_take_one_product_each() -> None:
    dense = Dense()
    assert dense.model.decrease(dense.s) == pytest.approx(dense.decrease(dense.s), rel=1e-12)
    assert dense.operator.products == 1
    torch.testing.assert_close(dense.model.gradient_after(dense.s), dense.g + dense.A @ dense.s)
    assert dense.operator.products == 2


@pytest.mark.parametrize("t", [-0.5, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("started", [False, True])
def test_the_model_along_a_direction(started: bool, t: float) -> None:
    dense = Dense()
    start = dense.known if started else None
    end = dense.model.along(dense.d, start).at(t)
    torch.testing.assert_close(end.step, (dense.s if started else 0.0) + t * dense.d)
    assert end.decrease == pytest.approx(dense.decrease(end.step), rel=1e-12, abs=1e-12)
    assert dense.operator.products == 1 + started


def test_a_known_decrease_tells_the_bend_without_a_product() -> None:
    dense = Dense()
    bend, square = float(dense.s @ dense.A @ dense.s), float(dense.s @ dense.s)
    line = dense.model.through(dense.known)
    assert (line.slope, line.bend) == (pytest.approx(float(dense.g @ dense.s)), pytest.approx(bend))
    assert line.at(0.3).decrease == pytest.approx(dense.decrease(0.3 * dense.s), rel=1e-12)
    assert dense.model.curvature_along(dense.known) == pytest.approx(abs(bend) / square)
    slope, curvature = dense.model.per_length(dense.known)
    assert (slope, curvature) == (pytest.approx(line.slope / square**0.5), pytest.approx(bend / square))
    assert dense.operator.products == 0


def test_a_step_of_length_zero_has_no_curvature() -> None:
    assert Dense().model.curvature_along(Iterate(torch.zeros(N).double(), 0.0)) == 0.0


@pytest.mark.parametrize("rates", [0.5, torch.linspace(0.1, 1.0, N).double()])
def test_learning_rates_scale_the_step_and_its_decrease(rates: float | Tensor) -> None:
    dense = Dense(rates)
    step = dense.model.scaled(dense.known)
    torch.testing.assert_close(step.step, rates * dense.s)
    assert step.decrease == pytest.approx(dense.decrease(step.step), rel=1e-12)
    assert dense.operator.products == isinstance(rates, Tensor)


@pytest.mark.parametrize("damping", [0.0, 0.3, 50.0])
def test_damping_is_added_to_the_curvature_and_taken_off_decreases(damping: float) -> None:
    dense = Dense()
    assert dense.model.damped(damping).decrease(dense.s) == pytest.approx(dense.decrease(dense.s, damping), rel=1e-12)
    damped = Iterate(dense.s, dense.decrease(dense.s, damping))
    assert without_damping(damped, damping).decrease == pytest.approx(dense.decrease(dense.s), rel=1e-12)
    assert with_more_damping(dense.known, damping).decrease == pytest.approx(damped.decrease, rel=1e-12)


def test_a_model_without_its_curvature_gives_no_product() -> None:
    dense = Dense()
    bare = QuadraticModel(dense.g, 1.0, 1.0, 1e-16)
    assert vars(bare.through(dense.known)) == vars(dense.model.through(dense.known))
    with pytest.raises(ValueError, match="shape"):
        bare.decrease(dense.s)


def test_a_line_gives_the_direction_itself_at_one() -> None:
    direction = torch.ones(2)
    assert Line(direction, -1.0, 1.0).at(1.0).step is direction
