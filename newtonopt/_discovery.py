"""What a closure holds on to: modules, random generators, and objects that it calls."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Iterable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

MODULE_INTERNALS = frozenset(vars(nn.Module()))
CONTAINERS = (list, dict, set, deque)
GENERATORS = (torch.Generator, np.random.Generator, random.Random)
# What is looked for in a closure holds none of it, and would take long to look through.
_OPAQUE = (Tensor, torch.optim.Optimizer, ModuleType, type, str, bytes, int, float)
_FOLLOWED = (functools.partial, MethodType, FunctionType)
_DEPTH = 5
_MOST_ENTRIES = 64


def found_in(closure: Any) -> Iterator[Any]:
    """The modules and random generators within reach of a closure.

    Followed are what `functools.partial` binds, cells, defaults and globals of functions, of those that they call in
    turn, and one level of the attributes or entries of other objects.
    """
    seen: set[int] = set()
    waiting: deque[tuple[Any, int, bool]] = deque([(closure, _DEPTH, False)])
    while waiting:
        host, depth, inside = waiting.popleft()
        if isinstance(host, _OPAQUE) or id(host) in seen:
            continue
        seen.add(id(host))
        if isinstance(host, (nn.Module, *GENERATORS)):
            yield host
        if isinstance(host, DataLoader):
            yield from (source for source in _generators_of(host) if isinstance(source, GENERATORS))
        elif depth > 0 and isinstance(host, _FOLLOWED):
            waiting.extend((held, depth - 1, False) for held in _bound_to(host))
        elif depth > 0 and (not inside or type(host) in CONTAINERS or type(host) is tuple):
            waiting.extend((held, depth - 1, True) for held in _contents(host))


def _bound_to(host: Any) -> Iterator[Any]:
    if isinstance(host, functools.partial):
        yield from (host.func, *host.args, *host.keywords.values())
    elif isinstance(host, MethodType):
        yield from (host.__self__, host.__func__)
    elif not (host.__module__ or "").startswith("torch."):
        filled = [cell for cell in host.__closure__ or () if cell != CellType()]
        yield from (cell.cell_contents for cell in filled)
        yield from host.__defaults__ or ()
        yield from (host.__kwdefaults__ or {}).values()
        yield from (host.__globals__[name] for name in _names(host.__code__) if name in host.__globals__)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _contents(host: Any) -> Iterable[Any]:
    if type(host) in CONTAINERS or type(host) is tuple:
        entries = host.values() if isinstance(host, dict) else host
        return tuple(entries) if len(entries) <= _MOST_ENTRIES else ()
    own = getattr(host, "__dict__", None)
    called = (type(host).__call__,) if callable(host) and isinstance(type(host).__call__, FunctionType) else ()
    if type(own) is not dict:
        return called
    return (*called, *(value for name, value in own.items() if name not in MODULE_INTERNALS))


def _generators_of(loader: DataLoader[Any]) -> Iterator[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    for host in (loader, loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
        yield getattr(host, "generator", None)


def generator_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def set_generator_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state


def bound_callables(closure: Any) -> Iterator[Any]:
    """The callable objects that are called: the closure or what `functools.partial` binds, modules apart."""
    if isinstance(closure, functools.partial):
        for bound in (closure.func, *closure.args, *closure.keywords.values()):
            yield from bound_callables(bound)
    elif isinstance(closure, (*_FOLLOWED, nn.Module)) or not callable(closure):
        return
    elif type(getattr(closure, "__dict__", None)) is dict:
        yield closure
