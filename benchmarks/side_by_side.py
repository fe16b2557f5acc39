"""Train one problem with several optimizers, each run in a process and one thread of its own."""

import argparse
import ast
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
from comparison import OURS, write
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.optim import Adam
from training import GRID, LBFGS_METHOD, Contender, Message, Problem, Report, Run, Stepping, train

from newtonopt import CubicNewton, DampedNewton, HessianFree, LevenbergMarquardt, NewtonCG, TrustRegionNewton

_SPAWN = multiprocessing.get_context(
    "spawn"
)  # a fresh interpreter for each run, without the parent's threads and state

_FAMILY = (HessianFree, LevenbergMarquardt, NewtonCG, TrustRegionNewton, CubicNewton, DampedNewton)
_MEMBERS = {member.__name__: member for member in _FAMILY}
METHODS = (*_MEMBERS, "Adam", "L-BFGS", "Adam+L-BFGS")
RATES = (
    3e-4,
    1e-3,
    3e-3,
    1e-2,
)  # Adam's grid; the table reports the rate with the lowest last loss, median over the seeds
DENSE = 1000  # parameters; DampedNewton is meant for a few hundred


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Parse the command line that all side-by-side benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150.0, help="training time of a run (default: 150)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--clock", choices=["wall", "processor"], default="wall", help="clock that counts the seconds (default: wall)"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all", metavar="NAME")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=RATES, metavar="LR", help="Adam's grid (default: 3e-4 1e-3 3e-3 1e-2)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; 1, the default, disturbs none")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="for HessianFree's constructor; repeatable"
    )
    output = Path(__file__).parent / "out"
    parser.add_argument("--output", type=Path, default=output, help="folder of figures (default: benchmarks/out)")
    return parser


def main(name: str, problem: Callable[[int], Problem], error_name: str, args: argparse.Namespace) -> None:
    """Run every method over the seeds, then print the tables and write `name`.json and `name`.png."""
    size = sum(p.numel() for p in problem(args.seeds[0]).model.parameters())
    options = dict(map(_option, args.option))
    contenders = _contenders(args.methods, options, args.rates)
    left_out = {}
    if size > DENSE and "DampedNewton" in args.methods:
        contenders = [contender for contender in contenders if contender.method != "DampedNewton"]
        left_out["DampedNewton"] = f"not run: {size} products and their matrix a step"
    work = {
        f"{contender.name}, seed {seed}": partial(train, problem, contender, seed, args.seconds, args.clock)
        for seed in args.seeds
        for contender in contenders
    }
    outcomes = dict(race(name, work, args.jobs))
    runs = [outcomes[label] for label in work if isinstance(outcomes[label], Run)]
    if runs:
        settings = {"options": options, "seconds": args.seconds, "clock": args.clock, "jobs": args.jobs}
        write(name, runs, left_out, error_name, settings, args.output)
    failures = {label: repr(e) for label, e in outcomes.items() if isinstance(e, BaseException)}
    failures |= {f"{run.contender}, seed {run.seed}": run.failure for run in runs if run.failure}
    if failures:
        sys.exit("\n".join(f"{label} failed: {text}" for label, text in failures.items()))


def _contenders(methods: Sequence[str], options: dict[str, Any], rates: Sequence[float]) -> list[Contender]:
    """Return our optimizers with default settings, except HessianFree's `options`, and the peers."""
    chosen = []
    for method in methods:
        if method in _MEMBERS:
            make = partial(_MEMBERS[method], **options) if method == OURS else _MEMBERS[method]
            chosen.append(Contender(method, ((1.0, Stepping(make)),), method))
        elif method == "Adam":
            chosen += [Contender(f"Adam {lr:g}", ((1.0, Stepping(partial(Adam, lr=lr))),), method) for lr in rates]
        elif method == "L-BFGS":
            chosen.append(Contender(method, ((1.0, LBFGS_METHOD),), method))
        else:
            phases = (1 / 3, Stepping(partial(Adam, lr=1e-3))), (1.0, LBFGS_METHOD)
            chosen.append(Contender(method, phases, method))
    return chosen


def _option(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):  # a bare word means a string
        return key, value


def race(
    title: str, work: Mapping[str, Callable[[Report], Run]], jobs: int
) -> Iterator[tuple[str, Run | BaseException]]:
    """Carry out runs, each in a process of its own, under a progress bar; yield each outcome as soon as it is there.

    Args:
        title: Text beside the bar.
        work: The runs by their names, in the order in which they begin.
        jobs: Runs at a time.

    Yields:
        The name of a run, and the run, or the error that ended it.
    """
    messages: SimpleQueue[tuple[str, Message]] = _SPAWN.SimpleQueue()
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    threads, reached = ThreadPoolExecutor(jobs), dict.fromkeys(work, 0.0)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(title, total=len(work))
        futures = {threads.submit(_in_a_process, messages, name, run): name for name, run in work.items()}
        unfinished = set(futures)
        try:
            while unfinished:
                done, unfinished = wait(unfinished, timeout=0.2, return_when=FIRST_COMPLETED)
                while not messages.empty():
                    name, (_, _, index, loss, _) = messages.get()
                    reached[name] = index / GRID
                    text = f"{title}: {name}: {loss:.1e}"
                    progress.update(bar, completed=sum(reached.values()), description=text)
                for future in done:
                    reached[futures[future]] = 1.0
                    yield futures[future], future.exception() or future.result()
        finally:
            # After an interruption no further run begins.
            threads.shutdown(cancel_futures=True)


def _in_a_process(messages: "SimpleQueue[tuple[str, Message]]", name: str, run: Callable[[Report], Run]) -> Run:
    # One pool for each run, so that a killed run takes no other with it.
    with ProcessPoolExecutor(1, _SPAWN, _start_worker, (messages,)) as pool:
        return pool.submit(_run_in_worker, name, run).result()


_send: Callable[[tuple[str, Message]], None]  # set in each worker


def _start_worker(messages: "SimpleQueue[tuple[str, Message]]") -> None:
    global _send
    torch.set_num_threads(1)
    _send = messages.put


def _run_in_worker(name: str, run: Callable[[Report], Run]) -> Run:
    return run(lambda message: _send((name, message)))
