"""Newton optimizers.

- `newton`: the loop of all of them. `settings`: checks of what users set. `report`: what a step did.
- `hessian_free`, `damped_newton`, `newton_cg`, `trust_region`, `cubic`: the members. `regions` and `matrices`: what
  some of them share. `preconditioning`: sketches that are renewed.
- `trials`: from a proposal to the step taken. `rules`: how damping, radius and weight follow. `rates`: learning rates.
- `escape`: away from saddles. `checkpoints`: the state as it is saved.
"""

from newtonopt.optimizers.cubic import CubicNewton
from newtonopt.optimizers.damped_newton import DampedNewton
from newtonopt.optimizers.hessian_free import HessianFree
from newtonopt.optimizers.newton_cg import NewtonCG
from newtonopt.optimizers.report import StepReport
from newtonopt.optimizers.trust_region import TrustRegionNewton

__all__ = ["CubicNewton", "DampedNewton", "HessianFree", "NewtonCG", "StepReport", "TrustRegionNewton"]
