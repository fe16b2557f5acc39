"""The density of all eigenvalues."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from newtonopt.curvature.density import SpectralDensity, spectral_density
from newtonopt.curvature.drawing import drawing
from newtonopt.curvature.measurements.measurement import Histogram, Measurement, Tag, View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Products of one Lanczos run. There are as many runs as the budget allows, at least two.
_STEPS = 50
_BARS = 60


@dataclass(frozen=True)
class Density(Measurement[SpectralDensity]):
    """The density of all eigenvalues, as a figure and a histogram, for up to 100 products, or `max_products` where that
    is more.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import Density, measure
        >>> w = torch.ones(3, dtype=torch.float64, requires_grad=True)
        >>> weights = torch.tensor([1.0, 2.0, 3.0])
        >>> found = measure(lambda: 0.5 * (weights * w**2).sum(), [w], measurements=[Density()])
        >>> [round(node, 6) for node in found.of(Density).nodes.tolist()]
        [1.0, 2.0, 3.0]

    See Also:
        - `spectral_density()`: the function behind it.
        - `GaussNewtonSpectrum`: all eigenvalues, exact, of one matrix.
        - `docs/read_your_curvature.md`: what a density says about a run.
    """

    tags: ClassVar[tuple[Tag, ...]] = (
        Tag("spectral_density", "", "a figure of the density of all eigenvalues"),
        Tag("eigenvalues_log_count", "", "a histogram of all eigenvalues, with log10(1 + count) for each bin"),
    )

    def measure(self, view: View) -> SpectralDensity | None:
        """Return the density, from as many Lanczos runs as the budget allows."""
        budget = view.affordable_for_whole_spectrum()
        if budget == 0:
            return None
        starts = max(2, budget // _STEPS)
        return spectral_density(view.matrix, steps=budget // starts, starts=starts, seed=view.plan.seed)

    def values(self, result: SpectralDensity) -> dict[str, float]:
        """Return no number: a density is looked at."""
        return {}

    def figures(self, result: SpectralDensity) -> dict[str, Figure]:
        """Return the density as a figure."""
        figure, (axes,) = drawing(1)
        result.plot(ax=axes)
        return {"spectral_density": figure}

    def histograms(self, result: SpectralDensity) -> dict[str, Histogram]:
        """Return how many eigenvalues lie in each of equal ranges, as log10(1 + count): nearly all lie next to zero."""
        low, high = float(result.nodes.min()), float(result.nodes.max())
        edges = torch.linspace(low, low + result.span(), _BARS + 1, dtype=torch.float64, device="cpu")
        bars = torch.bucketize(result.nodes, edges[1:-1], right=True)
        counts = torch.zeros(_BARS, dtype=torch.float64, device="cpu")
        counts.index_add_(0, bars, result.weights * result.size)
        # A tag of its own: TensorBoard shows what was written first under a tag, and drops the rest.
        return {"eigenvalues_log_count": Histogram(low, high, edges, torch.log10(1.0 + counts))}
