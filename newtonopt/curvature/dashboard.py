"""`plot_history`: the measurements of one run, or of several, over their steps, in one figure.

A figure is a list of panels, of which those are drawn that have data: first what matters most. Each panel is a function
that draws all runs into its axes.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from newtonopt.checks import shown
from newtonopt.curvature.drawing import sheet
from newtonopt.curvature.event_files import count_of_logs, read
from newtonopt.curvature.histories import History, Log, Numbers
from newtonopt.curvature.measurements.measurement import Measured
from newtonopt.curvature.showing import written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that colour-blind readers can tell apart (Okabe & Ito 2008), and dashes once they are used up.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", ":", "-.")
_DASHED = (0, (5, 3))
_MOST_RUNS = len(_COLOURS) * len(_DASHES)
_EDGE, _FURTHER, _QUIET = "#D55E00", ("#56B4E9", "#7F7F7F", "#A6A6A6", "#C4C4C4"), "0.6"
# Widths in inches: 900 pixels at 90 to the inch.
_WIDTH, _TOP, _ROW = 10.0, 2.7, 1.9
# Markers beyond this number would run into each other.
_MOST_MARKERS = 120
# Values that span more than this factor get a logarithmic axis.
_WIDE = 100.0
# Values of both signs get one where the largest size is this many times the median one. A logarithmic axis ends at the
# other factors above and below the median.
_EXPLODES, _ABOVE, _BELOW = 1e3, 1e8, 1e12
_NOTHING = np.zeros(0)
_ORDINALS = {2: "2nd", 3: "3rd", 4: "4th", 5: "5th"}
_ROWS_OF_DENSITY, _MOST_LAYERS = 120, 40
# Sentences that say how something was measured, and not what it means.
_ASIDE = re.compile(r"Measured\b")
_MOST_WORDS = 740

Source = (
    str | os.PathLike[str] | Measured | Mapping[int, Measured] | Sequence[Measured] | Sequence[tuple[int, Measured]]
)


def plot_history(
    source: Source | Mapping[str, Source], *, prefix: str = "curvature", loss: str | None = None
) -> Figure:
    """Draw what was measured over the steps of a run, or of several runs, in one figure.

    The panels: the largest eigenvalues with the interval of the first (a filled marker: certified; a hollow one:
    tracked), the stability threshold (dashed) and, of one run, shaded where the ratio to it exceeds one; the ratio; the
    smallest eigenvalue; the preconditioned one; sharpness; step margin and critical sharpness; trace; the training
    loss; damping and ratio of Newton steps; of one run, the density of eigenvalues and the layers as heat maps. Panels
    without data are left out. Below stands what the last measurement of a single run says in words. Of a long run a
    thousand measurements are drawn, evenly spaced.

    Event files may be damaged, cut short or foreign: what cannot be read is left out, and where nothing is left the
    figure says so.

    Args:
        source: A folder of event files, of one run or with several runs below it (or of tables that CSVLogger wrote);
            the return values of `measure`, as a mapping from steps, as pairs of a step and one, or as a list counted
            from zero. A mapping from names to any of these compares them.
        prefix: Prefix of the tags. Default "curvature".
        loss: Tag of the training loss in the logs; None (default): the likeliest, such as "train_loss".

    Returns:
        The figure, which `plt.show()` shows.

    Raises:
        FileNotFoundError: There is no such folder.
        ImportError: matplotlib is missing, or tensorboard where there are event files.
        TypeError: `source` holds something else.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import measure, plot_history
        >>> w = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> optimizer = torch.optim.SGD([w], lr=0.1)
        >>> found = {}
        >>> for step in range(3):
        ...     found[step] = measure(lambda: (w**4).sum(), [w], optimizer, sharpness=None, last=found.get(step - 1))
        ...     _ = optimizer.step(lambda: (w**4).sum())
        >>> figure = plot_history(found)
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['Largest eigenvalues', 'Largest eigenvalue over the threshold', 'Smallest eigenvalue']

    See Also:
        - `measure()`: the measurements to draw.
        - `CurvatureMonitor`: writes the event files, and draws this figure with `figure_every`.
        - `docs/tab.md`: the same panels in TensorBoard.
    """
    histories = _histories(source, prefix, loss, "")
    figure = sheet(_WIDTH, _height(histories), known=True)
    _draw(figure, histories, f"Nothing to draw: {_nothing(source, prefix)}")
    return figure


def dashboard(history: History) -> Figure:
    """Return the figure of one run for a log: pyplot does not know it, and so does not keep it.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = sheet(_WIDTH, _height([history]), known=False)
    _draw(figure, [history], "Nothing has been measured yet.")
    return figure


def _histories(source: Any, prefix: str, loss: str | None, name: str) -> list[History]:
    """Return the histories that a source stands for.

    Args:
        source: The source.
        prefix: Prefix of the tags.
        loss: Tag of the training loss, or None.
        name: Name of the run, given by the user; empty if there is none.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"source must be an existing folder, got {shown(str(source))}.")
        found = read(path, prefix, loss)
        return [_renamed(h, name if len(found) == 1 else f"{name}/{h.name}") for h in found] if name else found
    if isinstance(source, Mapping) and not isinstance(source, Measured):
        if source and all(isinstance(key, str) for key in source):
            return [h for key, one in source.items() for h in _histories(one, prefix, loss, f"{name}/{key}".strip("/"))]
        pairs: list[Any] = list(source.items())
    else:
        entries = [source] if isinstance(source, Measured) else _listed(source)
        pairs = [(step, e) if isinstance(e, Measured) else e for step, e in enumerate(entries)]
    log = Log()
    for pair in pairs:
        match pair:
            case (Integral() as step, Measured() as measured):
                log.add(int(step), measured)
            case _:
                raise _refusal(pair)
    return [log.history(name)]


def _refusal(value: object) -> TypeError:
    return TypeError(
        f"source must be a folder of event files, or return values of measure by their steps, got {shown(value)}. "
        "Write plot_history('lightning_logs') or plot_history({0: measure(...), 100: measure(...)}), for example."
    )


def _listed(source: Any) -> list[Any]:
    if not isinstance(source, Iterable):
        raise _refusal(source)
    return list(source)


def _renamed(history: History, name: str) -> History:
    return History(name, history.measured, history.training, history.densities, history.words, history.loss)


def _nothing(source: Any, prefix: str) -> str:
    if isinstance(source, (str, os.PathLike)):
        count = count_of_logs(Path(source))
        files = f"{count} {'file' if count == 1 else 'files'} of events or tables"
        return f"{files} in {source} and below, with no measurement under {prefix}/ that can be read."
    return "no measurements were given."


# Panels


@dataclass(frozen=True)
class _Run:
    """A run with its looks."""

    history: History
    colour: str
    dash: Any
    alone: bool


@dataclass(frozen=True)
class _Panel:
    """A part of the figure.

    Attributes:
        title: Its title.
        unit: Unit on the axis.
        needs: A regular expression: drawn if it fits the name of a value.
        draw: Draws all runs.
        alone: Whether it is for a single run only.
    """

    title: str
    unit: str
    needs: str
    draw: Callable[[Axes, Sequence[_Run]], None]
    alone: bool = False


def _height(histories: Sequence[History]) -> float:
    panels = _with_data(histories)
    return _TOP + _ROW * math.ceil((len(panels) - 1) / 2) + 0.5 if panels else _TOP


def _with_data(histories: Sequence[History]) -> list[_Panel]:
    """Return the panels that have data."""
    names = {name for history in histories for name in history.names()}
    names |= {"density" for history in histories if history.densities}
    names |= {"loss" for history in histories if history.loss}
    found = [panel for panel in _PANELS if any(re.fullmatch(panel.needs, name) for name in names)]
    return [panel for panel in found if not panel.alone or len(histories) == 1]


def _draw(figure: Figure, histories: Sequence[History], nothing: str) -> None:
    """Draw all panels that have data; where there are none, a sentence."""
    shown_runs = histories[:_MOST_RUNS]
    panels = _with_data(shown_runs)
    if not panels:
        _say(figure.text(0.5, 0.5, _wrapped(nothing, 90), ha="center", va="center", color="0.3"))
        return
    alone = len(shown_runs) == 1
    runs = [
        _Run(history, _COLOURS[i % len(_COLOURS)], _DASHES[i // len(_COLOURS)], alone)
        for i, history in enumerate(shown_runs)
    ]
    rows = 1 + math.ceil((len(panels) - 1) / 2)
    grid = figure.add_gridspec(rows, 2, height_ratios=[_TOP, *[_ROW] * (rows - 1)])
    low, high = _steps(shown_runs)
    for number, panel in enumerate(panels):
        # The first panel has a row to itself, and so has the last one of an even number.
        wide = number == 0 or (number == len(panels) - 1 and number % 2 == 1)
        row, column = (number + 1) // 2, (number + 1) % 2
        axes = figure.add_subplot(grid[row, :] if wide else grid[row, column])
        axes.set_title(panel.title, loc="left", y=1.0, pad=6, fontsize=10, fontweight="bold", color="0.2")
        axes.set_ylabel(panel.unit, fontsize=8.5, color="0.3")
        axes.tick_params(labelsize=8, color=_QUIET)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(_QUIET)
        axes.set_xlim(low, high)
        panel.draw(axes, runs)
        axes.set_xlim(low, high)
        axes.locator_params(axis="x", integer=True)
        if number >= len(panels) - 2:
            axes.set_xlabel("step", fontsize=8.5, color="0.3")
    figure.align_ylabels()
    _caption(figure, runs, len(histories))


def _steps(histories: Sequence[History]) -> tuple[float, float]:
    """Return the first and the last step of all runs, with a margin."""
    steps = [step for history in histories for step in history.measured]
    steps += [step for history in histories for values in history.training.values() for step in values]
    margin = 0.01 * (max(steps) - min(steps)) or 0.5
    return min(steps) - margin, max(steps) + margin


def _caption(figure: Figure, runs: Sequence[_Run], count: int) -> None:
    """Write the last sentences of a single run below, or the names of several runs above."""
    if runs[0].alone:
        words = " ".join(line.strip() for line in runs[0].history.words if not _ASIDE.match(line.strip()))
        last = max(runs[0].history.measured)
        if words:
            whole = f"Step {last}. {words}"
            cut = whole if len(whole) <= _MOST_WORDS else whole[:_MOST_WORDS].rpartition(". ")[0] + ". ..."
            _say(figure.supxlabel(_wrapped(cut, 148), x=0.01, ha="left", fontsize=8.5, color="0.2"))
        return
    handles = [_line(run) for run in runs]
    labels = [_label(run.history.name) for run in runs]
    title = f"{len(runs)} of {count} runs" if count > len(runs) else None
    legend = figure.legend(
        handles, labels, loc="outside upper left", ncols=min(4, len(runs)), frameon=False, fontsize=9, title=title
    )
    for text in legend.get_texts():
        _say(text)


def _line(run: _Run) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=run.colour, linestyle=run.dash, linewidth=2.0)


def _label(name: str) -> str:
    """Return a name that comes from a file as a label: printable, short, and not hidden by matplotlib as `_name`."""
    printable = "".join(c if c.isprintable() else "?" for c in name)
    short = printable if len(printable) <= 40 else f"{printable[:19]}...{printable[-18:]}"
    return f" {short}" if short.startswith("_") else short


def _wrapped(text: str, width: int) -> str:
    printable = "".join(c if c.isprintable() else " " for c in text)
    return "\n".join(textwrap.wrap(printable, width))


def _say(text: Any) -> None:
    """Show dollar signs as they are: the text may come from a file, and is no formula."""
    text.set_parse_math(False)


def _largest(axes: Axes, runs: Sequence[_Run]) -> None:
    """Draw the five largest eigenvalues against the threshold, where it is one of theirs."""
    for run in runs:
        _eigenvalue(axes, run, "lambda_max")
        if not any("preconditioned_lambda_max" in values for values in run.history.measured.values()):
            _threshold(axes, run, "lambda_max")
        for rank, colour in zip((2, 3, 4, 5), _FURTHER, strict=True) if run.alone else ():
            # With gaps where it was not known.
            steps, values = run.history.series("lambda_max")[0], run.history.beside("lambda_max", f"lambda_{rank}")
            if np.isfinite(values).any():
                looks: dict[str, Any] = {"linewidth": 1.0, "marker": ".", "markersize": 2.0, "zorder": 1.5}
                axes.plot(steps, values, color=colour, label=_ORDINALS[rank], **looks)
    _scale(axes, runs, "lambda_max", beside="stability_threshold")
    if not runs[0].alone:
        looks = {"color": "0.4", "markersize": 4.5}
        axes.plot([], [], marker="o", linestyle="none", label="certified", **looks)
        axes.plot([], [], marker="o", linestyle="none", markerfacecolor="white", label="tracked", **looks)
        axes.plot([], [], linestyle=_DASHED, label="stability threshold", **looks)
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=9,
        frameon=False,
        fontsize=8,
        borderaxespad=0.1,
        handlelength=1.6,
        columnspacing=1.2,
    )


def _preconditioned(axes: Axes, runs: Sequence[_Run]) -> None:
    """Draw the preconditioned eigenvalue of runs that have it, against their thresholds."""
    runs = [run for run in runs if len(run.history.series("preconditioned_lambda_max")[0])]
    for run in runs:
        _eigenvalue(axes, run, "preconditioned_lambda_max")
        _threshold(axes, run, "preconditioned_lambda_max")
    # A threshold far above the eigenvalues would press them to the bottom of a linear axis.
    _scale(axes, runs, "preconditioned_lambda_max", "stability_threshold")


def _smallest(axes: Axes, runs: Sequence[_Run]) -> None:
    axes.axhline(0.0, color=_QUIET, linewidth=0.8, zorder=0)
    for run in runs:
        _eigenvalue(axes, run, "lambda_min")
    _scale(axes, runs, "lambda_min")


def _eigenvalue(axes: Axes, run: _Run, name: str) -> None:
    """Draw an eigenvalue with its interval, certified values with filled markers and tracked ones with hollow ones."""
    history = run.history
    steps, values = history.series(name)
    lower, upper = history.beside(name, f"{name}_lower"), history.beside(name, f"{name}_upper")
    axes.fill_between(steps, lower, upper, color=run.colour, alpha=0.25, linewidth=0, label=_of(run, "interval"))
    axes.plot(steps, values, color=run.colour, linestyle=run.dash, linewidth=1.5)
    # Where nothing says whether a value is certified, it is not called tracked.
    tracked = history.beside(name, "certified") == 0.0
    looks: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": run.colour, "markersize": 4.5}
    for chosen, face, label in ((~tracked, run.colour, "certified"), (tracked, "white", "tracked")):
        if 0 < chosen.sum() <= _MOST_MARKERS:
            looks |= {"markerfacecolor": face, "markeredgewidth": 1.1, "label": _of(run, label)}
            axes.plot(steps[chosen], values[chosen], **looks)


def _of(run: _Run, label: str) -> str | None:
    """Return a label in the legend of a single run; of several runs the legend names the runs."""
    return label if run.alone else None


def _threshold(axes: Axes, run: _Run, name: str) -> None:
    """Draw the stability threshold, and shade where the eigenvalue lies above it."""
    steps, threshold = run.history.series("stability_threshold")
    if not len(steps):
        return
    colour = _EDGE if run.alone else run.colour
    axes.plot(steps, threshold, color=colour, linestyle=_DASHED, linewidth=1.4, label=_of(run, "stability threshold"))
    for number, (first, last) in enumerate(_above_one(*run.history.series("stability_ratio")) if run.alone else ()):
        axes.axvspan(first, last, color=_EDGE, alpha=0.12, linewidth=0, zorder=0, label=None if number else "ratio > 1")


def _above_one(steps: Numbers, ratios: Numbers) -> list[tuple[float, float]]:
    """Return the stretches of steps where a ratio, drawn as a line, lies above one."""
    found: list[tuple[float, float]] = []
    for (s, r), (t, q) in itertools.pairwise(zip(steps.tolist(), ratios.tolist(), strict=True)):
        if max(r, q) <= 1.0:
            continue
        crossing = s + (1.0 - r) / (q - r) * (t - s) if r != q else s
        first, last = (s if r > 1.0 else crossing), (t if q > 1.0 else crossing)
        if found and found[-1][1] == first:
            found[-1] = found[-1][0], last
        else:
            found.append((first, last))
    return found


def _with_one(name: str) -> Callable[[Axes, Sequence[_Run]], None]:
    """Return a panel of a value that has a meaning above one, which is shaded."""

    def draw(axes: Axes, runs: Sequence[_Run]) -> None:
        _plain(name)(axes, runs)
        colour = _EDGE if runs[0].alone else "0.4"
        axes.axhline(1.0, color=colour, linestyle=_DASHED, linewidth=1.2)
        low, high = axes.get_ylim()
        axes.axhspan(1.0, max(high, 1.0), color=colour, alpha=0.08, linewidth=0, zorder=0)
        axes.set_ylim(low, max(high, 1.0))

    return draw


def _plain(name: str, error: str = "") -> Callable[[Axes, Sequence[_Run]], None]:
    """Return a panel of a value's line, with a band of one standard error where that is known."""

    def draw(axes: Axes, runs: Sequence[_Run]) -> None:
        for run in runs:
            steps, values = run.history.series(name)
            marker = "o" if len(steps) <= _MOST_MARKERS // 2 and name not in run.history.training else ""
            axes.plot(steps, values, color=run.colour, linestyle=run.dash, linewidth=1.3, marker=marker, markersize=2.5)
            if error:
                spread = run.history.beside(name, error)
                axes.fill_between(steps, values - spread, values + spread, color=run.colour, alpha=0.25, linewidth=0)
        _scale(axes, runs, name)

    return draw


def _loss(axes: Axes, runs: Sequence[_Run]) -> None:
    for run in runs:
        steps, values = run.history.series(run.history.loss)
        axes.plot(steps, values, color=run.colour, linestyle=run.dash, linewidth=1.0)
    _log_if_wide(axes, np.concatenate([run.history.series(run.history.loss)[1] for run in runs]))


def _damping(axes: Axes, runs: Sequence[_Run]) -> None:
    for run in runs:
        for name in _CONTROLS:
            axes.plot(*run.history.series(name), color=run.colour, linestyle=run.dash, linewidth=1.2)
    _log_if_wide(axes, np.concatenate([run.history.series(name)[1] for run in runs for name in _CONTROLS]))


def _newton_ratio(axes: Axes, runs: Sequence[_Run]) -> None:
    axes.axhline(1.0, color=_QUIET, linewidth=0.8, zorder=0)
    for run in runs:
        axes.plot(*run.history.series("newton/ratio"), color=run.colour, linestyle=run.dash, linewidth=1.0)
    # A rejected step's ratio may be anything.
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -1.0), min(max(high, 1.2), 3.0))


def _density(axes: Axes, runs: Sequence[_Run]) -> None:
    """Draw the counts of eigenvalues as a heat map over the steps, on one grid of ranges."""
    densities = sorted(runs[0].history.densities.items())
    low, high = min(b.edges[0] for _, b in densities), max(b.edges[-1] for _, b in densities)
    edges = np.linspace(low, high, _ROWS_OF_DENSITY + 1)
    columns = []
    for _, bars in densities:
        below = np.concatenate([[0.0], np.cumsum(bars.counts)])
        columns.append(np.diff(np.interp(edges, bars.edges, below)))
    counts = np.array(columns).T
    _heat_map(axes, [step for step, _ in densities], edges, np.log10(1.0 + np.maximum(counts, 0.0)), "log10(1 + count)")


def _layers(axes: Axes, runs: Sequence[_Run]) -> None:
    """Draw the largest eigenvalue of each layer as a heat map over the steps, the first layer on top."""
    history = runs[0].history
    names = [name for name in dict.fromkeys(n for v in history.measured.values() for n in v) if _is_layer(name)]
    names = names[:_MOST_LAYERS]
    steps = [step for step in sorted(history.measured) if any(name in history.measured[step] for name in names)]
    values = np.array([[history.measured[step].get(name, math.nan) for step in steps] for name in names], float)
    logs = np.log10(np.where(values > 0.0, values, math.nan))
    _heat_map(axes, steps, np.arange(len(names) + 1.0), np.ma.masked_invalid(logs), "log10")
    axes.set_yticks(np.arange(len(names)) + 0.5)
    for text in axes.set_yticklabels(
        [_label(name.partition("/")[2]) for name in names], fontsize=min(8, 150 / len(names))
    ):
        _say(text)
    axes.invert_yaxis()


def _is_layer(name: str) -> bool:
    return name.startswith("lambda_max_of/")


def _heat_map(axes: Axes, steps: Sequence[float], edges: Numbers, values: Any, label: str) -> None:
    middles = np.array(steps, float)
    between = 0.5 * (middles[1:] + middles[:-1])
    half = 0.5 * (middles[1] - middles[0]) if len(middles) > 1 else 0.5
    ends = np.concatenate([[middles[0] - half], between, [middles[-1] + half]])
    drawn = axes.pcolormesh(ends, edges, values, cmap="viridis", rasterized=True)
    # The scale stands on the line of the title, so that all panels of a column are equally wide.
    low, high = drawn.get_clim()
    scale = axes.inset_axes((0.8, 1.06, 0.12, 0.07))
    bar = axes.figure.colorbar(drawn, cax=scale, orientation="horizontal", ticks=[])
    bar.outline.set_visible(False)
    for x, side, text in ((0.79, "right", f"{label}: {written(low, 2)}"), (0.93, "left", written(high, 2))):
        axes.text(x, 1.09, text, transform=axes.transAxes, ha=side, va="center", fontsize=8, color="0.3")


def _scale(axes: Axes, runs: Sequence[_Run], *names: str, beside: str = "") -> None:
    """Choose the axis for values by their names, and for others beside them that do not decide on it."""
    values, others = (
        np.concatenate([run.history.series(name)[1] for run in runs for name in some]) for some in (names, (beside,))
    )
    _log_if_wide(axes, values, others)


def _log_if_wide(axes: Axes, values: Numbers, beside: Numbers = _NOTHING) -> None:
    """Take a logarithmic axis where values span decades: on both sides of zero where signs differ.

    It ends far from the median size, so that one run that explodes does not flatten the others; a note says how far the
    values go beyond.
    """
    sizes = np.sort(np.abs(values[values != 0.0]))
    if not len(sizes):
        return
    low, high, middle = values.min(), values.max(), sizes[(len(sizes) - 1) // 2]
    if low > 0.0 and high / low > _WIDE:
        axes.set_yscale("log")
        least, most = middle / _BELOW, _ABOVE * middle
    elif low <= 0.0 and sizes[-1] > _EXPLODES * middle:
        axes.set_yscale("symlog", linthresh=0.1 * middle)
        locator: Any = axes.yaxis.get_major_locator()  # a SymmetricalLogLocator
        locator.set_params(numticks=7)
        least, most = -_ABOVE * middle, _ABOVE * middle
    else:
        return
    if low >= least and high <= most:
        return
    within = np.concatenate([values, beside])
    within = within[(within >= least) & (within <= most)]
    first, last = within.min(), within.max()
    axes.set_ylim(first - 0.5 * abs(first), last + 0.5 * abs(last))
    if low < least:
        _note(axes, 0.04, f"down to {written(low, 2)}")
    if high > most:
        _note(axes, 0.88, f"up to {written(high, 2)}")


def _note(axes: Axes, height: float, text: str) -> None:
    axes.text(0.01, height, text, transform=axes.transAxes, fontsize=8, color="0.3")


_CONTROLS = ("newton/damping", "newton/radius", "newton/sigma")
_PANELS = (
    _Panel("Largest eigenvalues", "L / θ²", "lambda_max", _largest),
    _Panel("Largest preconditioned eigenvalue", "1 / learning rate", "preconditioned_lambda_max", _preconditioned),
    _Panel("Largest eigenvalue over the threshold", "", "stability_ratio", _with_one("stability_ratio")),
    _Panel("Smallest eigenvalue", "L / θ²", "lambda_min", _smallest),
    _Panel("Sharpness", "L", "sharpness", _plain("sharpness", "sharpness_error")),
    _Panel("Step margin: above 1 the step overshot", "", "step_margin", _with_one("step_margin")),
    _Panel("Critical sharpness", "1 / learning rate", "critical_sharpness", _plain("critical_sharpness")),
    _Panel("Trace", "L / θ²", "trace", _plain("trace", "trace_error")),
    _Panel("Training loss", "L", "loss", _loss),
    _Panel("Damping, radius or sigma", "", "newton/(damping|radius|sigma)", _damping),
    _Panel("Actual over predicted decrease", "", "newton/ratio", _newton_ratio),
    _Panel("All eigenvalues", "L / θ²", "density", _density, alone=True),
    _Panel("Largest eigenvalue of each part", "", "lambda_max_of/.*", _layers, alone=True),
)
