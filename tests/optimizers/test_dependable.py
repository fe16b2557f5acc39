"""Every optimizer of the exact Hessian, with its defaults, on the classical test functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functions import FUNCTIONS

from newtonopt import CubicNewton, DampedNewton, HessianFree, NewtonCG, TrustRegionNewton

# Flat or badly scaled to the point where no method, SciPy's included, brings the gradient to 1e-8: judged by the value.
BY_VALUE = {"brown_dennis", "jennrich_sampson", "meyer"}
MEMBERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "damped_newton": (DampedNewton, {}),
    "hessian_free": (HessianFree, {"curvature": "hessian"}),
    "newton_cg": (NewtonCG, {}),
    "trust_region": (TrustRegionNewton, {}),
    "trust_region_lanczos": (TrustRegionNewton, {"subproblem": "lanczos"}),
    "cubic": (CubicNewton, {}),
}
# Left out: they follow Meyer's valley, of condition 1e14, for more steps than are allowed here, as SciPy's do.
SLOW_IN_MEYERS_VALLEY = {"newton_cg", "trust_region", "trust_region_lanczos", "cubic"}
RUNS = [(m, f) for m in MEMBERS for f in FUNCTIONS if not (f == "meyer" and m in SLOW_IN_MEYERS_VALLEY)]


@pytest.mark.slow
@pytest.mark.parametrize(("member", "function"), RUNS)
def test_reaches_a_minimum_from_the_standard_start(member: str, function: str) -> None:
    problem = FUNCTIONS[function]
    kind, settings = MEMBERS[member]
    theta = torch.tensor(problem.start, dtype=torch.float64, requires_grad=True)
    optimizer = kind([theta], **settings)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = problem.value(theta)
        loss.backward()
        return loss

    for _ in range(2000):
        optimizer.step(closure)
        report = optimizer.last_step
        if report.gradient_norm <= 1e-8 or (function in BY_VALUE and reached(report.loss, problem.minima)):
            break
    assert report.gradient_norm <= 1e-8 or function in BY_VALUE
    assert reached(report.loss, problem.minima), report


def reached(loss: float, minima: tuple[float, ...]) -> bool:
    return any(loss == pytest.approx(minimum, rel=1e-6, abs=1e-8) for minimum in minima)
