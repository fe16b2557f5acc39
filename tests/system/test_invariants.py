"""Properties of every optimizer's steps, on random quadratics and random non-linear least squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_db import OPTIMIZERS
from torch import Tensor, nn

from newtonopt import NewtonCG, StepReport
from newtonopt.optimizers.newton import NewtonOptimizer

N = 5
SIZES = (2, 1, 2)
EACH = pytest.mark.parametrize("name", OPTIMIZERS)
few = settings(max_examples=2, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 10_000)
rates = st.lists(st.sampled_from([0.5, 0.8, 1.0]), min_size=3, max_size=3)
decays = st.lists(st.sampled_from([0.0, 0.1, 2.0]), min_size=3, max_size=3)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Problem:
    """A loss of five numbers in three parameters: `loss(theta)`, times `scale`."""

    def __init__(self, loss: Callable[[Tensor], Tensor], seed: int, scale: float = 1.0) -> None:
        self.params = [nn.Parameter(piece.clone()) for piece in draw(N, seed=seed).split(SIZES)]
        self._loss = loss
        self._scale = scale

    def closure(self) -> Tensor:
        for p in self.params:
            p.grad = None
        loss = self._scale * self._loss(torch.cat(self.params))
        loss.backward()
        return loss

    def flat(self) -> Tensor:
        return torch.cat(self.params).detach().clone()


def quadratic(name: str, seed: int) -> Callable[[Tensor], Tensor]:
    """An indefinite one for those that use the Hessian, a singular one for those that use Gauss-Newton."""
    if OPTIMIZERS[name]([nn.Parameter(torch.zeros(1))]).defaults["curvature"] == "hessian":
        A, b = draw(N, N, seed=seed + 1), draw(N, seed=seed + 2)
        return lambda theta: 0.25 * theta @ (A + A.T) @ theta + b @ theta
    B, t = draw(N - 1, N, seed=seed + 1), draw(N - 1, seed=seed + 2)
    return lambda theta: F.mse_loss(B @ theta, t)


def least_squares(seed: int) -> Callable[[Tensor], Tensor]:
    """Return least squares of a cubic: neither quadratic nor convex."""
    B, t = draw(N + 1, N, seed=seed + 1), 8 * draw(N + 1, seed=seed + 2)

    def loss(theta: Tensor) -> Tensor:
        z = B @ theta
        return F.mse_loss(z + 0.3 * z**3, t)

    return loss


def grouped(params: list[nn.Parameter], **settings: list[float]) -> list[dict[str, Any]]:
    return [{"params": [p], **{k: v[i] for k, v in settings.items()}} for i, p in enumerate(params)]


def report_of(optimizer: NewtonOptimizer) -> StepReport:
    assert optimizer.last_step is not None
    return optimizer.last_step


@EACH
@few
@given(seeds, rates, decays)
def test_the_promise_is_the_undamped_models(name: str, seed: int, lr: list[float], decay: list[float]) -> None:
    """And a quadratic keeps it: the ratio is one."""
    problem = Problem(quadratic(name, seed), seed)
    optimizer = OPTIMIZERS[name](grouped(problem.params, lr=lr, weight_decay=decay))
    start = problem.flat()
    D = torch.cat([torch.full((size,), d, dtype=torch.float64) for size, d in zip(SIZES, decay, strict=True)])

    def objective(theta: Tensor) -> Tensor:
        return problem._loss(theta) + 0.5 * (D * theta.square()).sum()

    A = torch.autograd.functional.hessian(objective, start)
    g = torch.autograd.functional.jacobian(objective, start)
    optimizer.step(problem.closure)
    report, step = report_of(optimizer), problem.flat() - start
    assert report.gradient_norm == pytest.approx(float(g.norm()), rel=1e-9)
    # Rates that differ can turn the minimiser of the model into a step uphill.
    assert report.accepted or (report.predicted_decrease <= 0.0 and len(set(lr)) > 1)
    if report.accepted:
        assert report.predicted_decrease == pytest.approx(-float(g @ step + step @ A @ step / 2), rel=1e-7)
        assert report.ratio == pytest.approx(1.0, rel=1e-6) or len(set(lr)) > 1
    if optimizer.control == "radius":
        assert report.step_norm <= report.radius * (1 + 1e-12)


# Hutchinson's random numbers go by the entries' places, and conjugate gradients end early.
@pytest.mark.parametrize("name", OPTIMIZERS)
@few
@given(seeds, decays)
def test_the_order_of_parameter_groups_does_not_matter(name: str, seed: int, decay: list[float]) -> None:
    ends = []
    for order in (1, -1):
        problem = Problem(least_squares(seed), seed)
        optimizer = OPTIMIZERS[name](grouped(problem.params, weight_decay=decay)[::order])
        for _ in range(2):
            optimizer.step(problem.closure)
        ends.append((problem.flat(), report_of(optimizer)))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-6, atol=1e-8)
    assert ends[0][1].accepted == ends[1][1].accepted


# Its squared gradients grow by the square of the scale, and are added to the damping.
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "hessian_free_empirical_fisher"])
@few
@given(seeds, st.sampled_from([1 / 64, 16.0]))
def test_scaling_the_loss_scales_damping_and_sigma_and_nothing_else(name: str, seed: int, scale: float) -> None:
    runs = []
    for c in (1.0, scale):
        problem = Problem(least_squares(seed), seed, c)
        optimizer = OPTIMIZERS[name](problem.params, weight_decay=0.1 * c)
        # Its damping is in units of the curvature.
        is_relative = "levenberg" in name
        if optimizer.control in ("damping", "sigma") and not is_relative:
            optimizer = OPTIMIZERS[name](
                problem.params, weight_decay=0.1 * c, **{optimizer.control: c * optimizer.defaults[optimizer.control]}
            )
        runs.append((c, problem, optimizer))
    for _ in range(3):
        for _, problem, optimizer in runs:
            optimizer.step(problem.closure)
        (_, one, plain), (_, other, scaled) = runs
        before, after = report_of(plain), report_of(scaled)
        if min(before.gradient_norm, after.gradient_norm) < 0.25:
            break  # there the forcing sequence begins, which depends on it
        assert (after.accepted, after.trials, after.iterations) == (before.accepted, before.trials, before.iterations)
        assert after.ratio == pytest.approx(before.ratio, rel=1e-8)
        torch.testing.assert_close(other.flat(), one.flat(), rtol=1e-8, atol=1e-10)
        if plain.control is not None:
            factor = 1.0 if plain.control == "radius" or is_relative else scale
            assert getattr(after, plain.control) == pytest.approx(factor * getattr(before, plain.control), rel=1e-7)


def test_a_smaller_loss_is_solved_more_tightly_by_the_forcing_sequence() -> None:
    iterations = []
    for scale in (1.0, 1e-8):
        problem = Problem(least_squares(0), 0, scale)
        optimizer = NewtonCG(problem.params, curvature="gauss_newton")
        optimizer.step(problem.closure)
        iterations.append(report_of(optimizer).iterations)
    assert iterations[0] < iterations[1] == N
