"""Processor time that StepMarginMonitor adds to training: `python benchmarks/step_margin_overhead.py`.

The networks are those of `monitor_overhead.py`, on one thread. Every fourth step is measured; the medians of the steps
with and without a measurement, in one run, are compared.
"""

import logging
import statistics
import time
import warnings
from typing import Any

import lightning as L
import torch
from monitor_overhead import NETWORKS, train

from newtonopt.callbacks import StepMarginMonitor

STEPS, EVERY = 120, 4


class Before(L.Callback):
    """Notes when steps begin. It stands before the monitor in the list of callbacks."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.times.append(time.process_time())


class After(L.Callback):
    """Notes when steps end. It stands behind the monitor in the list of callbacks."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.process_time())


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name, setup in NETWORKS.items():
        for critical in (False, True):
            before, after = Before(), After()
            train(setup(), STEPS, [before, StepMarginMonitor(EVERY, critical), after])
            steps = [end - start for start, end in zip(before.times, after.times, strict=True)]
            plain = statistics.median(t for i, t in enumerate(steps, 1) if i % EVERY)
            # The first measurement also checks that training's loss comes out again.
            measured = statistics.median(t for i, t in enumerate(steps, 1) if i % EVERY == 0 and i > EVERY)
            cost = measured / plain - 1.0
            what = "step margin and critical sharpness" if critical else "step margin"
            shares = ", ".join(f"every {every} steps {cost / every:.1%}" for every in (10, 50, 100))
            print(f"{name}, {what}: {cost:.2f} training steps; {shares}", flush=True)


if __name__ == "__main__":
    main()
