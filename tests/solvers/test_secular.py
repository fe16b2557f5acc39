"""Ball and cubic minima satisfy the conditions that characterise them, in the hard case too."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor

from newtonopt.solvers.dense import solve_ball
from newtonopt.solvers.secular import above_rounding, ball, cubic

models = settings(max_examples=150, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
sizes = st.integers(1, 12)
magnitudes = st.floats(-4, 4).map(lambda exponent: 10.0**exponent)
kinds = st.sampled_from(["definite", "indefinite", "singular", "hard", "nearly hard", "flat"])


def vector(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(n: int, seed: int, kind: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues ascending, and the gradient's coordinates."""
    values, slopes = vector(n, seed).sort().values, vector(n, seed + 1)
    if kind == "definite":
        values = values.abs().sort().values + 0.01
    if kind == "singular":
        values = (values - values[0]).clamp(min=0)
    if kind == "flat":
        values = torch.zeros(n, dtype=torch.float64)
    if "hard" in kind:
        values = values - values[0] - 1.0
        slopes[0] = 0.0 if kind == "hard" else 1e-14
    return values, slopes


def check_multiplier(values: Tensor, slopes: Tensor, y: Tensor, multiplier: float) -> None:
    """`(L + m I) y = -c` and `L + m I` positive semi-definite."""
    scale = float(slopes.norm()) + float(values.abs().max() + multiplier) * float(y.norm())
    assert float(((values + multiplier) * y + slopes).norm()) <= 1e-9 * scale
    assert float(values[0]) + multiplier >= -1e-9 * (float(values.abs().max()) + multiplier)


def multiplier_of(values: Tensor, slopes: Tensor, y: Tensor) -> float:
    return -float(y @ (values * y + slopes)) / float(y @ y) if bool(y.any()) else 0.0


@models
@given(sizes, seeds, kinds, magnitudes)
def test_ball_minimum_is_characterised(n: int, seed: int, kind: str, radius: float) -> None:
    values, slopes = model(n, seed, kind)
    y, case = ball(values, slopes, radius)
    length = float(y.norm())
    assert length <= radius * (1 + 1e-12)
    if case == "inside the ball":
        check_multiplier(values, slopes, y, 0.0)
    else:
        multiplier = multiplier_of(values, slopes, y)
        assert multiplier >= -1e-9 * float(values.abs().max())
        assert length == pytest.approx(radius, rel=1e-12)
        check_multiplier(values, slopes, y, max(multiplier, 0.0))


@models
@given(sizes, seeds, kinds, magnitudes)
def test_cubic_minimum_is_characterised(n: int, seed: int, kind: str, sigma: float) -> None:
    values, slopes = model(n, seed, kind)
    y, _ = cubic(values, slopes, sigma)
    check_multiplier(values, slopes, y, sigma * float(y.norm()))
    # CubicNewton relies on this bound when it raises sigma after a rejection.
    promised = -float(y @ slopes + y.square() @ values / 2)
    assert promised >= sigma * float(y.norm()) ** 3 / 2 * (1 - 1e-6) - 1e-12


@models
@given(sizes, seeds, kinds, magnitudes)
def test_no_point_of_the_ball_is_lower(n: int, seed: int, kind: str, radius: float) -> None:
    values, slopes = model(n, seed, kind)
    y, _ = ball(values, slopes, radius)
    others = vector(200 * n, seed + 3).view(200, n)
    others *= radius * torch.rand(200, 1, dtype=torch.float64) / others.norm(dim=1, keepdim=True)

    def heights(points: Tensor) -> Tensor:
        return points @ slopes + points.square() @ values / 2

    low = float(heights(y[None]))
    assert float(heights(others).min()) >= low - 1e-9 * abs(low)


@pytest.mark.parametrize("case", ["hard", "on the boundary", "inside"])
def test_cases_are_told_apart(case: str) -> None:
    values = torch.tensor([1.0, 2.0] if case == "inside" else [-1.0, 2.0]).double()
    slopes = torch.tensor([0.0 if case == "hard" else 0.5, 1.0]).double()
    assert ball(values, slopes, 4.0)[1].startswith(case)


def test_hard_case_by_hand() -> None:
    """`m = 1` lifts the eigenvalue -1 to zero; `y_2 = -3 / (2 + 1)`, and `y_1` completes the length."""
    values, slopes = torch.tensor([-1.0, 2.0]).double(), torch.tensor([0.0, 3.0]).double()
    y, _ = ball(values, slopes, 2.0)
    torch.testing.assert_close(y, torch.tensor([math.sqrt(3.0), -1.0]).double())
    y, _ = cubic(values, slopes, 0.5)  # |y| = m / sigma = 2
    torch.testing.assert_close(y, torch.tensor([math.sqrt(3.0), -1.0]).double())


def dense(values: Tensor, slopes: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix with these eigenvalues, its eigenvectors, and the gradient."""
    n = len(values)
    Q, _ = torch.linalg.qr(vector(n * n, seed + 5).view(n, n))
    A = (Q * values) @ Q.T
    return (A + A.T) / 2, Q, Q @ slopes


def decrease(A: Tensor, g: Tensor, s: Tensor) -> float:
    return float(-(g @ s + s @ A @ s / 2))


def largest_decrease(A: Tensor, g: Tensor, radius: float) -> float:
    """Return the largest decrease in the ball, as the least of its upper bounds `(g'(A + m I)^-1 g + m radius^2) / 2`.

    These hold for each `m >= 0` with `A + m I` positive definite, and the least of them is attained (More & Sorensen
    1983). In `m` they are convex, so that a search along a line finds the least. SciPy's own solver is no oracle: up to
    1.15, the last for Python 3.10, it may not end (https://github.com/scipy/scipy/issues/20244 and 12513).
    """

    def bound(m: float) -> float:
        return float(g @ torch.linalg.solve(A + m * torch.eye(len(g)).double(), g) + m * radius**2) / 2

    lowest, size = float(torch.linalg.eigvalsh(A)[0]), float(A.norm() + g.norm() / radius)
    lift = max(0.0, -lowest)
    found = minimize_scalar(
        lambda exponent: bound(lift + math.exp(exponent)),
        bounds=(math.log(1e-12 * size), math.log(2 * size)),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return min(float(found.fun), bound(0.0) if lowest > 1e-3 else math.inf)


@models
@given(sizes, seeds, kinds, magnitudes)
def test_dense_ball_solution_attains_the_largest_decrease(n: int, seed: int, kind: str, radius: float) -> None:
    values, slopes = model(n, seed, kind)
    A, Q, g = dense(values, slopes, seed)
    solution = solve_ball(values, Q, g, radius)
    assert float(solution.step.norm()) <= radius * (1 + 1e-12)
    assert solution.decrease == pytest.approx(decrease(A, g, solution.step), rel=1e-8, abs=1e-12)
    assert solution.decrease == pytest.approx(largest_decrease(A, g, radius), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("exponent", [-160, -110, 110, 140])
def test_sizes_whose_powers_leave_the_range_of_numbers(exponent: int) -> None:
    """The minimiser scales with `c` and the radius, or with `c` and `1 / sigma`."""
    values, slopes, scale = torch.tensor([1.0, 4.0]).double(), torch.tensor([3.0, -2.0]).double(), 10.0**exponent
    for expected, found in (
        (ball(values, slopes, 0.5), ball(values, scale * slopes, scale * 0.5)),
        (ball(values - 2, slopes, 0.5), ball(values - 2, scale * slopes, scale * 0.5)),
        (cubic(values, slopes, 1.0), cubic(values, scale * slopes, 1 / scale)),
        (cubic(values - 2, slopes, 1.0), cubic(values - 2, scale * slopes, 1 / scale)),
    ):
        assert found[1] == expected[1]
        torch.testing.assert_close(found[0] / scale, expected[0], rtol=1e-9, atol=0)


def test_a_cubic_term_that_is_rounding_leaves_newtons_step() -> None:
    values, slopes = torch.tensor([2.0, 4.0]).double(), torch.tensor([1e-300, 0.0]).double()
    torch.testing.assert_close(cubic(values, slopes, 1e-16)[0], -slopes / values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tiny", [-1e-16, 0.0, 1e-16])
def test_eigenvalues_at_rounding_count_as_such(tiny: float) -> None:
    """A matrix with entries of one size; a badly scaled matrix keeps a small eigenvalue."""
    eps = torch.finfo(torch.float64).eps
    vectors = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    values = torch.tensor([tiny, 2.0], dtype=torch.float64)
    raised = above_rounding(values, vectors, torch.ones(2, 2, dtype=torch.float64), eps)
    assert raised.tolist() == pytest.approx([4 * eps, 2.0], rel=1e-6)
    graded = torch.tensor([tiny, 2.0], dtype=torch.float64)
    kept = above_rounding(graded, torch.eye(2, dtype=torch.float64), graded.diag(), eps)
    assert kept.tolist() == [tiny, 2.0]
