"""Measurements drawn with matplotlib: into axes that are given, or into a figure that pyplot knows, for plt.show()."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from newtonopt.curvature.drawing import figure_of, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from newtonopt.curvature.slices import LossSlice


def slice_figure(measured: LossSlice, ax: Axes | Sequence[Axes] | None = None) -> Figure:
    """Loss and quadratic model as two lines; in two dimensions as contours side by side.

    Args:
        measured: What to draw.
        ax: Where to draw, in two dimensions two axes; None (default): in a new figure of pyplot.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `ax` is something else, or another number of axes.
    """
    drawn_in = panels(ax, measured.losses.dim())
    steps = measured.coordinates.numpy()
    if measured.losses.dim() == 1:
        (axes,) = drawn_in
        axes.plot(steps, measured.losses.numpy(), color="C0", linewidth=1.5, label="loss")
        axes.plot(steps, measured.model.numpy(), color="C1", linestyle="--", label="quadratic model")
        axes.plot(0.0, measured.loss, "ko", markersize=4)
        axes.set(xlabel=f"step along {measured.names[0]}", ylabel="loss")
        axes.set_title(f"slope {float(measured.slopes[0]):.3g}, curvature {float(measured.curvatures[0, 0]):.3g}")
        axes.legend(frameon=False)
        return figure_of(axes)
    finite = measured.losses[measured.losses.isfinite()]
    both = torch.cat([finite, measured.model.reshape(-1)])
    levels = _levels(float(both.min()), float(both.max()))
    for panel, values, title in zip(
        drawn_in, (measured.losses, measured.model), ("loss", "quadratic model"), strict=True
    ):
        # The first coordinate runs to the right.
        drawn = panel.contourf(steps, steps, values.T.numpy(), levels=levels, cmap="viridis")
        panel.plot(0.0, 0.0, "w+", markersize=8)
        panel.set(xlabel=f"step along {measured.names[0]}", title=title, aspect="equal")
    drawn_in[0].set_ylabel(f"step along {measured.names[1]}")
    figure = figure_of(drawn_in[0])
    figure.colorbar(drawn, ax=drawn_in, label="loss")
    return figure


def _levels(low: float, high: float) -> Any:
    """Round values that part the range into about sixteen."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(16).tick_values(low, high if high > low else low + 1.0)
