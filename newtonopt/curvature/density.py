"""The whole spectrum of a symmetric operator, as a density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from newtonopt.checks import check_positive, check_seed, check_whole, shown
from newtonopt.curvature.drawing import figure_of, panels
from newtonopt.curvature.traces import few
from newtonopt.operators.linear_operator import LinearOperator, check_operator
from newtonopt.solvers.lanczos import lanczos
from newtonopt.vectors.random import normals, unit_vectors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Width of the kernel, as a share of the spectrum's: narrow enough to part outliers from the bulk, wide enough
# to join its nodes.
_WIDTH = 0.01
# Decades that the density's axis shows below its peak.
_DECADES = 8.0


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The share of the eigenvalues at each place.

    Attributes:
        nodes: Ritz values `(m,)` of all runs, float64 on the CPU, ascending within a run.
        weights: What share of the eigenvalues each stands for `(m,)`, adding up to one.
        runs: To which run a node belongs `(m,)`, counted from zero.
        size: How many eigenvalues there are.
        exact: Whether the nodes are the eigenvalues, each with the weight 1 / size.
        products: Products with the operator that were used.
    """

    nodes: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    runs: Tensor = field(repr=False)
    size: int
    exact: bool
    products: int

    def density(self, grid: Tensor | Sequence[float], width: float | None = None) -> Tensor:
        """The density smoothed by a normal kernel, which integrates to one.

        Args:
            grid: Where, `(g,)`: a tensor or numbers.
            width: Standard deviation of the kernel, positive; None (default): a hundredth of the spectrum's width.

        Raises:
            TypeError: `grid` holds something else than numbers.
            ValueError: `grid` has another shape or holds NaN, or `width` is not positive.
        """
        return self._smoothed(grid, width).mean(0)

    def density_error(self, grid: Tensor | Sequence[float], width: float | None = None) -> Tensor:
        """Standard error of `density(grid, width)`, `(g,)`, over the starts.

        Zero for an exact density, infinite for one start.
        """
        return self._error(self._smoothed(grid, width))

    def cumulative(self, grid: Tensor | Sequence[float]) -> Tensor:
        """The share of the eigenvalues at or below each place of `grid`, `(g,)`."""
        low, high = self._cumulatives(grid)
        return (0.5 * (low + high)).mean(0)

    def cumulative_error(self, grid: Tensor | Sequence[float]) -> Tensor:
        """Error of `cumulative(grid)`, `(g,)`: the standard error over the starts, and what the finite runs leave open.

        The share below a place, of a measure with these moments, is known up to the weights of the nodes next to it
        (the inequalities of Chebyshev, Markov and Stieltjes: Szegő 1975, sec. 3.41). Infinite for one start.
        """
        low, high = self._cumulatives(grid)
        if self.exact:
            return torch.zeros_like(low[0])
        return self._error(0.5 * (low + high)) + 0.5 * (high - low).mean(0)

    def plot(self, width: float | None = None, ax: Axes | None = None) -> Figure:
        """Draw the density on a logarithmic scale, with a band of one standard error up, and as far down on that scale.

        Args:
            width: Of the kernel, as for `density`.
            ax: The axes of matplotlib's to draw in; None (default): a new figure, which `plt.show()` shows.

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is missing.
            TypeError: `ax` is something else than axes.
        """
        return _figure(self, width, ax)

    def span(self) -> float:
        """Of the nodes, from the lowest to the highest; the size of the only value, or one, where they are equal."""
        low, high = float(self.nodes.min()), float(self.nodes.max())
        scale = max(abs(low), abs(high))
        return high - low if high - low > 1e-12 * scale else scale or 1.0

    def _count(self) -> int:
        return int(self.runs.max()) + 1

    def _smoothed(self, grid: Tensor | Sequence[float], width: float | None) -> Tensor:
        """Of each run, `(runs, g)`."""
        if width is None:
            width = _WIDTH * self.span()
        check_positive("width", width)
        points = _places(grid)
        kernel = torch.exp(-0.5 * ((points - self.nodes[:, None]) / width).square())
        pieces = self.weights[:, None] * kernel / (width * math.sqrt(2.0 * math.pi))
        return self._per_run(pieces)

    def _per_run(self, pieces: Tensor) -> Tensor:
        count = self._count()
        return (
            torch.zeros(count, pieces.shape[1], dtype=torch.float64, device="cpu").index_add_(0, self.runs, pieces)
            * count
        )

    def _cumulatives(self, grid: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
        """Bounds of each run's share at or below each place, `(runs, g)`."""
        points = _places(grid)
        lows, highs = [], []
        for run in range(self._count()):
            mine = self.runs == run
            nodes, weights = self.nodes[mine], self.weights[mine] * self._count()
            below = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), weights.cumsum(0)])
            at = torch.searchsorted(nodes, points, right=True)
            if self.exact:
                lows.append(below[at])
                highs.append(below[at])
                continue
            lows.append(below[(at - 1).clamp_min(0)])
            highs.append(below[(at + 1).clamp_max(len(nodes))])
        return torch.stack(lows), torch.stack(highs)

    def _error(self, each: Tensor) -> Tensor:
        if self.exact:
            return torch.zeros_like(each[0])
        count = each.shape[0]
        if count == 1:
            return torch.full_like(each[0], math.inf)
        return few(count) * (each - each.mean(0)).square().mean(0).sqrt()


def _places(grid: Tensor | Sequence[float]) -> Tensor:
    try:
        points = torch.as_tensor(grid, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"grid must be a tensor of places `(g,)`, or numbers, got {shown(grid)}.") from error
    if points.dim() != 1 or bool(points.isnan().any()):
        raise ValueError(f"grid must be places `(g,)`, none of them NaN, got {shown(grid)}.")
    return points


def spectral_density(operator: LinearOperator, steps: int = 50, starts: int = 5, seed: int = 0) -> SpectralDensity:
    """Stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017; Ghorbani, Krishnan & Xiao 2019).

    A Lanczos run from a random unit vector v gives nodes and weights whose first `2 steps - 1` moments are those of the
    measure v'f(A)v, and the mean of that measure over v is the density. A run that finds an invariant space ends
    there, with exact moments.

    Where `starts * steps` reaches n, n products with unit vectors and the dense eigenvalues give the exact density
    instead: n nodes of weight 1 / n. Many steps resolve the spectrum, many starts make its weights sure.

    Memory is that of `steps` vectors of length n; of three times n in the exact case.

    Args:
        operator: Symmetric `(n, n)`.
        steps: Products a run, >= 1. Default 50.
        starts: Runs, >= 1; one leaves the standard errors unknown. Default 5.
        seed: Seed of the random vectors; the global random state is neither read nor written.

    Returns:
        Nodes and weights.

    Raises:
        TypeError: `operator` is no `LinearOperator`.
        ValueError: An argument is out of range, or the operator is not square.
        FloatingPointError: A product is not finite.
    """
    size = check_operator(operator)
    check_whole("steps", steps, 1)
    check_whole("starts", starts, 1)
    check_seed(seed)
    if starts * steps >= size:
        weights = torch.full((size,), 1.0 / size, dtype=torch.float64, device="cpu")
        runs = torch.zeros(size, dtype=torch.int64, device="cpu")
        return SpectralDensity(all_eigenvalues(operator), weights, runs, size, True, size)
    generator = torch.Generator().manual_seed(seed)
    nodes, weights_of, numbers = [], [], []
    for number in range(starts):
        tridiagonal = lanczos(operator, normals(operator.like, generator), steps).tridiagonal
        values, coordinates = tridiagonal.ritz()
        nodes.append(values)
        weights_of.append(coordinates[0].square() / starts)
        numbers.append(torch.full((tridiagonal.size,), number, device="cpu"))
    total = sum(len(values) for values in nodes)
    return SpectralDensity(torch.cat(nodes), torch.cat(weights_of), torch.cat(numbers), size, False, total)


def all_eigenvalues(operator: LinearOperator) -> Tensor:
    """All eigenvalues of an operator, ascending, float64 on the CPU: n products, and n vectors of memory."""
    units = list(unit_vectors(operator.like))
    columns = torch.stack([operator @ unit for unit in units])
    matrix = torch.stack([columns @ unit for unit in units]).to("cpu", torch.float64)
    if not bool(matrix.isfinite().all()):
        raise FloatingPointError("a product with the operator is not finite, so its eigenvalues cannot be told.")
    values: Tensor = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    return values


def _figure(measured: SpectralDensity, width: float | None, ax: Axes | None) -> Figure:
    """The density on a logarithmic scale, with a band of one standard error up, and as far down on that scale.

    Args:
        measured: What to draw.
        width: Of the kernel; None (default): as `SpectralDensity.density` chooses.
        ax: Where to draw; None (default): in a new figure of pyplot.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `ax` is something else than axes.
    """
    (axes,) = panels(ax, 1)
    margin = 0.05 * measured.span()
    low, high = float(measured.nodes.min()) - margin, float(measured.nodes.max()) + margin
    grid = torch.linspace(low, high, 1000, dtype=torch.float64, device="cpu")
    density = measured.density(grid, width)
    floor = float(density.max()) * 10.0**-_DECADES
    density = density.clamp_min(floor)
    # Density less error has no logarithm where few of the starts have nodes.
    factor = 1.0 + measured.density_error(grid, width) / density
    axes.semilogy(grid.numpy(), density.numpy(), color="C0", linewidth=1.5)
    if bool(factor.isfinite().all()) and not measured.exact:
        lower, upper = (density / factor).clamp_min(floor), density * factor
        axes.fill_between(grid.numpy(), lower.numpy(), upper.numpy(), color="C0", alpha=0.25, linewidth=0)
    axes.axvline(0.0, color="0.6", linewidth=0.8, zorder=0)
    axes.set(xlabel="eigenvalue", ylabel="density", xlim=(low, high), ylim=(floor, 3.0 * float(density.max())))
    how = "exact" if measured.exact else f"{int(measured.runs.max()) + 1} starts"
    axes.set_title(f"{measured.size} eigenvalues ({how}, {measured.products} products)", fontsize="medium")
    return figure_of(axes)
