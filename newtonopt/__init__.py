"""Second-order optimizers for PyTorch, and curvature you can trust."""

import importlib
from types import ModuleType

from newtonopt import curvature as curvature
from newtonopt.evaluation import Evaluation
from newtonopt.linear_operator import LinearOperator
from newtonopt.objective import Objective, evaluate, mark_outputs
from newtonopt.operators import gauss_newton, hessian, jacobian
from newtonopt.optimizers import CubicNewton, DampedNewton, HessianFree, NewtonCG, StepReport, TrustRegionNewton

__version__ = "0.1.0"

__all__ = [
    "CubicNewton",
    "DampedNewton",
    "Evaluation",
    "HessianFree",
    "LinearOperator",
    "NewtonCG",
    "Objective",
    "StepReport",
    "TrustRegionNewton",
    "evaluate",
    "gauss_newton",
    "hessian",
    "jacobian",
    "mark_outputs",
]


def __getattr__(name: str) -> ModuleType:
    """Import `newtonopt.callbacks`, which needs Lightning, when it is asked for."""
    if name == "callbacks":
        try:
            return importlib.import_module("newtonopt.callbacks")
        except ImportError as error:
            raise AttributeError(str(error)) from error  # so that hasattr answers
    raise AttributeError(f"module 'newtonopt' has no attribute {name!r}")
