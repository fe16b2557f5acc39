"""What a measurement of a loss's curvature is told to hold, and what it holds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from newtonopt.checks import (
    check_choice,
    check_flag,
    check_positive,
    check_seed,
    check_share,
    check_whole,
    shown,
)
from newtonopt.closure.evaluation import Matrix as Checked
from newtonopt.closure.evaluation import Products, Verdict, check_products
from newtonopt.curvature.density import SpectralDensity
from newtonopt.curvature.diagonal_blocks import are_patterns
from newtonopt.curvature.eigenvalues.extreme import Spectrum
from newtonopt.curvature.sharpness import Kind
from newtonopt.curvature.slices import LossSlice
from newtonopt.curvature.words import describe

Matrix = Literal["hessian", "gauss_newton"]
Layers = Literal["parts"] | Sequence[str] | None


@dataclass(frozen=True)
class Settings:
    """What a measurement holds and may cost: the arguments of `measure`, checked."""

    top: int = 3
    bottom: int = 1
    curvature: Matrix = "hessian"
    gradient: bool = True
    preconditioned: bool = False
    layers: Layers = None
    trace: bool = False
    density: bool = False
    sharpness: Kind | None = "ball"
    sharpness_radius: float = 0.05
    loss_slice: int = 0
    slice_radius: float = 1.0
    products: Products = "auto"
    tolerance: float = 1e-2
    max_products: int = 100
    max_seconds: float | None = None
    seed: int = 0
    prefix: str = "curvature"

    def __post_init__(self) -> None:
        for name, least in (("top", 1), ("bottom", 0), ("loss_slice", 0), ("max_products", 1)):
            check_whole(name, getattr(self, name), least)
        check_seed(self.seed)
        for name in ("gradient", "preconditioned", "trace", "density"):
            check_flag(name, getattr(self, name))
        check_choice("curvature", self.curvature, get_args(Matrix))
        check_choice("sharpness", self.sharpness, (*get_args(Kind), None))
        check_choice("loss_slice", self.loss_slice, (0, 1, 2))
        if self.loss_slice > self.top + self.bottom:
            raise ValueError(
                f"loss_slice must be at most top + bottom, {self.top + self.bottom}, for it is along those "
                f"eigenvectors, got {self.loss_slice}. Raise top or bottom."
            )
        for name in ("sharpness_radius", "slice_radius", *([] if self.max_seconds is None else ["max_seconds"])):
            check_positive(name, getattr(self, name))
        check_share("tolerance", self.tolerance)
        if not (self.layers in (None, "parts") or are_patterns(self.layers)):
            raise ValueError(
                f"layers must be a list of patterns of parameters' names, 'parts' or None, got {shown(self.layers)}. "
                "Write ['encoder.*'], for example."
            )
        if not isinstance(self.prefix, str) or not re.fullmatch(r"[-\w.]+(/[-\w.]+)*", self.prefix):
            raise ValueError(
                "prefix must be made of letters, digits, '_', '-' and '.', with single '/' between, got "
                f"{shown(self.prefix)}. Write 'curvature', for example."
            )
        check_products(self.products)


class Measurement(dict[str, float]):
    """Values by tag, such as `{"curvature/lambda_max": 12.4, ...}`, and what they were taken from.

    Args:
        settings: What was asked for.

    Attributes:
        settings: What was asked for.
        spectra: The eigenvalues with their vectors, by name: "lambda" those of the matrix itself.
        sharpest: The displacement that attains the sharpness in a ball.
        density: Of all eigenvalues, where it was asked for.
        slice: The loss along eigenvectors, where it was asked for.
        form: How products were formed.
        verdicts: Verdicts of the checks of products, for measurements that follow.
        doubt: Why the products cannot be vouched for; empty where they can.
        lack: Why there is no preconditioned eigenvalue, where it was asked for; None where there is, or no time.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.spectra: dict[str, Spectrum] = {}
        self.sharpest: Tensor | None = None
        self.density: SpectralDensity | None = None
        self.slice: LossSlice | None = None
        self.form: Products = "auto"
        self.verdicts: Mapping[Checked, Verdict] = {}
        self.doubt = ""
        self.lack: str | None = None

    @property
    def prefix(self) -> str:
        """The tags' group."""
        return self.settings.prefix

    @property
    def spectrum(self) -> Spectrum | None:
        """Of the matrix itself; None where the time was too short."""
        return self.spectra.get("lambda")

    def read(self, name: str) -> float | None:
        """The value without its tag's prefix; None if it was not measured."""
        return self.get(f"{self.prefix}/{name}")

    def in_words(self) -> str:
        """What the values mean, one sentence each."""
        lack = [] if self.lack is None else [f"There is no preconditioned eigenvalue: {self.lack}"]
        doubt = [f"Nothing is certified: {self.doubt}"] if self.doubt else []
        return "\n".join([*doubt, *describe(self.read, self.settings), *lack])

    def add(self, name: str, value: float) -> None:
        """Enter a value, unless it is not finite, which no chart can show."""
        if math.isfinite(value):
            self[f"{self.prefix}/{name}"] = float(value)
