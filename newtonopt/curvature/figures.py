"""Measurements as matplotlib figures, made without pyplot: no global state, no window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from newtonopt.curvature.density import SpectralDensity
    from newtonopt.curvature.slices import LossSlice

# Decades that the density's axis shows below its peak.
_DECADES = 8.0


def density_figure(measured: SpectralDensity, width: float | None = None) -> Figure:
    """The density on a logarithmic scale, with a band of one standard error up, and as far down on that scale.

    Args:
        measured: What to draw.
        width: Of the kernel; None (default): as `SpectralDensity.density` chooses.

    Raises:
        ImportError: matplotlib is missing.
    """
    margin = 0.05 * measured.span()
    low, high = float(measured.nodes.min()) - margin, float(measured.nodes.max()) + margin
    grid = torch.linspace(low, high, 1000, dtype=torch.float64)
    density = measured.density(grid, width)
    floor = float(density.max()) * 10.0**-_DECADES
    density = density.clamp_min(floor)
    # Density less error has no logarithm where few of the starts have nodes.
    factor = 1.0 + measured.density_error(grid, width) / density
    figure = _figure(1)
    axes = figure.subplots()
    axes.semilogy(grid.numpy(), density.numpy(), color="C0", linewidth=1.5)
    if bool(factor.isfinite().all()) and not measured.exact:
        lower, upper = (density / factor).clamp_min(floor), density * factor
        axes.fill_between(grid.numpy(), lower.numpy(), upper.numpy(), color="C0", alpha=0.25, linewidth=0)
    axes.axvline(0.0, color="0.6", linewidth=0.8, zorder=0)
    axes.set(xlabel="eigenvalue", ylabel="density", xlim=(low, high), ylim=(floor, 3.0 * float(density.max())))
    how = "exact" if measured.exact else f"{int(measured.runs.max()) + 1} starts"
    axes.set_title(f"{measured.size} eigenvalues ({how}, {measured.products} products)", fontsize="medium")
    return figure


def slice_figure(measured: LossSlice) -> Figure:
    """Loss and quadratic model as two lines; in two dimensions as contours side by side.

    Args:
        measured: What to draw.

    Raises:
        ImportError: matplotlib is missing.
    """
    steps = measured.coordinates.numpy()
    if measured.losses.dim() == 1:
        figure = _figure(1)
        axes = figure.subplots()
        axes.plot(steps, measured.losses.numpy(), color="C0", linewidth=1.5, label="loss")
        axes.plot(steps, measured.model.numpy(), color="C1", linestyle="--", label="quadratic model")
        axes.plot(0.0, measured.loss, "ko", markersize=4)
        axes.set(xlabel=f"step along {measured.names[0]}", ylabel="loss")
        axes.set_title(f"slope {float(measured.slopes[0]):.3g}, curvature {float(measured.curvatures[0, 0]):.3g}")
        axes.legend(frameon=False)
        return figure
    figure = _figure(2)
    panels: Any = figure.subplots(1, 2, sharex=True, sharey=True)
    finite = measured.losses[measured.losses.isfinite()]
    both = torch.cat([finite, measured.model.reshape(-1)])
    levels = _levels(float(both.min()), float(both.max()))
    for panel, values, title in zip(
        panels, (measured.losses, measured.model), ("loss", "quadratic model"), strict=True
    ):
        # The first coordinate runs to the right.
        drawn = panel.contourf(steps, steps, values.T.numpy(), levels=levels, cmap="viridis")
        panel.plot(0.0, 0.0, "w+", markersize=8)
        panel.set(xlabel=f"step along {measured.names[0]}", title=title, aspect="equal")
    panels[0].set_ylabel(f"step along {measured.names[1]}")
    figure.colorbar(drawn, ax=list(panels), label="loss")
    return figure


def _levels(low: float, high: float) -> Any:
    """Round values that part the range into about sixteen."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(16).tick_values(low, high if high > low else low + 1.0)


def _figure(panels: int) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A figure needs matplotlib, which is not installed: pip install matplotlib") from error
    return Figure(figsize=(5.0 * panels, 3.4), layout="constrained")
