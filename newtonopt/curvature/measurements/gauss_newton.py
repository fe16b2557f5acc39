"""All eigenvalues of the Gauss-Newton matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from newtonopt.checks import check_positive, check_whole
from newtonopt.curvature.drawing import drawing
from newtonopt.curvature.gauss_newton_spectra import ExactSpectrum, gauss_newton_spectrum
from newtonopt.curvature.measurements.measurement import (
    Chart,
    Histogram,
    Measured,
    Measurement,
    Tag,
    UnmeasurableError,
    View,
)
from newtonopt.curvature.showing import written
from newtonopt.operators.matrices import gauss_newton
from newtonopt.operators.rows import RowsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Multiplications a second of one slow core, to tell beforehand whether there is time: 2e10 to 3e10 were measured.
_SPEED = 5e9
# Share of the largest eigenvalue that is the damping unless one is given.
_SHARE = 1e-3
_BARS = 60
_OTHERS = ' Density() and Trace() with curvature="gauss_newton" take products alone.'


@dataclass(frozen=True)
class GaussNewtonSpectrum(Measurement[ExactSpectrum]):
    """All eigenvalues of the Gauss-Newton matrix, exact to rounding, from the rows of the Jacobian, whichever matrix
    the other measurements are of.

    The cost grows as the cube of the smaller of two numbers: the outputs' entries on the probe, and the parameters.
    There is nothing to measure above `max_size`, where more than 512 output entries are of coupled samples (as by
    BatchNorm in training mode), where the loss is not convex in its outputs, or where products are not cached. A
    sentence says why; `Density` and `Trace` with curvature="gauss_newton" measure such a model by products.

    Args:
        damping: Damping of the effective dimension, positive; None (default): a thousandth of the largest eigenvalue.
        max_size: Largest size that is measured, one or more. Default 2000: a few seconds on one core.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import GaussNewtonSpectrum, measure
        >>> w = torch.ones(3, dtype=torch.float64, requires_grad=True)
        >>> target = torch.zeros(2, dtype=torch.float64)
        >>> def closure():
        ...     return torch.nn.functional.mse_loss(w[:2] * torch.tensor([1.0, 3.0]), target)
        >>> found = measure(closure, [w], measurements=[GaussNewtonSpectrum(damping=1.0)])
        >>> {tag[23:]: round(value, 6) for tag, value in found.items() if "gauss_newton" in tag}
        {'trace': 10.0, 'rank': 2.0, 'condition_number': 9.0, 'effective_dimension': 1.4}
        >>> print(found.in_words().splitlines()[-2])
        The Gauss-Newton matrix has 3 eigenvalues, 2 of them not zero, with a condition number of 9; 1.4 directions
        stand out of a damping of 1.

    See Also:
        - `gauss_newton_spectrum()`: the function behind it.
        - `Density`: by products, for a model of any size.
        - `docs/monitor.md`: how to add a measurement to a run.
    """

    damping: float | None = None
    max_size: int = 2000

    tags: ClassVar[tuple[Tag, ...]] = (
        Tag("gauss_newton_trace", "L / θ²", "the sum of all eigenvalues of the Gauss-Newton matrix"),
        Tag("gauss_newton_rank", "", "how many of them are not zero up to rounding"),
        Tag("gauss_newton_condition_number", "1", "the largest of them divided by the smallest that is not zero"),
        Tag(
            "gauss_newton_effective_dimension",
            "1",
            "the sum of λ / (λ + damping) over them: how many stand out of the damping",
        ),
        Tag("gauss_newton_spectrum", "", "a figure of them, the largest first"),
        Tag("gauss_newton_log10_eigenvalues", "", "a histogram of the logarithms of those that are not zero"),
    )
    charts: ClassVar[tuple[Chart, ...]] = (
        Chart("Directions of the Gauss-Newton matrix", ("gauss_newton_(rank|effective_dimension)",), more=True),
        Chart("Condition number of the Gauss-Newton matrix", ("gauss_newton_condition_number",), more=True),
    )

    def __post_init__(self) -> None:
        if self.damping is not None:
            check_positive("damping", self.damping)
        check_whole("max_size", self.max_size, 1)

    def measure(self, view: View) -> ExactSpectrum | None:
        """Return the spectrum, without vectors."""
        evaluation = view.evaluation
        if evaluation.form != "cached":
            raise UnmeasurableError('The rows of the Jacobian need the graph. Write products="cached".')
        n = evaluation.gradient.numel()
        own = evaluation.gradient.new_tensor([sum(evaluation.output_sizes.values()) or n], dtype=torch.float64)
        # Counted over all processes, which must come to the same decision.
        m = int(torch.cat(view.objective.collect(own)).sum())
        small, large = min(m, n), max(m, n)
        if small > self.max_size:
            raise UnmeasurableError(
                f"The smaller of {m} outputs and {n} parameters is above max_size={self.max_size}.{_OTHERS}"
            )
        if not view.has_time((large * small**2 + 4 * small**3) / _SPEED):
            return None
        try:
            gauss_newton(evaluation)
        except RuntimeError as error:  # no output is known, or the loss is linear in it
            raise UnmeasurableError(str(error)) from error
        try:
            return gauss_newton_spectrum(evaluation)
        except RowsError as error:
            raise UnmeasurableError(
                f"{error.reason}, so the rows of the Jacobian are not available.{_OTHERS}"
            ) from error
        except MemoryError as error:
            raise UnmeasurableError(str(error)) from error

    def values(self, result: ExactSpectrum) -> dict[str, float]:
        """Return trace, rank, condition number and effective dimension."""
        damping = self._damping(result)
        found = {
            "gauss_newton_trace": result.trace,
            "gauss_newton_rank": float(result.rank),
            "gauss_newton_condition_number": result.condition_number,
        }
        if damping > 0.0:
            found["gauss_newton_effective_dimension"] = result.effective_dimension(damping)
        return found

    def sentences(self, result: ExactSpectrum, measured: Measured) -> list[str]:
        """Return how many eigenvalues there are, and how many stand out."""
        count = f"The Gauss-Newton matrix has {result.size} eigenvalues, {result.rank} of them not zero"
        if math.isfinite(result.condition_number):
            count += f", with a condition number of {written(result.condition_number, 3)}"
        damping = self._damping(result)
        if damping == 0.0:
            return [f"{count}."]
        directions = result.effective_dimension(damping)
        source = ", a thousandth of the largest" if self.damping is None else ""
        return [
            f"{count}; {written(directions, 3)} directions stand out of a damping of {written(damping, 3)}{source}."
        ]

    def figures(self, result: ExactSpectrum) -> dict[str, Figure]:
        """Return the eigenvalues as a figure."""
        figure, (axes,) = drawing(1)
        result.plot(ax=axes)
        return {"gauss_newton_spectrum": figure}

    def histograms(self, result: ExactSpectrum) -> dict[str, Histogram]:
        """Return how many of the nonzero eigenvalues lie in each of equal ranges of their logarithm."""
        logarithms = result.nonzero.log10()
        if not len(logarithms):
            return {}
        low, high = float(logarithms.min()), float(logarithms.max())
        width = high - low if high - low > 1e-6 else 1.0
        edges = torch.linspace(low, low + width, _BARS + 1, dtype=torch.float64, device="cpu")
        bars = torch.bucketize(logarithms, edges[1:-1], right=True)
        counts = torch.bincount(bars, minlength=_BARS).double()
        return {"gauss_newton_log10_eigenvalues": Histogram(low, high, edges, counts)}

    def _damping(self, result: ExactSpectrum) -> float:
        """Return the damping of the effective dimension; zero if none was given and all eigenvalues are zero."""
        largest = float(result.values[0])
        return self.damping if self.damping is not None else _SHARE * largest if math.isfinite(largest) else 0.0
