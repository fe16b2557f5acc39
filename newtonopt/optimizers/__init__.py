"""Newton optimizers.

- `newton`: the loop that all of them share: evaluate, propose, try, judge, commit. It begins with `settings`, which
  checks what users set, and ends with a `report`.
- `model`: the quadratic model of the loss, which computes every predicted decrease, and the proposals made from it.
- `hessian_free`, `levenberg_marquardt`, `damped_newton`, `newton_cg`, `trust_region_newton`, `cubic_newton`: the
  members, each a way to propose a step. `hessian_free` and `newton_cg` use `preconditioning`: when a sketch is renewed,
  with how many columns. `damped_newton`, `trust_region_newton` and `cubic_newton` use `subproblems`.
- `escape`: proposals that lead away from saddles, along negative curvature.
- `trials`: from a proposal to the step taken, and why a step is rejected, in words. `rules`: pure functions for ratios,
  controls (damping, radius, sigma) and line searches.
- `state`: what is remembered from step to step, and how it is saved.
"""

from newtonopt.optimizers.cubic_newton import CubicNewton
from newtonopt.optimizers.damped_newton import DampedNewton
from newtonopt.optimizers.hessian_free import HessianFree
from newtonopt.optimizers.levenberg_marquardt import LevenbergMarquardt
from newtonopt.optimizers.newton_cg import NewtonCG
from newtonopt.optimizers.report import StepReport
from newtonopt.optimizers.trust_region_newton import TrustRegionNewton

__all__ = [
    "CubicNewton",
    "DampedNewton",
    "HessianFree",
    "LevenbergMarquardt",
    "NewtonCG",
    "StepReport",
    "TrustRegionNewton",
]
