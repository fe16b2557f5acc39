"""The devices that tests run on, and counters of the places where the host waits for a device."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# For tests whose subject other tests cover on the CPU; there these only show that they work.
SLOW_ON_CPU = [pytest.param("cpu", marks=pytest.mark.slow), DEVICES[1]]

# Functions that read a tensor's values, so that the host waits for the device.
_READS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.cpu,
    Tensor.numpy,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__bool__,
    Tensor.__index__,
    Tensor.nonzero,
}


@contextmanager
def waits(device: str) -> Iterator[Counter[str]]:
    """Count the places, as file:line, where the host waits for the device; complete when the block ends.

    On CUDA torch warns at synchronising calls; elsewhere the calls that read a tensor count.
    """
    found: Counter[str] = Counter()
    if device != "cuda":
        with _Reads() as reads:
            yield found
        found.update(reads.places)
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
            found.update(
                f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing CUDA operation" in str(w.message)
            )


@contextmanager
def read_sizes(device: str) -> Iterator[list[int]]:
    """List the number of entries of each tensor that the host reads."""
    with _Copies() if device == "cuda" else _Reads() as mode:
        yield mode.sizes


class _Reads(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.sizes: list[int] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            caller = sys._getframe(1)
            self.places.append(f"{caller.f_code.co_filename}:{caller.f_lineno}")
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


class _Copies(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        source = args[1] if func._opname == "copy_" else args[0] if func._opname in _CROSSING else None
        if isinstance(source, Tensor) and source.is_cuda and not (isinstance(result, Tensor) and result.is_cuda):
            self.sizes.append(source.numel())
        return result


_CROSSING = ("_to_copy", "_local_scalar_dense")
