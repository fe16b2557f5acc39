"""The optimizers."""

from newtonopt.optimizers.damped_newton import DampedNewton
from newtonopt.optimizers.hessian_free import HessianFree
from newtonopt.optimizers.report import StepReport

__all__ = ["DampedNewton", "HessianFree", "StepReport"]
