"""What of a LightningModule is measured, and its loss as a closure in the mode and precision asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from newtonopt.checks import check_choice, shown
from newtonopt.closure.objective import ParametersMovedError
from newtonopt.curvature.eigenvalues.extreme import check_count
from newtonopt.curvature.measurement import Settings
from newtonopt.vectors.flat import flatten, place, put_back

from .probe import Probe

Result = TypeVar("Result")


@dataclass(frozen=True)
class Subject:
    """Which loss of a module is measured, how it is computed, and of which parameters.

    Args:
        step: The method that returns the loss.
        mode: That of the module meanwhile: "train", as it is, or "eval".
        precision: "full", without autocast, or "training".
        parameters: A regular expression to be found in their names; None: all.

    Raises:
        ValueError: One of them is none of these.
    """

    step: str = "training_step"
    mode: Literal["train", "eval"] = "train"
    precision: Literal["full", "training"] = "full"
    parameters: str | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("train", "eval"))
        check_choice("precision", self.precision, ("full", "training"))
        if not isinstance(self.step, str):
            raise ValueError(
                f"step must be the name of a method, got {shown(self.step)}. Write 'training_step', or leave it out."
            )
        try:
            if self.parameters is not None:
                re.compile(self.parameters).search("")
        except (TypeError, re.error) as error:
            raise ValueError(
                f"parameters must be a regular expression, or None for all, got {shown(self.parameters)} ({error}). "
                "Write '^encoder', for example."
            ) from error

    def check(self, module: LightningModule, settings: Settings) -> None:
        """Refuse a module that has no such method, no parameter of such a name, none that a layer's pattern fits, or
        fewer parameters than eigenvalues are asked for.

        What is frozen counts, for it may be trained later.

        Raises:
            ValueError: It has not.
        """
        if not callable(getattr(module, self.step, None)):
            raise ValueError(
                f"step must be the name of a method of {type(module).__name__}, got {self.step!r}. Give that of one "
                "that takes a batch and its index and returns the loss."
            )
        every = [name for name, _ in module.named_parameters()]
        names = [name for name in every if self._takes(name)]
        if self.parameters is not None and not names:
            raise ValueError(
                f"parameters must be found in the name of a parameter of {type(module).__name__}, got "
                f"{self.parameters!r}. Choose from {', '.join(every) or 'none'}."
            )
        layers = settings.layers
        for pattern in () if layers in (None, "parts") else layers or ():
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"layers must each fit the name of a parameter looked at, got {pattern!r}. Choose from "
                    f"{', '.join(names) or 'none'}."
                )

        looked_at = [p for name, p in module.named_parameters() if self._takes(name)]
        if not any(isinstance(p, UninitializedParameter) for p in looked_at):
            size = sum(p.numel() for p in looked_at)
            check_count("top", settings.top, size)
            check_count("bottom", settings.bottom, size)

    def trained(self, module: LightningModule) -> list[tuple[str, Tensor]]:
        """The parameters with `requires_grad`, and their names.

        Raises:
            ValueError: There are none.
        """
        named: list[tuple[str, Tensor]] = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        chosen = [(name, p) for name, p in named if self._takes(name)]
        if not named:
            raise ValueError(
                f"{type(module).__name__} must have a parameter with requires_grad to be measured, got none."
            )
        if not chosen:
            names = ", ".join(name for name, _ in named)
            raise ValueError(
                f"parameters must be found in the name of a parameter that is trained, got {self.parameters!r}. "
                f"Choose from {names}."
            )
        return chosen

    def _takes(self, name: str) -> bool:
        return self.parameters is None or re.search(self.parameters, name) is not None

    def loss_over(self, probe: Probe, trainer: Trainer, module: LightningModule) -> tuple[Callable[[], None], int]:
        """The mean loss over the probe's samples, as a closure that calls `backward` batch by batch, and their number.

        With "full" precision without autocast, which costs a product 4e-3 of relative error, in the weights' own.
        """
        samples = probe.samples(trainer, module)
        plugin = trainer.precision_plugin
        casts = isinstance(plugin, MixedPrecision) and self.precision == "full"

        def closure() -> None:
            for batch, batch_idx in probe.batches(trainer, module):
                share = probe.share(batch, samples)  # before the step, which may change the batch
                with nullcontext() if casts else plugin.train_step_context():
                    loss = self._loss(module, batch, batch_idx)
                (loss * share).backward()

        return closure, samples

    def _loss(self, module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
        # As Lightning calls it: `batch_idx` may be left out.
        method = getattr(module, self.step)
        takes_index = is_param_in_hook_signature(method, "batch_idx", min_args=2)
        output = method(batch, *([batch_idx] if takes_index else []))
        loss = output if isinstance(output, Tensor) else (output or {}).get("loss")
        if not isinstance(loss, Tensor):
            raise RuntimeError(f"{self.step} returned no loss for the probe batch.")
        return loss

    @contextmanager
    def measuring(self, module: LightningModule) -> Iterator[None]:
        """The module in the wanted mode, where derivatives can be taken."""
        training = [(part, part.training) for part in module.modules()]
        if self.mode == "eval":
            module.eval()
        try:
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            for part, flag in training:
                part.training = flag

    def in_words(self, trainer: Trainer, module: LightningModule) -> str:
        """Of which loss in which numbers, in a sentence."""
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters()}))
        plugin = trainer.precision_plugin
        cast = f" and the autocast of {plugin.precision}" if isinstance(plugin, MixedPrecision) else ""
        numbers = f"in {dtypes}{cast if self.precision == 'training' else ''}"
        return f"It is the loss of `{self.step}` in {self.mode} mode, {numbers}."


def at_rest(measure: Callable[[], Result], params: Sequence[Tensor], optimizers: Sequence[Optimizer]) -> Result:
    """Measure where a `training_step` that clamps parameters puts them, and put them back.

    Args:
        measure: Leaves `params` as they are, or raises if the step moves them.
        params: The parameters looked at.
        optimizers: The optimizers that train; the step may clamp any of their parameters.
    """
    known = {id(p) for p in params}
    others = [
        p
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) not in known and p.is_floating_point() and p.device == params[0].device and type(p) is type(params[0])
    ]
    with torch.no_grad():
        here = flatten(params, params).clone()
        elsewhere = flatten(others, others).clone() if others else here
    try:
        try:
            result = measure()
        except ParametersMovedError as moved:
            place(moved.point, params)
            result = measure()
        if others:
            moved_to = put_back(elsewhere, others)
            if moved_to is not None:
                place(moved_to, others)
                result = measure()
    finally:
        place(here, params)
        if others:
            place(elsewhere, others)
    return result
