"""Everything a closure changes besides the parameters, put back after a run that must leave no trace.

A trial evaluation of the loss, and a measurement, run the user's closure again. The closure then draws random numbers,
moves BatchNorm's running statistics, updates metrics, writes to Lightning's logs and clears `.grad`. `Isolation` lets
it, on copies.
"""

from __future__ import annotations

import functools
import os
import random
import re
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

_MODULE_INTERNALS = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set, deque)


class Isolation:
    """Runs a closure so that nothing but the parameters can tell it ran.

    The first run, recorded or isolated, notes the random state and the buffers it starts from. Every isolated run
    starts from there again, so it computes the same function of the parameters: the same Dropout masks, the same
    power-iteration vectors of a spectral norm.

    Args:
        closure: The user's closure. Modules that it holds (bound by `functools.partial`, as Lightning does, as `self`,
            in its cells) are looked after from the start, others from when the closure first calls them.
        params: The parameters; their `.grad` is put back after an isolated run.
    """

    def __init__(self, closure: Callable[[], Any], params: Iterable[Tensor]) -> None:
        self._params = tuple(params)
        hosts = list(_bound_objects(closure))
        self._modules = [host for host in hosts if isinstance(host, nn.Module)]
        self._callables = [host for host in hosts if not isinstance(host, nn.Module)]
        self._devices = {p.device for p in self._params if p.device.type == "cuda"}
        self._start: list[Any] | None = None
        # By identity here and below: a torchmetrics.Metric hashes by its state, which a run changes.
        self._buffers: dict[int, tuple[nn.Module, dict[str, Tensor]]] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """The run whose traces stay, as in any training step; they are taken back only if it raises."""
        self._start = self._random_state()
        touched: dict[int, tuple[nn.Module, dict[str, Tensor]]] = {}

        def note(module: nn.Module) -> None:
            if id(module) not in touched:
                touched[id(module)] = module, {name: b for name, b in module._buffers.items() if b is not None}
                self._starting_buffers(module)

        try:
            with _before_each_module(note):
                for module in self._submodules():
                    note(module)
                yield
        except BaseException:
            self._set_random_state(self._start)
            with torch.no_grad():
                for module, buffers in touched.values():
                    for name, buffer in buffers.items():
                        buffer.copy_(self._starting_buffers(module)[name])
                        module._buffers[name] = buffer
            raise

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """A run from where the first one started; random state, modules, gradients, results and logs are put back."""
        after = self._random_state()
        if self._start is None:
            self._start = after
        gradients = [p.grad for p in self._params]
        swapped: dict[int, _Swapped] = {}

        def swap(module: nn.Module) -> None:
            if id(module) not in swapped:
                swapped[id(module)] = _Swapped(module, self._starting_buffers(module))

        try:
            with ExitStack() as stack:
                for host in self._callables:
                    stack.enter_context(_attributes_restored(host))
                # The closure may zero gradients in place: let it find none.
                for p in self._params:
                    p.grad = None
                self._set_random_state(self._start)
                for module in self._submodules():
                    swap(module)
                for module in self._modules:
                    stack.enter_context(_silenced(module))
                stack.enter_context(_before_each_module(swap))
                yield
        finally:
            for entry in swapped.values():
                entry.put_back()
            for p, gradient in zip(self._params, gradients, strict=True):
                p.grad = gradient
            self._set_random_state(after)

    def _submodules(self) -> Iterator[nn.Module]:
        for module in self._modules:
            yield from module.modules()

    def _starting_buffers(self, module: nn.Module) -> dict[str, Tensor]:
        if id(module) not in self._buffers:
            with torch.no_grad():
                self._buffers[id(module)] = (
                    module,
                    {name: b.clone() for name, b in module._buffers.items() if b is not None},
                )
        return self._buffers[id(module)][1]

    def _random_state(self) -> list[Any]:
        on_devices = [(device, torch.cuda.get_rng_state(device)) for device in self._devices]
        return [torch.get_rng_state(), random.getstate(), np.random.get_state(), on_devices]

    def _set_random_state(self, state: list[Any]) -> None:
        of_torch, of_python, of_numpy, on_devices = state
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for device, of_device in on_devices:
            torch.cuda.set_rng_state(of_device, device)


class _Swapped:
    """One module working on copies of its buffers and plain attributes (counters, lists, states of a metric)."""

    def __init__(self, module: nn.Module, starting_buffers: dict[str, Tensor]) -> None:
        self._module = module
        self._attributes = {name: value for name, value in vars(module).items() if name not in _MODULE_INTERNALS}
        vars(module).update({name: _copied(value) for name, value in self._attributes.items()})
        self._buffers = {name: b for name, b in module._buffers.items() if b is not None}
        with torch.no_grad():
            copies = {name: b.clone() for name, b in starting_buffers.items() if name in self._buffers}
        module._buffers.update(copies)

    def put_back(self) -> None:
        own = vars(self._module)
        for name in [name for name in own if name not in _MODULE_INTERNALS and name not in self._attributes]:
            del own[name]
        own.update(self._attributes)
        self._module._buffers.update(self._buffers)


def _copied(value: Any) -> Any:
    if type(value) in _CONTAINERS:
        return value.copy()
    if isinstance(value, Tensor) and value.is_leaf and not isinstance(value, nn.Parameter):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return value


def _bound_objects(closure: Any) -> Iterator[Any]:
    """The modules and callable objects bound to a closure: by `functools.partial`, as `self`, or in its cells."""
    if isinstance(closure, functools.partial):
        for bound in (closure.func, *closure.args, *closure.keywords.values()):
            yield from _bound_objects(bound)
    elif isinstance(closure, MethodType):
        yield from (module for module in (closure.__self__,) if isinstance(module, nn.Module))
    elif isinstance(closure, FunctionType):
        filled = [cell for cell in closure.__closure__ or () if cell != CellType()]
        yield from (cell.cell_contents for cell in filled if isinstance(cell.cell_contents, nn.Module))
    elif isinstance(closure, nn.Module) or (callable(closure) and type(getattr(closure, "__dict__", None)) is dict):
        yield closure


@contextmanager
def _attributes_restored(host: Any) -> Iterator[None]:
    """A closure object keeps the result of its last call (Lightning's does): keep that of the recorded one."""
    before = dict(vars(host))
    try:
        yield
    finally:
        vars(host).clear()
        vars(host).update(before)


@contextmanager
def _before_each_module(action: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call `action(module)` before every forward call of a module in this thread (torch's hook is global)."""
    thread = threading.get_ident()

    def hook(module: nn.Module, _: Any) -> None:
        if threading.get_ident() == thread:
            action(module)

    _allow_global_hooks()
    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _allow_global_hooks() -> None:
    """A compiled module warns of global hooks, which see it once more than its original: ours does not mind."""
    message = r"Using `torch\.compile\(module\)` when there are global hooks"
    known = (pattern.pattern for _, pattern, *_ in warnings.filters if isinstance(pattern, re.Pattern))
    if message not in known:  # adding a filter again would make every warning that was shown once be shown again
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def _silenced(module: nn.Module) -> Iterator[None]:
    """Keep a LightningModule and its trainer's callbacks from logging, by `self.log`, `log_dict` or the loggers."""
    if not _is_lightning_module(module):
        yield
        return
    # An attribute of the instance hides the method of the class; `log_dict` calls `log`. `_Swapped` removes it again.
    vars(module)["log"] = _Silent()
    trainer: Any = module._trainer
    if trainer is None:
        yield
        return
    loggers = trainer.loggers
    # Callbacks with hooks inside the closure hold the module's `log` as it was when training began.
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


def _is_lightning_module(module: nn.Module) -> bool:
    # Either of Lightning's two package names, only if the user has imported it: this package must not.
    packages = (sys.modules.get(name) for name in ("lightning.pytorch", "pytorch_lightning"))
    return any(isinstance(module, package.LightningModule) for package in packages if package is not None)


class _Silent:
    """Stands in for a logger: whatever is done with it does nothing, but a name, path or number can be read."""

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
