"""A small network, sharded or whole, with its data and closure, for tests on several processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from newtonopt.vectors.sharded import local_part


def network() -> nn.Sequential:
    """Row counts that two processes share unevenly, or that leave one of them nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def sharded_network() -> nn.Sequential:
    model = network()
    fully_shard(model[0])
    return fully_shard(model)


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)


def closure_of(model: nn.Module, rank: int = 0, count: int = 1) -> Callable[[], Tensor]:
    """The mean squared error on this process's part of the data."""
    x, y = (t.chunk(count)[rank] for t in data())

    def closure() -> Tensor:
        model.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    return closure


def bits(model: nn.Module) -> list[bytes]:
    return [local_part(p).detach().numpy().tobytes() for p in model.parameters()]


def whole(model: nn.Module) -> Tensor:
    tensors = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([t.detach().reshape(-1) for t in tensors])
