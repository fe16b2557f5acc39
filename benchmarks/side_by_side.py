"""Train one problem with several optimizers, each run in a process and one thread of its own."""

import argparse
import ast
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
from comparison import write
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.optim import LBFGS, Adam
from training import GRID, Contender, Message, Problem, Run, train

from newtonopt import HessianFree

_SPAWN = multiprocessing.get_context("spawn")  # a fresh interpreter each, with no threads or state of the parent's

# Twenty iterations a call keep the clock's grain fine; without tolerances it uses all the time it is given.
_lbfgs = partial(
    LBFGS, history_size=100, max_iter=20, line_search_fn="strong_wolfe", tolerance_grad=0.0, tolerance_change=0.0
)
LBFGS_ALONE = Contender("L-BFGS", ((1.0, _lbfgs),))
ADAM_THEN_LBFGS = Contender("Adam+L-BFGS", ((1 / 3, partial(Adam, lr=1e-3)), (1.0, _lbfgs)))


def adam(lr: float) -> Contender:
    """Adam at one learning rate."""
    return Contender(f"Adam-{lr:g}", ((1.0, partial(Adam, lr=lr)),))


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The command line that all side-by-side benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150.0, help="training time of a run (default: 150)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--clock", choices=["wall", "processor"], default="wall", help="what seconds are (default: wall)"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders only")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; 1, the default, disturbs none")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="for HessianFree's constructor; repeatable"
    )
    output = Path(__file__).parent / "out"
    parser.add_argument("--output", type=Path, default=output, help="folder of figures (default: benchmarks/out)")
    return parser


def main(
    name: str, problem: Callable[[int], Problem], error_name: str, peers: Sequence[Contender], args: argparse.Namespace
) -> None:
    """Run HessianFree and its peers over the seeds, then print the tables and write `name`.json and `name`.png."""
    options = dict(map(_option, args.option))
    contenders = [Contender("HessianFree", ((1.0, partial(HessianFree, **options)),)), *peers]
    known = [contender.name for contender in contenders]
    if unknown := set(args.only or known) - set(known):
        sys.exit(f"--only: no contender is named {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    chosen = [contender for contender in contenders if contender.name in (args.only or known)]
    runs, failures = _run_all(problem, chosen, args)
    if runs:
        settings = {"options": options, "clock": args.clock, "jobs": args.jobs}
        write(name, runs, error_name, settings, args.output)
    if failures:
        sys.exit("\n".join(failures))


def _option(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):  # a bare word is a string
        return key, value


def _run_all(
    problem: Callable[[int], Problem], contenders: Sequence[Contender], args: argparse.Namespace
) -> tuple[list[Run], list[str]]:
    messages: SimpleQueue[Message] = _SPAWN.SimpleQueue()
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with ThreadPoolExecutor(args.jobs) as threads, Progress(*columns, console=Console(stderr=True)) as progress:
        futures = {
            threads.submit(
                _in_a_process, messages, partial(train, problem, contender, seed, args.seconds, args.clock)
            ): f"{contender.name}, seed {seed}"
            for seed in args.seeds
            for contender in contenders
        }
        bar = progress.add_task("starting", total=len(futures))
        reached: dict[tuple[str, int], float] = {}
        while wait(futures, timeout=0.2).not_done:
            while not messages.empty():
                name, seed, index, loss, error = messages.get()
                reached[name, seed] = index / GRID
                text = f"{name}, seed {seed}: loss {loss:.1e}, error {error:.1e}"
                progress.update(bar, completed=sum(reached.values()), description=text)
    failures = [f"{label} failed: {future.exception()!r}" for future, label in futures.items() if future.exception()]
    return [future.result() for future in futures if not future.exception()], failures


def _in_a_process(messages: "SimpleQueue[Message]", run: Callable[[Callable[[Message], None]], Run]) -> Run:
    # A pool for each run: one that is killed takes no other run with it.
    with ProcessPoolExecutor(1, _SPAWN, _start_worker, (messages,)) as pool:
        return pool.submit(_run_in_worker, run).result()


_report: Callable[[Message], None]  # set in each worker


def _start_worker(messages: "SimpleQueue[Message]") -> None:
    global _report
    torch.set_num_threads(1)
    _report = messages.put


def _run_in_worker(run: Callable[[Callable[[Message], None]], Run]) -> Run:
    return run(_report)
