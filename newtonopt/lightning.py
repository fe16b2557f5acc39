"""Special cases for Lightning (its Trainer, loggers, closures and Fabric) and for accelerate, each with its reason.

Both are looked for among what the user has imported, and never imported from here. `closure.isolation` silences the
log, `closure.reach` asks what belongs to the Trainer, `autodiff.gradients` differentiates under `fabric_backward`, and
`optimizers.newton` asks what kind of closure it was given. Upstream files of Lightning are below
https://github.com/Lightning-AI/pytorch-lightning/blob/master/src/lightning/.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, FunctionType, MethodType
from typing import Any

from torch import nn

# Logging. A trial runs `training_step` again, which would log again: an epoch's mean would hold the trials' losses too
# (33.1 in place of 2.49 was seen). Only the recorded run may log.


def is_lightning_module(module: nn.Module) -> bool:
    """Whether a module is a LightningModule, of either package name."""
    packages = (sys.modules.get(name) for name in ("lightning.pytorch", "pytorch_lightning"))
    return any(isinstance(module, package.LightningModule) for package in packages if package is not None)


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Keep a LightningModule and its Trainer's callbacks from logging, by `self.log`, `log_dict` or the loggers."""
    # An attribute of the instance hides the method of the class; `log_dict` calls `log`. Isolation removes it after
    # the run, as any other attribute that the run has added.
    vars(module)["log"] = _Silent()
    trainer: Any = module._trainer
    if trainer is None:
        yield
        return
    loggers = trainer.loggers
    # Callbacks with hooks inside the closure hold the module's `log` as it was when training began
    # (pytorch/trainer/connectors/callback_connector.py, `_attach_model_logging_functions`).
    logs = [(vars(callback), vars(callback)["log"]) for callback in trainer.callbacks if "log" in vars(callback)]
    trainer.loggers = [_Silent(logger) for logger in loggers]
    for own, _ in logs:
        own["log"] = _Silent()
    try:
        yield
    finally:
        trainer.loggers = loggers
        for own, log in logs:
            own["log"] = log


class _Silent:
    """Stands in for a logger: every call does nothing, but the logger's names, paths and numbers can be read."""

    def __init__(self, original: object = None) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._original, name, None)
        return value if isinstance(value, (str, int, float, os.PathLike)) else _Silent(value)

    def __call__(self, *args: Any, **kwargs: Any) -> _Silent:
        return self

    def __getitem__(self, key: Any) -> _Silent:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


# State that a closure can reach. The Trainer holds the whole run: loops, progress, loggers, data. Searching all of that
# would use up the budget of the search, and putting it back would undo what its other threads write.

OPAQUE_PACKAGES = {"lightning", "lightning_fabric", "pytorch_lightning", "tensorboard", "wandb", "mlflow"}
"""Packages whose objects are not searched for state."""

TRAINER = "_trainer"
"""The attribute under which a LightningModule holds its Trainer."""


def held_by_trainer(attributes: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """Return what may be the user's own among what a module's Trainer holds: callbacks and data module; optimizers.

    Args:
        attributes: The module's attributes.
    """
    trainer = attributes.get(TRAINER)
    if trainer is None:
        return [], []
    return [*trainer.callbacks, getattr(trainer, "datamodule", None)], list(trainer.optimizers)


def closure_objects(closure: Any) -> Iterator[Any]:
    """Yield the callable objects that a closure consists of: itself, or what `functools.partial` binds; no modules.

    Lightning's closure is such an object (pytorch/loops/optimization/automatic.py, `Closure`). It keeps the result of
    its last call for `on_train_batch_end`: without isolation that would be a trial's.
    """
    if isinstance(closure, functools.partial):
        for bound in (closure.func, *closure.args, *closure.keywords.values()):
            yield from closure_objects(bound)
    elif isinstance(closure, (MethodType, FunctionType, nn.Module)) or not callable(closure):
        return
    elif type(getattr(closure, "__dict__", None)) is dict:
        yield closure


# Fabric's backward. Under some precisions Fabric hooks the model's outputs, and the hook refuses any derivative that
# `fabric.backward` does not take (fabric/wrappers.py, `_backward_hook`). Products take theirs by torch.autograd.grad.


@contextmanager
def fabric_backward() -> Iterator[None]:
    """Let what follows differentiate as if `fabric.backward` did it."""
    wrappers = [vars(sys.modules[name]) for name in _FABRIC_WRAPPERS if name in sys.modules]
    flags = [names.get("_in_fabric_backward", False) for names in wrappers]
    for names in wrappers:
        names["_in_fabric_backward"] = True
    try:
        yield
    finally:
        for names, flag in zip(wrappers, flags, strict=True):
            names["_in_fabric_backward"] = flag


_FABRIC_WRAPPERS = ("lightning.fabric.wrappers", "lightning_fabric.wrappers")


# Closures. Lightning passes closures of its own to `step`, and accelerate leaves some out.


def does_nothing(closure: Callable[[], Any]) -> bool:
    """Return whether this is the closure that Lightning passes where a user calls `step()` without one.

    It does so under manual optimization. The closure returns None and computes no loss, so that the error for a missing
    closure says more than the one for a closure without a loss.
    """
    hosts = (closure.func, *closure.args) if isinstance(closure, functools.partial) else (closure,)
    return any(getattr(host, "__name__", "") == "do_nothing_closure" for host in hosts)


def skips_backward(closure: Callable[[], Any]) -> bool:
    """Return whether this is a closure of Lightning's that calls no `backward`.

    `WeightAveraging` runs batches so after it has averaged weights, to bring the statistics of BatchNorm up to date.
    """
    hosts = (closure.func, *closure.args) if isinstance(closure, functools.partial) else (closure,)
    return any(
        type(host).__module__.partition(".")[0] in ("lightning", "pytorch_lightning")
        and getattr(host, "_backward_fn", host) is None
        for host in hosts
    )


def refuse_skipped_batches() -> None:
    """Raise a RuntimeError if accelerate calls the step and leaves out all closures but every n-th.

    Its optimizer runs no closure while it accumulates gradients, so that a step would see one micro-batch of n.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_WRAPPERS):
        if frame is None:
            return
        if frame.f_globals.get("__name__") == "accelerate.optimizer":
            count = frame.f_locals["self"].gradient_state.num_steps
            if count > 1:
                raise RuntimeError(
                    f"Accelerator(gradient_accumulation_steps={count}) runs the closure for one batch in {count} only, "
                    "so that a step would leave out the others: set it to 1, and loop over the micro-batches inside "
                    "one closure, calling backward for each."
                )
        frame = frame.f_back


# Frames of hooks, decorators and schedulers between a caller of `step` and its body, at most.
_WRAPPERS = 10
