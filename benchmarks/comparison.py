"""Sum up runs made side by side: tables, raw figures and a picture."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import inf, isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from training import Run

OURS = "HessianFree"
COLUMNS = 5  # times in a table, evenly spaced


def write(
    name: str,
    runs: Sequence[Run],
    left_out: Mapping[str, str],
    error_name: str,
    settings: dict[str, Any],
    folder: Path,
) -> None:
    """Print the tables; write `name`.json, with every run, and `name`.png into `folder`.

    Args:
        name: Name of the problem and of the files.
        runs: The runs, in any order; methods keep the order of their first run.
        left_out: Methods that were not run, with the reason.
        error_name: Title of `Run.error`.
        settings: Settings of the runs, kept beside the figures.
        folder: Folder of the files, made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = [asdict(run) for run in runs]
    record = {"torch": torch.__version__, "settings": settings, "error": error_name, "runs": kept}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    groups = _best_of_each_method(runs)
    # A fixed width, so that a table written to a file is not folded.
    console = Console(width=150)
    for title, values in (("training loss", _loss), (error_name, _error)):
        console.print(_table(f"{name}: {title}", groups, left_out, values))
    shared = [f"{run.contender} seed {run.seed}" for run in runs if run.processor_share < 0.9]
    if shared and settings["clock"] == "wall":
        console.print(f"These runs had less than 0.9 of a core, too little for a wall clock: {', '.join(shared)}")
    _draw(groups, error_name, folder / f"{name}.png")


def _best_of_each_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return for each method the runs of its best contender: lowest last loss, median over the seeds."""
    methods: dict[str, dict[str, list[Run]]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        methods.setdefault(run.method, {}).setdefault(run.contender, []).append(run)
    groups = {}
    for contenders in methods.values():
        best = min(contenders, key=lambda name: _rank(_medians(contenders[name], _loss)[-1]))
        others = [name.split()[-1] for name in contenders]
        label = f"{best}, best of {' '.join(others)}" if len(others) > 1 else best
        groups[label] = contenders[best]
    return groups


def _rank(loss: float) -> float:
    return loss if isfinite(loss) else inf


def _loss(run: Run) -> list[float]:
    return run.loss


def _error(run: Run) -> list[float]:
    return run.error


def _table(
    title: str, groups: Mapping[str, list[Run]], left_out: Mapping[str, str], values: Callable[[Run], list[float]]
) -> Table:
    """Tabulate medians over the seeds at a few times, each seed's last value, and the ratio to HessianFree's median."""
    some = next(iter(groups.values()))
    stride = (len(some[0].seconds) - 1) // COLUMNS
    table = Table(title=f"{title}, median of {len(some)} seed(s)")
    table.add_column("")
    for second in some[0].seconds[stride::stride]:
        table.add_column(f"{second:g} s", justify="right")
    table.add_column("each seed at the end", justify="right")
    table.add_column("steps", justify="right")
    table.add_column(f"/ {OURS}", justify="right")
    ours = _medians(groups[OURS], values)[-1] if OURS in groups else None
    for label, group in groups.items():
        curve = _medians(group, values)
        table.add_row(
            label,
            *(f"{value:.2g}" for value in curve[stride::stride]),
            "  ".join(f"{values(run)[-1]:.2g}" for run in group),
            str(median(run.steps for run in group)),
            f"{curve[-1] / ours:.3g}" if ours else "",
        )
    for method, reason in left_out.items():
        table.add_row(method, *[""] * COLUMNS, reason)
    return table


def _medians(group: Sequence[Run], values: Callable[[Run], list[float]]) -> list[float]:
    return [median(column) for column in zip(*map(values, group), strict=True)]


def _draw(groups: Mapping[str, list[Run]], error_name: str, path: Path) -> None:
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.subplots(1, 2)
    _draw_curves(axes[0], groups, _loss, "training loss")
    _draw_curves(axes[1], groups, _error, error_name)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def _draw_curves(axis: Axes, groups: Mapping[str, list[Run]], values: Callable[[Run], list[float]], label: str) -> None:
    """Draw a bold line for the median over the seeds and a thin line for every seed."""
    for index, (name, group) in enumerate(groups.items()):
        for run in group:
            axis.plot(run.seconds, values(run), color=f"C{index}", linewidth=0.7, alpha=0.5)
        axis.plot(group[0].seconds, _medians(group, values), color=f"C{index}", linewidth=2.2, label=name)
    axis.set(yscale="log", xlabel="training time (s)", ylabel=label)
    axis.grid(alpha=0.25)
