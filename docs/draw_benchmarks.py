"""Draw the tables and pictures of the benchmark pages from the records in benchmarks/results/.

python docs/draw_benchmarks.py

The site does this each time that it is built, into docs/benchmarks/drawn/. Run by hand it also writes the README's
picture, docs/pictures/what_it_buys.png.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DRAWN = ROOT / "docs" / "benchmarks" / "drawn"
sys.path.insert(0, str(ROOT / "benchmarks"))

from gauss_newton_spectrum import Jacobians, Spectra, of_jacobians, of_spectra  # noqa: E402
from gpu import summary  # noqa: E402
from league import FAMILY, OURS, League, draw, middle, spurious  # noqa: E402
from training import Run  # noqa: E402

# Fits with fewer right digits have not found the parameters.
DIGITS = 6
# Names of the equations as they stand in a picture, and the colours of the optimizers of this library.
EQUATIONS = {
    "convection-30": "convection, 30",
    "convection-50": "convection, 50",
    "reaction": "reaction",
    "wave": "wave",
    "burgers": "Burgers",
    "allen-cahn": "Allen-Cahn",
    "helmholtz": "Helmholtz",
    "poisson-2d": "Poisson, 2-d",
    "poisson-5d": "Poisson, 5-d",
    "inverse-burgers": "inverse Burgers",
}
BLUE, LIGHT_BLUE = "#1446a0", "#7fa8e8"


def write(folder: Path) -> None:
    """Write every table and picture of the benchmark pages into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    league = League.load(RESULTS / "pinn.json")
    reached(league).savefig(folder / "reached.svg")
    for name, curve, last in (
        ("loss", lambda run: run.loss, lambda run: run.loss[-1]),
        ("error", lambda run: run.error, lambda run: run.error[-1]),
    ):
        draw(league, curve, name, columns=3).savefig(folder / f"pinn_{name}.svg")
        _save(folder / f"pinn_{name}.md", at_the_end(league, last))
    _save(folder / "pinn_methods.md", methods(league))
    for name in ("pinn_spurious", "pinn_spurious_50"):
        (folder / f"{name}.md").write_text(spurious(League.load(RESULTS / f"{name}.json")))
    fits = _record("regression")["fits"]
    _save(folder / "regression.md", regression(fits))
    profile(fits).savefig(folder / "regression.svg")
    record = _record("gauss_newton_spectrum")
    columns = ["loss", "m", "n", "all eigenvalues", "largest 3 (products)", "density (products)", "trace (products)"]
    _save(folder / "spectra.md", _table(columns, [of_spectra(Spectra(**found)) for found in record["spectra"]]))
    columns = ["loss", "m", "n", "rows as factors", "rows formed", "m products J'u", "products over rows"]
    _save(folder / "jacobians.md", _table(columns, [of_jacobians(Jacobians(**found)) for found in record["jacobians"]]))
    _save(folder / "gpu.md", on_a_gpu(_record("nvidia-h200")))


def reached(league: League) -> Figure:
    """Draw the error that each method reached on each equation: a row for an equation, a mark for a method."""
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.subplots()
    marks = dict(zip([m for m in league.methods if m not in FAMILY], "sD^v<>PX", strict=False))
    for row, equation in enumerate(league.equations):
        axes.axhline(row, color="#e6e6e6", linewidth=0.8, zorder=0)
        for method in league.methods:
            error = middle([run.error[-1] for run in league.runs(equation, method)])
            if not isfinite(error):
                continue
            if method in marks:
                axes.plot(error, row, marks[method], color="#8a8a8a", markersize=6, label=method)
            elif method == OURS:
                axes.plot(error, row, "o", color=BLUE, markersize=11, zorder=3, label=method)
            elif method == "HessianFree":
                axes.plot(error, row, "o", color=LIGHT_BLUE, markersize=8, zorder=2, label=method)
    axes.set_yticks(range(len(league.equations)), [EQUATIONS[name] for name in league.equations])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel=f"relative L2 error after {league.seconds:g} s of processor time on one thread")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    order = [name for name in (OURS, "HessianFree", *marks) if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside lower center", ncols=5, frameon=False)
    return figure


def at_the_end(league: League, last: Callable[[Run], float]) -> Iterator[str]:
    """Tabulate medians over the seeds: a row for a method, a column for an equation, the best in bold."""
    columns = [EQUATIONS[name] for name in league.equations]
    values = {m: [middle([last(run) for run in league.runs(e, m)]) for e in league.equations] for m in league.methods}
    best = [min(filter(isfinite, column)) for column in zip(*values.values(), strict=True)]
    rows = [
        [method, *(_cell(value, value == least) for value, least in zip(found, best, strict=True))]
        for method, found in values.items()
    ]
    return _table(["", *columns], rows)


def _cell(value: float, is_best: bool) -> str:
    if not isfinite(value):
        return "diverged" if value > 0 else ""
    text = f"{value:.1e}".replace("e-0", "e\u2011").replace("e-", "e\u2011").replace("e+00", "")
    return f"**{text}**" if is_best else text


def methods(league: League) -> Iterator[str]:
    """List how each method was set, the versions, the machine, and the runs that ended early."""
    machine = league.machine
    software = ", ".join(f"{name} {version}" for name, version in league.versions.items())
    yield f"One thread of {machine['processor']} with {machine['cores']} cores; {software}, as recorded then."
    yield ""
    yield from (f"- {method}: {league.settings[method]}." for method in league.methods)
    yield ""
    for entry in league.entries:
        if entry.run.failure:
            reason = entry.run.failure.split(": ")[0]
            yield f"- {entry.run.contender} on {entry.equation}, seed {entry.run.seed}, ended early: {reason}."


def regression(fits: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Tabulate, for each method, how many fits found the parameters, and what they took."""
    rows = []
    for method in dict.fromkeys(fit["method"] for fit in fits):
        own = [fit for fit in fits if fit["method"] == method]
        right = [fit for fit in own if fit["digits"] >= DIGITS]
        middles = [median(fit[key] for fit in right) for key in ("steps", "evaluations")]
        milliseconds = 1e3 * median(fit["seconds"] for fit in right)
        counts = f"{len(right)} of {len(own)}"
        rows.append([method, counts, *(f"{value:g}" for value in middles), f"{milliseconds:.3g}"])
    return _table(["method", "six digits right", "steps, median", "evaluations, median", "milliseconds, median"], rows)


def profile(fits: Sequence[dict[str, Any]]) -> Figure:
    """Draw the share of fits with at least so many right digits, a curve for a method."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(fit["method"] for fit in fits):
        digits = sorted((fit["digits"] for fit in fits if fit["method"] == method), reverse=True)
        shares = [100 * (count + 1) / len(digits) for count in range(len(digits))]
        ours = method.startswith(OURS)
        axes.step(digits, shares, label=method, color=None if not ours else BLUE, linewidth=2.4 if ours else 1.3,
                  linestyle="--" if "=" in method else "-")  # fmt: skip
    axes.set(xlabel="right digits, at least", ylabel="share of fits, %", ylim=(0, 102), xlim=(0, 11.2))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower left")
    return figure


def on_a_gpu(record: dict[str, Any]) -> Iterator[str]:
    """Say what `make gpu` found on the card, a list for each part."""
    yield f"{record['card']}, driver {record['driver']}, torch {record['torch']}, {record['date'][:10]}."
    for name, part in record["parts"].items():
        yield ""
        yield f"**{name.replace('_', ' ')}**: {part['status']} in {part['seconds']:g} s."
        yield ""
        yield from (f"- {line}" for line in summary(name, part["found"]) if line)


def _record(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _save(path: Path, lines: Iterator[str]) -> None:
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write(DRAWN)
    reached(League.load(RESULTS / "pinn.json")).savefig(ROOT / "docs" / "pictures" / "what_it_buys.png", dpi=110)
