"""The record of the league of physics-informed networks: one JSON file, and the tables and plots drawn from it."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from math import inf, isfinite, isnan, nan
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from training import Run, extrapolated

OURS = "LevenbergMarquardt"
MOMENTUM = "LevenbergMarquardt+momentum"
FAMILY = (OURS, MOMENTUM, "HessianFree")
TINY, LARGE = 1e-6, 0.1  # a smaller loss and a larger error make a solution spurious


@dataclass(frozen=True)
class Entry:
    """A run on an equation, and the commit that ran."""

    equation: str
    commit: str
    run: Run

    @property
    def key(self) -> tuple[str, str, int]:
        return self.equation, self.run.contender, self.run.seed


@dataclass(frozen=True)
class League:
    """All runs so far, and under which conditions they were made."""

    machine: dict[str, Any]
    versions: dict[str, str]
    seconds: float  # of processor time, a run
    formulas: dict[str, str] = field(default_factory=dict)  # of the equations
    settings: dict[str, str] = field(default_factory=dict)  # of the methods, in words
    left_out: dict[str, str] = field(default_factory=dict)  # methods that could not run, and why
    entries: tuple[Entry, ...] = ()
    horizons: dict[str, float] = field(default_factory=dict)  # later times of equations, to which errors are extended

    def with_entry(self, entry: Entry) -> "League":
        return replace(self, entries=(*self.entries, entry))

    def save(self, path: Path) -> None:
        """Write the file at once or not at all, so that an interruption leaves a whole one behind."""
        record = {**asdict(self), "entries": [asdict(entry) for entry in self.entries]}
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(_without_nan(record), indent=1, allow_nan=False) + "\n")
        unfinished.replace(path)

    @staticmethod
    def load(path: Path) -> "League":
        record = json.loads(path.read_text())
        entries = tuple(_entry(**entry) for entry in record.pop("entries"))
        return League(**record, entries=entries)

    def runs(self, equation: str, method: str) -> list[Run]:
        """Return the runs of a method on an equation, in the order of their seeds."""
        found = [e.run for e in self.entries if e.equation == equation and e.run.method == method]
        return sorted(found, key=lambda run: run.seed)

    @property
    def equations(self) -> list[str]:
        return list(dict.fromkeys(entry.equation for entry in self.entries))

    @property
    def methods(self) -> list[str]:
        present = {entry.run.method for entry in self.entries}
        return [method for method in self.settings if method in present]


def _entry(equation: str, commit: str, run: dict[str, Any]) -> Entry:
    curves = {name: [nan if value is None else value for value in run[name]] for name in ("loss", "error")}
    return Entry(equation, commit, Run(**{**run, **curves}))


def _without_nan(value: Any) -> Any:
    """Replace what JSON has no word for, the loss of a run that diverged, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return the processor, its cores and the threads of a run, and the card if it runs on one."""
    processor = platform.processor() or platform.machine()
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        models = [line.split(":", 1)[1].strip() for line in cpus.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    found = {"processor": processor, "cores": os.cpu_count(), "threads": 1, "system": platform.system()}
    return found if device == "cpu" else {**found, "card": torch.cuda.get_device_name()}


def commit() -> str:
    """Return the commit of this source tree, or an empty text where there is no history."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def markdown(league: League) -> str:
    """Return the conditions, then a table of losses and one of errors at the end, as Markdown."""
    on = league.machine
    software = ", ".join(f"{name} {version}" for name, version in league.versions.items())
    lines = [
        f"{league.seconds:g} seconds of {_clock(league)} a run, one thread, {on['processor']} with {on['cores']} cores"
        + (f", {on['card']}." if "card" in on else "."),
        f"{software}.",
        "",
        *(f"- {method}: {league.settings[method]}" for method in league.methods),
        *(f"- {method}: left out, {reason}" for method, reason in league.left_out.items()),
        "",
        *(f"- {equation}: {league.formulas[equation]}" for equation in league.equations),
    ]
    for title, last in (("Loss", _last_loss), ("Error", _last_error)):
        lines += ["", f"{title} at the end, median over the seeds (in brackets: divided by {OURS}'s)", ""]
        lines += _table(league, last)
    lines += _extended(league)
    for entry in league.entries:
        if entry.run.failure:
            lines += [
                "",
                f"{entry.run.contender}, {entry.equation}, seed {entry.run.seed}, ended early: {entry.run.failure}",
            ]
    return "\n".join(lines) + "\n"


def _clock(league: League) -> str:
    return "wall time" if "card" in league.machine else "processor time"


def _extended(league: League) -> list[str]:
    """Return the errors at the horizons that the runs ended before: extrapolated, not measured."""
    lines = []
    for equation, horizon in league.horizons.items():
        for method in league.methods if horizon > league.seconds else []:
            for run in league.runs(equation, method):
                lines += [
                    "",
                    f"Extrapolated, not measured: {run.contender}, {equation}, seed {run.seed}: error "
                    f"{run.error[-1]:.1e} at {league.seconds:g} s, {extrapolated(run, horizon):.1e} at {horizon:g} s "
                    "if it goes on falling as a power of the time, as in the second half of the run.",
                ]
    return lines


def _last_loss(run: Run) -> float:
    return run.loss[-1]


def _last_error(run: Run) -> float:
    return run.error[-1]


def _table(league: League, last: Callable[[Run], float]) -> Iterator[str]:
    yield "| equation | seeds | " + " | ".join(league.methods) + f" | best of the others / {OURS} |"
    yield "|---" * (len(league.methods) + 3) + "|"
    for equation in league.equations:
        values = {m: middle([last(run) for run in league.runs(equation, m)]) for m in league.methods}
        ours, best = values.get(OURS, nan), min(filter(isfinite, values.values()), default=nan)
        others = min((v for m, v in values.items() if m not in FAMILY and isfinite(v)), default=nan)
        cells = [_cell(value, ours if method != OURS else nan, best) for method, value in values.items()]
        seeds = sorted({e.run.seed for e in league.entries if e.equation == equation})
        lead = "" if isnan(others / ours) else f"{others / ours:.2g}"
        yield f"| {equation} | {' '.join(map(str, seeds))} | {' | '.join(cells)} | {lead} |"


def middle(values: Sequence[float]) -> float:
    """Return the median, where a diverged run is worse than any other; nan where there was no run."""
    return median(inf if isnan(value) else value for value in values) if values else nan


def _cell(value: float, ours: float, best: float) -> str:
    if isnan(value):
        return ""
    if value == inf:
        return "diverged"
    text = f"**{value:.1e}**" if value == best else f"{value:.1e}"
    return text if isnan(ours) else f"{text} ({value / ours:.2g})"


def spurious(league: League) -> str:
    """Return how often a run of ours ended on a solution with next to no residual that is wrong, as Markdown."""
    lines = [
        f"{OURS} after {league.seconds:g} s of processor time. Spurious: loss below {TINY:g}, error above {LARGE:g}.",
        "",
        "| equation | runs | spurious | right (error below .01) | neither | loss, median | error, each seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for equation in league.equations:
        runs = league.runs(equation, OURS)
        wrong = [run for run in runs if run.loss[-1] < TINY and run.error[-1] > LARGE]
        right = [run for run in runs if run.error[-1] < 0.01]
        seeds = f" (seeds {' '.join(str(run.seed) for run in wrong)})" if wrong else ""
        counts = f"{len(runs)} | {len(wrong)}{seeds} | {len(right)} | {len(runs) - len(wrong) - len(right)}"
        errors = " ".join(f"{run.error[-1]:.0e}" for run in runs)
        lines.append(
            f"| {league.formulas[equation]} | {counts} | {middle([run.loss[-1] for run in runs]):.1e} | {errors} |"
        )
    return "\n".join(lines) + "\n"


_COLOURS = [*(f"C{index}" for index in range(10)), "black"]


def draw(league: League, curve: Callable[[Run], list[float]], label: str, columns: int = 5) -> Figure:
    """Draw a panel for each equation: a bold line for a method's median, a thin one for each seed."""
    equations = league.equations
    columns = min(len(equations), columns)
    rows = -(-len(equations) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.7 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(equations) :]:
        panel.set_axis_off()
    for equation, panel in zip(equations, panels, strict=False):
        for method, colour in zip(league.settings, cycle(_COLOURS), strict=False):
            runs = league.runs(equation, method)
            for run in runs if len(runs) > 1 else []:
                panel.plot(run.seconds, curve(run), color=colour, linewidth=0.6, alpha=0.5)
            if runs:
                medians = [middle(values) for values in zip(*map(curve, runs), strict=True)]
                width = 2.6 if method == OURS else 1.5
                panel.plot(runs[0].seconds, medians, color=colour, linewidth=width, label=method)
        panel.set(title=equation, yscale="log", xlabel=f"{_clock(league)} (s)", ylabel=label)
        panel.grid(alpha=0.25)
    named = {name: line for panel in panels for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns, frameon=False)
    return figure


def write_pictures(league: League, path: Path) -> None:
    """Write `_loss.png` and `_error.png` beside the record at `path`."""
    for label, curve in (("loss", lambda run: run.loss), ("error", lambda run: run.error)):
        draw(league, curve, label).savefig(path.with_name(f"{path.stem}_{label}.png"), dpi=120)
