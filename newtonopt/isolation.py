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
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.utils import _to_kwargs
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from newtonopt._discovery import (
    CONTAINERS,
    GENERATORS,
    MODULE_INTERNALS,
    bound_callables,
    found_in,
    generator_state,
    set_generator_state,
)
from newtonopt._subclasses import copied


class Isolation:
    """Runs a closure so that nothing but the parameters can tell it ran.

    The first run, recorded or isolated, notes the random state and the buffers it starts from. Every isolated run
    starts from there again, so it computes the same function of the parameters: the same Dropout masks, the same
    power-iteration vectors of a spectral norm.

    Args:
        closure: The user's closure. Modules and random generators that it holds (bound by `functools.partial`, as
            Lightning does, as `self` or its attributes, in cells and globals, its own and those of functions that it
            calls) are looked after from the start, other modules from when the closure first calls them.
        params: The parameters; their `.grad` is put back after an isolated run.
    """

    def __init__(self, closure: Callable[[], Any], params: Iterable[Tensor]) -> None:
        self._params = tuple(params)
        found = list(found_in(closure))
        self._modules = [host for host in found if isinstance(host, nn.Module)]
        self._generators = [host for host in found if isinstance(host, GENERATORS)]
        self._callables = list(bound_callables(closure))
        self._devices = {p.device for p in self._params if p.device.type == "cuda"}
        self._start: list[Any] = []
        # By identity here and below: a torchmetrics.Metric hashes by its state, which a run changes.
        self._buffers: dict[int, tuple[nn.Module, dict[str, Tensor]]] = {}
        self._visiting: dict[int, tuple[Tensor, Tensor]] = {}
        self._before: list[tuple[nn.Module, dict[str, Tensor]]] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """The run whose traces stay, as in any training step; they are taken back if it raises, or by `rewind`."""
        self._start = self._random_state()
        visits = _Visits(self._visiting, lend=False)
        for module in self._submodules():
            visits.own(module)
            own = {name: b for name, b in module._buffers.items() if b is not None}
            self._before.append((module, own))
            self._starting_buffers(module)
        try:
            with _around_each_module(visits.enter, visits.leave):
                yield
        except BaseException:
            self.rewind()
            raise

    def rewind(self) -> None:
        """Take back what the recorded run did to random state and buffers."""
        self._set_random_state(self._start)
        with torch.no_grad():
            for buffer, start in self._visiting.values():
                buffer.copy_(start)
            for module, buffers in self._before:
                for name, buffer in buffers.items():
                    buffer.copy_(self._starting_buffers(module)[name])
                    module._buffers[name] = buffer

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """A run from where the first one started; random state, modules, gradients, results and logs are put back."""
        after = self._random_state()
        if not self._start:
            self._start = after
        gradients = [p.grad for p in self._params]
        swapped: dict[int, _Swapped] = {}
        visits = _Visits(self._visiting, lend=True)

        def enter(module: nn.Module) -> None:
            if id(module) not in swapped:
                swapped[id(module)] = _Swapped(module, {})
            visits.enter(module)

        try:
            with ExitStack() as stack:
                for host in self._callables:
                    stack.enter_context(_attributes_restored(host))
                # The closure may zero gradients in place: let it find none.
                for p in self._params:
                    p.grad = None
                self._set_random_state(self._start)
                for module in self._submodules():
                    swapped[id(module)] = _Swapped(module, self._starting_buffers(module))
                    visits.own(module)
                for module in self._modules:
                    stack.enter_context(_silenced(module))
                stack.enter_context(_around_each_module(enter, visits.leave))
                yield
        finally:
            visits.leave_all()
            for entry in swapped.values():
                entry.put_back()
            for p, gradient in zip(self._params, gradients, strict=True):
                p.grad = gradient
            self._set_random_state(after)

    def _submodules(self) -> Iterable[nn.Module]:
        return {id(module): module for host in self._modules for module in host.modules()}.values()

    def _starting_buffers(self, module: nn.Module) -> dict[str, Tensor]:
        if id(module) not in self._buffers:
            copies = {name: copied(b) for name, b in module._buffers.items() if b is not None}
            self._buffers[id(module)] = module, copies
        return self._buffers[id(module)][1]

    def _random_state(self) -> list[Any]:
        on_devices = [(device, torch.cuda.get_rng_state(device)) for device in self._devices]
        held = [generator_state(generator) for generator in self._generators]
        return [torch.get_rng_state(), random.getstate(), np.random.get_state(), on_devices, held]

    def _set_random_state(self, state: list[Any]) -> None:
        of_torch, of_python, of_numpy, on_devices, held = state
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for device, of_device in on_devices:
            torch.cuda.set_rng_state(of_device, device)
        for generator, of_generator in zip(self._generators, held, strict=True):
            set_generator_state(generator, of_generator)


class _Swapped:
    """One module working on copies of its buffers and plain attributes (counters, lists, states of a metric)."""

    def __init__(self, module: nn.Module, starting_buffers: dict[str, Tensor]) -> None:
        self._module = module
        self._attributes = {name: value for name, value in vars(module).items() if name not in MODULE_INTERNALS}
        vars(module).update({name: _copied(value) for name, value in self._attributes.items()})
        self._buffers = {name: module._buffers[name] for name in starting_buffers if name in module._buffers}
        module._buffers.update({name: copied(starting_buffers[name]) for name in self._buffers})
        if isinstance(module, DistributedDataParallel):
            # Nothing that waits for other processes; the flags are for a call that has begun already.
            vars(module).update(
                require_backward_grad_sync=False,
                require_forward_param_sync=False,
                forward=functools.partial(_forward_of_one_process, module),
            )

    def put_back(self) -> None:
        own = vars(self._module)
        for name in [name for name in own if name not in MODULE_INTERNALS and name not in self._attributes]:
            del own[name]
        own.update(self._attributes)
        self._module._buffers.update(self._buffers)


def _forward_of_one_process(module: DistributedDataParallel, *inputs: Any, **kwargs: Any) -> Any:
    if module.device_ids:
        device = torch.device(module.device_type, module.device_ids[0])
        (inputs,), (kwargs,) = _to_kwargs(inputs, kwargs, device, module.use_side_stream_for_tensor_copies)
    return module.module(*inputs, **kwargs)


class _Visits:
    """Looks after buffers that a module has while its forward runs and that are not known to be its own.

    `torch.func.functional_call` gives a module somebody else's for as long, and a module that was not found at the
    start may be called by it. An isolated run lends a copy for each one, and takes it back before `functional_call`
    does, so that neither the buffers nor who holds which can change.

    Args:
        starts: Where buffers started, by identity: themselves, and a copy of their values then. Added to.
        lend: Whether the modules work on copies.
    """

    def __init__(self, starts: dict[int, tuple[Tensor, Tensor]], *, lend: bool) -> None:
        self._starts = starts
        self._known: dict[int, Tensor | None] = {}
        self._lend = lend
        self._current: dict[int, Tensor] = {}
        self._open: list[tuple[nn.Module, dict[str, Tensor]]] = []

    def own(self, module: nn.Module, but: Container[str] = ()) -> None:
        """The buffers that the module has now are its own, or copies."""
        self._known.update({id(b): b for name, b in module._buffers.items() if name not in but})

    def enter(self, module: nn.Module) -> None:
        """Called before the module's forward."""
        met = {name: b for name, b in module._buffers.items() if b is not None and id(b) not in self._known}
        self._open.append((module, met))
        for name, buffer in met.items():
            with torch.no_grad():
                _, start = self._starts.setdefault(id(buffer), (buffer, copied(buffer)))
                if self._lend:
                    module._buffers[name] = self._current.setdefault(id(buffer), copied(start))
        if self._lend:
            self.own(module)

    def leave(self, module: nn.Module) -> None:
        """Called after the module's forward."""
        if not self._open or self._open[-1][0] is not module:
            return  # another hook raised before the visit began
        _, met = self._open.pop()
        self.own(module, met)
        for name, buffer in met.items():
            now = module._buffers.get(name)
            if self._lend:
                self._current[id(buffer)] = buffer if now is None else now
                module._buffers[name] = buffer
            elif now is not None and now is not buffer:
                # Assigned anew: later runs meet this one, and start from where the other did.
                self._starts[id(now)] = now, self._starts[id(buffer)][1]

    def leave_all(self) -> None:
        """End the visits that an exception broke off."""
        while self._open:
            self.leave(self._open[-1][0])


def _copied(value: Any) -> Any:
    if type(value) in CONTAINERS:
        return value.copy()
    if isinstance(value, Tensor) and value.is_leaf and not isinstance(value, nn.Parameter):
        return copied(value).requires_grad_(value.requires_grad)
    return value


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
def _around_each_module(enter: Callable[[nn.Module], None], leave: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call these before and after every forward call of a module in this thread (torch's hooks are global)."""
    thread = threading.get_ident()

    def before(module: nn.Module, _: Any) -> None:
        if threading.get_ident() == thread:
            enter(module)

    def after(module: nn.Module, *_: Any) -> None:
        if threading.get_ident() == thread:
            leave(module)

    _allow_global_hooks()
    handles = register_module_forward_pre_hook(before), register_module_forward_hook(after, always_call=True)
    try:
        yield
    finally:
        for handle in handles:
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
