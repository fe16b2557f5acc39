"""Second-order optimizers for PyTorch, and curvature you can trust.

From the ground up, each package built on those before it:

- `checks`, `progress` and `lightning`: argument checks; progress bars; special cases for Lightning.
- `vectors`: flat vectors, whole or sharded, over one or several processes.
- `autodiff`: derivatives, graphs, and kernels that can be differentiated twice.
- `closure`: the user's closure as an `Objective`, and what is known of it at a point, an `Evaluation`.
- `operators`: curvature matrices, known by their products, which are checked before they are trusted.
- `solvers`: linear systems and eigenvalues of anything with `A @ v`.
- `optimizers`: Newton steps. `curvature`: measurements.
- `callbacks`: Lightning's monitors, which use both; imported when they are asked for.
- `doctor`: what works on this machine. `__main__`: the command line, `python -m newtonopt doctor`.
"""

import importlib
from types import ModuleType

from newtonopt import curvature as curvature
from newtonopt.closure.evaluation import Evaluation
from newtonopt.closure.objective import Objective, evaluate
from newtonopt.closure.tap import mark_outputs
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.operators.matrices import gauss_newton, hessian, jacobian
from newtonopt.optimizers import (
    CubicNewton,
    DampedNewton,
    HessianFree,
    LevenbergMarquardt,
    NewtonCG,
    StepReport,
    TrustRegionNewton,
)

__version__ = "0.2.0"

__all__ = [
    "CubicNewton",
    "DampedNewton",
    "Evaluation",
    "HessianFree",
    "LevenbergMarquardt",
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
