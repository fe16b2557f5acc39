"""Curvature measurements with error bounds.

Functions of a matrix or a closure, one subject each:

- `eigenvalues`: extreme eigenvalues, with an interval for each. `diagonal_blocks`: the matrix of each layer.
- `traces`: trace, Frobenius norm and diagonal. `density`: all eigenvalues. `effective_dimensions`: how many of them
  count.
- `along_gradient`: the curvature along the gradient. `critical_points`: minimum or saddle. `stability`: the curvature
  that an optimizer bears, and the matrix as it sees it.
- `ascent`: how much the loss rises nearby. `slices`: the loss along directions. `drawing`: axes for figures.

And what a training run measures again and again:

- `measurements`: one class for each, with its tags, charts, sentences and figures. They call the functions above.
- `measuring`: `measure`, which takes a list of them. The callbacks do the same.
"""

from newtonopt.curvature.along_gradient import GradientCurvature, gradient_curvature
from newtonopt.curvature.ascent import SharpnessEstimate, sharpness
from newtonopt.curvature.critical_points import CriticalPoint, critical_point
from newtonopt.curvature.density import SpectralDensity, spectral_density
from newtonopt.curvature.diagonal_blocks import blocks
from newtonopt.curvature.effective_dimensions import EffectiveDimension, effective_dimension
from newtonopt.curvature.eigenvalues.extreme import Eigenvalue, Spectrum, extreme_eigenvalues
from newtonopt.curvature.measurements.density import Density
from newtonopt.curvature.measurements.eigenvalues import ExtremeEigenvalues
from newtonopt.curvature.measurements.gradient import AlongGradient
from newtonopt.curvature.measurements.layers import Layers
from newtonopt.curvature.measurements.loss_slice import LossSlice
from newtonopt.curvature.measurements.measurement import (
    Chart,
    Histogram,
    Measured,
    Measurement,
    Tag,
    UnmeasurableError,
    View,
)
from newtonopt.curvature.measurements.preconditioned import Preconditioned
from newtonopt.curvature.measurements.sharpness import Sharpness
from newtonopt.curvature.measurements.stability import Stability
from newtonopt.curvature.measurements.trace import Trace
from newtonopt.curvature.measuring import measure
from newtonopt.curvature.slices import LossSurface, loss_slice
from newtonopt.curvature.stability import preconditioned, stability_threshold
from newtonopt.curvature.traces import Diagonal, FrobeniusNorm, TraceEstimate, diagonal, frobenius_norm, trace

__all__ = [
    "AlongGradient",
    "Chart",
    "CriticalPoint",
    "Density",
    "Diagonal",
    "EffectiveDimension",
    "Eigenvalue",
    "ExtremeEigenvalues",
    "FrobeniusNorm",
    "GradientCurvature",
    "Histogram",
    "Layers",
    "LossSlice",
    "LossSurface",
    "Measured",
    "Measurement",
    "Preconditioned",
    "Sharpness",
    "SharpnessEstimate",
    "SpectralDensity",
    "Spectrum",
    "Stability",
    "Tag",
    "Trace",
    "TraceEstimate",
    "UnmeasurableError",
    "View",
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
