"""Time that CurvatureMonitor adds to training: `python benchmarks/monitor_overhead.py`.

Each network trains under Lightning with Adam, from the same weights with one monitor after the other, in one process.
The same run times training steps and measurements apart, and the table compares their medians over all rounds. A
monitor measures every 100 steps: some measurements start at random, the others track the last one. A round takes 300
steps, with one certified measurement and two that track it; `--measurements` makes it longer, for the spectrum moves
fastest at first, and tracking takes most there. The overhead weighs them as they occur in the first hundred
measurements of a run in which tracking keeps up, so that ten, twenty and forty of them lie between certified ones:
(96 tracked + 4 certified) / 10,000 steps.
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from memory_setups import Setup, convolutional, gpt
from torch import Tensor
from torch.utils.data import DataLoader

from newtonopt.callbacks import Budget, CurvatureMonitor

EVERY = 100
CERTIFIED_SHARE = 0.04  # numbers 0, 10, 30 and 70 of a hundred
BUDGET = Budget(certify_every=3)  # in a round one measurement is certified, and two track it
NETWORKS: dict[str, Callable[[], Setup]] = {
    "conv": convolutional,
    "gpt": lambda: gpt(4, 128, 4, 64, batch=16, length=64),
}
MONITORS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "top eigenvalue alone": {"sharpness": None, "top": 1, "bottom": 0, "gradient": False},
}


class Classifier(L.LightningModule):
    """A setup that trains on one batch of its data again and again, with fresh noise."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.network = setup.model

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]).flatten(0, -2), batch[1].flatten())


@dataclass
class Times:
    """Times of one monitor over the rounds: seconds by kind of measurement, and products."""

    tracked: list[float] = field(default_factory=list)
    certified: list[float] = field(default_factory=list)
    products: dict[float, list[float]] = field(default_factory=lambda: {0.0: [], 1.0: []})


class Stopwatch(L.Callback):
    """Measures the time of each step, without the callbacks."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.began = clock, 0.0
        self.steps: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = self.clock()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(self.clock() - self.began)


class Timed(CurvatureMonitor):
    """A monitor that records the seconds of its hook when it measures."""

    def __init__(self, times: Times, clock: Callable[[], float], **settings: Any) -> None:
        super().__init__(**settings)
        self.times, self.clock = times, clock

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        began = self.clock()
        super().on_train_batch_end(trainer, *rest)
        seconds = self.clock() - began
        if trainer.global_step % self.every_n_train_steps == 0:
            certified = float(trainer.callback_metrics["curvature-bookkeeping/certified"])
            (self.times.certified if certified else self.times.tracked).append(seconds)
            self.times.products[certified].append(float(trainer.callback_metrics["curvature-bookkeeping/products"]))


def train(
    setup: Setup, steps: int, callbacks: list[L.Callback], accelerator: str = "cpu", precision: Any = "32-true"
) -> None:
    """Train on batches of the setup's size, each with its own inputs."""
    torch.manual_seed(1)
    batches = [_batch(setup, seed) for seed in range(8)]
    loader = DataLoader([batches[i % len(batches)] for i in range(steps)], batch_size=None)
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(Classifier(setup), loader)


def _batch(setup: Setup, seed: int) -> tuple[Tensor, Tensor]:
    """Return a batch of which a part was seen before, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(setup.inputs), generator=generator).to(setup.inputs.device)
    return setup.inputs[order], setup.targets[order]


def measure(
    name: str, rounds: int, every: int, measurements: int, clock: Callable[[], float]
) -> tuple[float, dict[str, Times]]:
    """Return the median time of a step, and the median times of each monitor's measurements."""
    steps: list[float] = []
    times = {monitor: Times() for monitor in MONITORS}
    for _ in range(rounds):
        for monitor, settings in MONITORS.items():
            watch = Stopwatch(clock)
            budget = Budget(
                certify_every=measurements
            )  # in a round the first one is certified, and the others track it
            timed = Timed(times[monitor], clock, every_n_train_steps=every, budget=budget, **settings)
            train(NETWORKS[name](), measurements * every, [watch, timed])
            steps += watch.steps
    return statistics.median(steps), times


def overhead(tracked: float, certified: float, every: int) -> float:
    """Return the share of time that measurements add, which take so many steps each."""
    return ((1 - CERTIFIED_SHARE) * tracked + CERTIFIED_SHARE * certified) / every


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK", help="conv, gpt (both)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--every", type=int, default=EVERY, help="steps between measurements (default: 100)")
    parser.add_argument("--measurements", type=int, default=3, help="in a round, 2 to 10 (default: 3)")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help="default: wall")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    table = Table(title=f"Added time at a measurement every {args.every} steps, {CERTIFIED_SHARE:.0%} certified")
    for column in ("network", "monitor", "step, s", "tracked: steps (products)", "certified", "added"):
        table.add_column(column, justify="left" if column in ("network", "monitor") else "right")
    for name in args.networks:
        step, times = measure(name, args.rounds, args.every, args.measurements, clock)
        for monitor, found in times.items():
            tracked, certified = (statistics.median(t) / step for t in (found.tracked, found.certified))
            added = overhead(tracked, certified, args.every)
            products = [statistics.median(found.products[kind]) for kind in (0.0, 1.0)]
            table.add_row(
                name,
                monitor,
                f"{step:.3g}",
                f"{tracked:.1f} ({products[0]:.0f})",
                f"{certified:.1f} ({products[1]:.0f})",
                f"{added:.1%}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
