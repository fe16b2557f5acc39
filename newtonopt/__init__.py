"""Second-order optimizers for PyTorch, and curvature you can trust."""

from newtonopt.evaluation import Evaluation
from newtonopt.linear_operator import LinearOperator
from newtonopt.objective import Objective, evaluate, mark_outputs
from newtonopt.operators import gauss_newton, hessian, jacobian
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
