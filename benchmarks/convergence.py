"""Our Newton methods beside SciPy's and L-BFGS on functions with known minima, from the standard starting points.

    OMP_NUM_THREADS=1 python benchmarks/convergence.py [--functions NAME ...] [--methods NAME ...] [--jobs 2]

Each run ends at a gradient norm of 1e-8, or after 2000 gradients or evaluations. It counts evaluations of the function,
gradients, products of the Hessian with a vector (a dense Hessian counts n) and the time they took together. It succeeds
if its gradient is that small at a listed minimum; "elsewhere" is another stationary point, or another point with so
small a slope.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import inf, isclose
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.optimize import minimize
from torch import Tensor

import newtonopt

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from functions import FUNCTIONS, Function

TOLERANCE, LIMIT = 1e-8, 2000
STALLED = 100  # steps in a row that did not move
Runs = dict[str, dict[str, "Run"]]  # by function and method

# With these options only the gradient ends a run; Newton-CG has only a tolerance for the step.
SCIPY = {"Newton-CG": {"xtol": 0.0}} | {f"trust-{name}": {"gtol": TOLERANCE} for name in ("ncg", "krylov", "exact")}
# Each of our optimizers with the closest method of SciPy; a method that this version of SciPy lacks is left out.
TWINS = {"DampedNewton": "trust-exact", "HessianFree": "Newton-CG", "NewtonCG": "Newton-CG"}
TWINS |= {"TrustRegionNewton": "trust-ncg", "CubicNewton": "trust-krylov"}
OURS = [name for name in TWINS if hasattr(newtonopt, name)]
METHODS = [*SCIPY, "L-BFGS", *OURS]


@dataclass
class Run:
    """The cost of one method on one function, and its end point."""

    function: str
    method: str
    evaluations: int = 0
    gradients: int = 0
    products: int = 0
    seconds: float = 0.0
    norm: float = inf
    value: float = inf
    reason: str = ""

    @property
    def outcome(self) -> str:
        minima = FUNCTIONS[self.function].minima
        at_minimum = any(isclose(self.value, minimum, rel_tol=1e-6, abs_tol=1e-8) for minimum in minima)
        if self.norm <= TOLERANCE:
            return "minimum" if at_minimum else "elsewhere"
        return f"|g| {self.norm:.0e}{' at a minimum' if at_minimum else ''}{self.reason and f', {self.reason}'}"

    @property
    def cost(self) -> float:
        """Return gradients plus products; infinity if the run did not succeed."""
        return self.gradients + self.products if self.outcome == "minimum" else inf


class _Ended(Exception):
    """The run has reached its end or a limit."""


class _Oracle:
    """The function as other libraries call it, with counters; products reuse the gradient's graph at the same point."""

    def __init__(self, function: Function, run: Run, seconds: float) -> None:
        self.function, self.run, self.end = function, run, perf_counter() + seconds
        self.at: np.ndarray | None = None

    def value(self, x: np.ndarray) -> float:
        self._check()
        self.run.evaluations += 1
        return float(self.function.value(torch.from_numpy(x)))

    def gradient(self, x: np.ndarray) -> np.ndarray:
        self._go_to(x)
        self.run.gradients += 1
        norm = float(np.linalg.norm(gradient := self.g.detach().numpy()))
        if norm < self.run.norm:
            self.run.norm, self.run.value = norm, float(self.loss.detach())
        if norm <= TOLERANCE:
            raise _Ended
        return gradient

    def product(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        self._go_to(x)
        self.run.products += 1
        (product,) = torch.autograd.grad(self.g, self.x, torch.tensor(v), retain_graph=True, materialize_grads=True)
        return product.numpy()

    def dense(self, x: np.ndarray) -> np.ndarray:
        return np.stack([self.product(x, unit) for unit in np.eye(len(x))])

    def _go_to(self, x: np.ndarray) -> None:
        self._check()
        if self.at is None or not np.array_equal(x, self.at):
            self.at = x.copy()
            self.x = torch.tensor(x, requires_grad=True)
            self.loss = self.function.value(self.x)
            (self.g,) = torch.autograd.grad(self.loss, self.x, create_graph=True)

    def _check(self) -> None:
        if max(self.run.evaluations, self.run.gradients) >= LIMIT or perf_counter() > self.end:
            self.run.reason = "limit"
            raise _Ended


def measure(function: Function, method: str, seconds: float) -> Run:
    """One run of one method from the standard start."""
    run, start = Run(function.name, method), perf_counter()
    try:
        (_run_ours if method in OURS else _run_scipy if method in SCIPY else _run_lbfgs)(function, run, seconds)
        run.reason = run.reason or "gave up"
    except _Ended:
        pass
    except (ArithmeticError, RuntimeError, ValueError, np.linalg.LinAlgError) as error:
        run.reason = type(error).__name__
    run.seconds = run.seconds or perf_counter() - start
    return run


def _run_scipy(function: Function, run: Run, seconds: float) -> None:
    oracle, x = _Oracle(function, run, seconds), np.array(function.start, dtype=np.float64)
    method = run.method
    second = {"hess": oracle.dense} if method == "trust-exact" else {"hessp": oracle.product}
    with np.errstate(all="ignore"):
        minimize(
            oracle.value, x, method=method, jac=oracle.gradient, options=SCIPY[method] | {"maxiter": LIMIT}, **second
        )


def _run_lbfgs(function: Function, run: Run, seconds: float) -> None:
    oracle, x = _Oracle(function, run, seconds), torch.tensor(function.start, dtype=torch.float64, requires_grad=True)
    settings = {"max_iter": LIMIT, "max_eval": LIMIT, "tolerance_grad": 0.0, "tolerance_change": 0.0}
    optimizer = torch.optim.LBFGS([x], history_size=100, line_search_fn="strong_wolfe", **settings)

    def closure() -> Tensor:
        run.evaluations += 1
        x.grad = torch.from_numpy(oracle.gradient(x.detach().numpy()))
        return oracle.loss.detach()

    optimizer.step(closure)


def _run_ours(function: Function, run: Run, seconds: float) -> None:
    """Run one of our optimizers. Each step costs one gradient; the last one shows that the end point is stationary."""
    x = torch.tensor(function.start, dtype=torch.float64, requires_grad=True)
    options = {"curvature": "hessian"} if run.method == "HessianFree" else {}
    optimizer = getattr(newtonopt, run.method)([x], **options)
    oracle, stalled = _Oracle(function, run, seconds), 0

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = function.value(x)
        loss.backward()
        return loss

    while stalled < STALLED:
        oracle.gradient(x.detach().numpy())
        start = perf_counter()
        optimizer.step(closure)
        run.seconds += perf_counter() - start
        report = optimizer.last_step
        run.products += report.products
        run.evaluations += 1 + report.trials
        stalled = 0 if report.accepted else stalled + 1
    run.reason = "stalled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", nargs="+", metavar="NAME", choices=FUNCTIONS, default=list(FUNCTIONS))
    parser.add_argument("--methods", nargs="+", metavar="NAME", choices=METHODS, default=METHODS)
    parser.add_argument("--seconds", type=float, default=60.0, help="longest time of a run (default: 60)")
    parser.add_argument("--jobs", type=int, default=1, help="functions at a time; 1, the default, times best")
    args = parser.parse_args()
    work = partial(_measure_all, methods=args.methods, seconds=args.seconds)
    console, spawn = Console(width=180), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, spawn) as pool:
        results = track(pool.map(work, args.functions), total=len(args.functions), console=Console(stderr=True))
        runs = {group[0].function: {run.method: run for run in group} for group in results}
    console.print(_details(runs))
    console.print(_costs(runs, args.methods))
    for line in _summary(runs, args.methods):
        console.print(line, soft_wrap=True)


def _measure_all(name: str, methods: list[str], seconds: float) -> list[Run]:
    torch.set_num_threads(1)
    measure(FUNCTIONS["rosenbrock"], "L-BFGS", 1.0)  # the first use of torch is slow
    return [measure(FUNCTIONS[name], method, seconds) for method in methods]


def _details(runs: Runs) -> Table:
    table = Table("function", "method", title="to a gradient norm of 1e-8")
    for column in ("evaluations", "gradients", "products", "ms"):
        table.add_column(column, justify="right")
    table.add_column("ended at")
    for group in runs.values():
        for run in group.values():
            counts = map(str, (run.evaluations, run.gradients, run.products))
            table.add_row(run.function, run.method, *counts, f"{1e3 * run.seconds:.1f}", run.outcome)
        table.add_section()
    return table


def _costs(runs: Runs, methods: list[str]) -> Table:
    table = Table("function", title="gradients and products, where a listed minimum was reached")
    for method in methods:
        table.add_column(method, justify="right")
    for name, group in runs.items():
        table.add_row(name, *(f"{run.cost:g}" if run.cost < inf else "-" for run in group.values()))
    return table


def _summary(runs: Runs, methods: list[str]) -> Iterator[str]:
    solved = {m: sum(group[m].cost < inf for group in runs.values()) for m in methods}
    yield f"Solved of {len(runs)} functions: " + ", ".join(f"{m} {count}" for m, count in solved.items())
    ours, scipy = ([m for m in methods if m in family] for family in (OURS, SCIPY))
    best = {n: [min((g[m].cost for m in family), default=inf) for family in (ours, scipy)] for n, g in runs.items()}
    wins = [name for name, (a, b) in best.items() if a <= b and a < inf]
    only = [name for name, (a, b) in best.items() if a < inf == b]
    lost = [name for name, (a, b) in best.items() if b < a]
    yield f"Our best needs no more gradients and products than SciPy's best on {len(wins)} of {len(runs)}"
    yield f"  (only ours solves {', '.join(only) or 'none'}); more on {', '.join(lost) or 'none'}"
    for method in ours:
        twin = TWINS[method]
        failed = [n for n, group in runs.items() if twin in group and group[twin].cost < inf == group[method].cost]
        yield f"{method} fails where {twin} succeeds: {', '.join(failed) or 'nowhere'}"


if __name__ == "__main__":
    main()
