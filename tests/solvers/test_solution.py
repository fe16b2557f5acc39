"""Every solver's result: the decrease it promises is the model's at its step, and nothing about it can be changed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from newtonopt.solvers.cg import conjugate_gradients, shortened
from newtonopt.solvers.dense import solve_absolute, solve_ball, solve_clamped, solve_cubic, solve_shifted
from newtonopt.solvers.krylov import krylov_space, minimise_in
from newtonopt.solvers.secular import ball
from newtonopt.solvers.solution import Iterate, Solution

VALUES, GRADIENT = torch.tensor([1.0, 2.0, 6.0]).double(), torch.tensor([1.0, -2.0, 3.0]).double()
A = torch.diag(VALUES)


def of_steihaug() -> Solution:
    return conjugate_gradients(A, GRADIENT, radius=0.5, keep_path=True)


def of_krylov() -> Solution:
    minimise = functools.partial(ball, radius=0.5)
    return minimise_in(krylov_space(A, GRADIENT, minimise, residual_tolerance=0.0, max_products=3), GRADIENT, minimise)


# Each solver, and what it adds to the diagonal of the matrix.
SOLVERS: dict[str, tuple[Callable[[], Solution], float]] = {
    "conjugate_gradients": (lambda: conjugate_gradients(A, GRADIENT), 0.0),
    "steihaug": (of_steihaug, 0.0),
    "shortened": (lambda: shortened(of_steihaug(), GRADIENT, 0.3), 0.0),
    "krylov": (of_krylov, 0.0),
    "ball": (lambda: solve_ball(VALUES, torch.eye(3).double(), GRADIENT, 0.5), 0.0),
    "cubic": (lambda: solve_cubic(VALUES, torch.eye(3).double(), GRADIENT, 2.0), 0.0),
    "shifted": (lambda: solve_shifted(A, GRADIENT, 0.1), 0.1),
    "absolute": (lambda: solve_absolute(A, GRADIENT, 0.1), 0.1),
    "clamped": (lambda: solve_clamped(A, GRADIENT, 0.1), 0.0),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_the_decrease_is_the_models(name: str) -> None:
    solve, damping = SOLVERS[name]
    solution = solve()
    s: Tensor = solution.step
    model = float(GRADIENT @ s + s @ A @ s / 2 + damping * s @ s / 2)
    assert solution.decrease == pytest.approx(-model, rel=1e-9)
    assert solution.decrease > 0
    assert solution.reason and solution.iterations >= 1
    for iterate in solution.path:
        s = iterate.step
        assert iterate.decrease == pytest.approx(-float(GRADIENT @ s + s @ A @ s / 2), rel=1e-9)


def test_nothing_can_be_changed() -> None:
    for result in (of_steihaug(), Iterate(GRADIENT, 1.0)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            result.decrease = 0.0  # type: ignore[misc]
    assert Solution(GRADIENT, 1.0, 1, "").path == ()
    assert Solution(GRADIENT, 1.0, 1, "").negative_curvature is None
