"""Several processes: `torchrun --standalone --nproc-per-node 2 examples/how_to/torchrun_loop.py`.

Each process holds its part of the data, and `DistributedDataParallel` the model. A step of HessianFree is then a step
on the whole data: the program prints the same losses, up to rounding, for one process as for several. `measure` is a
collective call too, so that all processes make it and the first one prints.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from newtonopt import HessianFree
from newtonopt.curvature import measure


def main(steps: int = 10) -> float:
    """Train, and return the last loss on this process's data."""
    dist.init_process_group("gloo")  # "nccl" on GPUs
    rank, count = dist.get_rank(), dist.get_world_size()
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    x, y = (images / 8 - 1)[rank::count], labels[rank::count]

    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double())
    optimizer = HessianFree(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for step in range(steps):
        optimizer.step(closure)
        report = optimizer.last_step
        if rank == 0:
            print(f"step {step}: loss of all data {report.loss:.6f}, {report.products} products")
    values = measure(closure, model.parameters(), optimizer)
    if rank == 0:
        print(values.in_words())
    dist.destroy_process_group()
    return report.loss


if __name__ == "__main__":
    main()
