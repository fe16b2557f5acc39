"""Minimisers in the Krylov space of the gradient against those in the whole space."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from newtonopt.solvers.cg import conjugate_gradients
from newtonopt.solvers.dense import solve_ball, solve_cubic
from newtonopt.solvers.krylov import krylov_space, minimise_in
from newtonopt.solvers.secular import ball, cubic

models = settings(max_examples=150, deadline=None, derandomize=True)


def vector(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(n: int, seed: int, definite: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eigenvalues, eigenvectors, the matrix and a gradient."""
    values = vector(n, seed).sort().values
    values = values.abs().sort().values + 0.01 if definite else values
    Q, _ = torch.linalg.qr(vector(n * n, seed + 5).view(n, n))
    A = (Q * values) @ Q.T
    return values, Q, (A + A.T) / 2, Q @ vector(n, seed + 1)


def decrease(A: Tensor, g: Tensor, s: Tensor) -> float:
    return float(-(g @ s + s @ A @ s / 2))


class Counted:
    """A matrix that counts its products, and spoils them from a given one on."""

    def __init__(self, A: Tensor, spoil_at: int = 10**9) -> None:
        self.A, self.spoil_at, self.products = A, spoil_at, 0

    def __matmul__(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.A @ v if self.products < self.spoil_at else torch.full_like(v, math.nan)


def test_two_unknowns_by_hand() -> None:
    """`(A + m I) s = -g` with `m = 3`: `s = -(3 / 5, 8 / 10)`, of length one."""
    A, g = torch.diag(torch.tensor([2.0, 7.0]).double()), torch.tensor([3.0, 8.0]).double()
    minimise = functools.partial(ball, radius=1.0)
    space = krylov_space(A, g, minimise, residual_tolerance=1e-12, max_products=2)
    solution = minimise_in(space, g, minimise)
    torch.testing.assert_close(solution.step, torch.tensor([-0.6, -0.8]).double())
    assert solution.decrease == pytest.approx(1.8 + 6.4 - (2 * 0.36 + 7 * 0.64) / 2)
    assert (solution.iterations, solution.reason) == (2, "on the boundary")
    # |s| = m / sigma with the same m.
    held = minimise_in(space, g, functools.partial(cubic, sigma=3.0))
    torch.testing.assert_close(held.step, solution.step)


@models
@given(st.integers(1, 12), st.integers(0, 10_000), st.booleans(), st.floats(-4, 4).map(lambda exponent: 10.0**exponent))
def test_krylov_space_holds_the_minimiser_of_the_whole_space(n: int, seed: int, definite: bool, control: float) -> None:
    values, Q, A, g = problem(n, seed, definite)
    for minimise, exact in ((ball, solve_ball), (cubic, solve_cubic)):
        space = krylov_space(A, g, lambda v, c: minimise(v, c, control), residual_tolerance=1e-12, max_products=n)  # noqa: B023
        for tighter in (1.0, 0.25 if minimise is ball else 2.0):
            solution = minimise_in(space, g, lambda v, c: minimise(v, c, tighter * control))  # noqa: B023
            best = exact(values, Q, g, tighter * control)
            assert solution.decrease == pytest.approx(best.decrease, rel=1e-7)
            assert solution.decrease == pytest.approx(decrease(A, g, solution.step), rel=1e-7, abs=1e-10)
            assert solution.iterations <= n


@pytest.mark.parametrize("tolerance", [0.5, 1e-2, 1e-6])
def test_krylov_space_ends_at_its_tolerance(tolerance: float) -> None:
    _, _, A, g = problem(80, 3, definite=True)
    space = krylov_space(A, g, lambda v, c: cubic(v, c, 0.1), residual_tolerance=tolerance, max_products=80)
    solution = minimise_in(space, g, lambda v, c: cubic(v, c, 0.1))
    residual = A @ solution.step + 0.1 * float(solution.step.norm()) * solution.step + g
    assert float(residual.norm()) <= 1.001 * tolerance * float(g.norm())
    assert solution.iterations < 80 or tolerance < 1e-3


@pytest.mark.parametrize("minimise", [functools.partial(ball, radius=0.5), functools.partial(cubic, sigma=2.0)])
def test_budget_is_kept_and_a_smaller_region_costs_nothing(minimise: Callable[..., tuple[Tensor, str]]) -> None:
    _, _, A, g = problem(60, 1, definite=False)
    counted = Counted(A)
    space = krylov_space(counted, g, minimise, residual_tolerance=0.0, max_products=7)
    assert counted.products == 7
    solution = minimise_in(space, g, minimise)
    assert (counted.products, solution.iterations) == (7, 7)
    # The best point of the space: no worse than Steihaug's, which is in it.
    if minimise.func is ball:
        steihaug = conjugate_gradients(A, g, radius=0.5, max_iterations=7)
        assert solution.decrease >= steihaug.decrease * (1 - 1e-9)
        assert float(solution.step.norm()) == pytest.approx(0.5, rel=1e-9)


def test_the_small_model_is_solved_each_time_the_space_has_grown_by_a_tenth() -> None:
    sizes: list[int] = []

    def minimise(values: Tensor, slopes: Tensor) -> tuple[Tensor, str]:
        sizes.append(len(values))
        return ball(values, slopes, 1.0)

    _, _, A, g = problem(60, 1, definite=False)
    krylov_space(A, g, minimise, residual_tolerance=0.0, max_products=40)
    assert sizes[:10] == list(range(1, 11))
    assert sizes[10:] == [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 22, 24, 26, 28, 30, 33, 36, 39]


def test_curvature_that_is_rounding_is_not_followed() -> None:
    """A singular matrix in float32, whose products are rounded: without a ball the minimiser is not far away."""
    J = torch.randn(40, 10, generator=torch.Generator().manual_seed(0)).double()
    A, g = (J @ J.T).float(), (J @ torch.ones(10).double()).float()
    minimise = functools.partial(ball, radius=1e6)
    space = krylov_space(A, g, minimise, residual_tolerance=0.0, max_products=40)
    step = minimise_in(space, g, minimise).step.double()
    best = torch.linalg.lstsq(J @ J.T, -g.double(), driver="gelsd").solution
    assert float(step.norm()) < 100 * float(best.norm())


def test_a_product_that_is_not_finite_raises() -> None:
    _, _, A, g = problem(20, 1, definite=True)
    with pytest.raises(FloatingPointError, match="Product number 3 with the operator is not finite"):
        krylov_space(Counted(A, 3), g, functools.partial(ball, radius=1.0), residual_tolerance=0.0, max_products=9)
