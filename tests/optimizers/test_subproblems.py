"""Minimisers under a control, and matrices that are held whole."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.optimizers.model import QuadraticModel
from newtonopt.optimizers.state import State
from newtonopt.optimizers.subproblems import bounded, check_subproblem, finite_dense, spectrum
from newtonopt.solvers.dense import solve_ball


def operator(A: Tensor) -> LinearOperator:
    return LinearOperator(lambda v: A @ v, (len(A), len(A)), A)


@pytest.mark.parametrize("rates", [1.0, 0.5, torch.tensor([1.0, 0.5, 0.2, 1.0]).double()])
def test_a_tighter_control_gives_a_shorter_step_without_a_product(rates: float | Tensor) -> None:
    M, g = torch.randn(4, 4).double(), torch.randn(4).double()
    A = M @ M.T + torch.eye(4).double()
    whole = operator(A)
    solve = functools.partial(solve_ball, *spectrum(whole), g)
    model = QuadraticModel(g, rates, 0.0, 1e-16, whole)
    proposal = bounded(model, State(control=1e-1), solve, lambda slope, bend, control: control)
    products = whole.products
    assert proposal.length == pytest.approx(1e-1) and proposal.products == products
    assert proposal.shorter is not None
    shorter = proposal.shorter.at(State(control=1e-2, steps=7))
    assert whole.products == products and shorter.state.steps == 7
    assert shorter.length == pytest.approx(1e-2)
    for found in (proposal, shorter):
        (step,) = found.steps
        assert step.decrease == pytest.approx(-float(step.step @ (g + A @ step.step / 2)), rel=1e-10)
    expected = rates * solve(1e-2).step if not isinstance(rates, Tensor) else 0.1 * proposal.steps[0].step
    torch.testing.assert_close(shorter.steps[0].step, expected)


def test_a_matrix_that_is_not_finite_is_refused() -> None:
    A = torch.eye(3).double()
    torch.testing.assert_close(finite_dense(operator(A)), A)
    A[0, 1] = A[1, 0] = math.nan
    for of in (finite_dense, spectrum):
        with pytest.raises(FloatingPointError, match="not finite"):
            of(operator(A))


def test_eigenvalues_within_their_rounding_are_raised_to_it() -> None:
    column = torch.randn(3, 1).double()
    values, vectors = spectrum(operator(column @ column.T))
    assert 0 < float(values[0]) < 1e-13 and vectors.shape == (3, 3)


@pytest.mark.parametrize(("name", "value"), [("subproblem", "cauchy"), ("max_trials", 0), ("max_iterations", 0)])
def test_settings_are_checked(name: str, value: object) -> None:
    settings = {"subproblem": "exact", "max_trials": 1, "max_iterations": 1}
    check_subproblem(settings, "exact")
    with pytest.raises(ValueError, match=f"{name} must be"):
        check_subproblem({**settings, name: value}, "exact")
