"""Nonlinear regression: LevenbergMarquardt beside SciPy's `least_squares`, both in double precision.

    nist      the 27 problems of NIST's Statistical Reference Datasets, from both starts, against certified parameters
    spectrum  a thousand samples of five peaks on a sloping background, against the best solution that any method found

Ours takes the ordinary closure of a model written in torch, with its defaults, which damp the parameters of a formula
in their own units, and as it damps networks (`scaling=1/2`). SciPy takes the same model written in NumPy, with its
defaults, and at its best: with the exact Jacobian, columns scaled (`x_scale="jac"`) and tolerances at the rounding
floor.

Ours stops after three steps that change no parameter by more than 1e-11 of itself, SciPy at its tolerances; all stop
after 1000 steps (SciPy's default: 1000 evaluations for each parameter). Times are processor times of one thread.

    python benchmarks/regression.py                           tables, and benchmarks/results/regression.json
    python benchmarks/regression.py --problems MGH10 --output /tmp/one.json
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from league import commit
from nist_problems import MODELS, Regression, digits, read
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares
from torch import Tensor, nn

from newtonopt import LevenbergMarquardt

RESULTS = Path(__file__).parent / "results" / "regression.json"
STEPS = 1000
WANTED = 6  # digits
LEAST = 1e-11  # relative change of a parameter, NIST's precision
STILL = 3  # steps in a row without such a change that end a fit
REPEATS, ENOUGH = 3, 0.3  # runs of a fit, of which the fastest counts; less once they have taken so many seconds


@dataclass(frozen=True)
class Fit:
    """Result of one method from one start.

    Attributes:
        problem: Name of the problem.
        start: Number of the start, 1 or 2.
        method: Name of the method.
        digits: Correct digits of the worst parameter, 0 to 11.
        squares: Residual sum of squares, over the certified one.
        steps: Steps, or Jacobians, of the method.
        evaluations: Evaluations of the model, those for a Jacobian by differences included.
        seconds: Processor time.
        end: Why it ended, in the method's words.
    """

    problem: str
    start: int
    method: str
    digits: float
    squares: float
    steps: int
    evaluations: int
    seconds: float
    end: str


@dataclass(frozen=True)
class Found:
    """Parameters at which a method ended, and its counts, as in `Fit`."""

    parameters: np.ndarray
    steps: int
    evaluations: int
    end: str


class Curve(nn.Module):
    """The model of a regression, with a scalar parameter for each of its own."""

    def __init__(self, problem: Regression, start: np.ndarray) -> None:
        super().__init__()
        self.model = problem.model
        self.b = nn.ParameterList([nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in start])

    def forward(self, x: Tensor) -> Tensor:
        return self.model(torch, x, *self.b)

    def values(self) -> np.ndarray:
        return torch.stack(list(self.b)).detach().numpy()


def ours(problem: Regression, start: np.ndarray, **options: Any) -> Found:
    """Fit with LevenbergMarquardt until some steps in a row have moved no parameter."""
    curve, x, y = Curve(problem, start), torch.from_numpy(problem.x), torch.from_numpy(problem.y)
    optimizer = LevenbergMarquardt(curve.parameters(), **options)
    evaluations, steps = 0, 0

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(curve(x), y, reduction="sum") / 2
        loss.backward()
        return loss

    still = 0
    while steps < STEPS and still < STILL:
        before = curve.values()
        optimizer.step(closure)
        steps += 1
        evaluations += 1 + optimizer.last_step.trials
        moved = bool((np.abs(curve.values() - before) > LEAST * np.abs(before)).any())
        # A rejected step raises the damping, so that the next one may be taken.
        still = 0 if moved else still + 1
    return Found(curve.values(), steps, evaluations, optimizer.last_step.reason)


def scipy_usual(problem: Regression, start: np.ndarray, method: str) -> Found:
    """Fit with SciPy's defaults: a Jacobian by differences, no scaling of `lm`'s columns, tolerances of 1e-8."""
    return _scipy(problem, start, method=method, max_nfev=STEPS * len(start))


def scipy_best(problem: Regression, start: np.ndarray, method: str) -> Found:
    """Fit with SciPy's best settings for such problems."""
    # Complex steps give the derivatives to the last digit, at less cost here than automatic differentiation.
    tiny = 1e-200

    def jacobian(b: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            columns = [problem.model(np, problem.x, *(b + 1j * tiny * unit)).imag / tiny for unit in np.eye(len(b))]
        return np.stack(columns, axis=1)

    # SciPy refuses tolerances below the rounding unit.
    floor = float(np.finfo(float).eps)
    tolerances = {"ftol": floor, "xtol": floor, "gtol": floor}
    return _scipy(problem, start, method=method, jac=jacobian, x_scale="jac", max_nfev=STEPS * len(start), **tolerances)


def _scipy(problem: Regression, start: np.ndarray, **settings: Any) -> Found:
    evaluations = 0

    def residuals(b: np.ndarray) -> np.ndarray:
        nonlocal evaluations
        evaluations += 1
        return problem.model(np, problem.x, *b) - problem.y

    with np.errstate(all="ignore"):
        found = least_squares(residuals, start, **settings)
    # MINPACK, which counts no Jacobians without one of ours, evaluates the model once for each parameter and Jacobian.
    return Found(found.x, found.njev or found.nfev, evaluations, found.message)


METHODS: dict[str, Callable[[Regression, np.ndarray], Found]] = {
    "LevenbergMarquardt": ours,
    "LevenbergMarquardt, scaling=1/2": lambda problem, start: ours(problem, start, scaling=0.5),
    "SciPy lm": lambda problem, start: scipy_usual(problem, start, "lm"),
    "SciPy trf": lambda problem, start: scipy_usual(problem, start, "trf"),
    "SciPy lm, best": lambda problem, start: scipy_best(problem, start, "lm"),
    "SciPy trf, best": lambda problem, start: scipy_best(problem, start, "trf"),
}


def spectrum(samples: int = 1000) -> Regression:
    """Return five overlapping peaks on a sloping background, with noise of one percent of the tallest.

    The certified parameters are those of the lowest minimum that SciPy's `trf` and `lm` find from the true ones.
    """
    random = np.random.default_rng(0)
    x = np.linspace(0.0, 10.0, samples)
    # Base and slope, then height, place and width of each peak.
    true = np.array([0.2, 0.03, 1.0, 1.5, 0.4, 0.7, 3.0, 0.6, 0.9, 4.2, 0.5, 0.5, 6.5, 0.9, 0.8, 8.0, 0.4])
    y = _peaks_on_a_slope(np, x, *true) + 0.01 * random.standard_normal(samples)
    blurred = true.copy()
    blurred[2:] *= random.uniform(0.85, 1.15, size=len(true) - 2)
    equal = true.copy()
    equal[:2], equal[2::3], equal[4::3] = 0.0, 1.0, 1.0
    unknown = np.full(len(true), np.nan)
    problem = Regression("spectrum", "", x, y, np.stack([equal, blurred]), unknown, unknown, np.nan, _peaks_on_a_slope)
    ends = [scipy_best(problem, true, method).parameters for method in ("lm", "trf")]
    best = min(ends, key=lambda b: _squares(problem, b))
    fields = {"certified": best, "squares": _squares(problem, best)}
    return Regression(**{**vars(problem), **fields})


def _peaks_on_a_slope(m, x, base, slope, *peaks):
    total = base + slope * x
    for height, place, width in zip(peaks[::3], peaks[1::3], peaks[2::3], strict=True):
        total = total + height * m.exp(-(((x - place) / width) ** 2))
    return total


def _squares(problem: Regression, parameters: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        residuals = problem.model(np, problem.x, *parameters) - problem.y
        return float(residuals @ residuals)


def fits(problem: Regression, methods: Sequence[str]) -> list[Fit]:
    """Return what each method finds from each start."""
    return [
        _fit(problem, number, start, method) for number, start in enumerate(problem.starts, 1) for method in methods
    ]


def _fit(problem: Regression, number: int, start: np.ndarray, method: str) -> Fit:
    seconds = []
    while len(seconds) < REPEATS and sum(seconds) < ENOUGH:
        began = time.process_time()
        found = METHODS[method](problem, start)
        seconds.append(time.process_time() - began)
    correct = digits(found.parameters, problem.certified)
    share = _squares(problem, found.parameters) / problem.squares
    return Fit(problem.name, number, method, correct, share, found.steps, found.evaluations, min(seconds), found.end)


def table(title: str, found: Sequence[Fit]) -> Table:
    """Tabulate, for each problem and start, the digits, steps and milliseconds of each method."""
    methods = list(dict.fromkeys(fit.method for fit in found))
    grid = Table(title=f"{title}: correct digits / steps / milliseconds")
    grid.add_column("problem, start")
    for method in methods:
        grid.add_column(method, justify="right")
    rows: dict[str, list[str]] = {}
    for fit in found:
        text = f"{fit.digits:.1f} / {fit.steps} / {1e3 * fit.seconds:.0f}"
        rows.setdefault(f"{fit.problem}, {fit.start}", []).append(text if fit.digits >= WANTED else f"[red]{text}[/]")
    for name, cells in rows.items():
        grid.add_row(name, *cells)
    grid.add_section()
    grid.add_row(f"{WANTED} digits", *(f"{right} of {total}" for right, total in map(_successes(found), methods)))
    for name, value in (("median steps", "steps"), ("median evaluations", "evaluations")):
        middles = (median(getattr(fit, value) for fit in found if fit.method == method) for method in methods)
        grid.add_row(name, *(f"{middle:g}" for middle in middles))
    times = (1e3 * median(fit.seconds for fit in found if fit.method == method) for method in methods)
    grid.add_row("median milliseconds", *(f"{middle:.1f}" for middle in times))
    return grid


def _successes(found: Sequence[Fit]) -> Callable[[str], tuple[int, int]]:
    def count(method: str) -> tuple[int, int]:
        own = [fit for fit in found if fit.method == method]
        return sum(fit.digits >= WANTED for fit in own), len(own)

    return count


def record(found: Sequence[Fit]) -> dict[str, Any]:
    """Return the fits with the versions and the machine that made them."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return {
        "newtonopt": version("newtonopt"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "processor": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, one thread",
        "fits": [asdict(fit) for fit in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*MODELS, "spectrum"]
    parser.add_argument("--problems", nargs="+", choices=names, default=names, metavar="NAME", help="default: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"default: benchmarks/results/{RESULTS.name}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for name in args.problems:
        found += fits(spectrum() if name == "spectrum" else read(name), args.methods)
    console = Console(width=170)
    for title, part in (
        ("NIST", [fit for fit in found if fit.problem != "spectrum"]),
        ("a thousand samples", [fit for fit in found if fit.problem == "spectrum"]),
    ):
        if part:
            console.print(table(title, part))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
