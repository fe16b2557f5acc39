"""Hundreds of measurements in one run: memory stays flat, and each adds as much to the files as the one before."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch.nn.functional as F
from lightning_problems import both_loggers, monitor_of, points, quiet_trainer
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

from newtonopt.curvature import Trace

COUNTS = (60, 160, 260)


class Tiny(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=1e-3)


class Gauge(L.Callback):
    """Counts Python's blocks of memory and the bytes of the event files after so many measurements."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blocks: list[int] = []
        self.bytes: list[int] = []

    def on_train_batch_end(self, trainer: Any, *others: Any) -> None:
        if trainer.global_step in COUNTS:
            gc.collect()
            trainer.loggers[0].experiment.flush()
            self.blocks.append(sys.getallocatedblocks())
            self.bytes.append(sum(path.stat().st_size for path in self.folder.glob("*tfevents*")))


@pytest.mark.slow
def test_memory_is_flat_and_files_grow_evenly(tmp_path: Path) -> None:
    gauge, monitor = Gauge(tmp_path / "tb"), monitor_of({"every_n_train_steps": 1, "measurements": [Trace()]})
    trainer = quiet_trainer(
        max_epochs=-1, max_steps=COUNTS[-1], callbacks=[monitor, gauge], logger=both_loggers(tmp_path)
    )
    trainer.fit(Tiny(), DataLoader(TensorDataset(*points()), batch_size=22))
    # The result of a measurement alone has some hundred blocks.
    measurements = COUNTS[2] - COUNTS[1]
    assert gauge.blocks[2] - gauge.blocks[1] < 10 * measurements, gauge.blocks
    early, late = (after - before for before, after in zip(gauge.bytes, gauge.bytes[1:], strict=False))
    assert 0 < late < 1.2 * early
