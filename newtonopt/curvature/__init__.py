"""Curvature measurements with error bounds.

Measurements of a symmetric operator:

- `eigenvalues`, a package: `extreme_eigenvalues`.
- `traces`: `trace`, `frobenius_norm`, `diagonal`, and the statistics that estimates by random vectors share.
- `density`: `spectral_density`, and all eigenvalues of a small operator.
- `effective_dimensions`: `effective_dimension`.
- `diagonal_blocks`: `blocks`, operators for parts of a model.

Measurements at a point, that is of an `Evaluation`, a closure or an optimizer:

- `critical_points`: `critical_point`. `along_gradient`: `gradient_curvature`.
- `stability`: `stability_threshold` and `preconditioned`, the two numbers of the edge of stability.
- `sharpness` and `ascent`. `slices` and `figures`.

`drawing` makes the axes that densities and slices are drawn in.

All of them together: `measure`, `measurement`, `parts`, `words`.
"""

from newtonopt.curvature.along_gradient import GradientCurvature, gradient_curvature
from newtonopt.curvature.critical_points import CriticalPoint, critical_point
from newtonopt.curvature.density import SpectralDensity, spectral_density
from newtonopt.curvature.diagonal_blocks import blocks
from newtonopt.curvature.effective_dimensions import EffectiveDimension, effective_dimension
from newtonopt.curvature.eigenvalues.extreme import Eigenvalue, Spectrum, extreme_eigenvalues
from newtonopt.curvature.measure import measure
from newtonopt.curvature.measurement import Measurement
from newtonopt.curvature.sharpness import Sharpness, sharpness
from newtonopt.curvature.slices import LossSlice, loss_slice
from newtonopt.curvature.stability import preconditioned, stability_threshold
from newtonopt.curvature.traces import Diagonal, FrobeniusNorm, TraceEstimate, diagonal, frobenius_norm, trace

__all__ = [
    "CriticalPoint",
    "Diagonal",
    "EffectiveDimension",
    "Eigenvalue",
    "FrobeniusNorm",
    "GradientCurvature",
    "LossSlice",
    "Measurement",
    "Sharpness",
    "SpectralDensity",
    "Spectrum",
    "TraceEstimate",
    "blocks",
    "critical_point",
    "diagonal",
    "effective_dimension",
    "extreme_eigenvalues",
    "frobenius_norm",
    "gradient_curvature",
    "loss_slice",
    "measure",
    "preconditioned",
    "sharpness",
    "spectral_density",
    "stability_threshold",
    "trace",
]
