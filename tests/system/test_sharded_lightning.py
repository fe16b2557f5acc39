"""Lightning trains, measures, saves and resumes a model sharded by its ModelParallelStrategy."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from processes import run
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from newtonopt import HessianFree
from newtonopt.callbacks import Budget, CurvatureMonitor, StepMonitor


class Regression(L.LightningModule):
    def configure_model(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[0], mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return HessianFree(self.parameters(), rank=3)

    def train_dataloader(self) -> DataLoader[Any]:
        torch.manual_seed(1)
        return DataLoader(TensorDataset(torch.randn(8, 4), torch.randn(8, 1)), batch_size=4)


def fit(rank: int, folder: str, epochs: int, checkpoint: str | None) -> tuple[dict[str, float], int]:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_epochs=epochs,
        callbacks=[CurvatureMonitor(every_n_train_steps=1, budget=Budget(max_products=8)), StepMonitor()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Regression(), ckpt_path=checkpoint)
    trainer.save_checkpoint(f"{folder}/{epochs}.ckpt")
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return metrics, int(trainer.optimizers[0].state_dict()["state"][0]["steps"])


def in_processes(rank: int, folder: str) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        for name, value in (("LOCAL_RANK", rank), ("NODE_RANK", 0), ("WORLD_SIZE", dist.get_world_size())):
            patch.setenv(name, str(value))
        return [fit(rank, folder, 2, None), fit(rank, folder, 4, f"{folder}/2.ckpt")]


def test_model_parallel_strategy(tmp_path: Path) -> None:
    for results in run(in_processes, str(tmp_path)):
        (_, first), (metrics, both) = results
        assert (first, both) == (2, 4)
        assert metrics["newton/accepted"] in (0.0, 1.0)
        assert 0.0 < metrics["curvature/lambda_max"] < math.inf
        assert metrics["curvature-bookkeeping/certified"] == 0.0, "it followed the measurement before"
        assert 0.0 < metrics["curvature/sharpness"] < math.inf
