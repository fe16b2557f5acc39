"""A LightningModule's loss as a closure, in the mode and precision in which it is to be measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from .probe import Probe


def loss_over(
    probe: Probe, trainer: Trainer, module: LightningModule, step: str, precision: str
) -> tuple[Callable[[], None], int]:
    """The mean loss over the probe's samples, as a closure that calls `backward` batch by batch, and their number.

    With "full" precision without autocast, which costs a product 4e-3 of relative error, in the weights' own.
    """
    samples = probe.samples(trainer, module)
    plugin = trainer.precision_plugin
    casts = isinstance(plugin, MixedPrecision) and precision == "full"

    def closure() -> None:
        for batch, batch_idx in probe.batches(trainer, module):
            share = probe.share(batch, samples)  # before the step, which may change the batch
            with nullcontext() if casts else plugin.train_step_context():
                loss = _loss(module, step, batch, batch_idx)
            (loss * share).backward()

    return closure, samples


def _loss(module: LightningModule, step: str, batch: Any, batch_idx: int) -> Tensor:
    # As Lightning calls it: `batch_idx` may be left out.
    method = getattr(module, step)
    takes_index = is_param_in_hook_signature(method, "batch_idx", min_args=2)
    output = method(batch, *([batch_idx] if takes_index else []))
    loss = output if isinstance(output, Tensor) else (output or {}).get("loss")
    if not isinstance(loss, Tensor):
        raise RuntimeError(f"{step} returned no loss for the probe batch.")
    return loss


def chosen_parameters(module: LightningModule, pattern: str | None) -> list[tuple[str, Tensor]]:
    """Those with `requires_grad` in whose names the pattern is found.

    Raises:
        ValueError: There are none.
    """
    named: list[tuple[str, Tensor]] = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    chosen = [(name, p) for name, p in named if pattern is None or re.search(pattern, name)]
    if not chosen:
        names = ", ".join(name for name, _ in named) or "none"
        raise ValueError(f"parameters is {pattern!r}, which is found in no name of those that are trained: {names}.")
    return chosen


@contextmanager
def measuring(module: LightningModule, mode: str) -> Iterator[None]:
    """The module in the wanted mode, where derivatives can be taken."""
    training = [(part, part.training) for part in module.modules()]
    if mode == "eval":
        module.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for part, flag in training:
            part.training = flag


def words_for_precision(trainer: Trainer, module: LightningModule, precision: str) -> str:
    """In which numbers the loss is computed."""
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters()}))
    plugin = trainer.precision_plugin
    cast = f" and the autocast of {plugin.precision}" if isinstance(plugin, MixedPrecision) else ""
    return f"in {dtypes}{cast if precision == 'training' else ''}"
