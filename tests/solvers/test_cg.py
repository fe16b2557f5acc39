"""Conjugate gradients and Steihaug's method against dense solves and SciPy's, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize._trustregion_ncg import CGSteihaugSubproblem
from torch import Tensor

from newtonopt.solvers.cg import conjugate_gradients, forcing_sequence, shortened

quadratics = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
sizes = st.integers(1, 12)
radii = st.floats(-3, 3).map(lambda exponent: 10.0**exponent)


def vector(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """Symmetric, with given eigenvalues and random eigenvectors."""
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(vector(n * n, seed + 1).view(n, n))
    A = (Q * eigenvalues) @ Q.T
    return (A + A.T) / 2


def definite(n: int, seed: int = 0, condition: float = 1e3) -> Tensor:
    return matrix(torch.logspace(0, -math.log10(condition), n, dtype=torch.float64), seed)


def indefinite(n: int, seed: int = 0) -> Tensor:
    return matrix(vector(n, seed + 2), seed)


def decrease(A: Tensor, g: Tensor, s: Tensor) -> float:
    return float(-(g @ s + s @ A @ s / 2))


def jacobi(A: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: v / A.diagonal()


def scipy_iterates(A: Tensor, g: Tensor, start: Tensor | None = None, M: Tensor | None = None) -> list[Tensor]:
    """SciPy's iterates, the start included."""
    found = [torch.zeros_like(g) if start is None else start]
    scipy.sparse.linalg.cg(
        A.numpy(),
        -g.numpy(),
        x0=found[0].numpy().copy(),
        M=None if M is None else np.diag(1 / M.numpy()),
        rtol=1e-14,
        maxiter=len(g),
        callback=lambda x: found.append(torch.tensor(x)),
    )
    return found


class Recorder:
    """A matrix that counts its products, and spoils them from a given one on."""

    def __init__(self, A: Tensor, spoil_at: int = 10**9, value: float = math.nan) -> None:
        self.A, self.spoil_at, self.value, self.products = A, spoil_at, value, 0

    def __matmul__(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.A @ v if self.products < self.spoil_at else torch.full_like(v, self.value)


@pytest.mark.parametrize("n", [1, 7, 40])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_iterates_are_scipys_and_end_at_the_solution(n: int, preconditioned: bool, started: bool) -> None:
    A, g = definite(n, condition=100) + torch.diag(torch.linspace(0, 5, n, dtype=torch.float64)), vector(n, 1)
    start = vector(n, 2) if started else None
    apply = jacobi(A) if preconditioned else None
    oracle = scipy_iterates(A, g, start, A.diagonal() if preconditioned else None)
    for k in range(1, min(len(oracle), 12)):
        solution = conjugate_gradients(A, g, start=start, preconditioner=apply, max_iterations=k)
        torch.testing.assert_close(solution.step, oracle[k], rtol=1e-8, atol=1e-10)
    whole = conjugate_gradients(A, g, start=start, preconditioner=apply, max_iterations=4 * n)
    torch.testing.assert_close(whole.step, torch.linalg.solve(A, -g), rtol=1e-10, atol=1e-10)
    assert whole.reason == "residual tolerance reached"
    assert whole.negative_curvature is None


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_decrease_is_the_models_and_grows_along_the_path(started: bool, preconditioned: bool) -> None:
    A, g = definite(60, condition=1e4), vector(60, 1)
    start = vector(60, 2) if started else None
    apply = jacobi(A) if preconditioned else None
    solution = conjugate_gradients(A, g, start=start, preconditioner=apply, keep_path=True)
    last = [solution] if solution.path[-1].step is not solution.step else []
    values = [iterate.decrease for iterate in [*solution.path, *last]]
    assert values == pytest.approx([decrease(A, g, i.step) for i in [*solution.path, *last]], rel=1e-9)
    assert all(later > earlier for earlier, later in pairwise(values))
    if started:
        assert solution.path[0].step.equal(start)


@quadratics
@given(sizes, seeds, st.booleans())
def test_decrease_grows_with_every_iteration_until_negative_curvature(n: int, seed: int, convex: bool) -> None:
    A, g = definite(n, seed) if convex else indefinite(n, seed), vector(n, seed)
    last = 0.0
    for k in range(1, n + 1):
        solution = conjugate_gradients(A, g, max_iterations=k)
        assert solution.decrease == pytest.approx(decrease(A, g, solution.step), rel=1e-7, abs=1e-12)
        if solution.iterations < k or solution.negative_curvature is not None:
            break
        assert solution.decrease > last
        last = solution.decrease
    assert solution.decrease >= last


def test_path_is_kept_on_a_grid_that_grows() -> None:
    A, g = definite(150, condition=1e6), vector(150, 1)
    path = conjugate_gradients(A, g, max_iterations=120, keep_path=True).path
    kept = []
    for iteration in range(1, 121):
        step = conjugate_gradients(A, g, max_iterations=iteration).step
        kept += [iteration] * any(step.equal(iterate.step) for iterate in path)
    assert len(kept) == len(path)
    # Martens 2010, sec. 4.6: indices grow by 1.3, rounded up.
    assert kept[:4] == [1, 2, 3, 4]
    assert all(1.2 <= b / a < 1.34 for a, b in pairwise(kept) if a >= 10)
    assert kept[-1] > 120 / 1.34
    assert conjugate_gradients(A, g, max_iterations=5).path == ()


@quadratics
@given(sizes, seeds, radii, st.booleans())
def test_steihaug_is_scipys(n: int, seed: int, radius: float, convex: bool) -> None:
    A, g = definite(n, seed) if convex else indefinite(n, seed), vector(n, seed)
    products = Recorder(A)
    solution = conjugate_gradients(
        products, g, radius=radius, residual_tolerance=forcing_sequence(float(g.norm())), max_iterations=100
    )
    oracle = Recorder(A)
    subproblem = CGSteihaugSubproblem(
        np.zeros(n), lambda x: 0.0, lambda x: g.numpy(), None, lambda x, p: (oracle @ torch.tensor(p)).numpy()
    )
    step, at_boundary = subproblem.solve(radius)
    torch.testing.assert_close(solution.step, torch.tensor(step), rtol=1e-6, atol=1e-8 * radius)
    assert at_boundary == (solution.reason in ("reached the radius", "negative curvature"))
    # SciPy compares the two boundary points by the model, for two products.
    assert solution.iterations == products.products == oracle.products - 2 * (solution.negative_curvature is not None)


@quadratics
@given(sizes, seeds, radii, st.booleans())
def test_ball_is_that_of_the_preconditioner(n: int, seed: int, radius: float, convex: bool) -> None:
    """Preconditioning is a change of variables `t = L's` with `M = L L'`, in which the ball is round."""
    A, g = definite(n, seed) if convex else indefinite(n, seed), vector(n, seed)
    M = definite(n, seed + 5, condition=30)
    L = torch.linalg.cholesky(M)
    inverse = torch.linalg.inv(L)
    solution = conjugate_gradients(A, g, radius=radius, preconditioner=lambda v: inverse.T @ (inverse @ v))
    round_ball = conjugate_gradients(inverse @ A @ inverse.T, inverse @ g, radius=radius)
    length = math.sqrt(solution.step @ M @ solution.step)
    cauchy = cauchy_decrease(inverse @ A @ inverse.T, inverse @ g, radius)
    assert length <= radius * (1 + 1e-9)
    assert solution.decrease == pytest.approx(decrease(A, g, solution.step), rel=1e-6)
    assert solution.decrease >= cauchy * (1 - 1e-9)
    # Rounding spoils conjugacy: n iterations do not quite reach the solution.
    assert solution.decrease == pytest.approx(round_ball.decrease, rel=1e-3)
    if solution.reason in ("reached the radius", "negative curvature"):
        assert length == pytest.approx(radius, rel=1e-9)


def cauchy_decrease(A: Tensor, g: Tensor, radius: float) -> float:
    """The model's decrease along the gradient (Nocedal & Wright 2006, eq. 4.11)."""
    norm, bend = float(g.norm()), float(g @ A @ g)
    t = radius / norm if bend <= 0 else min(norm**2 / bend, radius / norm)
    return decrease(A, g, -t * g)


@pytest.mark.parametrize(("factor", "reason"), [(0.5, "reached the radius"), (2.0, "residual tolerance reached")])
def test_boundary_is_reached_only_when_the_solution_lies_outside(factor: float, reason: str) -> None:
    A, g = definite(10), vector(10, 1)
    truth = torch.linalg.solve(A, -g)
    radius = factor * float(truth.norm())
    solution = conjugate_gradients(A, g, radius=radius, max_iterations=50)
    assert solution.reason == reason
    assert float(solution.step.norm()) == pytest.approx(min(radius, float(truth.norm())), rel=1e-9)


@quadratics
@given(sizes, seeds, st.booleans(), st.booleans())
def test_negative_curvature_is_returned_as_a_direction(n: int, seed: int, started: bool, bounded: bool) -> None:
    A, g = matrix(vector(n, seed).abs() * torch.linspace(-1, 1, n + 1, dtype=torch.float64)[:-1], seed), vector(n, seed)
    solution = conjugate_gradients(
        A,
        g,
        start=3 * vector(n, seed + 7) if started and not bounded else None,
        radius=5.0 if bounded else math.inf,
        max_iterations=20 * n,
    )
    d = solution.negative_curvature
    if solution.reason != "negative curvature":
        assert bounded
        assert d is None
        return
    assert d is not None
    assert float(d @ A @ d) <= 1e-12 * float(d @ d)
    assert float(g @ d) <= 1e-12 * float(g.norm() * d.norm())
    assert solution.decrease == pytest.approx(decrease(A, g, solution.step), rel=1e-6, abs=1e-10)


def test_negative_curvature_without_a_ball_keeps_the_last_iterate() -> None:
    A, g = torch.diag(torch.tensor([2.0, -1.0]).double()), torch.tensor([1.0, 0.1]).double()
    solution = conjugate_gradients(A, g)
    assert (solution.reason, solution.iterations) == ("negative curvature", 2)
    torch.testing.assert_close(solution.step, -g * (g @ g) / (g @ A @ g))
    first = conjugate_gradients(-A, torch.tensor([1.0, 0.0]).double())
    assert not first.step.any()
    assert first.negative_curvature is not None


def residuals(A: Tensor, g: Tensor) -> list[Tensor]:
    """The residuals of a run without a stop, from the first one on, as the preconditioner sees them."""
    seen: list[Tensor] = []

    def identity(r: Tensor) -> Tensor:
        seen.append(r)
        return r

    conjugate_gradients(A, g, preconditioner=identity, max_iterations=2000)
    return seen


@pytest.mark.parametrize("tolerance", [5e-3, 5e-4, 1e-5])
def test_martens_stop(tolerance: float) -> None:
    A, g = definite(300, condition=1e5), vector(300, 1)
    inverse = torch.linalg.inv(A)
    # Martens' phi is minus a decrease: m(s) = (r'A^-1 r - g'A^-1 g) / 2.
    phi = [float(r @ inverse @ r - g @ inverse @ g) / 2 for r in residuals(A, g)]
    look_back = [max(10, i // 10) for i in range(len(phi))]
    expected = next(
        i for i, k in enumerate(look_back) if i > k and phi[i] < 0 and (phi[i] - phi[i - k]) / phi[i] < k * tolerance
    )
    solution = conjugate_gradients(A, g, progress_tolerance=tolerance, max_iterations=2000)
    assert (solution.iterations, solution.reason) == (expected, "progress below tolerance")
    assert tolerance > 1e-5 or look_back[expected] > 10


@pytest.mark.parametrize("tolerance", [0.5, 1e-3, 1e-8])
def test_residual_tolerance(tolerance: float) -> None:
    A, g = definite(80), vector(80, 1)
    expected = next(i for i, r in enumerate(residuals(A, g)) if r.norm() <= tolerance * g.norm())
    solution = conjugate_gradients(A, g, residual_tolerance=tolerance, max_iterations=400)
    assert (solution.iterations, solution.reason) == (expected, "residual tolerance reached")
    assert float((A @ solution.step + g).norm()) <= 1.001 * tolerance * float(g.norm())


def test_forcing_sequence() -> None:
    assert [forcing_sequence(norm) for norm in (0.0, 1e-4, 0.09, 0.25, 7.0)] == pytest.approx([0, 0.01, 0.3, 0.5, 0.5])


@pytest.mark.parametrize("radius", [1.0, math.inf])
def test_zero_gradient_needs_no_product(radius: float) -> None:
    A = Recorder(definite(4))
    solution = conjugate_gradients(A, torch.zeros(4, dtype=torch.float64), radius=radius)
    assert (solution.reason, solution.iterations, solution.decrease, A.products) == ("zero residual", 0, 0.0, 0)
    assert not solution.step.any()


def test_start_is_left_alone_and_may_be_the_solution() -> None:
    A, g = torch.diag(torch.tensor([1.0, 2.0]).double()), torch.tensor([1.0, 4.0]).double()
    start = torch.tensor([-1.0, -2.0]).double()
    solution = conjugate_gradients(A, g, start=start)
    assert (solution.reason, solution.decrease) == ("zero residual", 4.5)
    kept = vector(2, 1)
    given_start = kept.clone()
    assert not conjugate_gradients(A, g, start=given_start).step.equal(kept)
    assert given_start.equal(kept)
    assert conjugate_gradients(A, g, start=kept, max_iterations=0).step.equal(kept)


def test_iteration_limit_is_the_number_of_products() -> None:
    for limit, expected in ((0, 0), (3, 3), (None, 30)):
        A = Recorder(definite(30, condition=1e8))
        solution = conjugate_gradients(A, vector(30, 1), max_iterations=limit)
        assert (solution.reason, solution.iterations, A.products) == ("iteration limit", expected, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_product_keeps_the_last_good_iterate(value: float) -> None:
    A, g = definite(20), vector(20, 1)
    good = conjugate_gradients(A, g, max_iterations=2)
    solution = conjugate_gradients(Recorder(A, spoil_at=3, value=value), g, keep_path=True)
    assert (solution.reason, solution.iterations) == ("non-finite product", 3)
    assert good.is_finite and not solution.is_finite
    assert solution.step.equal(good.step)
    assert solution.decrease == good.decrease
    assert len(solution.path) == 2


@pytest.mark.parametrize("radius", [0.0, -1.0, math.nan])
def test_radius_is_positive(radius: float) -> None:
    with pytest.raises(ValueError, match=f"radius must be positive, got {radius}. Write math.inf for no bound"):
        conjugate_gradients(definite(2), vector(2, 1), radius=radius)


def test_start_and_radius_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="start must be None for a finite radius"):
        conjugate_gradients(definite(2), vector(2, 1), start=vector(2, 2), radius=1.0)


def test_huge_radius_is_no_bound() -> None:
    A, g = definite(5), vector(5, 1)
    assert conjugate_gradients(A, g, radius=1e200).step.equal(conjugate_gradients(A, g).step)


@quadratics
@given(st.integers(1, 60), seeds, st.floats(0, 4), st.integers(-9, 9))
def test_single_precision_ends_at_rounding_level(n: int, seed: int, digits: float, scale: int) -> None:
    """Iterating on past what float32 resolves must not mistake rounding for negative curvature."""
    exact, gradient = definite(n, seed, condition=10**digits), vector(n, seed) * 10.0**scale
    A, g = exact.float(), gradient.float()
    solution = conjugate_gradients(A, g, max_iterations=20 * n + 20)
    assert solution.reason.startswith(("residual tolerance reached", "rounding"))
    assert solution.negative_curvature is None
    best = float(gradient @ torch.linalg.solve(exact, gradient)) / 2
    assert decrease(exact, gradient, solution.step.double()) == pytest.approx(best, rel=1e-4)
    assert solution.decrease == pytest.approx(best, rel=1e-3)


@quadratics
@given(sizes, seeds, st.booleans(), st.floats(0.01, 0.99))
def test_shortened_solution_is_on_the_polygon(n: int, seed: int, convex: bool, part: float) -> None:
    A, g = definite(n, seed) if convex else indefinite(n, seed), vector(n, seed)
    whole = conjugate_gradients(A, g, radius=5.0, keep_path=True)
    radius = part * float(whole.step.norm())
    point = shortened(whole, g, radius)
    assert float(point.step.norm()) <= radius * (1 + 1e-9)
    assert point.decrease == pytest.approx(decrease(A, g, point.step), rel=1e-6, abs=1e-12)
    assert 0 < point.decrease <= whole.decrease * (1 + 1e-9)
    if len(whole.path) < 5 and convex:
        # Every iterate was kept, so that this is Steihaug's own point.
        assert point.decrease == pytest.approx(conjugate_gradients(A, g, radius=radius).decrease, rel=1e-6)
    assert shortened(whole, g, 6.0) is whole


@pytest.mark.parametrize("exponent", [-120, 120, 150])
def test_a_boundary_whose_square_leaves_the_range_of_numbers(exponent: int) -> None:
    """A step far longer than the gradient, as where the curvature is nearly zero."""
    scale = 10.0**exponent
    A, g = torch.diag(torch.tensor([1.0, 2.0, -1.0]).double()), torch.ones(3).double()
    expected = conjugate_gradients(A, g, radius=0.7)
    found = conjugate_gradients(1e20 / scale * A, 1e20 * g, radius=0.7 * scale)
    torch.testing.assert_close(found.step / scale, expected.step, rtol=1e-9, atol=0)
    assert found.decrease / scale / 1e20 == pytest.approx(expected.decrease, rel=1e-9)


@pytest.mark.parametrize("least", [1e-17, -1e-17, 0.0])
def test_curvature_that_is_rounding_is_handed_back_as_none(least: float) -> None:
    A, g = torch.diag(torch.tensor([1.0, 3.0, least]).double()), torch.tensor([1.0, -2.0, 5.0]).double()
    solution = conjugate_gradients(A, g, rounding=torch.finfo(g.dtype).eps)
    d = solution.negative_curvature
    assert (solution.reason, solution.bend, solution.iterations) == ("no curvature", 0.0, 3)
    assert d is not None and float(g @ d) < 0.0
    torch.testing.assert_close(d / d.norm(), torch.tensor([0.0, 0.0, -1.0]).double(), atol=1e-12, rtol=0)


def test_small_curvature_that_is_no_rounding_is_solved() -> None:
    A, g = torch.diag(torch.tensor([1.0, 1e-12]).double()), torch.tensor([1.0, 1e-6]).double()
    solution = conjugate_gradients(A, g, rounding=torch.finfo(g.dtype).eps)
    # Rounding is magnified by the condition number, to 1e-4 and some.
    torch.testing.assert_close(solution.step, torch.tensor([-1.0, -1e6]).double(), rtol=5e-2, atol=0)
