"""The loss that CurvatureMonitor measures: a module's step on kept batches, as a closure. All workarounds for
Lightning's peculiarities that the callbacks need stand in this file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from torch.utils.data import Dataset

from newtonopt.checks import check_choice, check_flag, check_whole, shown
from newtonopt.closure.isolation import Isolation
from newtonopt.closure.objective import ParametersMovedError
from newtonopt.curvature import Measurement, Tag
from newtonopt.vectors.flat import flatten, place, put_back

Result = TypeVar("Result")

PROBE_TAG = Tag(
    "probe_step",
    "",
    "the step at which the batches measured on were taken; written where that is not the start, as in a run resumed "
    "without [`save_probe`](#probe), because earlier values belong to other batches",
    group="bookkeeping",
)


def log_values(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Write values to every logger at the global step, and to `trainer.callback_metrics` for other callbacks.

    `self.log` would drop values that do not fall on the grid of `log_every_n_steps`. An error of one logger is raised
    after the others have the values.
    """
    trainer.callback_metrics.update({name: torch.tensor(value, device="cpu") for name, value in values.items()})
    errors: list[Exception] = []
    for logger in trainer.loggers:
        try:
            logger.log_metrics(dict(values), step=trainer.global_step)
            logger.save()  # CSVLogger keeps its rows in memory until then
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def show_in_bar(trainer: Trainer, values: Mapping[str, float], tag: str) -> None:
    """Show a value in the progress bar until there is a new one, if it was measured.

    `self.log` would write it to the loggers or forget it after the batch. Lightning's progress bars read a dictionary.
    """
    if tag in values:
        trainer.progress_bar_metrics[tag] = values[tag]


def passes_multiple(before: int, now: int, every: int) -> bool:
    """Return whether a multiple of `every` lies in `(before, now]`.

    `trainer.global_step` counts the steps of all optimizers: several may pass in a batch, or none.
    """
    return now // every > before // every


def is_trial(trainer: Trainer) -> bool:
    """Return whether this is a `fast_dev_run`, which ends before anything is due and is to show whether all works."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def watch_step(
    trainer: Trainer, around: Callable[[Callable[[], Any], tuple[Any, ...]], Any], after: Callable[[], None]
) -> None:
    """Be called inside the next training step, until `unwatch_step`.

    Lightning has no hook between those before a batch, which may change the batch and the module, and `training_step`;
    and none between the optimizer's step and the moment when `trainer.global_step` counts it, on which losses depend.
    So two methods of the strategy are replaced for one batch. No closure can reach the strategy.

    Args:
        trainer: The trainer.
        around: Called in place of `training_step` with a function that runs it and with its arguments; returns what
            that function returns.
        after: Called after the optimizer's step.
    """
    strategy = trainer.strategy
    run, step = strategy.training_step, strategy.optimizer_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        return around(lambda: run(*args, **kwargs), args)

    def optimizer_step(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        after()
        return result

    vars(strategy).update(training_step=training_step, optimizer_step=optimizer_step)


def unwatch_step(trainer: Trainer) -> None:
    """Give the strategy its own methods back."""
    for name in ("training_step", "optimizer_step"):
        vars(trainer.strategy).pop(name, None)


def step_again(trainer: Trainer, module: LightningModule, args: tuple[Any, ...]) -> Callable[[], Tensor]:
    """Return a function that runs `training_step` on a copy of these arguments, as training does; returns the loss."""
    kept, plugin = _copied(args, None), trainer.precision_plugin

    def again() -> Tensor:
        with plugin.train_step_context():
            return loss_in(module.training_step(*_copied(kept, None)), "training_step")

    return again


def loss_in(output: Any, step: str) -> Tensor:
    """Return the loss in the output of a step: a tensor, a dictionary with "loss", or None to skip the batch.

    Raises:
        RuntimeError: There is none.
    """
    loss = output if isinstance(output, Tensor) else (output or {}).get("loss")
    if not isinstance(loss, Tensor):
        raise RuntimeError(f'{step} returned no loss. Return a tensor, or a dictionary with "loss".')
    return loss


@dataclass(frozen=True)
class Probe:
    """The loss that CurvatureMonitor measures: which batches, which method of the module, and which parameters.

    Args:
        num_batches: How many of the first batches that training sees make the probe, one or more; of an epoch with
            fewer, all. Default 1.
        dataloader: A loader, or a list of batches, to measure on instead, all of it each time; None (default): the
            first batches.
        device: Where the first batches are kept, such as "cpu"; None (default): where training has them.
        step: The module's method that returns the loss, called as `training_step` is. Default "training_step". With
            manual optimization name another, for `training_step` would train the model.
        mode: "train" (default): the function that training minimises, with Dropout's random numbers held fixed; "eval":
            the model in evaluation mode.
        precision: "full" (default): the precision of the weights, without autocast; "training": as in training.
        parameters: A regular expression to be found in the names of the parameters that are looked at, such as
            "^generator"; None (default): all parameters.
        follow_loss: Whether the words tell what the loss of `training_step` did between measurements: that it spiked,
            jumped, or is back where it was. Default True. Turn it off where the objective changes on purpose, as in
            adversarial and reinforcement learning.
        save_probe: Whether checkpoints hold the first batches, so that a resumed run goes on measuring on them. Default
            False: checkpoints hold no training data, and a resumed run measures on the first batches that it sees.

    Raises:
        ValueError: A setting is out of its range, there is no such device, `dataloader` is no loader, is empty, or
            cannot be iterated more than once, or `save_probe` is asked of a `dataloader`.

    Example:
        >>> from newtonopt.callbacks import CurvatureMonitor, Probe
        >>> CurvatureMonitor(probe=Probe(num_batches=4, mode="eval")).probe.num_batches
        4

    See Also:
        - `CurvatureMonitor`: takes it as `probe`.
        - `Budget`: how much measuring may cost.
        - `docs/monitor.md`: when to measure on other data than training's first batch.
    """

    num_batches: int = 1
    dataloader: Iterable[Any] | None = None
    device: str | None = None
    step: str = "training_step"
    mode: Literal["train", "eval"] = "train"
    precision: Literal["full", "training"] = "full"
    parameters: str | None = None
    follow_loss: bool = True
    save_probe: bool = False

    def __post_init__(self) -> None:
        check_whole("num_batches", self.num_batches, 1)
        _check_loader(self.dataloader)
        check_flag("follow_loss", self.follow_loss)
        check_flag("save_probe", self.save_probe)
        if self.save_probe and self.dataloader is not None:
            raise ValueError(
                "save_probe must be False beside a dataloader, got True. Leave it out, and give the resumed run the "
                "same dataloader."
            )
        _device(self.device)
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

    @property
    def follows_training(self) -> bool:
        """Whether the words tell of the loss of every step, which is the one that is measured."""
        return self.follow_loss and self.step == "training_step"

    def check_model(self, module: LightningModule, measurements: Iterable[Measurement[Any]]) -> None:
        """Refuse a module that has no such method, no parameter of such a name, or not what a measurement needs.

        Frozen parameters count, for they may be trained later.

        Raises:
            ValueError: The module lacks something.
        """
        if not callable(getattr(module, self.step, None)):
            raise ValueError(
                f"step must be the name of a method of {type(module).__name__}, got {self.step!r}. Give the name of "
                "one that takes a batch and its index and returns the loss."
            )
        every = [name for name, _ in module.named_parameters()]
        looked_at = [(name, p) for name, p in module.named_parameters() if self._takes(name)]
        if self.parameters is not None and not looked_at:
            raise ValueError(
                f"parameters must be found in the name of a parameter of {type(module).__name__}, got "
                f"{self.parameters!r}. Choose from {', '.join(every) or 'none'}."
            )
        # A lazy module knows its shapes with the first batch.
        lazy = any(isinstance(p, UninitializedParameter) for _, p in looked_at)
        size = None if lazy else sum(p.numel() for _, p in looked_at)
        for measurement in measurements:
            measurement.check_model([name for name, _ in looked_at], size)

    def trained(self, module: LightningModule) -> list[tuple[str, Tensor]]:
        """Return the names and parameters that are looked at and require a gradient.

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

    @contextmanager
    def measuring(self, module: LightningModule) -> Iterator[None]:
        """Put the module in the wanted mode, where derivatives can be taken, and back."""
        training = [(part, part.training) for part in module.modules()]
        if self.mode == "eval":
            module.eval()
        try:
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            for part, flag in training:
                part.training = flag

    def in_words(self, trainer: Trainer, module: LightningModule, began: int) -> str:
        """Return sentences that say which loss is measured, in which precision, and whether on batches taken late.

        Args:
            trainer: The trainer.
            module: The module that is trained.
            began: Optimizer step at which the batches were taken.
        """
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters()}))
        plugin = trainer.precision_plugin
        cast = f" and the autocast of {plugin.precision}" if isinstance(plugin, MixedPrecision) else ""
        numbers = f"in {dtypes}{cast if self.precision == 'training' else ''}"
        late = f" Its batches were taken at step {began}; earlier values belong to other batches." if began else ""
        return f"Measured on the loss of `{self.step}` in {self.mode} mode, {numbers}.{late}"


class Batches:
    """The batches of a probe, and the module's loss on them.

    Args:
        probe: Batches, loss and parameters to measure.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._device = _device(probe.device)
        self._kept: list[tuple[Any, int]] = []
        self._samples = 0
        self._closed = False
        self._began = 0

    @property
    def began(self) -> int:
        """The optimizer step at which the first of the batches was taken; zero before that, and with a loader."""
        return self._began

    @property
    def complete(self) -> bool:
        """Whether all batches are there."""
        probe = self._probe
        return probe.dataloader is not None or self._closed or len(self._kept) >= probe.num_batches

    def lack(self) -> str:
        """Return in words why the batches may not have been complete when they were needed."""
        return (
            f"num_batches={self._probe.num_batches}, and training had seen {len(self._kept)} when it ended. Lower that"
        )

    def close(self) -> None:
        """Take no more batches, if there are any."""
        self._closed = bool(self._kept)

    def offer(self, batch: Any, batch_idx: int, step: int) -> None:
        """Keep a batch of training's at that optimizer step, if it is among the first."""
        if not self.complete:
            self._began = self._began if self._kept else step
            self._kept.append((_copied(batch, self._device), batch_idx))

    def loss(self, trainer: Trainer, module: LightningModule) -> tuple[Callable[[], None], int]:
        """Return the mean loss over all samples as a closure that calls `backward` batch by batch, and their number."""
        samples = self._count(trainer, module)
        plugin, step = trainer.precision_plugin, getattr(module, self._probe.step)
        # Autocast costs a product 4e-3 of relative error. Other plugins' contexts set the weights' own precision.
        uncast = isinstance(plugin, MixedPrecision) and self._probe.precision == "full"
        # Lightning lets a step leave out `batch_idx`.
        takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)

        def closure() -> None:
            for batch, batch_idx in self._each(trainer, module):
                share = 1.0 if samples == 1 else _size(batch) / samples  # before the step, which may change the batch
                with nullcontext() if uncast else plugin.train_step_context():
                    output = step(batch, *([batch_idx] if takes_index else []))
                (loss_in(output, self._probe.step) * share).backward()

        return closure, samples

    def _each(self, trainer: Trainer, module: LightningModule) -> Iterator[tuple[Any, int]]:
        """Yield copies of the batches as `training_step` takes them, for it may change its batch, and their indices."""
        if self._probe.dataloader is None:
            for batch, batch_idx in self._kept:
                yield _copied(batch, module.device), batch_idx
            return
        for batch_idx, batch in enumerate(self._probe.dataloader):
            # The Trainer does this to training's batches before any hook sees them.
            moved = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            yield _copied(moved, module.device), batch_idx

    def _count(self, trainer: Trainer, module: LightningModule) -> int:
        """Return how many samples the batches hold together; 1 where that need not be known."""
        if len(self._kept) == 1 and trainer.world_size == 1:
            return 1
        if self._samples == 0:

            def count() -> None:
                self._samples = sum(_size(batch) for batch, _ in self._each(trainer, module))

            with Isolation(count, ()).isolated():  # a loader draws its order from the random numbers of training
                count()
        if self._samples == 0:
            raise ValueError(
                "dataloader must give a batch in each pass, got none. Give one that can be iterated again."
            )
        return self._samples

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds: nothing before a batch was taken, and no batches unless `save_probe` asks for
        them and they are made of plain containers.
        """
        if not self._kept:
            return {}
        saved = self._probe.save_probe and _is_plain(self._kept)
        return {"batches": self._kept if saved else [], "closed": saved and self._closed, "began": self._began}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the batches of a checkpoint; if it holds none, say that others will be taken."""
        self._kept, self._samples = list(state["batches"]), 0
        self._closed, self._began = state["closed"], state["began"]
        if not self._kept:
            rank_zero_warn(
                "CurvatureMonitor measures on other batches from here on, so that its curves may jump: the checkpoint "
                "holds no training data. Give probe=Probe(save_probe=True), and checkpoints will hold the batches."
            )


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
    """Return the number of batches; None where it is not known, as for an iterable data set."""
    try:
        return len(dataloader)
    except (TypeError, NotImplementedError):
        return None


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device must be one of this machine, got {shown(name)}. Write 'cpu', for example.") from error


def _size(batch: Any) -> int:
    """Return how many samples a batch holds, as Lightning counts them for `self.log`."""
    try:
        return extract_batch_size(batch)
    except MisconfigurationException:
        raise ValueError(
            "batches must have a known number of samples, which weights them, got one of type "
            f"{type(batch).__name__}. Make them of tensors, lists, tuples and dicts, or measure one batch on one "
            "process."
        ) from None


def _copied(batch: Any, device: torch.device | None) -> Any:
    """Return a copy of a batch on the device.

    `training_step` may change what a batch of the user's own class holds, so all of it is copied that can be.
    """
    tensors: dict[int, Any] = {}
    plain = apply_to_collection(batch, Tensor, lambda t: tensors.setdefault(id(t), t.detach().clone()))
    try:
        copy = deepcopy(batch, tensors)
    except Exception:  # it holds a lock, an open file or the like
        copy = plain
    return copy if device is None else move_data_to_device(copy, device)


def _is_plain(value: Any) -> bool:
    """Return whether `torch.load` reads a value with `weights_only`."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (Tensor, bool, int, float, str)
