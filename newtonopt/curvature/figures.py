"""Measurements drawn with matplotlib: into axes that are given, or into a figure that pyplot knows, for plt.show()."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from newtonopt.checks import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from newtonopt.curvature.density import SpectralDensity
    from newtonopt.curvature.slices import LossSlice

# Decades that the density's axis shows below its peak.
_DECADES = 8.0


def density_figure(measured: SpectralDensity, width: float | None = None, ax: Axes | None = None) -> Figure:
    """The density on a logarithmic scale, with a band of one standard error up, and as far down on that scale.

    Args:
        measured: What to draw.
        width: Of the kernel; None (default): as `SpectralDensity.density` chooses.
        ax: Where to draw; None (default): in a new figure of pyplot.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `ax` is something else than axes.
    """
    (axes,) = _panels(ax, 1)
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
    return _figure_of(axes)


def slice_figure(measured: LossSlice, ax: Axes | Sequence[Axes] | None = None) -> Figure:
    """Loss and quadratic model as two lines; in two dimensions as contours side by side.

    Args:
        measured: What to draw.
        ax: Where to draw, in two dimensions two axes; None (default): in a new figure of pyplot.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `ax` is something else, or another number of axes.
    """
    panels = _panels(ax, measured.losses.dim())
    steps = measured.coordinates.numpy()
    if measured.losses.dim() == 1:
        (axes,) = panels
        axes.plot(steps, measured.losses.numpy(), color="C0", linewidth=1.5, label="loss")
        axes.plot(steps, measured.model.numpy(), color="C1", linestyle="--", label="quadratic model")
        axes.plot(0.0, measured.loss, "ko", markersize=4)
        axes.set(xlabel=f"step along {measured.names[0]}", ylabel="loss")
        axes.set_title(f"slope {float(measured.slopes[0]):.3g}, curvature {float(measured.curvatures[0, 0]):.3g}")
        axes.legend(frameon=False)
        return _figure_of(axes)
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
    figure = _figure_of(panels[0])
    figure.colorbar(drawn, ax=panels, label="loss")
    return figure


def drawing(panels: int) -> tuple[Figure, list[Axes]]:
    """Return a figure that pyplot does not know, which would keep it, with axes side by side.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(_MISSING) from error
    figure = Figure(figsize=_size(panels), layout="constrained")
    return figure, list(figure.subplots(1, panels, sharex=True, sharey=True, squeeze=False)[0])


def _levels(low: float, high: float) -> Any:
    """Round values that part the range into about sixteen."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(16).tick_values(low, high if high > low else low + 1.0)


_MISSING = "A figure needs matplotlib, which is not installed: pip install matplotlib"


def _panels(ax: Any, count: int) -> list[Any]:
    """Return the axes to draw in."""
    try:
        import matplotlib.pyplot as plt
        from matplotlib.axes import Axes
    except ImportError as error:
        raise ImportError(_MISSING) from error
    if ax is None:
        _, panels = plt.subplots(
            1, count, figsize=_size(count), layout="constrained", sharex=True, sharey=True, squeeze=False
        )
        return list(panels[0])
    given = [ax] if isinstance(ax, Axes) else list(ax) if isinstance(ax, Iterable) else []
    if len(given) != count or not all(isinstance(entry, Axes) for entry in given):
        what, remedy = ("axes", "plt.subplots()[1]") if count == 1 else ("two axes", "plt.subplots(1, 2)[1]")
        raise TypeError(f"ax must be {what} of matplotlib, got {shown(ax)}. Write {remedy}, or leave it out.")
    return given


def _figure_of(axes: Axes) -> Figure:
    figure: Any = axes.get_figure()
    return figure  # type: ignore[no-any-return]


def _size(panels: int) -> tuple[float, float]:
    return 5.0 * panels, 3.4
