"""Second-order optimizers for PyTorch, and curvature you can trust."""

from newtonopt.objective import Evaluation, Objective, evaluate, mark_outputs
from newtonopt.operators import LinearOperator, gauss_newton, hessian, jacobian
from newtonopt.optimizers import DampedNewton, HessianFree, StepReport

__version__ = "0.1.0"

__all__ = [
    "DampedNewton",
    "Evaluation",
    "HessianFree",
    "LinearOperator",
    "Objective",
    "StepReport",
    "evaluate",
    "gauss_newton",
    "hessian",
    "jacobian",
    "mark_outputs",
]
