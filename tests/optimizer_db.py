"""Every optimizer, in the configurations that must all pass the same tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from newtonopt import CubicNewton, DampedNewton, HessianFree, LevenbergMarquardt, NewtonCG, TrustRegionNewton
from newtonopt.optimizers.newton import NewtonOptimizer

Build = Callable[..., NewtonOptimizer]


def _with(kind: type[NewtonOptimizer], **settings: Any) -> Build:
    def build(params: Iterable[Tensor] | Iterable[dict[str, Any]], **more: Any) -> NewtonOptimizer:
        return kind(params, **{**settings, **more})

    return build


OPTIMIZERS: dict[str, Build] = {
    "hessian_free": _with(HessianFree, refresh_every=30),
    # With this first damping the battery's first steps are not rejected.
    "hessian_free_hessian": _with(HessianFree, curvature="hessian", damping=10.0, rank=5, refresh_every=20),
    "hessian_free_empirical_fisher": _with(HessianFree, preconditioner="empirical_fisher"),
    "hessian_free_plain": _with(HessianFree, preconditioner=None, warm_start=0.0),
    "hessian_free_retrying": _with(HessianFree, max_trials=4, refresh_every=30),
    "damped_newton": _with(DampedNewton),
    "damped_newton_gauss_newton": _with(DampedNewton, curvature="gauss_newton"),
    "damped_newton_shifted": _with(DampedNewton, eigenvalues="shifted"),
    "damped_newton_clamped": _with(DampedNewton, eigenvalues="clamped", max_trials=3),
    "damped_newton_blocks": _with(DampedNewton, blocks="parameter", max_trials=3),
    "levenberg_marquardt": _with(LevenbergMarquardt),
    "levenberg_marquardt_samples": _with(
        LevenbergMarquardt, solve="samples", acceleration=False, max_trials=1, damping=0.1
    ),
    "levenberg_marquardt_scaled": _with(LevenbergMarquardt, solve="parameters", scaling=1.0),
    "levenberg_marquardt_momentum": _with(LevenbergMarquardt, momentum=0.5),
    "newton_cg": _with(NewtonCG),
    "newton_cg_strong_wolfe": _with(NewtonCG, line_search="strong_wolfe"),
    "newton_cg_nystrom": _with(NewtonCG, preconditioner="nystrom", curvature="gauss_newton", rank=5, refresh_every=20),
    "newton_cg_gauss_newton": _with(NewtonCG, curvature="gauss_newton"),
    "trust_region": _with(TrustRegionNewton),
    "trust_region_retrying": _with(TrustRegionNewton, max_trials=4),
    "trust_region_lanczos": _with(TrustRegionNewton, subproblem="lanczos", max_trials=4),
    "trust_region_exact": _with(TrustRegionNewton, subproblem="exact", max_trials=4),
    "trust_region_gauss_newton": _with(TrustRegionNewton, curvature="gauss_newton"),
    # With this first weight the battery's first steps are not rejected.
    "cubic_newton": _with(CubicNewton, sigma=30.0),
    "cubic_newton_retrying": _with(CubicNewton, sigma=30.0, max_trials=4),
    "cubic_newton_exact": _with(CubicNewton, sigma=30.0, subproblem="exact", max_trials=4),
    "cubic_newton_gauss_newton": _with(CubicNewton, sigma=30.0, curvature="gauss_newton"),
}

# The Hessian is no choice of theirs: they know no negative curvature.
GAUSS_NEWTON = {name for name in OPTIMIZERS if "gauss_newton" in name or "levenberg" in name}

# Close to another configuration: among the slow tests.
FURTHER = {
    "hessian_free_plain",
    "hessian_free_retrying",
    "damped_newton_clamped",
    "damped_newton_gauss_newton",
    "damped_newton_shifted",
    "levenberg_marquardt_momentum",
    "levenberg_marquardt_scaled",
    "newton_cg_gauss_newton",
    "newton_cg_strong_wolfe",
    "trust_region_exact",
    "trust_region_gauss_newton",
    "trust_region_retrying",
    "cubic_newton_exact",
    "cubic_newton_gauss_newton",
    "cubic_newton_retrying",
}
