"""Tensors that a closure writes to: their values from before, kept when the first write comes, and put back.

The tap sees every operation in place. Nothing is copied before there is one, whatever the size of what the closure
holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import Node

from newtonopt._graph import all_behind
from newtonopt._subclasses import is_wrapper

# Functions that write to their arguments, or hand out memory that others may write to, and do not say so by their name.
_BY_NAME = frozenset(
    {"__setitem__", "numpy", "__array__", "__dlpack__", "storage", "typed_storage", "untyped_storage"}
    | {f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "matmul")}
    | {f"__i{name}__" for name in ("and", "or", "xor", "lshift", "rshift")}
)
# What ends as the names of operations in place do, and leaves the memory as it is.
_NO_WRITES = frozenset({"requires_grad_", "detach_", "share_memory_", "rename_"})
_SETTERS = ("data", "grad")
_WITH_STATISTICS = frozenset({"batch_norm", "instance_norm"})


def is_write(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call of this function may write to a tensor that it is given."""
    try:
        known = _KNOWN.get(func)
    except TypeError:  # it cannot be hashed
        known = None
    if known is None:
        known = _KNOWN[func] = _writes(func)
    return known or "out" in kwargs or bool(kwargs.get("inplace"))


_KNOWN: dict[Any, bool] = {}


def _writes(func: Callable[..., Any]) -> bool:
    schema = getattr(func, "_schema", None)
    if schema is not None:  # an operator, such as one of `torch.library.custom_op`
        return bool(schema.is_mutable)
    name = getattr(func, "__name__", "")
    if name == "__set__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _SETTERS
    in_place = name.endswith("_") and not name.endswith("__") and name not in _NO_WRITES
    return in_place or name in _BY_NAME or name in _WITH_STATISTICS


class Memory:
    """The memory of tensors that a closure can find, looked up when it first matters.

    Args:
        tensors: The tensors.
        params: The parameters, which others put back.
    """

    def __init__(self, tensors: Iterable[Tensor], params: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._params = list(params)
        self._param_ids = {id(p) for p in self._params}
        self._ids: set[int] = set()
        self._storages: dict[int, UntypedStorage] | None = None

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Take further tensors in."""
        self._tensors.extend(tensors)
        self._storages = None

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Leave tensors out that others put back."""
        away = {id(t) for t in tensors}
        self._tensors = [t for t in self._tensors if id(t) not in away]
        self._storages = None

    def has(self, t: Tensor) -> bool:
        """Whether this is one of the tensors, and no parameter."""
        if id(t) in self._param_ids:
            return False
        self._look_up()
        return id(t) in self._ids

    def of(self, t: Tensor) -> UntypedStorage | None:
        """Return the memory of `t` if one of the tensors has the same, and no parameter has."""
        storage = storage_of(t)
        return None if storage is None else self._look_up().get(storage._cdata)

    def _look_up(self) -> dict[int, UntypedStorage]:
        if self._storages is None:
            self._ids = {id(t) for t in self._tensors} - self._param_ids
            others = [t for t in self._tensors if id(t) in self._ids]
            found = [storage_of(t) for t in others]
            found += [storage_of(t.grad) for t in others if t.is_leaf and t.grad is not None]
            self._storages = {storage._cdata: storage for storage in found if storage is not None}
            for p in self._params:
                storage = storage_of(p)
                if storage is not None:
                    self._storages.pop(storage._cdata, None)
        return self._storages


class Writes:
    """The values from before a run of what it writes to.

    Args:
        memory: The tensors that the run finds when it begins; what it makes itself is nobody's concern.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._values: dict[int, tuple[UntypedStorage, UntypedStorage]] = {}
        # Of `.data` and `.grad` that are assigned anew.
        self._assigned: dict[tuple[int, str], tuple[Tensor, str, Tensor | None]] = {}

    def before(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before a function writes."""
        name = func.__name__
        with torch._C.DisableTorchFunction():  # a subclass of Tensor may refuse to tell
            if name == "__set__":
                self._before_assignment(args[0], func.__self__.__name__)  # type: ignore[attr-defined]
                return
            several = name.startswith("_fused") or hasattr(func, "_schema")
            first, last = (1, 3) if name in _WITH_STATISTICS else (0, None if several else 1)
            for t in _tensors_in((args[first:last], kwargs)):
                self.save(t)

    def save(self, t: Tensor) -> None:
        """Keep what a tensor holds now, unless it is known or the run has made it."""
        storage = self._memory.of(t)
        if storage is not None and storage._cdata not in self._values:
            self._values[storage._cdata] = storage, storage.clone()

    def _before_assignment(self, t: Tensor, name: str) -> None:
        if (id(t), name) not in self._assigned and self._memory.has(t):
            self._assigned[id(t), name] = t, name, _read(t, name)

    def swap(self) -> Writes:
        """Write the values from before; returns a record of those that were there, to be written back in turn."""
        now = Writes(self._memory)
        for key, (storage, value) in self._values.items():
            now._values[key] = storage, storage.clone()
            storage.copy_(value)
        for entry, (t, name, former) in self._assigned.items():
            now._assigned[entry] = t, name, _read(t, name)
            setattr(t, name, former)
        return now

    def used_by(self, start: Node | None) -> bool:
        """Whether the graph from here keeps a tensor that was written to."""
        if not self._values and not self._assigned:
            return False
        assigned = [storage_of(t) for t, name, _ in self._assigned.values() if name == "data"]
        keys = set(self._values) | {storage._cdata for storage in assigned if storage is not None}
        kept = map(storage_of, _saved_by(start))
        return any(storage is not None and storage._cdata in keys for storage in kept)


def _read(t: Tensor, name: str) -> Tensor | None:
    return t.data if name == "data" else t.grad


def storage_of(t: Tensor) -> UntypedStorage | None:
    """Return the memory of a tensor; None where it has none of its own."""
    if is_wrapper(t):
        return None
    with torch._C.DisableTorchFunction():
        try:
            return t.untyped_storage() if t.layout == torch.strided else None
        except (RuntimeError, NotImplementedError):  # a tensor inside a transform of torch.func
            return None


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors_in(entry)
    elif isinstance(value, dict):
        yield from _tensors_in(tuple(value.values()))


def _saved_by(start: Node | None) -> Iterator[Tensor]:
    """The tensors that the nodes of a graph keep for its derivatives."""
    for node in all_behind([start]):
        of_function = getattr(node, "saved_tensors", ())  # of a custom autograd.Function
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_raw_saved_")]
        for one in (*of_function, *(part for value in saved for part in (value if _is_list(value) else [value]))):
            held = one if isinstance(one, Tensor) else getattr(one, "data", None)
            if isinstance(held, Tensor):
                yield held


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))
