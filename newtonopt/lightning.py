"""Special cases for Lightning: its Trainer, its loggers and Fabric, each with its reason.

Lightning is looked for among the modules that the user has imported, under both of its package names, and never
imported from here. `closure.isolation` silences the log, `closure.reach` asks what belongs to the Trainer, and
`autodiff.gradients` differentiates under `fabric_backward`. Upstream files are below
https://github.com/Lightning-AI/pytorch-lightning/blob/master/src/lightning/.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType
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
