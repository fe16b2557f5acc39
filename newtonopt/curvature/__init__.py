"""Curvature measurements with error bounds."""

from newtonopt.curvature.blocks import blocks
from newtonopt.curvature.eigenvalues import Eigenvalue, Spectrum, extreme_eigenvalues
from newtonopt.curvature.preconditioned import preconditioned
from newtonopt.curvature.sharpness import Sharpness, sharpness
from newtonopt.curvature.stability import stability_threshold

__all__ = [
    "Eigenvalue",
    "Sharpness",
    "Spectrum",
    "blocks",
    "extreme_eigenvalues",
    "preconditioned",
    "sharpness",
    "stability_threshold",
]
