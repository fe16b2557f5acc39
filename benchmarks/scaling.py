"""Time and memory against parameters, batch and processes: `python benchmarks/scaling.py`.

Four actions on a tanh perceptron with two hidden layers of one width, a single output and squared error:

    product             one Hessian product on a graph that exists already
    HessianFree         a first step, which makes the sketch of rank 50, with ten iterations of conjugate gradients
    LevenbergMarquardt  a first step
    measurement         `measure` with its defaults, from random starts

Seconds are processor time on one thread, the median of up to five runs. Memory is the peak of PyTorch's allocator above
the parameters and the data. In a group of gloo processes each has a batch of its own, and the largest figure counts.

A run writes benchmarks/results/scaling.json, and from it docs/pictures/scaling.png and the table in
docs/what_it_costs.md; `--draw` only draws the file again. The default takes four minutes; `--largest 1e8` goes to
a hundred million parameters in twice that time, and leaves out what would not fit in memory, judged by ten times less.
"""

import argparse
import ctypes
import gc
import json
import math
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from league import commit, machine
from matplotlib.figure import Figure
from memory import peak
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from newtonopt import HessianFree, LevenbergMarquardt, evaluate, hessian
from newtonopt.curvature import measure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
PICTURE = ROOT / "docs" / "pictures" / "scaling.png"
PAGE = ROOT / "docs" / "what_it_costs.md"
BATCHES = (16, 64, 256, 1024)
PROCESSES = (1, 2)
BATCH = 32  # in the other two sweeps
REPEATS, ENOUGH = 5, 2.0  # runs of an action; no further one after so many seconds
BEGIN, END = "<!-- written by benchmarks/scaling.py -->", "<!-- end -->"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class Task:
    """A network with data of its own in each process."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def count(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def closure(self) -> Tensor:
        self.model.zero_grad()
        loss = F.mse_loss(self.model(self.inputs), self.targets)
        loss.backward()
        return loss


@dataclass(frozen=True)
class Point:
    """Cost of an action.

    Attributes:
        sweep: Name of the quantity that varies: "parameters", "batch" or "processes".
        at: Its value.
        action: Name of the action.
        seconds: Processor time; None if there was not enough memory.
        bytes: Peak of memory; None if there was not enough.
    """

    sweep: str
    at: int
    action: str
    seconds: float | None
    bytes: float | None


def width_of(parameters: float) -> int:
    """Return the width of the two hidden layers with which the network has so many parameters, nearly."""
    return max(1, round((math.sqrt(1 + 8 * parameters) - 3) / 4))


def count_of(width: int) -> int:
    return 2 * width**2 + 3 * width + 1


def task_of(parameters: float, batch: int, rank: int = 0) -> Task:
    width = width_of(parameters)
    torch.manual_seed(0)
    layers = (nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
    model: nn.Module = nn.Sequential(*layers)
    torch.manual_seed(rank + 1)
    inputs, targets = torch.randn(batch, width), torch.randn(batch, 1)
    return Task(DistributedDataParallel(model) if dist.is_initialized() else model, inputs, targets)


# Each prepares a fresh task for one run of its action.


def product(task: Task) -> Callable[[], object]:
    A = hessian(evaluate(task.closure, task.model.parameters()))
    v = torch.ones(task.count)
    A @ v  # the first product makes the graph of the gradient
    return lambda: A @ v


def hessian_free(task: Task) -> Callable[[], object]:
    optimizer = HessianFree(task.model.parameters(), max_iterations=10)
    return lambda: optimizer.step(task.closure)


def levenberg_marquardt(task: Task) -> Callable[[], object]:
    optimizer = LevenbergMarquardt(task.model.parameters())
    return lambda: optimizer.step(task.closure)


def measurement(task: Task) -> Callable[[], object]:
    optimizer = SGD(task.model.parameters(), lr=0.1)
    return lambda: measure(task.closure, task.model.parameters(), optimizer)


ACTIONS: dict[str, Callable[[Task], Callable[[], object]]] = {
    "product": product,
    "HessianFree": hessian_free,
    "LevenbergMarquardt": levenberg_marquardt,
    "measurement": measurement,
}


def cost(prepare: Callable[[Task], Callable[[], object]], make: Callable[[], Task]) -> tuple[float, float]:
    """Return the seconds and the bytes of an action. The first run tells the bytes, and fetches the memory."""
    gc.collect()
    memory, _ = peak(prepare(make()), "cpu")
    seconds: list[float] = []
    # Several processes have to run equally often.
    while not seconds or (len(seconds) < REPEATS and (dist.is_initialized() or sum(seconds) < ENOUGH)):
        action = prepare(make())
        began = time.process_time()
        action()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds), memory


def point(sweep: str, at: int, name: str, make: Callable[[], Task]) -> Point:
    seconds: float | None
    memory: float | None
    try:
        seconds, memory = cost(ACTIONS[name], make)
    except MemoryError:
        seconds = memory = None
    return Point(sweep, at, name, seconds, memory)


def sweeps(parameters: Sequence[float], middle: float) -> Iterator[Point]:
    for name in ACTIONS:
        before: Point | None = None
        for size in parameters:
            at = count_of(width_of(size))
            if before is not None and not fits(before, at):
                yield Point("parameters", at, name, None, None)
                continue
            before = point("parameters", at, name, partial(task_of, size, BATCH))
            yield before
        for batch in BATCHES:
            yield point("batch", batch, name, partial(task_of, middle, batch))


def fits(before: Point, at: int) -> bool:
    """Return whether there is memory in proportion to what fewer parameters took: without it systems end programs."""
    return before.bytes is not None and before.bytes * at / before.at < 0.85 * psutil.virtual_memory().available


def of_processes(middle: float) -> Iterator[Point]:
    """Yield the points of groups of processes, with the largest time of a group."""
    context = mp.get_context("spawn")
    for count in PROCESSES:
        answers = context.SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(in_group, (count, middle, f"{folder}/meeting", answers), nprocs=count)
        found = [answers.get() for _ in range(count)]
        for points in zip(*found, strict=True):
            yield max(points, key=lambda p: p.seconds)


def in_group(rank: int, count: int, middle: float, meeting: str, answers: Any) -> None:
    quiet()
    dist.init_process_group("gloo", f"file://{meeting}", world_size=count, rank=rank)
    answers.put([point("processes", count, name, partial(task_of, middle, BATCH, rank)) for name in ACTIONS])
    dist.destroy_process_group()


def quiet() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if platform.system() == "Linux":
        # Keep freed memory. By default glibc gives each tensor above 32 MB back to the system, which clears the pages
        # anew for the next one.
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


# The record, and what is drawn from it.


def save(points: Sequence[Point], path: Path) -> None:
    record = {
        "machine": machine(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
        "points": [asdict(p) for p in points],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def load(path: Path) -> list[Point]:
    return [Point(**p) for p in json.loads(path.read_text())["points"]]


def series(points: Sequence[Point], sweep: str, action: str, what: str) -> list[tuple[int, float]]:
    found = [(p.at, getattr(p, what)) for p in points if (p.sweep, p.action) == (sweep, action)]
    return [(at, value) for at, value in found if value is not None]


def slope(pairs: Sequence[tuple[int, float]]) -> float:
    """Return the slope between the last two points, on logarithmic axes."""
    (x, y), (further, higher) = pairs[-2:]
    return math.log(higher / y) / math.log(further / x)


def table(points: Sequence[Point]) -> str:
    """Return the seconds, and the slopes of seconds and memory, as Markdown."""
    sizes = sorted({p.at for p in points if p.sweep == "parameters"})
    heads = [f"{size:.0e}".replace("e+0", "e") for size in sizes]
    lines = [
        "| | " + " | ".join(heads) + " | slope | bytes | slope | batch: slope | bytes: slope | two processes |",
        "|---" * (len(sizes) + 7) + "|",
    ]
    for name in ACTIONS:
        times, memory = series(points, "parameters", name, "seconds"), series(points, "parameters", name, "bytes")
        cells = [f"{dict(times)[size]:.2g}" if size in dict(times) else "too large" for size in sizes]
        cells += [f"{slope(times):.2f}", f"{memory[-1][1] / memory[-1][0]:.0f}", f"{slope(memory):.2f}"]
        cells += [f"{slope(series(points, 'batch', name, what)):.2f}" for what in ("seconds", "bytes")]
        (_, alone), (_, together) = series(points, "processes", name, "seconds")
        lines.append(f"| {name} | " + " | ".join([*cells, f"{together / alone:.2f}"]) + " |")
    return "\n".join(lines)


def draw(points: Sequence[Point], path: Path) -> None:
    figure = Figure((10, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col")
    for column, (sweep, label) in enumerate((("parameters", "parameters"), ("batch", "samples in the batch"))):
        for row, (what, unit) in enumerate((("seconds", "processor time, s"), ("bytes", "peak of memory, bytes"))):
            panel = panels[row][column]
            for name, marker in zip(ACTIONS, "osv^", strict=True):
                pairs = series(points, sweep, name, what)
                panel.loglog(*zip(*pairs, strict=True), marker=marker, label=f"{name}, slope {slope(pairs):.2f}")
            panel.set_ylabel(unit)
            panel.grid(alpha=0.3)
            panel.set_ylim(top=30 * panel.get_ylim()[1])  # room for the legend
            panel.legend(fontsize="small", loc="upper left")
        panels[1][column].set_xlabel(label)
    figure.savefig(path, dpi=100)


def write_into(page: Path, text: str) -> None:
    """Replace what stands between the page's two marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=float, default=1e7, help="parameters of the largest network (default: 1e7)")
    parser.add_argument("--middle", type=float, default=1e5, help="parameters in the other two sweeps (default: 1e5)")
    parser.add_argument("--draw", action="store_true", help="draw the table and the picture from the file again")
    for name, path in (("results", RESULTS), ("picture", PICTURE), ("page", PAGE)):
        parser.add_argument(f"--{name}", type=Path, default=path, help=f"default: {path.relative_to(ROOT)}")
    args = parser.parse_args()
    quiet()
    if not args.draw:
        sizes = [10.0**power for power in range(3, round(math.log10(args.largest)) + 1)]
        cost(product, lambda: task_of(1e3, BATCH))  # libraries load parts of themselves at the first use
        found = chain(sweeps(sizes, args.middle), of_processes(args.middle))
        total = len(ACTIONS) * (len(sizes) + len(BATCHES) + len(PROCESSES))
        save([*track(found, "points", total, console=Console(stderr=True))], args.results)
    points = load(args.results)
    draw(points, args.picture)
    write_into(args.page, table(points))
    print(table(points))
    print(f"{time.process_time():.0f} s of processor time")


if __name__ == "__main__":
    main()
