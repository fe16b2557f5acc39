"""Curvature measurements with error bounds."""

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
