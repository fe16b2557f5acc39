"""Objects that hold state: how to read their content, to tell whether it changed, and to write it back in place.

Content is read one level deep: what a list holds is told by identity, and the objects in it are holders themselves.
Writing goes past methods that a subclass overrides, so that nothing but the content changes.
"""

from __future__ import annotations

import operator
import sys
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextvars import ContextVar
from queue import Queue
from threading import local
from types import CellType, GeneratorType, MemberDescriptorType
from typing import Any, ClassVar

import numpy as np
from torch.utils.data.dataloader import _BaseDataLoaderIter


class Holder(ABC):
    """An object with state.

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

    @abstractmethod
    def holds(self, content: Any) -> bool:
        """Whether the content is still this."""

    @abstractmethod
    def write(self, content: Any) -> None:
        """Put the content back, if that can be done."""


class Entries(Holder):
    """A list or a deque."""

    __slots__ = ("_kind",)

    def __init__(self, host: Any, path: str) -> None:
        super().__init__(host, path)
        self._kind: Any = list if isinstance(host, list) else deque

    def read(self) -> Any:
        """See the base class."""
        return tuple(self._kind.__iter__(self.host))

    def holds(self, content: Any) -> bool:
        """See the base class."""
        kind = self._kind
        return kind.__len__(self.host) == len(content) and all(map(operator.is_, kind.__iter__(self.host), content))

    def write(self, content: Any) -> None:
        """See the base class."""
        self._kind.clear(self.host)
        self._kind.extend(self.host, content)


class Bytes(Holder):
    """A bytearray or an `array.array`."""

    __slots__ = ()

    def read(self) -> Any:
        """See the base class."""
        return self.host[:]

    def holds(self, content: Any) -> bool:
        """See the base class."""
        return bytes(self.host) == bytes(content)

    def write(self, content: Any) -> None:
        """See the base class."""
        self.host[:] = content


class Members(Holder):
    """A set."""

    __slots__ = ()

    def read(self) -> Any:
        """See the base class."""
        return {id(value): value for value in set.__iter__(self.host)}

    def holds(self, content: Any) -> bool:
        """See the base class."""
        return set.__len__(self.host) == len(content) and all(id(value) in content for value in set.__iter__(self.host))

    def write(self, content: Any) -> None:
        """See the base class."""
        set.clear(self.host)
        set.update(self.host, content.values())


class Items(Holder):
    """A dictionary of any kind, in its order."""

    __slots__ = ("_kind",)

    def __init__(self, host: Any, path: str) -> None:
        super().__init__(host, path)
        self._kind: Any = OrderedDict if isinstance(host, OrderedDict) else dict

    def read(self) -> Any:
        """See the base class."""
        return tuple(self._kind.keys(self.host)), tuple(self._kind.values(self.host))

    def holds(self, content: Any) -> bool:
        """See the base class."""
        return dict.__len__(self.host) == len(content[0]) and _same_items(self._kind, self.host, content)

    def write(self, content: Any) -> None:
        """See the base class."""
        self._kind.clear(self.host)
        for key, value in zip(*content, strict=True):
            self._kind.__setitem__(self.host, key, value)


def _same_items(kind: Any, host: Any, content: Any) -> bool:
    keys, values = content
    return all(map(operator.is_, kind.values(host), values)) and all(map(operator.is_, kind.keys(host), keys))


class Empty(Holder):
    """Several dictionaries that are empty as a rule, such as those of a module's hooks."""

    __slots__ = ()
    host: list[dict[Any, Any]]

    def read(self) -> Any:
        """See the base class."""
        return [tuple(one.items()) for one in self.host] if any(self.host) else ()

    def holds(self, content: Any) -> bool:
        """See the base class."""
        return not any(self.host) if content == () else bool(self.read() == content)

    def write(self, content: Any) -> None:
        """See the base class."""
        for one in self.host:
            one.clear()
        for one, items in zip(self.host, content, strict=False):
            one.update(items)


class Attributes(Holder):
    """The attributes in the dictionary of an object."""

    __slots__ = ("_own",)

    def __init__(self, host: Any, path: str) -> None:
        super().__init__(host, path)
        # The dictionary of a threading.local is that of the thread.
        self._own = vars(host) if isinstance(host, local) else object.__getattribute__(host, "__dict__")

    def read(self) -> Any:
        """See the base class."""
        return tuple(self._own), tuple(self._own.values())

    def holds(self, content: Any) -> bool:
        """See the base class."""
        return len(self._own) == len(content[0]) and _same_items(dict, self._own, content)

    def write(self, content: Any) -> None:
        """See the base class."""
        self._own.clear()
        self._own.update(zip(*content, strict=True))


class Slots(Holder):
    """The attributes that a class keeps in slots.

    Args:
        host: The object.
        kind: Its class, or a base of it, that has the slots.
        path: The name under which messages speak of it.
    """

    __slots__ = ("_members",)

    def __init__(self, host: Any, kind: type, path: str) -> None:
        super().__init__(host, path)
        self._members = tuple(vars(kind)[name] for name in self.names(kind))

    @staticmethod
    def names(kind: type) -> list[str]:
        """Return the names of a class's own slots."""
        return [name for name, value in vars(kind).items() if type(value) is MemberDescriptorType]

    @classmethod
    def values(cls, host: Any, kind: type) -> list[tuple[str, Any]]:
        """Return the names and values of the slots that are filled."""
        found = [(name, cls._value(vars(kind)[name], host)) for name in cls.names(kind)]
        return [(name, value) for name, value in found if value is not _EMPTY]

    @staticmethod
    def _value(member: Any, host: Any) -> Any:
        try:
            return member.__get__(host)
        except AttributeError:
            return _EMPTY

    def read(self) -> Any:
        """See the base class."""
        return tuple(self._value(member, self.host) for member in self._members)

    def holds(self, content: Any) -> bool:
        """See the base class."""
        return all(map(operator.is_, self.read(), content))

    def write(self, content: Any) -> None:
        """See the base class."""
        for member, value in zip(self._members, content, strict=True):
            if value is not _EMPTY:
                member.__set__(self.host, value)
            elif self._value(member, self.host) is not _EMPTY:
                member.__delete__(self.host)


_EMPTY = object()


class Cell(Holder):
    """A variable that a function shares with the one around it."""

    __slots__ = ()
    host: CellType

    def read(self) -> Any:
        """See the base class."""
        try:
            return self.host.cell_contents
        except ValueError:  # it was deleted
            return _EMPTY

    def holds(self, content: Any) -> bool:
        """See the base class."""
        return self.read() is content

    def write(self, content: Any) -> None:
        """See the base class."""
        if content is not _EMPTY:
            self.host.cell_contents = content
        else:
            del self.host.cell_contents


class Binding(Holder):
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
        """See the base class."""
        own = self.host if isinstance(self.host, dict) else vars(self.host)
        return own.get(self._name, _EMPTY)

    def holds(self, content: Any) -> bool:
        """See the base class."""
        return self.read() is content

    def write(self, content: Any) -> None:
        """See the base class."""
        if isinstance(self.host, dict):
            self.host[self._name] = content
        else:
            setattr(self.host, self._name, content)


class Context(Holder):
    """A context variable."""

    __slots__ = ()
    host: ContextVar[Any]

    def read(self) -> Any:
        """See the base class."""
        return self.host.get(_EMPTY)

    def holds(self, content: Any) -> bool:
        """See the base class."""
        return self.read() is content

    def write(self, content: Any) -> None:
        """See the base class."""
        if content is not _EMPTY:
            self.host.set(content)


class Weak(Holder):
    """A dictionary with weak keys or weak values."""

    __slots__ = ()
    host: weakref.WeakKeyDictionary[Any, Any]

    def read(self) -> Any:
        """See the base class."""
        return list(self.host.items())

    def holds(self, content: Any) -> bool:
        """See the base class."""
        now = self.read()
        return len(now) == len(content) and all(
            key is other and value is another for (key, value), (other, another) in zip(now, content, strict=True)
        )

    def write(self, content: Any) -> None:
        """See the base class."""
        self.host.clear()
        self.host.update(content)


class Numbers(Holder):
    """A NumPy array."""

    __slots__ = ()
    host: np.ndarray[Any, Any]

    def read(self) -> Any:
        """See the base class."""
        return self.host.copy()

    def holds(self, content: Any) -> bool:
        """See the base class."""
        return False  # comparing to the bit costs no less than writing

    def write(self, content: Any) -> None:
        """See the base class."""
        if self.host.flags.writeable:
            self.host[...] = content


class Position(Holder):
    """How far an iterator or a queue has got, which cannot be put back."""

    __slots__ = ()

    def read(self) -> Any:
        """See the base class."""
        return _position(self.host)

    def holds(self, content: Any) -> bool:
        """See the base class."""
        return bool(_position(self.host) == content)

    def write(self, content: Any) -> None:
        """See the base class."""


class Sample(Holder):
    """A container or an array that is too long to be copied in each run."""

    __slots__ = ()
    size: ClassVar[int] = 64

    def read(self) -> Any:
        """See the base class."""
        if isinstance(self.host, np.ndarray):
            flat = self.host.reshape(-1) if self.host.flags.contiguous else self.host[:1].reshape(-1)
            return flat[:: max(1, flat.size // 2**12)].tobytes()
        length = len(self.host)
        indices = range(0, length, length // self.size) if isinstance(self.host, (list, deque)) else ()
        return length, tuple(id(self.host[i]) for i in indices)

    def holds(self, content: Any) -> bool:
        """See the base class."""
        return bool(self.read() == content)

    def write(self, content: Any) -> None:
        """See the base class."""


def _position(host: Any) -> Any:
    if isinstance(host, GeneratorType):
        frame = host.gi_frame
        return None if frame is None else (frame.f_lasti, *map(_told, frame.f_locals.values()))
    if isinstance(host, Queue):  # threads may put something in at any time
        return tuple(map(id, host.queue))
    if isinstance(host, _BaseDataLoaderIter):
        return (host._num_yielded,)
    kind = type(host)
    if kind.__module__ == "itertools" and (kind.__name__ == "count" or sys.version_info >= (3, 12)):
        return (repr(host),)
    if kind in _OF_HASH_TABLES:
        return (operator.length_hint(host),)
    try:
        reduced = host.__reduce__()
    except TypeError:  # itertools.pairwise and the like tell nothing
        return ()
    return tuple(map(_told, _leaves(reduced[1:])))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value


def _told(value: Any) -> Any:
    """Return a number or string itself, the position of an iterator, the identity of anything else."""
    if isinstance(value, (int, float, str, bytes)):
        return value
    if isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools"):
        return _position(value)
    return id(value)


_HASH_TABLES: tuple[Any, ...] = ({}, {}.values(), {}.items(), set())
_OF_HASH_TABLES = tuple(type(iter(host)) for host in _HASH_TABLES)
