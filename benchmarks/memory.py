"""Memory: the peak of a step and of a measurement beside a plain step of SGD.

`python benchmarks/memory.py` prints a table for each of four small models: the peak of one action above the memory in
use before it (the data and the parameters), plus the parameters. The figure is the exact peak of PyTorch's allocator;
memory that a kernel allocates by itself, such as oneDNN's scratch, is not counted.

`python benchmarks/memory.py --large` takes a GPT of 100 million parameters: each action runs in a process of its own
and reports the peak of its resident memory. A process that would take more than `--limit` ends with an error instead.

Each takes some minutes.
"""

import argparse
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from memory_setups import Setup, large_setup, small_setups
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile

from newtonopt import HessianFree, evaluate, gauss_newton, hessian
from newtonopt.curvature import extreme_eigenvalues

PARTS = 8  # micro-batches
ITERATIONS = 6  # iterations of conjugate gradients in a step
PRODUCTS = 8  # iterations in a measurement
FORMS = ("cached", "streamed", "finite_difference")
MB = 1e6
GB = 1e9
# Vectors (n,) of a step: the point, its gradient, the last step's direction, and from conjugate gradients
# iterate, residual, direction and product. The path of iterates comes on top.
STEP_VECTORS = 7
# Point, gradient, and from Lanczos the last vector, the next and the product; twice the Ritz vectors. Plus the basis.
MEASUREMENT_VECTORS = 7
LARGE_TARGET = 24.0  # GB
TARGETS = {("step", "cached"): 3.5, ("step", "streamed"): 1.5, ("product", "streamed"): 1.3}


@dataclass(frozen=True)
class Row:
    """One action's peak, and the number of vectors `(n,)` that the method is documented to hold."""

    action: str
    form: str
    parts: int
    bytes: float
    vectors: int = 0
    target: float | None = None


def plain_step(setup: Setup, parts: int) -> int:
    optimizer = SGD(setup.parameters, lr=0.0)
    optimizer.step(setup.closure(optimizer, parts))
    return 0


def newton_step(setup: Setup, parts: int, form: Any, steps: int = 2, preconditioner: Any = None) -> int:
    """Take two steps; the second starts from the first one's direction. Return the number of vectors a step holds."""
    optimizer = HessianFree(setup.parameters, products=form, preconditioner=preconditioner, max_iterations=ITERATIONS)
    closure = setup.closure(optimizer, parts)
    for _ in range(steps):
        optimizer.step(closure)
    report = optimizer.last_step
    assert report is not None
    return STEP_VECTORS + path_length(report.iterations)


def path_length(iterations: int) -> int:
    """Return the number of kept iterates without the last: the first, and indices that grow by 1.3."""
    kept, mark = 1, 1.0
    for iteration in range(1, iterations):
        if iteration >= mark:
            kept, mark = kept + 1, max(iteration + 1, 1.3 * mark)
    return kept


def measurement(setup: Setup, parts: int, form: Any) -> int:
    """Compute the largest eigenvalue of the Hessian. Return the number of vectors held."""
    optimizer = SGD(setup.parameters, lr=0.0)
    evaluation = evaluate(setup.closure(optimizer, parts), setup.parameters, products=form)
    return (
        MEASUREMENT_VECTORS + extreme_eigenvalues(hessian(evaluation), top=1, bottom=0, max_products=PRODUCTS).products
    )


def peak(action: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Return the peak in bytes above the bytes allocated before, and the action's result."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = action()
        return torch.cuda.max_memory_allocated() - before, result
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with silent_errors():
        profiler.start()
    result = action()
    with silent_errors():
        profiler.stop()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest, result


@contextmanager
def silent_errors() -> Iterator[None]:
    """Hide the lines that the profiler's native code writes to the standard error."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def check_meter(device: str) -> None:
    """Check that a known pattern of allocations is measured to the byte."""

    def pattern() -> None:
        held = [torch.empty(256 * size, device=device) for size in (1, 2)]
        del held[0]
        held.append(torch.empty(512, device=device))
        del held[0]

    measured, _ = peak(pattern, device)
    if measured != 4 * 1024:
        raise SystemExit(f"The meter is wrong: {measured} bytes measured where {4 * 1024} were allocated.")


def measure(make: Callable[[], Setup], device: str) -> tuple[Setup, list[Row]]:
    """Measure all actions, each on a new model and new data, so that none finds another's leftovers."""

    def fresh() -> Setup:
        setup = make()
        setup.model.to(device)
        return Setup(setup.name, setup.model, setup.inputs.to(device), setup.targets.to(device))

    def row(name: str, kind: str, form: str, parts: int, prepare: Callable[[Setup], Callable[[], int]]) -> Row:
        setup = fresh()
        used, vectors = peak(prepare(setup), device)
        return Row(name, form, parts, used + 4 * setup.count, vectors, TARGETS.get((kind, form)))

    def ready(action: Callable[..., int], *args: Any) -> Callable[[Setup], Callable[[], int]]:
        return lambda setup: lambda: action(setup, *args)

    newton_step(fresh(), 1, "cached", steps=1)  # libraries allocate some memory for good, which no action should count
    rows = []
    for parts in (1, PARTS):
        rows.append(row("SGD step", "plain", "", parts, ready(plain_step, parts)))
        for form in FORMS if parts == 1 else FORMS[1:]:
            rows.append(row("HessianFree step", "step", form, parts, ready(newton_step, parts, form)))
            rows.append(row("eigenvalue", "step", form, parts, ready(measurement, parts, form)))
        for form in FORMS[1:]:
            for name, matrix in (("Hessian product", hessian), ("Gauss-Newton product", gauss_newton)):
                rows.append(row(name, "product", form, parts, prepared_product(matrix, form, parts)))
    return fresh(), rows


def prepared_product(matrix: Any, form: Any, parts: int) -> Callable[[Setup], Callable[[], int]]:
    """Prepare an evaluation and a vector, and return one product; its result counts like `.grad` for SGD."""

    def prepare(setup: Setup) -> Callable[[], int]:
        optimizer = SGD(setup.parameters, lr=0.0)
        operator = matrix(evaluate(setup.closure(optimizer, parts), setup.parameters, products=form))
        v = torch.ones(setup.count, device=setup.targets.device)

        def product() -> int:
            operator @ v
            return 0

        return product

    return prepare


def small_table(setup: Setup, rows: Sequence[Row]) -> Table:
    n = setup.count
    plain = {row.parts: row.bytes for row in rows if row.form == ""}
    table = Table(title=f"{setup.name}: {n:,} parameters, {4 * n / MB:.3g} MB")
    for name in ("action", "products", "closure"):
        table.add_column(name, no_wrap=True)
    for name in ("peak, MB", "/ whole-batch SGD", "/ own SGD", "vectors", "MB", "/ own SGD, without", "target"):
        table.add_column(name, justify="right")
    for row in rows:
        if row.form == "" and row.parts != 1:
            table.add_section()
        own, held = row.bytes / plain[row.parts], 4 * n * row.vectors
        free = (row.bytes - held) / plain[row.parts]
        target = "" if row.target is None else _verdict(own if row.form == "cached" else free, row.target)
        table.add_row(
            row.action,
            row.form,
            "whole batch" if row.parts == 1 else f"{row.parts} parts",
            f"{row.bytes / MB:.3g}",
            f"{row.bytes / plain[1]:.2f}",
            f"{own:.2f}",
            str(row.vectors or ""),
            f"{held / MB:.3g}" if row.vectors else "",
            f"{free:.2f}" if row.vectors else "",
            target,
        )
    return table


def _verdict(value: float, target: float) -> str:
    return f"{target:g} {'met' if value <= target else 'MISSED'}"


SMALL_CAPTION = f"""\
HessianFree: Gauss-Newton, no preconditioner, at most {ITERATIONS} iterations; the second step starts from the first's \
direction. Eigenvalue: the largest of the Hessian, {PRODUCTS} products at most. A product: its evaluation exists \
beforehand. "own SGD" is one step of SGD with the same closure. "vectors" are those that the method is documented to \
need, with the path of iterates or the Lanczos basis, 4 bytes an entry; "without" is the peak less the vectors. \
Targets: cached, on the peak; streamed, on the peak without the vectors; a streamed product, on the peak."""


def run_large(action: str, form: str, limit: float) -> tuple[str, ...]:
    """Return a row of the table, from a process whose addresses end `limit` bytes above its start."""
    start = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (int(start + limit), int(start + limit)))
    torch.set_num_threads(1)
    setup = large_setup()
    began, failure = time.perf_counter(), ""
    try:
        if action == "SGD step":
            plain_step(setup, 1)
        elif action == "eigenvalue":
            measurement(setup, 1, form)
        else:
            newton_step(setup, 1, form, preconditioner="empirical_fisher")
    except (RuntimeError, MemoryError) as error:
        failure = f"ended: {str(error).splitlines()[0][:60]}"
    seconds = time.perf_counter() - began
    used = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GB
    return action, form, f"{used:.2f}", f"{seconds:.0f}", failure or _verdict(used, LARGE_TARGET)


def large_table(limit: float) -> Table:
    table = Table(title="GPT of 100 million parameters (0.4 GB), 2 x 32 tokens")
    for name in ("action", "products"):
        table.add_column(name)
    for name in ("peak resident, GB", "seconds", "target, GB"):
        table.add_column(name, justify="right")
    jobs = [("SGD step", "")]
    jobs += [(action, form) for action in ("HessianFree step", "eigenvalue") for form in FORMS[1:]]
    spawn = multiprocessing.get_context("spawn")
    for action, form in track(jobs, description="100 million parameters", console=Console(stderr=True)):
        with ProcessPoolExecutor(1, spawn) as pool:
            table.add_row(*pool.submit(run_large, action, form, limit).result())
    return table


LARGE_CAPTION = f"""\
HessianFree: Gauss-Newton, at most {ITERATIONS} iterations, preconditioner="empirical_fisher", two vectors: the \
default sketch of rank 50 takes 20 GB to keep, and more to make. Eigenvalue: the largest of the Hessian, {PRODUCTS} \
products at most. One thread. The resident memory holds Python and PyTorch too, about 0.3 GB. HessianFree: two steps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="the model of 100 million parameters, on the CPU")
    parser.add_argument("--limit", type=float, help="GB that a process may take (default: 0.85 of what is free)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="for the small models (default: cpu)")
    args = parser.parse_args()
    console = Console(width=150)  # a fixed width, so that a table written to a file is not folded
    if args.large:
        limit = args.limit * GB if args.limit else 0.85 * psutil.virtual_memory().available
        console.print(large_table(limit), LARGE_CAPTION, sep="\n")
        return
    check_meter(args.device)
    for make in track(small_setups(), description="small models", console=Console(stderr=True)):
        console.print(small_table(*measure(make, args.device)))
    console.print(SMALL_CAPTION)


if __name__ == "__main__":
    main()
