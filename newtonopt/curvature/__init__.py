"""Curvature measurements with error bounds."""

from newtonopt.curvature.eigenvalues import Eigenvalue, Spectrum, extreme_eigenvalues
from newtonopt.curvature.sharpness import Sharpness, sharpness
from newtonopt.curvature.stability import stability_threshold

__all__ = [
    "Eigenvalue",
    "Sharpness",
    "Spectrum",
    "extreme_eigenvalues",
    "sharpness",
    "stability_threshold",
]
