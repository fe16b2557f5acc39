"""Curvature measurements with error bounds.

Measurements of a symmetric operator:

- `eigenvalues`, a package: `extreme_eigenvalues`.
- `traces`: `trace`, `frobenius_norm`, `diagonal`, and the statistics that estimates by random vectors share.
- `density`: `spectral_density`, and all eigenvalues of a small operator.
- `effective_dimensions`: `effective_dimension`.
- `diagonal_blocks`: `blocks`, operators for parts of a model.

Measurements at a point, that is of an `Evaluation`, a closure or an optimizer:

- `critical_points`: `critical_point`. `along_gradient`: `gradient_curvature`.
- `gauss_newton_spectra`: `gauss_newton_spectrum`, all eigenvalues from the rows of the Jacobian.
- `tangent_kernels`: `neural_tangent_kernel`.
- `stability`: `stability_threshold` and `preconditioned`, the two numbers of the edge of stability.
- `ascent`: `sharpness`. `slices`: `loss_slice`.
- `step_margins`: `step_margin`, the loss along an optimizer's own step.

`drawing` makes the axes that densities and slices are drawn in. `showing` makes the tables of results in notebooks.

A training run measures again and again:

- `measurements`, a package: one class for each, with its tags, charts, sentences and figures. They call the functions
  above.
- `measuring`: `measure`, which takes a list of them, as the callbacks do.
- `dashboard`: `plot_history`, what was measured over the steps of a run, from `histories`, which `event_files` reads.
- `records`: `add_to_tensorboard`, the record of a measurement that TensorBoard's "Curvature" tab reads.
"""

from newtonopt.curvature.along_gradient import GradientCurvature, gradient_curvature
from newtonopt.curvature.ascent import SharpnessEstimate, sharpness
from newtonopt.curvature.critical_points import CriticalPoint, critical_point
from newtonopt.curvature.dashboard import plot_history
from newtonopt.curvature.density import SpectralDensity, spectral_density
from newtonopt.curvature.diagonal_blocks import blocks
from newtonopt.curvature.effective_dimensions import EffectiveDimension, effective_dimension
from newtonopt.curvature.eigenvalues.extreme import Eigenvalue, Spectrum, extreme_eigenvalues
from newtonopt.curvature.gauss_newton_spectra import ExactSpectrum, gauss_newton_spectrum
from newtonopt.curvature.measurements.alignment import Alignment
from newtonopt.curvature.measurements.density import Density
from newtonopt.curvature.measurements.eigenvalues import ExtremeEigenvalues
from newtonopt.curvature.measurements.gauss_newton import GaussNewtonSpectrum
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
from newtonopt.curvature.measurements.relative_sharpness import RelativeSharpness
from newtonopt.curvature.measurements.sharpness import Sharpness
from newtonopt.curvature.measurements.stability import Stability
from newtonopt.curvature.measurements.trace import Trace
from newtonopt.curvature.measuring import measure
from newtonopt.curvature.records import add_to_tensorboard
from newtonopt.curvature.slices import LossSurface, loss_slice
from newtonopt.curvature.stability import preconditioned, stability_threshold
from newtonopt.curvature.step_margins import StepMargin, step_margin
from newtonopt.curvature.tangent_kernels import neural_tangent_kernel
from newtonopt.curvature.traces import Diagonal, FrobeniusNorm, TraceEstimate, diagonal, frobenius_norm, trace

__all__ = [
    "Alignment",
    "AlongGradient",
    "Chart",
    "CriticalPoint",
    "Density",
    "Diagonal",
    "EffectiveDimension",
    "Eigenvalue",
    "ExactSpectrum",
    "ExtremeEigenvalues",
    "FrobeniusNorm",
    "GaussNewtonSpectrum",
    "GradientCurvature",
    "Histogram",
    "Layers",
    "LossSlice",
    "LossSurface",
    "Measured",
    "Measurement",
    "Preconditioned",
    "RelativeSharpness",
    "Sharpness",
    "SharpnessEstimate",
    "SpectralDensity",
    "Spectrum",
    "Stability",
    "StepMargin",
    "Tag",
    "Trace",
    "TraceEstimate",
    "UnmeasurableError",
    "View",
    "add_to_tensorboard",
    "blocks",
    "critical_point",
    "diagonal",
    "effective_dimension",
    "extreme_eigenvalues",
    "frobenius_norm",
    "gauss_newton_spectrum",
    "gradient_curvature",
    "loss_slice",
    "measure",
    "neural_tangent_kernel",
    "plot_history",
    "preconditioned",
    "sharpness",
    "spectral_density",
    "stability_threshold",
    "step_margin",
    "trace",
]
