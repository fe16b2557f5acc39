"""The optimizers."""

from newtonopt.optimizers.cubic import CubicNewton
from newtonopt.optimizers.damped_newton import DampedNewton
from newtonopt.optimizers.hessian_free import HessianFree
from newtonopt.optimizers.newton_cg import NewtonCG
from newtonopt.optimizers.report import StepReport
from newtonopt.optimizers.trust_region import TrustRegionNewton

__all__ = ["CubicNewton", "DampedNewton", "HessianFree", "NewtonCG", "StepReport", "TrustRegionNewton"]
