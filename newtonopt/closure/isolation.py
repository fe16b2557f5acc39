"""Everything a closure changes besides the parameters, put back after a run that must leave no trace.

A trial evaluation of the loss, and a measurement, run the user's closure again. The closure then draws random numbers,
moves BatchNorm's running statistics, updates metrics and teacher networks, appends to lists, writes to Lightning's logs
and clears `.grad`. `Isolation` lets it, and puts everything back:

- random numbers: `RandomState`, here;
- Python objects: `reach` finds those that the closure can reach, and reads and writes their content;
- tensors: `writes` keeps the values from before the first write;
- buffers: lent as copies, here, because BatchNorm writes to them unseen and a graph may keep them;
- Lightning's log: `lightning.silenced`.
"""

from __future__ import annotations

import functools
import random
import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.utils import _to_kwargs
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from newtonopt.closure.reach import ReachableState, generator_state, set_generator_state
from newtonopt.closure.writes import Memory, Writes, storage_of
from newtonopt.lightning import closure_objects, is_lightning_module, silenced
from newtonopt.vectors.subclasses import alike, copied


class Isolation:
    """Runs a closure so that nothing but the parameters can tell it ran.

    The first run, recorded or isolated, notes the state that it starts from. An isolated run starts from there again,
    so it computes the same function of the parameters: the same Dropout masks, the same counter, the same teacher
    network. Content is written in place, so objects keep their identity.

    Args:
        closure: The user's closure.
        params: The parameters; their `.grad` is put back after an isolated run. No parameter is ever copied, wherever
            it is held.

    Attributes:
        unprotected: Names of objects that isolated runs changed and that cannot be put back, such as generators.
    """

    def __init__(self, closure: Callable[[], Any], params: Iterable[Tensor]) -> None:
        self.unprotected: list[str] = []
        self._closure = closure
        self._params = tuple(params)
        self._devices = {p.device for p in self._params if p.device.type == "cuda"}
        self._reach = ReachableState()
        self._memory = Memory((), self._params)
        self._writes = Writes(self._memory)
        # Random numbers where the first run started, and where the recorded run ended.
        self._random_start: RandomState | None = None
        self._random_end: RandomState | None = None
        # Contents of the holders of `_reach`, in their order: where the first run met them, and where the recorded run
        # left them, with the numbers of the holders that this run has changed.
        self._contents: list[Any] = []
        self._settled: list[Any] = []
        self._moved: list[int] = []
        # Modules and buffers are known by identity: a torchmetrics.Metric hashes by its state, which a run changes.
        self._modules: list[nn.Module] = []
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        # Buffers that not only modules hold: they are put back in place.
        self._shared: list[Tensor] = []
        self._visits = _Visits()

    def begin(self) -> None:
        """Note the state that runs start from, before a run that training makes itself; `ended` notes what that leaves.

        Tensors that such a run writes to, other than buffers, are not put back.
        """
        self._begin()

    @contextmanager
    def recorded(self) -> Iterator[Writes]:
        """The run whose traces stay, as in any training step; they are taken back if it raises, or by `rewind`.

        Yields:
            The record to tell before a tensor is written to.
        """
        self._begin()
        self._visits.begin(self._modules, lend=False)

        def enter(module: nn.Module) -> None:
            self._add(module)
            self._visits.enter(module)

        try:
            with _around_each_module(enter, self._visits.leave):
                yield self._writes
        except BaseException:
            self.rewind()
            raise

    def ended(self) -> None:
        """Note what the recorded run leaves, before its loss is differentiated once more."""
        pairs = list(zip(self._reach.holders, self._contents, strict=True))
        self._settled = [start if holder.holds(start) else holder.read() for holder, start in pairs]
        self._moved = [i for i, (_, start) in enumerate(pairs) if self._settled[i] is not start]
        self._random_end = self._random_state()

    def rewind(self) -> None:
        """Take back what the recorded run did."""
        if self._random_start is None:
            return
        self._random_start.restore()
        self._writes.swap()
        self._put_back(self._contents)
        with torch.no_grad():
            for buffer, start in (*self._visits.starts.values(), *self._buffers.values()):
                buffer.copy_(start)

    @contextmanager
    def isolated(self) -> Iterator[Writes]:
        """A run from where the first one started, after which everything is as it was before.

        Yields:
            The record to tell before a tensor is written to.
        """
        origin = self._begin()
        random_before = self._random_state()
        gradients = [p.grad for p in self._params]
        alone = {id(module) for module in self._modules}
        holders = self._reach.holders
        contents = [
            start if holder.holds(start) else holder.read()
            for holder, start in zip(holders, self._contents, strict=True)
        ]
        positions = [(holder, holder.read()) for holder in self._reach.watched]

        def enter(module: nn.Module) -> None:
            contents.extend(self._add(module))
            if id(module) not in alone:
                alone.add(id(module))
                _run_alone(module)
            self._visits.enter(module)

        writes = self._writes.swap()
        try:
            with ExitStack() as stack:
                for i in self._moved:
                    holders[i].write(self._contents[i])
                # The closure may zero gradients in place: let it find none.
                for p in self._params:
                    p.grad = None
                origin.restore()
                self._lend_buffers(writes)
                self._visits.begin(self._modules, lend=True)
                for module in self._modules:
                    _run_alone(module)
                    if is_lightning_module(module):
                        stack.enter_context(silenced(module))
                stack.enter_context(_around_each_module(enter, self._visits.leave))
                yield writes
        finally:
            self._visits.leave_all()
            writes.swap()
            self._put_back(contents)
            for p, gradient in zip(self._params, gradients, strict=True):
                p.grad = gradient
            random_before.restore()
            changed = [holder.path for holder, before in positions if not holder.holds(before)]
            self.unprotected += [path for path in changed if path not in self.unprotected]

    def settle(self) -> None:
        """Put everything back to where the recorded run left it, or to before the first run if none was recorded.

        Hooks on tensors run outside of any run, when a graph that was kept is differentiated.
        """
        if self._random_start is not None:
            self._put_back(self._settled)
            (self._random_end or self._random_start).restore()

    def _begin(self) -> RandomState:
        """Note where the first run starts; return the state of its random numbers."""
        if self._random_start is not None:
            return self._random_start
        self._extend([(self._closure, "the closure")], closure_objects(self._closure), running=False)
        self._modules = list(self._reach.modules)
        self._random_start = self._random_state()
        buffers = {id(b): b for module in self._modules for b in module._buffers.values() if b is not None}
        if not buffers:
            return self._random_start
        alone = {key: b for key, b in buffers.items() if key not in self._reach.outside}
        others = [t for t in (*self._reach.tensors, *self._params) if id(t) not in alone]
        taken = {storage._cdata for t in others if (storage := storage_of(t)) is not None}
        lent = [b for b in alone.values() if (storage := storage_of(b)) is None or storage._cdata not in taken]
        self._buffers = {id(b): (b, copy) for b, copy in zip(lent, _copies(lent), strict=True)}
        self._shared = [b for key, b in buffers.items() if key not in self._buffers]
        self._memory.leave_out(lent)
        for buffer in self._shared:
            self._writes.save(buffer)
        return self._random_start

    def _add(self, module: nn.Module) -> list[Any]:
        """Add a module that was not found before a run calls it; return the content of the holders that are new."""
        return [] if id(module) in self._reach.seen else self._extend([(module, type(module).__name__)], running=True)

    def _extend(self, roots: Iterable[tuple[Any, str]], callables: Iterable[Any] = (), *, running: bool) -> list[Any]:
        """Add what can be reached from these roots; return the content of the holders that are new."""
        first, tensors = len(self._reach.holders), len(self._reach.tensors)
        self._reach.extend(roots, callables, running=running)
        self._memory.add(self._reach.tensors[tensors:])
        contents = [holder.read() for holder in self._reach.holders[first:]]
        self._contents.extend(contents)
        self._settled.extend(contents)
        return contents

    def _lend_buffers(self, writes: Writes) -> None:
        """Give modules copies of the buffers that they started with."""
        starts = [start for _, start in self._buffers.values()]
        lent = dict(zip(self._buffers, _copies(starts), strict=True))
        for module in self._modules if lent else ():
            for name, buffer in module._buffers.items():
                if id(buffer) in lent:
                    module._buffers[name] = lent[id(buffer)]
        for buffer in self._shared:
            writes.save(buffer)

    def _put_back(self, contents: Iterable[Any]) -> None:
        for holder, content in zip(self._reach.holders, contents, strict=True):
            if not holder.holds(content):
                holder.write(content)

    def _random_state(self) -> RandomState:
        return RandomState.now(self._devices, self._reach.generators)


class UnprotectedError(RuntimeError):
    """A run that should leave no trace has changed what cannot be put back."""

    def __init__(self, paths: Iterable[str]) -> None:
        super().__init__(
            f"The closure changes {', '.join(paths)}, which cannot be restored: an iterator, or an array or container "
            "too large to copy. Advance it outside the closure, or keep such state in numbers, lists, dicts or "
            "tensors."
        )


class Watch:
    """The objects that a function can reach and that could not be put back, while the function runs for real.

    Args:
        function: The function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        reach = ReachableState()
        reach.extend([(function, "the function")], (), running=False)
        self._positions = [(holder, holder.read()) for holder in reach.watched]

    def changed(self) -> list[str]:
        """Return the names of those that have changed since."""
        return [holder.path for holder, before in self._positions if not holder.holds(before)]


# Random numbers.


@dataclass(frozen=True, eq=False)
class RandomState:
    """The states of the global random generators, and of those that the closure can reach, at one moment."""

    of_torch: Tensor
    of_python: Any
    of_numpy: Any
    of_devices: list[tuple[torch.device, Tensor]]
    of_generators: list[tuple[Any, Any]]

    @classmethod
    def now(cls, devices: Iterable[torch.device], generators: Iterable[Any]) -> RandomState:
        """Read the present states."""
        on_devices = [(device, torch.cuda.get_rng_state(device)) for device in devices]
        held = [(generator, generator_state(generator)) for generator in generators]
        return cls(torch.get_rng_state(), random.getstate(), np.random.get_state(), on_devices, held)

    def restore(self) -> None:
        """Put all generators back into these states."""
        torch.set_rng_state(self.of_torch)
        random.setstate(self.of_python)
        np.random.set_state(self.of_numpy)
        for device, state in self.of_devices:
            torch.cuda.set_rng_state(state, device)
        for generator, state in self.of_generators:
            set_generator_state(generator, state)


# Buffers.


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a copy of each tensor; those that share memory have copies that share memory."""
    together = Counter(storage._cdata for t in tensors if (storage := storage_of(t)) is not None)
    memory: dict[int, Tensor] = {}
    result = []
    for t in tensors:
        storage = storage_of(t)
        if storage is None or together[storage._cdata] == 1:
            result.append(copied(t))
            continue
        if storage._cdata not in memory:
            memory[storage._cdata] = torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage.clone())
        same = memory[storage._cdata].untyped_storage()
        view = torch.empty(0, dtype=t.dtype, device=t.device).set_(same, t.storage_offset(), t.shape, t.stride())
        result.append(alike(view, t))
    return result


class _Visits:
    """Looks after buffers that a module has while its forward runs and that are not known to be its own.

    `torch.func.functional_call` gives a module somebody else's for as long, and a module that was not found at the
    start may be called by it. An isolated run lends a copy for each one, and takes it back before `functional_call`
    does, so that neither the buffers nor who holds which can change.

    Attributes:
        starts: Where buffers started, by identity: themselves, and a copy of their values then.
    """

    def __init__(self) -> None:
        self.starts: dict[int, tuple[Tensor, Tensor]] = {}
        self.begin((), lend=False)

    def begin(self, modules: Iterable[nn.Module], *, lend: bool) -> None:
        """Begin a run.

        Args:
            modules: Modules whose present buffers are their own, or copies.
            lend: Whether modules work on copies of other buffers.
        """
        self._lend = lend
        self._known: dict[int, Tensor | None] = {}
        self._current: dict[int, Tensor] = {}
        self._open: list[tuple[nn.Module, dict[str, Tensor]]] = []
        for module in modules:
            self._own(module)

    def enter(self, module: nn.Module) -> None:
        """Called before the module's forward."""
        met = {name: b for name, b in module._buffers.items() if b is not None and id(b) not in self._known}
        self._open.append((module, met))
        for name, buffer in met.items():
            with torch.no_grad():
                _, start = self.starts.setdefault(id(buffer), (buffer, copied(buffer)))
                if self._lend:
                    module._buffers[name] = self._current.setdefault(id(buffer), copied(start))
        if self._lend:
            self._own(module)

    def leave(self, module: nn.Module) -> None:
        """Called after the module's forward."""
        if not self._open or self._open[-1][0] is not module:
            return  # another hook raised before the visit began
        _, met = self._open.pop()
        self._own(module, met)
        for name, buffer in met.items():
            now = module._buffers.get(name)
            if self._lend:
                self._current[id(buffer)] = buffer if now is None else now
                module._buffers[name] = buffer
            elif now is not None and now is not buffer:
                # Assigned anew: later runs meet this one, and start from where the other did.
                self.starts[id(now)] = now, self.starts[id(buffer)][1]

    def leave_all(self) -> None:
        """End the visits that an exception broke off."""
        while self._open:
            self.leave(self._open[-1][0])

    def _own(self, module: nn.Module, but: Container[str] = ()) -> None:
        self._known.update({id(b): b for name, b in module._buffers.items() if name not in but})


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
    """Silence a compiled module's warning of global hooks, which see it and its original: ours are made for that."""
    message = r"Using `torch\.compile\(module\)` when there are global hooks"
    known = (pattern.pattern for _, pattern, *_ in warnings.filters if isinstance(pattern, re.Pattern))
    if message not in known:  # adding a filter again would make every warning that was shown once be shown again
        warnings.filterwarnings("ignore", message=message)


# Several processes.


def _run_alone(module: nn.Module) -> None:
    """Have a module wait for no other process; the flags are for a call that has begun already."""
    if isinstance(module, DistributedDataParallel):
        vars(module).update(
            require_backward_grad_sync=False,
            require_forward_param_sync=False,
            forward=functools.partial(_forward_of_one_process, module),
        )


def _forward_of_one_process(module: DistributedDataParallel, *inputs: Any, **kwargs: Any) -> Any:
    if module.device_ids:
        device = torch.device(module.device_type, module.device_ids[0])
        (inputs,), (kwargs,) = _to_kwargs(inputs, kwargs, device, module.use_side_stream_for_tensor_copies)
    return module.module(*inputs, **kwargs)
