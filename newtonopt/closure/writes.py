"""Tensors that a closure writes to: their values from before are kept at the first write, and put back.

The tap sees every call of torch and tells `Writes.before` of each that `is_write` names. Nothing is copied before there
is a write, however much memory the closure holds. `isolation` owns the `Writes` and swaps the values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from newtonopt.autodiff.graph import all_behind
from newtonopt.vectors.subclasses import is_wrapper


class Writes:
    """The values of tensors from before the first write to them.

    Args:
        memory: The tensors that are there when the closure begins; tensors that the closure makes are not kept.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        # Storages with a copy of what they held, by their address.
        self._values: dict[int, tuple[UntypedStorage, UntypedStorage]] = {}
        # Tensors whose `.data` or `.grad` is assigned anew, with the name and the former tensor.
        self._assigned: dict[tuple[int, str], tuple[Tensor, str, Tensor | None]] = {}

    def before(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the values of the tensors that this call is about to write to."""
        name = func.__name__
        with torch._C.DisableTorchFunction():  # a subclass of Tensor may override what is asked here
            if name == "__set__":
                self._before_assignment(args[0], func.__self__.__name__)  # type: ignore[attr-defined]
                return
            several = name.startswith("_fused") or hasattr(func, "_schema")
            first, last = (1, 3) if name in _WITH_STATISTICS else (0, None if several else 1)
            for t in tensors_in((args[first:last], kwargs)):
                self.save(t)

    def save(self, t: Tensor) -> None:
        """Keep the present values of a tensor, unless they are kept already or the closure made the tensor."""
        storage = self._memory.of(t)
        if storage is not None and storage._cdata not in self._values:
            self._values[storage._cdata] = storage, storage.clone()

    def _before_assignment(self, t: Tensor, name: str) -> None:
        if (id(t), name) not in self._assigned and self._memory.has(t):
            self._assigned[id(t), name] = t, name, _read(t, name)

    def swap(self) -> Writes:
        """Write the kept values; return a record of the ones they replaced, whose `swap` writes those again."""
        now = Writes(self._memory)
        for key, (storage, value) in self._values.items():
            now._values[key] = storage, storage.clone()
            storage.copy_(value)
        for entry, (t, name, former) in self._assigned.items():
            now._assigned[entry] = t, name, _read(t, name)
            setattr(t, name, former)
        return now

    def used_by(self, start: Node | None) -> bool:
        """Whether the graph that ends in `start` has saved a tensor that was written to."""
        if not self._values and not self._assigned:
            return False
        assigned = [storage_of(t) for t, name, _ in self._assigned.values() if name == "data"]
        keys = set(self._values) | {storage._cdata for storage in assigned if storage is not None}
        saved = map(storage_of, _saved_by(start))
        return any(storage is not None and storage._cdata in keys for storage in saved)


class WriteTap(TorchFunctionMode):
    """Tells a record of the writes of a run that needs no other tap: one whose loss is wanted and nothing else.

    Args:
        writes: The record.
    """

    def __init__(self, writes: Writes) -> None:
        super().__init__()
        self._writes = writes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_write(func, kwargs):
            self._writes.before(func, args, kwargs)
        return func(*args, **kwargs)


class Memory:
    """The storages of the tensors that a closure can reach, looked up when the first write comes.

    Args:
        tensors: The tensors.
        params: The parameters, which the objective puts back itself.
    """

    def __init__(self, tensors: Iterable[Tensor], params: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._params = list(params)
        self._param_ids = {id(p) for p in self._params}
        self._ids: set[int] = set()
        self._storages: dict[int, UntypedStorage] | None = None

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Add further tensors."""
        self._tensors.extend(tensors)
        self._storages = None

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Remove tensors that are put back in another way."""
        away = {id(t) for t in tensors}
        self._tensors = [t for t in self._tensors if id(t) not in away]
        self._storages = None

    def has(self, t: Tensor) -> bool:
        """Whether `t` is one of the tensors, and no parameter."""
        if id(t) in self._param_ids:
            return False
        self._look_up()
        return id(t) in self._ids

    def of(self, t: Tensor) -> UntypedStorage | None:
        """Return the storage of `t` if one of the tensors shares it and no parameter does."""
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


# Which functions write.

# Functions that write to their arguments, or return memory that others may write to, without a name that says so.
_BY_NAME = frozenset(
    {"__setitem__", "numpy", "__array__", "__dlpack__", "storage", "typed_storage", "untyped_storage"}
    | {f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "matmul")}
    | {f"__i{name}__" for name in ("and", "or", "xor", "lshift", "rshift")}
)
# Functions whose name ends in an underscore, as of operations in place, and that leave the memory as it is.
_NO_WRITES = frozenset({"requires_grad_", "detach_", "share_memory_", "rename_"})
_SETTERS = ("data", "grad")
# Functions whose second and third argument are running statistics.
_WITH_STATISTICS = frozenset({"batch_norm", "instance_norm"})


def is_write(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call of this function may write to one of its arguments."""
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


# Tensors and their memory.


def storage_of(t: Tensor) -> UntypedStorage | None:
    """Return the memory of a tensor; None if it has none of its own."""
    if is_wrapper(t):
        return None
    with torch._C.DisableTorchFunction():
        try:
            return t.untyped_storage() if t.layout == torch.strided else None
        except (RuntimeError, NotImplementedError):  # a tensor inside a transform of torch.func
            return None


def _read(t: Tensor, name: str) -> Tensor | None:
    return t.data if name == "data" else t.grad


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, in lists, tuples and dictionaries too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors_in(entry)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


def _saved_by(start: Node | None) -> Iterator[Tensor]:
    """Yield the tensors that the nodes of a graph have saved for their derivatives."""
    for node in all_behind([start]):
        of_function = getattr(node, "saved_tensors", ())  # of a custom autograd.Function
        raw = [getattr(node, name) for name in dir(node) if name.startswith("_raw_saved_")]
        several = [value if isinstance(value, (list, tuple)) else [value] for value in raw]
        for one in itertools.chain(of_function, *several):
            saved = one if isinstance(one, Tensor) else getattr(one, "data", None)
            if isinstance(saved, Tensor):
                yield saved
