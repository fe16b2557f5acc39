"""The step margin where it matters: at the edge of stability, and on several processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning_problems import quiet_trainer
from processes import run
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from newtonopt import HessianFree
from newtonopt.callbacks import StepMarginMonitor
from newtonopt.curvature import step_margin
from newtonopt.vectors.sharded import local_part


def test_at_the_edge_of_stability_the_crossing_is_exact_to_two_percent() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    x = torch.randn(30, 5, dtype=torch.float64)
    y = torch.sin(2 * x.sum(1, keepdim=True))
    params = list(network.parameters())
    optimizer = torch.optim.SGD(params, lr=0.4)

    def closure() -> Tensor:
        network.zero_grad()
        loss = F.mse_loss(network(x), y)
        loss.backward()
        return loss

    errors, near = [], 0
    for _ in range(300):
        before = [p.detach().clone() for p in params]
        found = step_margin(optimizer, closure, critical=True)
        after = [p.detach().clone() for p in params]
        if found.margin is None or found.margin < 0.5:
            continue
        near += abs(found.margin - 1.0) < 0.1
        assert found.critical_step is not None
        low, high = 0.0, 4.0
        for _ in range(20):
            middle = (low + high) / 2
            for p, b, a in zip(params, before, after, strict=True):
                p.data.copy_(torch.lerp(b, a, middle))
            low, high = (middle, high) if float(F.mse_loss(network(x), y).detach()) < found.loss else (low, middle)
        for p, a in zip(params, after, strict=True):
            p.data.copy_(a)
        errors.append(abs(found.critical_step / low - 1.0))
    assert len(errors) > 50, "the run reaches the edge"
    assert near > 20
    assert max(errors) < 0.02


class Seen(L.Callback):
    def __init__(self) -> None:
        self.values: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        names = ("curvature/step_margin", "curvature/critical_sharpness")
        self.values.append(tuple(float(trainer.callback_metrics[name]) for name in names))  # type: ignore[arg-type]


class Regression(L.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def configure_model(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.name == "SGD":
            return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)
        return HessianFree(self.parameters(), rank=3)


def fit(count: int, name: str, strategy: Any, monitored: bool, folder: str) -> tuple[list[Any], list[bytes]]:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(*(torch.randn(16, k, generator=generator, dtype=torch.float64) for k in (4, 1)))
    seen, model = Seen(), Regression(name)
    monitors = [StepMarginMonitor(1, critical_sharpness=True), seen] if monitored else []
    settings: dict[str, Any] = {"callbacks": monitors, "max_epochs": 4, "default_root_dir": folder}
    if strategy is not None:
        settings |= {"strategy": strategy, "devices": count}
    trainer = quiet_trainer(**settings)
    trainer.fit(model, DataLoader(data, batch_size=16 // count))
    return seen.values, [local_part(p).detach().numpy().tobytes() for p in model.parameters()]


def in_processes(rank: int, name: str, sharded: bool, folder: str) -> Any:
    count = dist.get_world_size()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, message="(?!StepMarginMonitor)")
        warnings.filterwarnings("ignore", category=FutureWarning)
        # Set the variables as torchrun does.
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
        place = {"NODE_RANK": 0, "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
        for key, value in {**launched, **place}.items():
            patch.setenv(key, str(value))

        def strategy() -> Any:
            if sharded:
                return ModelParallelStrategy(data_parallel_size=count, tensor_parallel_size=1)
            return DDPStrategy(process_group_backend="gloo")

        return [fit(count, name, strategy(), monitored, folder) for monitored in (False, True)]


@pytest.mark.parametrize(
    ("name", "sharded"),
    [("SGD", False), ("HessianFree", False), ("SGD", True)],
    ids=["SGD-DDP", "HessianFree-DDP", "SGD-FSDP2"],
)
def test_two_processes_measure_as_one_with_the_whole_batch(name: str, sharded: bool, tmp_path: Path) -> None:
    expected, _ = fit(1, name, None, True, str(tmp_path))
    for (_, without), (values, watched) in run(in_processes, name, sharded, str(tmp_path)):
        assert watched == without, "training is the same to the bit"
        for found, true in zip(values, expected, strict=True):
            assert found == pytest.approx(true, rel=1e-4)
