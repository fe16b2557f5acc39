"""Every optimizer of the exact Hessian, with its defaults, on the classical test functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from functions import FUNCTIONS

from newtonopt import CubicNewton, DampedNewton, HessianFree, NewtonCG, StepReport, TrustRegionNewton

# Flat or badly scaled to the point where no method, SciPy's included, brings the gradient to 1e-8: judged by the value.
BY_VALUE = {"brown_dennis", "jennrich_sampson", "meyer"}
# Runs end at 1e-8. Where the loss cannot tell shorter steps apart, the order of rounding decides how near they come.
ROUNDING = 1e-7
MEMBERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "damped_newton": (DampedNewton, {}),
    "hessian_free": (HessianFree, {"curvature": "hessian"}),
    "newton_cg": (NewtonCG, {}),
    "trust_region": (TrustRegionNewton, {}),
    "trust_region_lanczos": (TrustRegionNewton, {"subproblem": "lanczos"}),
    "trust_region_exact": (TrustRegionNewton, {"subproblem": "exact"}),
    "cubic": (CubicNewton, {}),
    "cubic_exact": (CubicNewton, {"subproblem": "exact"}),
}
# Left out: they follow Meyer's valley, of condition 1e14, for more steps than are allowed here, as SciPy's do.
SLOW_IN_MEYERS_VALLEY = {"newton_cg", "trust_region", "trust_region_lanczos", "cubic"}
LEFT_OUT = {(member, "meyer") for member in SLOW_IN_MEYERS_VALLEY}
# From most points near this start it follows a valley that falls to 0.2427 at infinity, as SciPy's trust-exact does.
LEFT_OUT.add(("trust_region_exact", "biggs_exp6"))
RUNS = [(m, f) for m in MEMBERS for f in FUNCTIONS if (m, f) not in LEFT_OUT]
# Left out of ten times the start: none of SciPy's exact Newton's methods gets through these two valleys either.
FAR = {10.0: [f for f in FUNCTIONS if f not in ("meyer", "osborne_1")]}
FAR[100.0] = ["rosenbrock", "extended_rosenbrock", "freudenstein_roth", "beale", "helical_valley", "bard", "gaussian"]
FAR_RUNS = [(member, function, scale) for scale in FAR for member in MEMBERS for function in FAR[scale]]


@pytest.mark.slow
@pytest.mark.parametrize(("member", "function"), RUNS)
def test_reaches_a_minimum_from_the_standard_start(member: str, function: str) -> None:
    problem = FUNCTIONS[function]
    report = minimised(member, function, problem.start)
    assert report.gradient_norm <= ROUNDING or function in BY_VALUE, report
    assert reached(report.loss, problem.minima), report


@pytest.mark.slow
@pytest.mark.parametrize(("member", "function", "scale"), FAR_RUNS)
def test_the_gradient_vanishes_from_a_far_start(member: str, function: str, scale: float) -> None:
    """From a multiple of the standard start, or of ones where that is zero, as MINPACK's tests do."""
    start = FUNCTIONS[function].start
    report = minimised(member, function, [scale * x for x in start] if any(start) else [scale] * len(start))
    assert report.gradient_norm <= ROUNDING or function in BY_VALUE, report
    assert math.isfinite(report.loss)


def minimised(member: str, function: str, start: Sequence[float]) -> StepReport:
    """The last report of a run that ends where the gradient vanishes or a minimum of those judged by value is met."""
    problem = FUNCTIONS[function]
    kind, settings = MEMBERS[member]
    theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = kind([theta], **settings)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = problem.value(theta)
        loss.backward()
        return loss

    for _ in range(2000):
        optimizer.step(closure)
        report: StepReport = optimizer.last_step
        if report.gradient_norm <= 1e-8 or (function in BY_VALUE and reached(report.loss, problem.minima)):
            break
    return report


def reached(loss: float, minima: tuple[float, ...]) -> bool:
    return any(loss == pytest.approx(minimum, rel=1e-6, abs=1e-8) for minimum in minima)
