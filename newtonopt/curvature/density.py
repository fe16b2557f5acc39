"""The whole spectrum of a symmetric operator: as a density, and eigenvalue by eigenvalue if the operator is small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from newtonopt.checks import check_positive, check_seed, check_whole, shown
from newtonopt.curvature.drawing import figure_of, panels
from newtonopt.curvature.showing import as_table, as_text
from newtonopt.curvature.traces import student_factor
from newtonopt.operators.linear_operator import LinearOperator, check_operator
from newtonopt.solvers.lanczos import lanczos
from newtonopt.vectors.random import normals, unit_vectors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Width of the kernel, as a share of the spectrum's width: narrow enough to part outliers from the bulk, wide enough to
# join the nodes of the bulk.
_WIDTH = 0.01
# Decades that the figure's axis shows below the peak.
_DECADES = 8.0


@dataclass(frozen=True, eq=False, repr=False)
class SpectralDensity:
    """A distribution of eigenvalues, as nodes with weights.

    Attributes:
        nodes: Ritz values `(m,)` of all runs, float64 on the CPU, ascending within a run.
        weights: Share of the eigenvalues that each node stands for `(m,)`; the shares sum to one.
        runs: Number of the run that each node belongs to `(m,)`, counted from zero.
        size: Number of eigenvalues.
        exact: Whether the nodes are the eigenvalues, each with the weight 1 / size.
        products: Number of products with the operator that were used.

    Example:
        >>> import torch
        >>> from newtonopt import LinearOperator
        >>> from newtonopt.curvature import spectral_density
        >>> A = torch.diag(torch.tensor([0.0, 0.0, 1.0, 10.0], dtype=torch.float64))
        >>> found = spectral_density(LinearOperator(A.mv, A.shape, A))
        >>> found.cumulative([-1.0, 0.5, 20.0]).tolist()
        [0.0, 0.5, 1.0]

    See Also:
        - `spectral_density()`: computes it.
        - `ExactSpectrum`: all eigenvalues themselves.
        - `docs/read_your_curvature.md`: what a density says about a run.
    """

    nodes: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    runs: Tensor = field(repr=False)
    size: int
    exact: bool
    products: int

    def __repr__(self) -> str:
        return as_text(self, self._ends())

    def _repr_html_(self) -> str:
        return as_table(self, self._ends())

    def _ends(self) -> dict[str, float]:
        return {"smallest": float(self.nodes.min()), "largest": float(self.nodes.max())}

    def density(self, grid: Tensor | Sequence[float], width: float | None = None) -> Tensor:
        """Return the density at points, smoothed by a normal kernel; it integrates to one.

        Args:
            grid: Points `(g,)`, a tensor or numbers.
            width: Standard deviation of the kernel, positive; None (default): a hundredth of the spectrum's width.

        Returns:
            The density, `(g,)`, float64 on the CPU.

        Raises:
            TypeError: `grid` does not hold numbers.
            ValueError: `grid` has another shape or holds NaN, or `width` is not positive.
        """
        return self._smoothed(grid, width).mean(0)

    def density_error(self, grid: Tensor | Sequence[float], width: float | None = None) -> Tensor:
        """Return the standard error of `density(grid, width)`, `(g,)`, over the random starts.

        The error is zero for an exact density and infinite for a single start.
        """
        return self._error(self._smoothed(grid, width))

    def cumulative(self, grid: Tensor | Sequence[float]) -> Tensor:
        """Return the share of the eigenvalues at or below each point of `grid`, `(g,)`."""
        low, high = self._cumulatives(grid)
        return (0.5 * (low + high)).mean(0)

    def cumulative_error(self, grid: Tensor | Sequence[float]) -> Tensor:
        """Return the error of `cumulative(grid)`, `(g,)`; infinite for a single start.

        It is the standard error over the starts, plus what runs of finite length leave open: the moments determine the
        share below a point up to the weights of the nodes next to it (the inequalities of Chebyshev, Markov and
        Stieltjes: Szegő 1975, sec. 3.41).
        """
        low, high = self._cumulatives(grid)
        if self.exact:
            return torch.zeros_like(low[0])
        return self._error(0.5 * (low + high)) + 0.5 * (high - low).mean(0)

    def plot(self, width: float | None = None, ax: Axes | None = None) -> Figure:
        """Draw the density on a logarithmic scale, with a band of one standard error up, and as far down on that scale.

        Args:
            width: Standard deviation of the kernel; None (default): as for `density`.
            ax: Axes of matplotlib to draw in; None (default): a new figure, which `plt.show()` shows.

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is missing.
            TypeError: `ax` is not axes.
        """
        (axes,) = panels(ax, 1)
        margin = 0.05 * self.span()
        low, high = float(self.nodes.min()) - margin, float(self.nodes.max()) + margin
        grid = torch.linspace(low, high, 1000, dtype=torch.float64, device="cpu")
        density = self.density(grid, width)
        floor = float(density.max()) * 10.0**-_DECADES
        density = density.clamp_min(floor)
        # The band ends at density + error and density^2 / (density + error): the difference density - error has no
        # logarithm where few of the starts have nodes.
        factor = 1.0 + self.density_error(grid, width) / density
        axes.semilogy(grid.numpy(), density.numpy(), color="C0", linewidth=1.5)
        if bool(factor.isfinite().all()) and not self.exact:
            lower, upper = (density / factor).clamp_min(floor), density * factor
            axes.fill_between(grid.numpy(), lower.numpy(), upper.numpy(), color="C0", alpha=0.25, linewidth=0)
        axes.axvline(0.0, color="0.6", linewidth=0.8, zorder=0)
        axes.set(xlabel="eigenvalue", ylabel="density", xlim=(low, high), ylim=(floor, 3.0 * float(density.max())))
        how = "exact" if self.exact else f"{self._count()} starts"
        axes.set_title(f"{self.size} eigenvalues ({how}, {self.products} products)", fontsize="medium")
        return figure_of(axes)

    def span(self) -> float:
        """Return the width of the spectrum; if all nodes are equal, the magnitude of their value, or one."""
        low, high = float(self.nodes.min()), float(self.nodes.max())
        scale = max(abs(low), abs(high))
        return high - low if high - low > 1e-12 * scale else scale or 1.0

    def _count(self) -> int:
        return int(self.runs.max()) + 1

    def _smoothed(self, grid: Tensor | Sequence[float], width: float | None) -> Tensor:
        """Return each run's density at the points, `(runs, g)`."""
        if width is None:
            width = _WIDTH * self.span()
        check_positive("width", width)
        kernel = torch.exp(-0.5 * ((_points(grid) - self.nodes[:, None]) / width).square())
        pieces = self.weights[:, None] * kernel / (width * math.sqrt(2.0 * math.pi))
        count = self._count()
        sums = torch.zeros(count, pieces.shape[1], dtype=torch.float64, device="cpu")
        return sums.index_add_(0, self.runs, pieces) * count

    def _cumulatives(self, grid: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return bounds on each run's share at or below the points, `(runs, g)`."""
        points = _points(grid)
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
            # The last node at or below the point may stand for eigenvalues above it, the next node for some below it.
            lows.append(below[(at - 1).clamp_min(0)])
            highs.append(below[(at + 1).clamp_max(len(nodes))])
        return torch.stack(lows), torch.stack(highs)

    def _error(self, each: Tensor) -> Tensor:
        """Return the standard error of the mean over the runs `(runs, g)`."""
        if self.exact:
            return torch.zeros_like(each[0])
        count = each.shape[0]
        if count == 1:
            return torch.full_like(each[0], math.inf)
        return student_factor(count) * (each - each.mean(0)).square().mean(0).sqrt()


def _points(grid: Tensor | Sequence[float]) -> Tensor:
    try:
        points = torch.as_tensor(grid, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"grid must be a tensor of points `(g,)`, or numbers, got {shown(grid)}.") from error
    if points.dim() != 1 or bool(points.isnan().any()):
        raise ValueError(f"grid must be points `(g,)`, none of them NaN, got {shown(grid)}.")
    return points


def spectral_density(operator: LinearOperator, steps: int = 50, starts: int = 5, seed: int = 0) -> SpectralDensity:
    """Estimate the density of eigenvalues by stochastic Lanczos quadrature.

    A Lanczos run from a random unit vector v gives nodes and weights whose first `2 steps - 1` moments are those of the
    measure f -> v'f(A)v, and the mean of that measure over v is the density (Ubaru, Chen & Saad 2017; Ghorbani,
    Krishnan & Xiao 2019). A run that finds an invariant subspace ends there, with exact moments. Many steps resolve the
    spectrum, many starts make the weights certain.

    If `starts * steps` reaches n, n products with unit vectors and the dense eigenvalues give the exact density
    instead: n nodes of weight 1 / n.

    Memory is `steps` vectors of length n, or three times n vectors in the exact case.

    Args:
        operator: Symmetric operator `(n, n)`.
        steps: Number of products of a run, >= 1. Default 50.
        starts: Number of runs, >= 1; one leaves the standard errors unknown. Default 5.
        seed: Seed of the random vectors; the global random state is neither read nor written. Default 0.

    Returns:
        Nodes and weights.

    Raises:
        TypeError: `operator` is no `LinearOperator`.
        ValueError: An argument is out of range, or the operator is not square.
        FloatingPointError: A product is not finite.

    Example:
        >>> import torch
        >>> from newtonopt import LinearOperator
        >>> from newtonopt.curvature import spectral_density
        >>> scales = torch.cat([torch.ones(900), torch.full((100,), 5.0)]).double()
        >>> found = spectral_density(LinearOperator(lambda v: scales * v, (1000, 1000), scales), steps=2)
        >>> [round(node, 3) for node in found.nodes[:2].tolist()], found.products
        ([1.0, 5.0], 10)

    See Also:
        - `SpectralDensity`: the result, which can be drawn.
        - `gauss_newton_spectrum()`: exact, and cheaper for small models or few samples.
        - `Density`: the same in a training run.
        - `docs/reference/mathematics.md`: stochastic Lanczos quadrature.
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
        # Gauss's rule: the nodes are the Ritz values, the weights the squared first entries of T's eigenvectors (Golub
        # & Welsch 1969).
        values, coordinates = tridiagonal.ritz()
        nodes.append(values)
        weights_of.append(coordinates[0].square() / starts)
        numbers.append(torch.full((tridiagonal.size,), number, device="cpu"))
    total = sum(len(values) for values in nodes)
    return SpectralDensity(torch.cat(nodes), torch.cat(weights_of), torch.cat(numbers), size, False, total)


def all_eigenvalues(operator: LinearOperator) -> Tensor:
    """Return all eigenvalues, ascending, float64 on the CPU, by n products and n vectors of memory; shards too."""
    units = list(unit_vectors(operator.like))
    columns = torch.stack([operator @ unit for unit in units])
    matrix = torch.stack([columns @ unit for unit in units]).to("cpu", torch.float64)
    if not bool(matrix.isfinite().all()):
        raise FloatingPointError(
            "A product with the operator is not finite, so its eigenvalues cannot be computed. Check that loss and "
            'gradient are finite at this point. If a norm is zero, write products="finite_difference".'
        )
    values: Tensor = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    return values
