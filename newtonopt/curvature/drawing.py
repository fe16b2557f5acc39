"""The figures and axes of matplotlib in which measurements are drawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from newtonopt.checks import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MISSING = "A figure needs matplotlib, which is not installed: pip install 'newtonopt[plots]'"


def drawing(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` axes side by side, for a log: pyplot does not know it, and so does not keep it.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(_MISSING) from error
    figure = Figure(figsize=size(count), layout="constrained")
    return figure, list(figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0])


def sheet(width: float, height: float, known: bool) -> Figure:
    """Return an empty figure of a size in inches, known to pyplot or not.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(_MISSING) from error
    make = plt.figure if known else Figure
    return make(figsize=(width, height), dpi=90, layout="constrained")


def panels(ax: Any, count: int) -> list[Any]:
    """Return the `count` axes that a user gave as `ax`; None: axes in a new figure, which `plt.show()` shows.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `ax` is not `count` axes.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.axes import Axes
    except ImportError as error:
        raise ImportError(_MISSING) from error
    if ax is None:
        _, made = plt.subplots(
            1, count, figsize=size(count), layout="constrained", sharex=True, sharey=True, squeeze=False
        )
        return list(made[0])
    given = [ax] if isinstance(ax, Axes) else list(ax) if isinstance(ax, Iterable) else []
    if len(given) != count or not all(isinstance(entry, Axes) for entry in given):
        what, remedy = (
            ("matplotlib axes", "plt.subplots()[1]") if count == 1 else ("two matplotlib axes", "plt.subplots(1, 2)[1]")
        )
        raise TypeError(f"ax must be {what}, got {shown(ax)}. Write {remedy}, or leave it out.")
    return given


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Return a figure as an image `(height, width, 3)`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return image


def figure_of(axes: Axes) -> Figure:
    """Return the figure that axes belong to."""
    figure: Any = axes.get_figure()
    return figure  # type: ignore[no-any-return]


def size(count: int) -> tuple[float, float]:
    """Return the width and height of a figure with `count` axes side by side, in inches."""
    return 5.0 * count, 3.4
