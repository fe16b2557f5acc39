"""One training run, on a clock that counts the optimizer's time alone.

A value at time t belongs to the parameters at t, which are the parameters before the step under way.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import exp, isfinite, log, nan
from statistics import linear_regression
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

GRID = 20  # measurements in a run, evenly spaced in time

# Contender, seed, index on the time grid, loss, error.
Message = tuple[str, int, int, float, float]
Report = Callable[[Message], None]


# A function of one point `(d,)`, such as the network or a derivative of it.
Field = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Term:
    """A mean of squares `(residual(u, p) - target)^2` over points `p`, written for one point at a time.

    `points` has shape (m, d), `targets` (m,); without targets they are zero.
    """

    points: Tensor
    residual: Callable[[Field, Tensor], Tensor]
    targets: Tensor | None = None


def keep() -> None:
    """Leave the data as they are."""


@dataclass(frozen=True)
class Problem:
    """A model, the loss that trains it, and the error that its user cares about.

    `draw` is called before each step and renews the data of losses that are trained on changing data. `terms` says the
    loss again, as a sum of terms with the data of this step, where the problem can.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    error: Callable[[], float]
    draw: Callable[[], None] = keep
    terms: Callable[[], list[Term]] | None = None


# Begins the training of a problem and returns a function that takes one step.
Method = Callable[[Problem], Callable[[], object]]


@dataclass(frozen=True)
class Contender:
    """One or several methods in turn; each phase lasts until its fraction of the time has passed.

    Contenders of one method differ in a setting; the best of them stands for the method.
    """

    name: str
    phases: tuple[tuple[float, Method], ...]
    method: str


@dataclass(frozen=True)
class Run:
    """Loss and error of one contender from one seed, at the times of the grid."""

    contender: str
    method: str
    seed: int
    steps: int
    processor_share: float  # processor time over wall time; well below 1 the run had to share its core
    seconds: list[float]
    loss: list[float]
    error: list[float]
    failure: str = ""  # error of the step that ended the run early; from there on the values stand still


def on_device(problem: Callable[[int], Problem], device: str, seed: int) -> Problem:
    """Return the problem with its model and its data on a device."""
    with torch.device(device):
        return problem(seed)


def train(
    problem: Callable[[int], Problem],
    contender: Contender,
    seed: int,
    seconds: float,
    clock: Literal["wall", "processor"],
    report: Report,
) -> Run:
    """Train for `seconds` of optimizer time; measure loss and error on the time grid, with the clock stopped.

    Args:
        problem: Builds the problem from a seed.
        contender: The optimizers that train it.
        seed: Seeds model, data and torch's random state.
        seconds: Length of the run.
        clock: Wall time or processor time. They agree on an idle machine; processor time is steadier on a shared
            one.
        report: Called with a message at every measurement.
    """
    task = problem(seed)
    torch.manual_seed(seed)
    params = list(task.model.parameters())
    grid = [seconds * index / GRID for index in range(GRID + 1)]
    measured = [_measure(task)]
    steps, elapsed, wall, processor, failure = 0, 0.0, 0.0, 0.0, ""
    for until, begin in contender.phases:
        step = begin(task)
        while elapsed < until * seconds and not failure:
            held = [param.detach().clone() for param in params]
            wall_start, processor_start = time.perf_counter(), time.process_time()
            task.draw()
            try:
                step()
                if params[0].is_cuda:
                    torch.cuda.synchronize()
            except (ArithmeticError, RuntimeError, ValueError) as error:
                failure = f"{type(error).__name__}: {error}".split("\n")[0]
            wall += time.perf_counter() - wall_start
            processor += time.process_time() - processor_start
            elapsed = wall if clock == "wall" else processor
            steps += 1
            due = len(grid) if failure else sum(point <= elapsed for point in grid)
            if due > len(measured):
                measured += (due - len(measured)) * [_measure_at(task, params, held)]
                report((contender.name, seed, len(measured) - 1, *measured[-1]))
    losses, errors = map(list, zip(*measured, strict=True))
    return Run(contender.name, contender.method, seed, steps, processor / wall, grid, losses, errors, failure)


@dataclass(frozen=True)
class Stepping:
    """The method that hands an optimizer of torch's kind the usual closure: `Stepping(partial(Adam, lr=1e-3))`."""

    make: Callable[[list[nn.Parameter]], Optimizer]

    def __call__(self, task: Problem) -> Callable[[], object]:
        optimizer = self.make(list(task.model.parameters()))

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = task.loss()
            value.backward()
            return value

        return lambda: optimizer.step(closure)


# Twenty iterations a call, so that the clock is read often; without tolerances L-BFGS uses all its time.
LBFGS_METHOD = Stepping(
    partial(
        LBFGS, history_size=100, max_iter=20, line_search_fn="strong_wolfe", tolerance_grad=0.0, tolerance_change=0.0
    )
)


def extrapolated(run: Run, seconds: float) -> float:
    """Return the error at a later time if it goes on falling as a power of the time, as in the run's second half.

    nan if the error did not fall in that half, or the run failed.
    """
    half = [(log(s), log(e)) for s, e in zip(run.seconds[GRID // 2 :], run.error[GRID // 2 :], strict=True) if e > 0.0]
    if run.failure or len(half) < 2 or not all(isfinite(e) for _, e in half):
        return nan
    slope, start = linear_regression(*zip(*half, strict=True))
    return exp(start + slope * log(seconds)) if slope < 0.0 else nan


def _measure(task: Problem) -> tuple[float, float]:
    return task.loss().item(), task.error()


def _measure_at(task: Problem, params: list[nn.Parameter], values: list[Tensor]) -> tuple[float, float]:
    """Measure with the parameters set to `values`, then restore the parameters bit for bit."""
    current = [param.detach().clone() for param in params]
    _assign(params, values)
    result = _measure(task)
    _assign(params, current)
    return result


@torch.no_grad()
def _assign(params: list[nn.Parameter], values: list[Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        param.copy_(value)
