"""The batches on which curvature is measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size as batch_size
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import Dataset

from newtonopt.checks import check_whole, shown
from newtonopt.closure.isolation import Isolation


class Probe:
    """The first batches that training sees, kept; or a loader of the user's, gone through for each run of the closure.

    Args:
        num_batches: How many of the first batches are kept.
        dataloader: The user's loader; None: the first batches.
        device: Where batches are kept; None: where training has them.

    Raises:
        ValueError: `num_batches` is below one, or `dataloader` is none, is empty, or cannot be gone through again and
            again, or there is no such device.
    """

    def __init__(self, num_batches: int, dataloader: Iterable[Any] | None, device: str | None) -> None:
        check_whole("num_batches", num_batches, 1)
        _check_loader(dataloader)
        self._num_batches = num_batches
        self._dataloader = dataloader
        self._device = _device(device)
        self._kept: list[tuple[Any, int]] = []
        self._samples = 0
        self._closed = False

    @property
    def complete(self) -> bool:
        """Whether all batches are there."""
        return self._dataloader is not None or self._closed or len(self._kept) >= self._num_batches

    def lack(self) -> str:
        """In words, why it may not have been complete when it was needed."""
        return f"num_batches={self._num_batches}, and training had seen {len(self._kept)} when it ended. Lower that"

    def clear(self) -> None:
        """Begin anew."""
        self._kept, self._samples, self._closed = [], 0, False

    def close(self) -> None:
        """Take no more batches, if there are any."""
        self._closed = bool(self._kept)

    def offer(self, batch: Any, batch_idx: int) -> None:
        """Keep a batch of training's, if it is among the first."""
        if not self.complete:
            self._kept.append((_copied(batch, self._device), batch_idx))

    def batches(self, trainer: Trainer, module: LightningModule) -> Iterator[tuple[Any, int]]:
        """The batches as `training_step` takes them, and their indices: copies, for the step may change its batch."""
        if self._dataloader is None:
            for batch, batch_idx in self._kept:
                yield _copied(batch, module.device), batch_idx
            return
        for batch_idx, batch in enumerate(self._dataloader):
            moved = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            yield _copied(moved, module.device), batch_idx

    def samples(self, trainer: Trainer, module: LightningModule) -> int:
        """How many samples the batches hold together; 1 where that need not be known."""
        if len(self._kept) == 1 and trainer.world_size == 1:
            return 1
        if self._samples == 0:

            def count() -> None:
                self._samples = sum(_size(batch) for batch, _ in self.batches(trainer, module))

            with Isolation(count, ()).isolated():  # a loader draws its order from the random numbers of training
                count()
        if self._samples == 0:
            raise ValueError(
                "dataloader must give a batch in each pass, got none. Give one that can be gone through again."
            )
        return self._samples

    def share(self, batch: Any, samples: int) -> float:
        """Of a batch in the mean over all samples."""
        return 1.0 if samples == 1 else _size(batch) / samples

    def state_dict(self) -> dict[str, Any]:
        """The batches, if they are made of plain containers, which checkpoints can hold."""
        return {"batches": self._kept if _is_plain(self._kept) else None, "closed": self._closed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The same batches as before; without them new ones are taken."""
        if state["batches"] is None:
            rank_zero_warn(
                "CurvatureMonitor measures on other batches from here on: the checkpoint holds none, because they are "
                "not made of tensors, numbers, strings, lists, tuples and dicts alone."
            )
        self.clear()
        self._kept = list(state["batches"] or [])
        self._closed = state["closed"] and bool(self._kept)


def _check_loader(dataloader: object) -> None:
    if dataloader is None:
        return
    what = "a loader or a list of batches, or None"
    if isinstance(dataloader, Iterator):
        raise ValueError(
            f"dataloader must be {what}, got an iterator, which ends after one pass. Write the loader, or a list."
        )
    one = isinstance(dataloader, (Tensor, np.ndarray, Mapping))
    if one or (isinstance(dataloader, tuple) and all(isinstance(entry, Tensor) for entry in dataloader)):
        raise ValueError(f"dataloader must be {what}, got {shown(dataloader)}, which is one batch. Write [batch].")
    if not isinstance(dataloader, Iterable) or isinstance(dataloader, (str, nn.Module)):
        remedy = " Write DataLoader(dataset, batch_size)." if isinstance(dataloader, Dataset) else ""
        raise ValueError(f"dataloader must be {what}, got {shown(dataloader)}.{remedy}")
    if isinstance(dataloader, Sized) and _length(dataloader) == 0:
        raise ValueError(f"dataloader must hold one batch at least, got {shown(dataloader)} of length 0.")


def _length(dataloader: Sized) -> int | None:
    """Return the number of batches, None where that is not known."""
    try:
        return len(dataloader)
    except (TypeError, NotImplementedError):  # of an iterable dataset
        return None


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device must be one of this machine, got {shown(name)}. Write 'cpu', for example.") from error


def _size(batch: Any) -> int:
    """How many samples it holds."""
    try:
        return batch_size(batch)
    except MisconfigurationException:
        raise ValueError(
            "batches must tell their number of samples, by which they are weighted, got one of type "
            f"{type(batch).__name__}. Make them of tensors, lists, tuples and dicts, or measure one batch on one "
            "process."
        ) from None


def _copied(batch: Any, device: torch.device | None) -> Any:
    """All of it, for `training_step` may change what a batch of the user's own class holds; such as can be copied."""
    tensors: dict[int, Any] = {}
    plain = apply_to_collection(batch, Tensor, lambda t: tensors.setdefault(id(t), t.detach().clone()))
    try:
        copy = deepcopy(batch, tensors)
    except Exception:  # it holds a lock, an open file or the like
        copy = plain
    return copy if device is None else move_data_to_device(copy, device)


def _is_plain(value: Any) -> bool:
    """Whether `torch.load` reads it with `weights_only`."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (Tensor, bool, int, float, str)
