"""The test functions have the published values at their starts and minima."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from functions import FUNCTIONS, Function
from scipy.optimize import minimize

# Published values at the standard starts: initial norms, squared, in the test results of MINPACK (lmder), function
# values from the tests of gonum/optimize; the others are worked by hand from the definition.
STARTS = {
    "rosenbrock": 24.2,
    "freudenstein_roth": 20.0124960961895**2,
    "powell_badly_scaled": 1.13526171734838,
    "brown_badly_scaled": 999998000003.0,
    "beale": 14.203125,
    "jennrich_sampson": 64.5856498144943**2,
    "helical_valley": 50.0**2,
    "bard": 6.45613629515967**2,
    "gaussian": 3.88810699116688e-06,
    "meyer": 41153.4665543031**2,
    "gulf": 12.11070582556949,
    "box": 32.1115837449572**2,
    "powell_singular": 14.6628782986152**2,
    "wood": 19192.0,
    "kowalik_osborne": 0.0728915102882945**2,
    "brown_dennis": 2815.43839161816**2,
    "osborne_1": 0.937564021037838**2,
    "biggs_exp6": 0.77907007565597,
    "osborne_2": 1.44686540984712**2,
    "watson_6": 5.47722557505166**2,
    "watson_9": 5.47722557505166**2,
    "extended_rosenbrock": 5 * 24.2,
    "extended_powell_singular": 3 * 215.0,
    "penalty_1": 885.06264,
    "penalty_2": 2.34000880546302,
    "variably_dimensioned": 3.85 + 38.5**2 + 38.5**4,
    "trigonometric": 0.00707575946622261,
    "brown_almost_linear": 16.5302162063499**2,
    "broyden_tridiagonal": 21.0,
    "broyden_banded": 360.0,
    "chebyquad": 0.196513862833975**2,
}


@pytest.mark.parametrize("name", STARTS)
def test_the_start_value_is_the_published_one(name: str) -> None:
    function = FUNCTIONS[name]
    assert float(function.value(_tensor(function.start))) == pytest.approx(STARTS[name], rel=1e-10)


def test_both_discretisations_have_one_solution() -> None:
    # 28 and 29 have no published start value. They are two equations for the same problem and check each other.
    x, y = (_minimise(FUNCTIONS[f"discrete_{kind}"])[0] for kind in ("boundary_value", "integral_equation"))
    assert x == pytest.approx(y, rel=1e-8)
    assert set(FUNCTIONS) - set(STARTS) == {"discrete_boundary_value", "discrete_integral_equation"}


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=list(FUNCTIONS))
def test_scipy_reaches_a_listed_minimum(function: Function) -> None:
    x, value = _minimise(function)
    assert np.isfinite(_gradient(function, x)).all()
    assert any(value == pytest.approx(minimum, rel=1e-6, abs=1e-12) for minimum in function.minima)


def _minimise(function: Function) -> tuple[np.ndarray, float]:
    """Minimise from the standard start with the exact Hessian."""
    with np.errstate(over="ignore"):
        result = minimize(
            lambda x: float(function.value(_tensor(x))),
            np.array(function.start, dtype=np.float64),
            method="trust-exact",
            jac=lambda x: _gradient(function, x),
            hess=lambda x: torch.autograd.functional.hessian(function.value, _tensor(x)).numpy(),
            options={"gtol": 1e-9, "maxiter": 400, "max_trust_radius": 1e8},
        )
    return result.x, float(result.fun)


def _gradient(function: Function, x: np.ndarray) -> np.ndarray:
    return np.asarray(torch.func.grad(function.value)(_tensor(x)))


def _tensor(x: np.ndarray | tuple[float, ...]) -> torch.Tensor:
    return torch.as_tensor(x, dtype=torch.float64)
