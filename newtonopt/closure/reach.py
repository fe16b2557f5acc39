"""State that a closure can reach: which objects hold some, how to read their content, how to write it back in place.

`isolation` asks `ReachableState` for the holders, and reads, compares and writes them. The walk follows cells,
defaults, attributes, slots, containers, and the globals, classes and functions that the user's own code names. It
leaves out what belongs to libraries: threads, loggers, the Trainer, torch's own machinery. For each class of objects
`_KINDS` names the method of `_Walk` that follows such an object and keeps a `Holder` of its state.

Content is read one level deep: the content of a list is its entries by identity, and these may be holders themselves.
Writing goes past methods that a subclass overrides, so that nothing but the content changes.
"""

from __future__ import annotations

import enum
import functools
import itertools
import operator
import os
import random
import sys
import sysconfig
import threading
import types
import weakref
from abc import ABC, abstractmethod
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from queue import Queue
from types import (
    BuiltinMethodType,
    CellType,
    CodeType,
    FunctionType,
    GeneratorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from newtonopt.lightning import OPAQUE_PACKAGES, TRAINER, held_by_trainer


@dataclass(frozen=True, eq=False)
class ReachableState:
    """The state that a closure can reach.

    Attributes:
        modules: The modules, each once.
        generators: Random generators.
        tensors: Tensors, each once.
        outside: Identities of the tensors that an object other than a module holds too.
        holders: Objects whose content can be put back.
        watched: Objects whose content can only be watched.
        seen: The objects met, by identity, kept alive so that no other object takes an identity over.
    """

    modules: list[nn.Module] = field(default_factory=list)
    generators: list[Any] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    outside: set[int] = field(default_factory=set)
    holders: list[Holder] = field(default_factory=list)
    watched: list[Watched] = field(default_factory=list)
    seen: dict[int, Any] = field(default_factory=dict)

    def extend(self, roots: Iterable[tuple[Any, str]], callables: Iterable[Any], *, running: bool) -> None:
        """Add what can be reached from these roots.

        Args:
            roots: Objects to begin at, each with the name under which messages speak of it.
            callables: Callable objects that the closure consists of, followed although a library wrote them.
            running: Whether the closure runs, so that `functional_call` may have lent modules other parameters and
                buffers.
        """
        with torch._C.DisableTorchFunction():  # a subclass of Tensor may override what is asked here
            _Walk(self, running=running).go(roots, callables)


def generator_state(generator: Any) -> Any:
    """Return the state of a random generator."""
    generator = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.state if isinstance(generator, np.random.BitGenerator) else generator.get_state()


def set_generator_state(generator: Any, state: Any) -> None:
    """Put a random generator into a state that it had."""
    generator = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.BitGenerator):
        generator.state = state
    else:
        generator.set_state(state)


_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)


# The walk.

# A budget: objects met, entries of a container that are followed, entries or bytes that are copied in each run, and
# entries of a longer list that are watched.
_MOST_OBJECTS = 20_000
_MOST_FOLLOWED = 1_024
_MOST_ENTRIES = 100_000
_MOST_BYTES = 2**24
_SAMPLED = 64


class _Walk:
    """One walk, breadth first, so that its budget leaves out what is farthest away.

    Args:
        state: The state known already, to which the walk adds.
        running: Whether the closure runs.
    """

    def __init__(self, state: ReachableState, *, running: bool) -> None:
        self._state = state
        self._running = running
        self._left_alone: set[int] = set()
        self._waiting: deque[tuple[_Follow, Any, str]] = deque()

    def go(self, roots: Iterable[tuple[Any, str]], callables: Iterable[Any]) -> None:
        seen, waiting, first = self._state.seen, self._waiting, len(self._state.holders)
        for root, path in roots:
            self._meet(root, path)
        for host in callables:
            self._take(host, type(host).__name__)
        while waiting and len(seen) < _MOST_OBJECTS:
            follow, host, path = waiting.popleft()
            follow(self, host, path)
        if self._left_alone:
            kept = [one for one in self._state.holders[first:] if id(one.host) not in self._left_alone]
            self._state.holders[first:] = kept

    def _meet(self, host: Any, path: str, *, registered: bool = False) -> None:
        follow, seen = _follow_of(type(host)), self._state.seen
        if follow is None:
            return
        if isinstance(host, Tensor) and not registered:
            self._state.outside.add(id(host))
        if id(host) not in seen:
            seen[id(host)] = host
            self._waiting.append((follow, host, path))

    def _take(self, host: Any, path: str) -> None:
        """Follow an object whatever its kind."""
        if id(host) not in self._state.seen:
            self._state.seen[id(host)] = host
            self._object(host, path)

    def _keep(self, holder: Holder) -> None:
        self._state.holders.append(holder)

    def _watch(self, holder: Watched) -> None:
        self._state.watched.append(holder)

    def _tensor(self, host: Tensor, path: str) -> None:
        self._state.tensors.append(host)
        self._attributes(host, path)
        for hook in (host._backward_hooks or {}).values() if not host._is_view() else ():
            self._meet(hook, f"a hook of {path}")

    def _module(self, host: nn.Module, path: str) -> None:
        self._state.modules.append(host)
        own = vars(host)
        self._keep(_Items(own, path))
        if isinstance(host, torch.jit.ScriptModule):
            self._script(host, path)
            return
        without_hooks = []
        for name, value in own.items():
            if name in _MODULE_INTERNALS:
                registered = name in ("_parameters", "_buffers", "_modules")
                if type(value) in (dict, OrderedDict) and not value and not registered:
                    without_hooks.append(value)
                elif isinstance(value, dict):
                    if not (registered and self._running):
                        self._keep(_Items(value, path))
                    for key, entry in value.items():
                        self._meet(entry, f"{path}.{key}", registered=registered)
            elif name != TRAINER:
                self._meet(value, f"{path}.{name}")
        self._keep(_Empty(without_hooks, path))
        given, optimizers = held_by_trainer(own)
        for held in given:
            if not _is_library(type(held)):
                self._take(held, type(held).__name__)
        for optimizer in optimizers:
            self._meet(optimizer, type(optimizer).__name__)
        self._class_of(host)

    def _script(self, host: torch.jit.ScriptModule, path: str) -> None:
        """Follow a compiled module, whose buffers cannot be lent as copies."""
        for name, t in (*host.named_parameters(recurse=False), *host.named_buffers(recurse=False)):
            self._meet(t, f"{path}.{name}")
        for name, module in host.named_children():
            self._meet(module, f"{path}.{name}")

    def _object(self, host: Any, path: str) -> None:
        self._attributes(host, path)
        for kind in _slotted(type(host)):
            slots = _Slots(host, kind, path)
            self._keep(slots)
            for member, value in zip(slots.members, slots.read(), strict=True):
                if value is not _EMPTY:
                    self._meet(value, f"{path}.{member.__name__}")
        self._meet(_get(host, "__self__"), path)  # a method written in C
        self._meet(_get(host, "__wrapped__"), path)  # functools.cache
        self._class_of(host)

    def _attributes(self, host: Any, path: str) -> None:
        # The dictionary of a threading.local is that of the thread.
        own = vars(host) if isinstance(host, threading.local) else _get(host, "__dict__")
        if type(own) is not dict or (not own and isinstance(host, Tensor)):
            return
        self._keep(_Items(own, path))
        for name, value in tuple(own.items()):
            self._meet(value, f"{path}.{name}")

    def _class_of(self, host: Any) -> None:
        for kind in type(host).__mro__:
            if not _is_library(kind):
                self._meet(kind, kind.__name__)

    def _class(self, host: type, path: str) -> None:
        if _is_library(host) or issubclass(host, enum.Enum):
            return
        for name, value in tuple(vars(host).items()):
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            elif isinstance(value, property):
                for function in (value.fget, value.fset):
                    self._meet(function, f"{path}.{name}")
            elif isinstance(value, functools.cached_property):
                value = value.func
            if not name.startswith("__") and not hasattr(type(value), "__get__"):
                self._keep(_Binding(host, name, f"{path}.{name}"))
            if not name.startswith("__") or isinstance(value, FunctionType):
                self._meet(value, f"{path}.{name}")
        for base in host.__bases__:
            self._meet(base, base.__name__)

    def _library(self, host: Any, path: str) -> None:
        """Follow an object of a library, whose own attributes are not put back."""
        own = _get(host, "__dict__")
        for name, value in tuple(own.items()) if type(own) is dict else ():
            self._meet(value, f"{path}.{name}")

    def _optimizer(self, host: torch.optim.Optimizer, path: str) -> None:
        if any(kind.__module__.startswith("newtonopt.") for kind in type(host).__mro__):
            # Its state changes between the runs of a step; nobody else may take it for the closure's.
            self._left_alone.update(map(id, (host.state, *host.state.values())))
            self._meet(host.param_groups, f"{path}.param_groups")
        else:
            self._object(host, path)

    def _function(self, host: FunctionType, path: str) -> None:
        code = host.__code__
        for name, cell in zip(code.co_freevars, host.__closure__ or (), strict=True):
            self._cell(cell, name)
        for value in (*(host.__defaults__ or ()), *(host.__kwdefaults__ or {}).values()):
            self._meet(value, f"a default of {host.__name__}")
        if _is_library_file(code.co_filename):
            return
        self._attributes(host, path)
        names = _names(code)
        for name in names & host.__globals__.keys():
            value = host.__globals__[name]
            if isinstance(value, ModuleType):
                self._named_in(value, names, name)
            else:
                self._binding(host.__globals__, name, name)

    def _named_in(self, module: ModuleType, names: frozenset[str], path: str) -> None:
        """Follow the globals of a module that code names along with the module, as in `helpers.draw()`."""
        if _is_library_file(_file(module)):
            return
        for name in names & vars(module).keys():
            value = vars(module)[name]
            if isinstance(value, ModuleType):
                self._named_in(value, names - {name}, f"{path}.{name}")
            else:
                self._binding(module, name, f"{path}.{name}")

    def _cell(self, cell: CellType, name: str) -> None:
        if id(cell) in self._state.seen or cell == CellType():
            return
        self._state.seen[id(cell)] = cell
        self._keep(_Cell(cell, name))
        self._meet(cell.cell_contents, name)

    def _binding(self, host: Any, name: str, path: str) -> None:
        value = (host if isinstance(host, dict) else vars(host))[name]
        if not isinstance(value, (FunctionType, ModuleType, type, BuiltinMethodType)):
            self._keep(_Binding(host, name, path))
        self._meet(value, path)

    def _method(self, host: Any, path: str) -> None:
        self._meet(host.__self__, "self" if isinstance(host.__self__, nn.Module) else path)
        self._meet(getattr(host, "__func__", None), path)

    def _partial(self, host: functools.partial[Any], path: str) -> None:
        for value in (host.func, *host.args, *host.keywords.values()):
            self._meet(value, "self" if isinstance(value, nn.Module) else path)

    def _sequence(self, host: Any, path: str) -> None:
        kind: Any = list if isinstance(host, list) else deque
        self._container(_Entries(host, path), kind.__len__(host), kind.__iter__(host))

    def _set(self, host: set[Any], path: str) -> None:
        self._container(_Members(host, path), set.__len__(host), set.__iter__(host))

    def _dict(self, host: dict[Any, Any], path: str) -> None:
        # Values first, under their keys.
        for key, value in itertools.islice(dict.items(host), _MOST_FOLLOWED):
            self._meet(value, f"{path}[{key!r}]" if isinstance(key, (str, int)) else path)
        self._container(_Items(host, path), dict.__len__(host), dict.__iter__(host))

    def _container(self, holder: Holder, length: int, entries: Iterator[Any]) -> None:
        host, path = holder.host, holder.path
        if length <= _MOST_ENTRIES:
            self._keep(holder)
        else:
            self._watch(_Sample(host, path))
        for value in itertools.islice(entries, _MOST_FOLLOWED):
            self._meet(value, path)
        if type(host) not in (list, deque, set, dict):
            self._object(host, path)  # a subclass may have attributes

    def _fixed(self, host: Any, path: str) -> None:
        values = host.values() if isinstance(host, types.MappingProxyType) else host
        for value in itertools.islice(values, _MOST_FOLLOWED):
            self._meet(value, path)

    def _bytes(self, host: Any, path: str) -> None:
        self._keep(_Bytes(host, path))

    def _array(self, host: np.ndarray[Any, Any], path: str) -> None:
        if host.flags.writeable:
            if host.nbytes <= _MOST_BYTES:
                self._keep(_Numbers(host, path))
            else:
                self._watch(_Sample(host, path))
        if host.dtype == object:
            for value in itertools.islice(host.flat, _MOST_FOLLOWED):
                self._meet(value, path)

    def _generator(self, host: Any, path: str) -> None:
        self._state.generators.append(host)
        self._attributes(host, path)

    def _context(self, host: ContextVar[Any], path: str) -> None:
        self._keep(_Context(host, path))
        self._meet(host.get(None), path)

    def _weak(self, host: Any, path: str) -> None:
        self._keep(_Weak(host, path))
        for value in itertools.islice(list(host.values()), _MOST_FOLLOWED):
            self._meet(value, path)

    def _iterator(self, host: Any, path: str) -> None:
        self._watch(_Position(host, path))


# The kinds of objects.

Result = TypeVar("Result")


def _cached(function: Callable[[type], Result]) -> Callable[[type], Result]:
    """Keep the answers of a function of a class."""
    return functools.lru_cache(maxsize=4096)(function)


_SEQUENCES: tuple[Any, ...] = ([], (), "", b"", range(0), range(2**70), reversed([]))
_TABLES: tuple[Any, ...] = ({}, {}.values(), {}.items(), set())
_TABLE_ITERATORS = tuple(type(iter(host)) for host in _TABLES)
_ITERATORS = (
    types.GeneratorType,
    *(kind for kind in vars(itertools).values() if isinstance(kind, type)),
    *(zip, map, filter, enumerate),
    *(type(iter(host)) for host in _SEQUENCES),
    *_TABLE_ITERATORS,
    _BaseDataLoaderIter,
)
_IGNORED = (str, bytes, int, float, complex, type(None), range, slice, torch.dtype, torch.device, torch.Size)
_OPAQUE = {"asyncio", "concurrent", "enum", "io", "_io", "logging", "multiprocessing", "queue", "socket", "threading"}
_OPAQUE |= {"_thread", "weakref", *OPAQUE_PACKAGES}
_OPAQUE_OF_TORCH = ("torch._", "torch.cuda", "torch.distributed", "torch.fx", "torch.jit", "torch.profiler")

_Follow = Callable[[_Walk, Any, str], None]
# The method that follows an object, by the first of these classes that it is an instance of; None: none does.
_KINDS: tuple[tuple[Any, _Follow | None], ...] = (
    ((*_IGNORED, ModuleType), None),
    (Tensor, _Walk._tensor),
    (nn.Module, _Walk._module),
    (FunctionType, _Walk._function),
    ((MethodType, BuiltinMethodType), _Walk._method),
    (functools.partial, _Walk._partial),
    (type, _Walk._class),
    ((list, deque), _Walk._sequence),
    ((tuple, frozenset, types.MappingProxyType), _Walk._fixed),
    (dict, _Walk._dict),
    (set, _Walk._set),
    ((bytearray, array), _Walk._bytes),
    (np.ndarray, _Walk._array),
    (_GENERATORS, _Walk._generator),
    ((*_ITERATORS, Queue), _Walk._iterator),
    (ContextVar, _Walk._context),
    ((weakref.WeakKeyDictionary, weakref.WeakValueDictionary), _Walk._weak),
    (threading.local, _Walk._object),
    (torch.optim.Optimizer, _Walk._optimizer),
    ((DataLoader, weakref.ref), _Walk._library),
)


@_cached
def _follow_of(kind: type) -> _Follow | None:
    for bases, follow in _KINDS:
        if issubclass(kind, bases):
            return follow
    names = [base.__module__ for base in kind.__mro__]
    if any(name.partition(".")[0] in _OPAQUE or name.startswith(_OPAQUE_OF_TORCH) for name in names):
        return None
    return _Walk._library if kind.__module__.partition(".")[0] == "newtonopt" else _Walk._object


def _get(host: Any, name: str) -> Any:
    """Return an attribute, past an object's own `__getattr__`, which may raise or do something."""
    try:
        return object.__getattribute__(host, name)
    except AttributeError:
        return None


_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> frozenset[str]:
    """Return the names of globals and attributes that the code uses, and the functions inside it."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(code.co_names).union(*inner)


@_cached
def _slotted(kind: type) -> tuple[type, ...]:
    """Return the bases of a class that have slots with state; classes written in C have none."""
    return tuple(base for base in kind.__mro__ if "__slots__" in vars(base) and _slots_of(base))


@_cached
def _slots_of(kind: type) -> tuple[Any, ...]:
    return tuple(value for value in vars(kind).values() if type(value) is MemberDescriptorType)


@_cached
def _is_library(kind: type) -> bool:
    """Whether a class was not written by the user."""
    if kind.__module__ == "builtins" or kind.__module__ in sys.stdlib_module_names:
        return True
    return _is_library_file(_file(sys.modules.get(kind.__module__)))


def _file(module: ModuleType | None) -> str:
    return getattr(module, "__file__", None) or ("" if getattr(module, "__name__", "") == "__main__" else "<built-in>")


@functools.lru_cache(maxsize=4096)
def _is_library_file(name: str) -> bool:
    # Code typed at a prompt or made by exec is in files such as "<stdin>" and "<string>".
    return name == "<built-in>" or name.startswith(_LIBRARIES) or "site-packages" in name or "dist-packages" in name


_LIBRARIES = (
    os.path.dirname(os.path.dirname(__file__)) + os.sep,
    *(sysconfig.get_path(part) + os.sep for part in ("stdlib", "platstdlib")),
    "<frozen",
)


# Objects that hold state.


class Watched(ABC):
    """An object whose content can be read.

    Args:
        host: The object.
        path: The name under which messages speak of it.
    """

    __slots__ = ("host", "path")

    def __init__(self, host: Any, path: str) -> None:
        self.host = host
        self.path = path

    @abstractmethod
    def read(self) -> Any:
        """Return the content."""

    def holds(self, content: Any) -> bool:
        """Whether the object still has this content."""
        return bool(self.read() == content)


class Holder(Watched):
    """An object whose content can be put back."""

    __slots__ = ()

    @abstractmethod
    def write(self, content: Any) -> None:
        """Put the content back."""


class _Entries(Holder):
    """A list or a deque."""

    __slots__ = ("_kind",)

    def __init__(self, host: Any, path: str) -> None:
        super().__init__(host, path)
        self._kind: Any = list if isinstance(host, list) else deque

    def read(self) -> Any:
        return tuple(self._kind.__iter__(self.host))

    def holds(self, content: Any) -> bool:
        kind = self._kind
        return kind.__len__(self.host) == len(content) and all(map(operator.is_, kind.__iter__(self.host), content))

    def write(self, content: Any) -> None:
        self._kind.clear(self.host)
        self._kind.extend(self.host, content)


class _Bytes(Holder):
    """A bytearray or an `array.array`."""

    __slots__ = ()

    def read(self) -> Any:
        return self.host[:]

    def holds(self, content: Any) -> bool:
        return bytes(self.host) == bytes(content)

    def write(self, content: Any) -> None:
        self.host[:] = content


class _Members(Holder):
    """A set."""

    __slots__ = ()

    def read(self) -> Any:
        return {id(value): value for value in set.__iter__(self.host)}

    def holds(self, content: Any) -> bool:
        return set.__len__(self.host) == len(content) and all(id(value) in content for value in set.__iter__(self.host))

    def write(self, content: Any) -> None:
        set.clear(self.host)
        set.update(self.host, content.values())


class _Items(Holder):
    """A dictionary of any kind in its order, such as that of an object's attributes."""

    __slots__ = ("_kind",)

    def __init__(self, host: Any, path: str) -> None:
        super().__init__(host, path)
        self._kind: Any = OrderedDict if isinstance(host, OrderedDict) else dict

    def read(self) -> Any:
        return tuple(self._kind.keys(self.host)), tuple(self._kind.values(self.host))

    def holds(self, content: Any) -> bool:
        return dict.__len__(self.host) == len(content[0]) and _same_items(self._kind, self.host, content)

    def write(self, content: Any) -> None:
        self._kind.clear(self.host)
        for key, value in zip(*content, strict=True):
            self._kind.__setitem__(self.host, key, value)


def _same_items(kind: Any, host: Any, content: Any) -> bool:
    keys, values = content
    return all(map(operator.is_, kind.values(host), values)) and all(map(operator.is_, kind.keys(host), keys))


class _Empty(Holder):
    """Several dictionaries that are empty as a rule, such as those of a module's hooks."""

    __slots__ = ()
    host: list[dict[Any, Any]]

    def read(self) -> Any:
        return [tuple(one.items()) for one in self.host] if any(self.host) else ()

    def holds(self, content: Any) -> bool:
        return not any(self.host) if content == () else bool(self.read() == content)

    def write(self, content: Any) -> None:
        for one in self.host:
            one.clear()
        for one, items in zip(self.host, content, strict=False):
            one.update(items)


class _Slots(Holder):
    """The attributes that a class keeps in slots.

    Args:
        host: The object.
        kind: Its class, or a base of it, that has the slots.
        path: The name under which messages speak of it.
    """

    __slots__ = ("members",)

    def __init__(self, host: Any, kind: type, path: str) -> None:
        super().__init__(host, path)
        self.members = _slots_of(kind)

    def _value(self, member: Any) -> Any:
        try:
            return member.__get__(self.host)
        except AttributeError:
            return _EMPTY

    def read(self) -> Any:
        return tuple(map(self._value, self.members))

    def holds(self, content: Any) -> bool:
        return all(map(operator.is_, self.read(), content))

    def write(self, content: Any) -> None:
        for member, value in zip(self.members, content, strict=True):
            if value is not _EMPTY:
                member.__set__(self.host, value)
            elif self._value(member) is not _EMPTY:
                member.__delete__(self.host)


_EMPTY = object()


class _Cell(Holder):
    """A variable that a function shares with the one around it."""

    __slots__ = ()
    host: CellType

    def read(self) -> Any:
        try:
            return self.host.cell_contents
        except ValueError:  # it was deleted
            return _EMPTY

    def holds(self, content: Any) -> bool:
        return self.read() is content

    def write(self, content: Any) -> None:
        if content is not _EMPTY:
            self.host.cell_contents = content
        else:
            del self.host.cell_contents


class _Binding(Holder):
    """A global name, given the dictionary or the module that has it, or an attribute of a class.

    Args:
        host: Where the name is bound.
        name: The name.
        path: The name under which messages speak of it.
    """

    __slots__ = ("_name",)

    def __init__(self, host: Any, name: str, path: str) -> None:
        super().__init__(host, path)
        self._name = name

    def read(self) -> Any:
        own = self.host if isinstance(self.host, dict) else vars(self.host)
        return own.get(self._name, _EMPTY)

    def holds(self, content: Any) -> bool:
        return self.read() is content

    def write(self, content: Any) -> None:
        if isinstance(self.host, dict):
            self.host[self._name] = content
        else:
            setattr(self.host, self._name, content)


class _Context(Holder):
    """A context variable."""

    __slots__ = ()
    host: ContextVar[Any]

    def read(self) -> Any:
        return self.host.get(_EMPTY)

    def holds(self, content: Any) -> bool:
        return self.read() is content

    def write(self, content: Any) -> None:
        if content is not _EMPTY:
            self.host.set(content)


class _Weak(Holder):
    """A dictionary with weak keys or weak values."""

    __slots__ = ()
    host: weakref.WeakKeyDictionary[Any, Any]

    def read(self) -> Any:
        return list(self.host.items())

    def holds(self, content: Any) -> bool:
        now = self.read()
        return len(now) == len(content) and all(
            key is other and value is another for (key, value), (other, another) in zip(now, content, strict=True)
        )

    def write(self, content: Any) -> None:
        self.host.clear()
        self.host.update(content)


class _Numbers(Holder):
    """A NumPy array."""

    __slots__ = ()
    host: np.ndarray[Any, Any]

    def read(self) -> Any:
        return self.host.copy()

    def holds(self, content: Any) -> bool:
        return False  # comparing to the bit costs no less than writing

    def write(self, content: Any) -> None:
        if self.host.flags.writeable:
            self.host[...] = content


class _Position(Watched):
    """An iterator or a queue, by how far it has got."""

    __slots__ = ()

    def read(self) -> Any:
        return _position(self.host)


class _Sample(Watched):
    """A container or an array that is too long to be copied in each run, by some of its entries."""

    __slots__ = ()

    def read(self) -> Any:
        if isinstance(self.host, np.ndarray):
            flat = self.host.reshape(-1) if self.host.flags.contiguous else self.host[:1].reshape(-1)
            return flat[:: max(1, flat.size // 2**12)].tobytes()
        length = len(self.host)
        indices = range(0, length, length // _SAMPLED) if isinstance(self.host, (list, deque)) else ()
        return length, tuple(id(self.host[i]) for i in indices)


# How far an iterator has got.


def _position(host: Any) -> Any:
    if isinstance(host, GeneratorType):
        frame = host.gi_frame
        return None if frame is None else (frame.f_lasti, *map(_fingerprint, frame.f_locals.values()))
    if isinstance(host, Queue):  # threads may put something in at any time
        return tuple(map(id, host.queue))
    if isinstance(host, _BaseDataLoaderIter):
        return (host._num_yielded,)
    kind = type(host)
    if kind.__module__ == "itertools" and (kind.__name__ == "count" or sys.version_info >= (3, 12)):
        return (repr(host),)
    if kind in _TABLE_ITERATORS:
        return (operator.length_hint(host),)
    try:
        reduced = host.__reduce__()
    except TypeError:  # itertools.pairwise and the like do not say
        return ()
    return tuple(map(_fingerprint, _flat(reduced[1:])))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for entry in value:
            yield from _flat(entry)
    else:
        yield value


def _fingerprint(value: Any) -> Any:
    """Return a number or string itself, the position of an iterator, the identity of any other object."""
    if isinstance(value, (int, float, str, bytes)):
        return value
    if isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools"):
        return _position(value)
    return id(value)
