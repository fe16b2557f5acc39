"""The processes of `torch.distributed` that share one objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")
Number = float | Tensor


class Processes:
    """The processes of the default group, or this process alone.

    Every method is a collective call: all processes make it, in the same order. If one of them raises an error inside,
    the others raise a RuntimeError at once.

    Args:
        like: A vector `(n,)` of the dtype and on the device of the vectors that are exchanged.

    Attributes:
        count: Number of processes.
        rank: Number of this process.
    """

    def __init__(self, like: Tensor) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.count = dist.get_world_size() if several else 1
        self.rank = dist.get_rank() if several else 0
        self._like = like

    def gather(self, compute: Callable[[], tuple[Result, tuple[Number, Number]]]) -> tuple[Result, Tensor]:
        """Return this process's result, and two numbers of every process.

        Args:
            compute: Returns this process's result and its two numbers.

        Returns:
            The result, and the numbers as rows `(count, 2)` in float64 on the CPU.

        Raises:
            RuntimeError: `compute` raised on another process.
        """
        if self.count == 1:
            result, numbers = compute()
            return result, _row(numbers)[None]
        row = torch.zeros(3, dtype=torch.float64, device="cpu")
        found: Result | None = None
        error: Exception | None = None
        try:
            found, numbers = compute()
            row[:2] = _row(numbers)
        except Exception as raised:
            error, row[2] = raised, 1.0
        rows = [torch.empty_like(row, device=self._like.device) for _ in range(self.count)]
        dist.all_gather(rows, row.to(self._like.device))
        table = torch.stack(rows).cpu()
        _pass_on(error, bool(table[:, 2].any()))
        return cast(Result, found), table[:, :2]

    def together(self, compute: Callable[[], Result]) -> Result:
        """Return this process's result, once all processes have computed theirs.

        Raises:
            RuntimeError: `compute` raised on another process.
        """
        return self.gather(lambda: (compute(), (0.0, 0.0)))[0]

    def sum(self, compute: Callable[[], Tensor], like: Tensor | None = None) -> Tensor:
        """Return the sum of the processes' tensors, by one all-reduce.

        Args:
            compute: Returns this process's tensor.
            like: A tensor of its shape; None (default): a vector `(n,)`.

        Raises:
            RuntimeError: `compute` raised on another process.
        """
        if self.count == 1:
            return compute()
        like = self._like if like is None else like
        n = like.numel()
        # The last entry counts errors, so that an error takes no communication of its own.
        buffer = self._like.new_zeros(n + 1)
        error: Exception | None = None
        try:
            buffer[:n] = compute().reshape(-1)
        except Exception as raised:
            error, buffer[n] = raised, 1.0
        dist.all_reduce(buffer)
        _pass_on(error, float(buffer[n]) != 0.0)
        return buffer[:n].view(like.shape)

    def collect(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, which may differ in shape but not in their number of dimensions."""
        if self.count == 1:
            return [tensor]
        shape = torch.tensor(tensor.shape, device=self._like.device)
        shapes = [torch.empty_like(shape) for _ in range(self.count)]
        dist.all_gather(shapes, shape)
        sizes = [torch.Size(other.tolist()) for other in shapes]
        # Collective calls take tensors of one size: the shorter ones are filled up.
        most = max(size.numel() for size in sizes)
        own = tensor.new_zeros(most, device=self._like.device)
        own[: tensor.numel()] = tensor.reshape(-1)
        found = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(found, own)
        return [one[: size.numel()].view(size).to(tensor.dtype) for one, size in zip(found, sizes, strict=True)]

    def first(self, vector: Tensor) -> Tensor:
        """Write the first process's vector `(n,)` over `vector` on all processes; return `vector`."""
        if self.count > 1:
            dist.broadcast(vector, 0)
        return vector

    def check_same(self, point: Tensor) -> None:
        """Raise a RuntimeError if the processes hold different parameters `point`, `(n,)`."""
        if self.count == 1:
            return
        _, table = self.gather(lambda: (None, (float(point.numel()), point.norm())))
        sizes, norms = table[:, 0].tolist(), table[:, 1].tolist()
        if len(set(sizes)) > 1 or any(math.isfinite(n) and abs(n - norms[0]) > 1e-5 * norms[0] for n in norms):
            raise RuntimeError(
                f"The {self.count} processes hold different parameters (norms {', '.join(f'{n:.6g}' for n in norms)}), "
                "but newtonopt minimises the mean of their losses over a single set. Wrap the model in "
                "DistributedDataParallel, or load the same state on each process. To train separate models, use no "
                "process group."
            )


def _pass_on(error: Exception | None, failed: bool) -> None:
    """Raise this process's error, or one that says that another process failed."""
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("The closure failed on another process; see the error message there.")


def _row(values: tuple[Number, Number]) -> Tensor:
    return torch.stack([torch.as_tensor(v, dtype=torch.float64, device="cpu").detach().reshape(()) for v in values])
