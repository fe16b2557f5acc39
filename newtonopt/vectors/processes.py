"""The processes that share one objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


class Ranks:
    """The processes of the default group, or this one alone.

    Every method is a collective call: all processes make it, in the same order. An error that one of them meets inside
    reaches the others as an error of their own, at once.

    Args:
        like: A vector `(n,)` of the dtype and on the device of those exchanged.
    """

    def __init__(self, like: Tensor) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.count = dist.get_world_size() if several else 1
        self.rank = dist.get_rank() if several else 0
        self._like = like

    def gather(self, compute: Callable[[], Sequence[float | Tensor]]) -> Tensor:
        """The two scalars that each process computes, as rows `(count, 2)` in float64 on the CPU.

        Raises:
            RuntimeError: `compute` raised on another process.
        """
        if self.count == 1:
            return _row(compute())[None]
        row = torch.zeros(3, dtype=torch.float64, device="cpu")
        error: Exception | None = None
        try:
            row[:2] = _row(compute())
        except Exception as raised:
            error, row[2] = raised, 1.0
        rows = [torch.empty_like(row, device=self._like.device) for _ in range(self.count)]
        dist.all_gather(rows, row.to(self._like.device))
        table = torch.stack(rows).cpu()
        _pass_on(error, bool(table[:, 2].any()))
        return table[:, :2]

    def each(self, compute: Callable[[], Result]) -> Result:
        """What this process computes.

        Raises:
            RuntimeError: `compute` raised on another process.
        """
        results: list[Result] = []

        def run() -> tuple[float, float]:
            results.append(compute())
            return 0.0, 0.0

        self.gather(run)
        return results[0]

    def sum(self, compute: Callable[[], Tensor], like: Tensor | None = None) -> Tensor:
        """The sum of the tensors shaped as `like`, vectors `(n,)` if None, that the processes compute: one all-reduce.

        Raises:
            RuntimeError: `compute` raised on another process.
        """
        if self.count == 1:
            return compute()
        like = self._like if like is None else like
        n = like.numel()
        buffer = self._like.new_zeros(n + 1)
        error: Exception | None = None
        try:
            buffer[:n] = compute().reshape(-1)
        except Exception as raised:
            error, buffer[n] = raised, 1.0
        dist.all_reduce(buffer)
        _pass_on(error, float(buffer[n]) != 0.0)
        return buffer[:n].view(like.shape)

    def first(self, vector: Tensor) -> Tensor:
        """The vector `(n,)` of the first process, written over the others'."""
        if self.count > 1:
            dist.broadcast(vector, 0)
        return vector

    def check_same(self, point: Tensor) -> None:
        """Refuse processes that hold different parameters."""
        if self.count == 1:
            return
        table = self.gather(lambda: (float(point.numel()), point.norm()))
        sizes, norms = table[:, 0].tolist(), table[:, 1].tolist()
        if len(set(sizes)) > 1 or any(math.isfinite(n) and abs(n - norms[0]) > 1e-5 * norms[0] for n in norms):
            raise RuntimeError(
                f"The {self.count} processes hold different parameters (norms {', '.join(f'{n:.6g}' for n in norms)}), "
                "and newtonopt minimises the mean of their losses over one set. Wrap the model in "
                "DistributedDataParallel or load the same state on each; train separate models without a process group."
            )


def _pass_on(error: Exception | None, failed: bool) -> None:
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("The closure failed on another process, whose own message says why.")


def _row(values: Sequence[float | Tensor]) -> Tensor:
    return torch.stack([torch.as_tensor(v, dtype=torch.float64, device="cpu").detach().reshape(()) for v in values])
