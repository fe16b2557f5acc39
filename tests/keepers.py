"""Objects that keep state between runs of a closure, in every way that Python and torch have.

A keeper is a class whose `draw` returns a number that depends on the state, and changes the state.
"""

from __future__ import annotations

import array
import collections
import contextvars
import copy
import dataclasses
import functools
import heapq
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from problems import unseen
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

KEEPERS: dict[str, type] = {}


def keeper(kind: type) -> type:
    KEEPERS[kind.__name__] = kind
    return kind


def content(value: Any) -> Any:
    """Return a value that is equal for equal states."""
    if isinstance(value, Tensor):
        return ("tensor", value.detach().tolist())
    if isinstance(value, np.ndarray):
        return ("array", value.tolist())
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state())
    if isinstance(value, nn.Module):
        return content(value.state_dict())
    if isinstance(value, (list, tuple, collections.deque)):
        return [content(entry) for entry in value]
    if isinstance(value, dict):
        return [(key if isinstance(key, (str, int)) else "", content(entry)) for key, entry in value.items()]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(content(entry)) for entry in value)
    return value


# Python's own containers.


@keeper
class ListOfNumbers:
    def __init__(self) -> None:
        self.seen: list[float] = []

    def draw(self) -> float:
        self.seen.append(1.0)
        return float(len(self.seen))

    def state(self) -> Any:
        return self.seen


@keeper
class ListOfTensors:
    def __init__(self) -> None:
        self.means = [torch.zeros(2), torch.ones(2)]

    def draw(self) -> float:
        self.means[0].add_(1.0)
        self.means[1] = self.means[1] * 1.5
        return float(self.means[0].sum() + self.means[1].sum())

    def state(self) -> Any:
        return self.means


@keeper
class DictOfTensors:
    def __init__(self) -> None:
        self.table = {"mean": torch.zeros(3)}

    def draw(self) -> float:
        self.table["mean"].mul_(0.9).add_(1.0)
        self.table[f"extra {len(self.table)}"] = torch.ones(1)
        return float(self.table["mean"].sum()) + len(self.table)

    def state(self) -> Any:
        return self.table


@keeper
class ListInDict:
    def __init__(self) -> None:
        self.table: dict[str, dict[str, list[float]]] = {"a": {"b": []}}

    def draw(self) -> float:
        self.table["a"]["b"].append(2.0)
        return sum(self.table["a"]["b"])

    def state(self) -> Any:
        return self.table


@keeper
class SetOfNumbers:
    def __init__(self) -> None:
        self.met: set[int] = {1}

    def draw(self) -> float:
        self.met.add(len(self.met) + 1)
        return float(sum(self.met))

    def state(self) -> Any:
        return self.met


@keeper
class SetOfTensors:
    def __init__(self) -> None:
        self.met = {torch.zeros(1)}

    def draw(self) -> float:
        for t in self.met:
            t += 1
        return float(sum(float(t) for t in self.met))

    def state(self) -> Any:
        return self.met


@keeper
class Ring:
    def __init__(self) -> None:
        self.last = collections.deque([1.0, 2.0], maxlen=3)

    def draw(self) -> float:
        self.last.append(sum(self.last))
        return self.last[0]

    def state(self) -> Any:
        return self.last


@keeper
class Counts:
    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter(a=1)

    def draw(self) -> float:
        self.counts.update(["a", "b"])
        return float(self.counts["a"])

    def state(self) -> Any:
        return self.counts


@keeper
class Default:
    def __init__(self) -> None:
        self.lists: Any = collections.defaultdict(list)

    def draw(self) -> float:
        self.lists["x"].append(1)
        return float(len(self.lists["x"]))

    def state(self) -> Any:
        return self.lists


@keeper
class Order:
    def __init__(self) -> None:
        self.cache = collections.OrderedDict.fromkeys("abc", 1.0)

    def draw(self) -> float:
        first = next(iter(self.cache))
        self.cache.move_to_end(first)
        self.cache[first] += 1.0
        return self.cache["a"] + 10 * ord(first)

    def state(self) -> Any:
        return self.cache


@keeper
class Chained:
    def __init__(self) -> None:
        self.settings = collections.ChainMap({"n": 0}, {"m": 1})

    def draw(self) -> float:
        self.settings["n"] += 1
        return float(self.settings["n"])

    def state(self) -> Any:
        return self.settings.maps


@keeper
class UserDict:
    def __init__(self) -> None:
        self.table = collections.UserDict(n=0)

    def draw(self) -> float:
        self.table["n"] += 1
        return float(self.table["n"])

    def state(self) -> Any:
        return self.table.data


class Attributes(dict):
    """A dictionary whose entries are attributes, as in many libraries."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__  # type: ignore[assignment]


@keeper
class Subclassed:
    def __init__(self) -> None:
        self.table = Attributes(n=0)

    def draw(self) -> float:
        self.table.n += 1
        return float(self.table.n)

    def state(self) -> Any:
        return self.table


@keeper
class Heap:
    def __init__(self) -> None:
        self.heap = [3.0, 1.0]
        heapq.heapify(self.heap)

    def draw(self) -> float:
        least = heapq.heappop(self.heap)
        heapq.heappush(self.heap, least + 2.5)
        return least

    def state(self) -> Any:
        return self.heap


@keeper
class Bytes:
    def __init__(self) -> None:
        self.flags = bytearray(b"\x00\x01")
        self.numbers = array.array("d", [0.0])

    def draw(self) -> float:
        self.flags[0] += 1
        self.numbers[0] += 0.5
        return float(self.flags[0]) + self.numbers[0]

    def state(self) -> Any:
        return bytes(self.flags), self.numbers.tolist()


# Objects.


class Meter:
    def __init__(self) -> None:
        self.total = 0.0

    def update(self) -> float:
        self.total += 1.0
        return self.total


@keeper
class PlainObject:
    def __init__(self) -> None:
        self.meter = Meter()

    def draw(self) -> float:
        return self.meter.update()

    def state(self) -> Any:
        return vars(self.meter)


@keeper
class FourLevelsDown:
    def __init__(self) -> None:
        self.root = types.SimpleNamespace(a=types.SimpleNamespace(b=[types.SimpleNamespace(meter=Meter())]))

    def draw(self) -> float:
        return self.root.a.b[0].meter.update()

    def state(self) -> Any:
        return vars(self.root.a.b[0].meter)


class Slotted:
    __slots__ = ("__hidden", "late", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.__hidden = [0.0]

    def update(self) -> float:
        self.value += 1.0
        self.__hidden.append(1.0)
        self.late = self.value
        return self.value + len(self.__hidden)

    def content(self) -> Any:
        return self.value, list(self.__hidden), hasattr(self, "late") and self.late


@keeper
class Slots:
    def __init__(self) -> None:
        self.inner = Slotted()

    def draw(self) -> float:
        return self.inner.update()

    def state(self) -> Any:
        return self.inner.content()


@dataclasses.dataclass(slots=True)
class Record:
    count: int = 0
    tensor: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(1))


@keeper
class DataClass:
    def __init__(self) -> None:
        self.record = Record()

    def draw(self) -> float:
        self.record.count += 1
        self.record.tensor += 1
        return self.record.count + float(self.record.tensor)

    def state(self) -> Any:
        return self.record.count, self.record.tensor


class Pair(NamedTuple):
    first: list[float]
    second: Tensor


@keeper
class Tuples:
    def __init__(self) -> None:
        self.pair = Pair([0.0], torch.zeros(1))

    def draw(self) -> float:
        self.pair.first[0] += 1.0
        self.pair.second.add_(1.0)
        return self.pair.first[0] + float(self.pair.second)

    def state(self) -> Any:
        return self.pair


@keeper
class NewAttributes:
    def draw(self) -> float:
        self.count = getattr(self, "count", 0) + 1
        return float(self.count)

    def state(self) -> Any:
        return vars(self)


@keeper
class OfTheClass:
    count = 0
    rows: list[int] = []  # noqa: RUF012

    def draw(self) -> float:
        OfTheClass.count += 1
        OfTheClass.rows.append(1)
        return float(OfTheClass.count + len(OfTheClass.rows))

    def state(self) -> Any:
        return OfTheClass.count, list(OfTheClass.rows)

    @staticmethod
    def reset() -> None:
        OfTheClass.count = 0
        OfTheClass.rows.clear()


COUNT = 0
ROWS: list[int] = []


def count_up() -> float:
    global COUNT
    COUNT += 1
    ROWS.append(COUNT)
    return float(COUNT + len(ROWS))


@keeper
class Globals:
    def draw(self) -> float:
        return count_up()

    def state(self) -> Any:
        return COUNT, list(ROWS)

    @staticmethod
    def reset() -> None:
        global COUNT
        COUNT = 0
        ROWS.clear()


THIS = sys.modules[__name__]


@keeper
class OfAModule:
    def draw(self) -> float:
        THIS.ROWS.append(1)
        return float(len(THIS.ROWS))

    def state(self) -> Any:
        return list(ROWS)

    reset = Globals.reset


@keeper
class CellVariable:
    def __init__(self) -> None:
        count = 0

        def draw() -> float:
            nonlocal count
            count += 1
            return float(count)

        self.draw = draw
        self.state = lambda: count


def remember(value: float, memory: list[float] = []) -> float:  # noqa: B006
    memory.append(value)
    return float(len(memory))


@keeper
class DefaultArgument:
    def draw(self) -> float:
        return remember(1.0)

    def state(self) -> Any:
        return list(remember.__defaults__[0])  # type: ignore[index]

    @staticmethod
    def reset() -> None:
        remember.__defaults__[0].clear()  # type: ignore[index]


def counted() -> float:
    counted.calls += 1  # type: ignore[attr-defined]
    return float(counted.calls)  # type: ignore[attr-defined]


@keeper
class FunctionAttribute:
    def draw(self) -> float:
        return counted()

    def state(self) -> Any:
        return counted.calls  # type: ignore[attr-defined]

    @staticmethod
    def reset() -> None:
        counted.calls = 0  # type: ignore[attr-defined]


counted.calls = 0  # type: ignore[attr-defined]


@keeper
class Bound:
    def __init__(self) -> None:
        self.meter = Meter()
        self.call = functools.partial(self._add, self.meter)

    @staticmethod
    def _add(meter: Meter) -> float:
        return meter.update()

    def draw(self) -> float:
        return self.call()

    def state(self) -> Any:
        return vars(self.meter)


# Random numbers.


@keeper
class TorchGenerator:
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def draw(self) -> float:
        return float(torch.rand((), generator=self.generator))

    def state(self) -> Any:
        return self.generator


@keeper
class PythonRandomInAList:
    def __init__(self) -> None:
        self.transforms = [types.SimpleNamespace(source=random.Random(0))]

    def draw(self) -> float:
        return self.transforms[0].source.random()

    def state(self) -> Any:
        return self.transforms[0].source


@keeper
class NumpyGenerators:
    def __init__(self) -> None:
        self.new, self.old = np.random.default_rng(0), np.random.RandomState(0)

    def draw(self) -> float:
        return float(self.new.random() + self.old.rand())

    def state(self) -> Any:
        return self.new, self.old


@keeper
class BoundGenerator:
    def __init__(self) -> None:
        self.random = random.Random(0)
        self.sources: list[Callable[[], float]] = [self.random.random]

    def draw(self) -> float:
        return self.sources[0]()

    def state(self) -> Any:
        return self.random


SOURCE = random.Random(0)


def noise() -> float:
    return SOURCE.random()


def more_noise() -> float:
    return noise()


@keeper
class ThroughHelpers:
    def draw(self) -> float:
        return more_noise()

    def state(self) -> Any:
        return SOURCE

    @staticmethod
    def reset() -> None:
        SOURCE.seed(0)


@keeper
class InAProperty:
    def __init__(self) -> None:
        self._source = random.Random(0)

    @property
    def next_number(self) -> float:
        return self._source.random()

    def draw(self) -> float:
        return self.next_number

    def state(self) -> Any:
        return self._source


class Noisy(Dataset[float]):
    def __init__(self) -> None:
        self.source, self.reads = random.Random(0), 0

    def __getitem__(self, index: int) -> float:
        self.reads += 1
        return self.source.random() + self.reads


@keeper
class DataSet:
    def __init__(self) -> None:
        self.data = Noisy()

    def draw(self) -> float:
        return self.data[0]

    def state(self) -> Any:
        return self.data.source, self.data.reads


# Arrays and tensors.


@keeper
class Array:
    def __init__(self) -> None:
        self.table, self.objects = np.zeros(3), np.array([[0.0], [1.0, 2.0]], dtype=object)

    def draw(self) -> float:
        self.table[1] += 1.0
        self.objects[0].append(1.0)
        return float(self.table.sum()) + len(self.objects[0])

    def state(self) -> Any:
        return self.table, self.objects


@keeper
class ArrayOfATensor:
    def __init__(self) -> None:
        self.tensor = torch.zeros(3)

    def draw(self) -> float:
        self.tensor.numpy()[0] += 1.0
        return float(self.tensor[0])

    def state(self) -> Any:
        return self.tensor


@keeper
class PartOfATensor:
    def __init__(self) -> None:
        self.queue, self.at = torch.zeros(4, 2), 0

    def draw(self) -> float:
        self.queue[self.at] = self.queue.sum() + 1
        self.at = (self.at + 1) % 4
        return float(self.queue.sum())

    def state(self) -> Any:
        return self.queue, self.at


@keeper
class OneMemoryTwoViews:
    def __init__(self) -> None:
        self.whole = torch.zeros(4)
        self.row, self.same = self.whole[1:3], [self.whole.view(2, 2)]

    def draw(self) -> float:
        self.row += 1
        return float(self.same[0].sum())

    def state(self) -> Any:
        return self.whole, self.row, self.same


@keeper
class OutOfAnOperation:
    def __init__(self) -> None:
        self.mean = torch.zeros(2)

    def draw(self) -> float:
        torch.add(self.mean, 1.0, out=self.mean)
        torch._foreach_add_([self.mean], 0.5)
        return float(self.mean.sum())

    def state(self) -> Any:
        return self.mean


@keeper
class DataReplaced:
    def __init__(self) -> None:
        self.mean = torch.zeros(2)

    def draw(self) -> float:
        self.mean.data = self.mean.data * 0.9 + 1.0
        return float(self.mean.sum())

    def state(self) -> Any:
        return self.mean


@keeper
class Teacher:
    """An average of a network's weights that are not among the parameters."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.student, self.teacher = nn.Linear(2, 2), nn.Linear(2, 2)
        for p in (*self.student.parameters(), *self.teacher.parameters()):
            p.requires_grad_(False)

    @torch.no_grad()
    def draw(self) -> float:
        for q, p in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            q.mul_(0.9).add_(p, alpha=0.1)
        return float(self.teacher.weight.sum())

    def state(self) -> Any:
        return self.teacher


@keeper
class TeacherByData(Teacher):
    def draw(self) -> float:
        for q, p in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            q.data = q.data * 0.9 + p.data * 0.1
        return float(self.teacher.weight.sum())


@keeper
class Averaged(Teacher):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = AveragedModel(self.student, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        self.teacher.update_parameters(copy.deepcopy(self.student))

    @torch.no_grad()
    def draw(self) -> float:
        self.student.weight.add_(0.5)
        self.teacher.update_parameters(self.student)
        return float(self.teacher.module.weight.sum())

    def state(self) -> Any:
        return self.student, self.teacher


@keeper
class Loaded(Teacher):
    def draw(self) -> float:
        state = {name: value * 1.1 for name, value in self.teacher.state_dict().items()}
        self.teacher.load_state_dict(state)
        return float(self.teacher.weight.sum())


@keeper
class InnerOptimizer(Teacher):
    def __init__(self) -> None:
        super().__init__()
        self.teacher.requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.teacher.parameters(), lr=0.1)

    def draw(self) -> float:
        with torch.enable_grad():
            gradients = torch.autograd.grad(self.teacher(torch.ones(1, 2)).square().sum(), self.teacher.parameters())
        for p, g in zip(self.teacher.parameters(), gradients, strict=True):
            p.grad = g
        self.optimizer.step()
        return float(self.teacher.weight.detach().sum())

    def state(self) -> Any:
        return self.teacher, list(self.optimizer.state.values())


class TwoModules(nn.Module):
    def __init__(self, shared: Tensor, registered: bool) -> None:
        super().__init__()
        if registered:
            self.register_buffer("shared", shared)
        else:
            self.shared = shared


@keeper
class SharedTensor:
    def __init__(self) -> None:
        shared = torch.zeros(2)
        self.writer, self.reader = TwoModules(shared, False), TwoModules(shared, False)

    def draw(self) -> float:
        self.writer.shared.add_(1.0)
        return float(self.reader.shared.sum())

    def state(self) -> Any:
        return self.writer.shared, self.reader.shared


@keeper
class SharedBuffer(SharedTensor):
    def __init__(self) -> None:
        shared = torch.zeros(2)
        self.writer, self.reader = TwoModules(shared, True), TwoModules(shared, True)


@keeper
class SharedView(SharedTensor):
    def __init__(self) -> None:
        shared = torch.zeros(2)
        self.writer, self.reader = TwoModules(shared, True), TwoModules(shared.view(1, 2)[0, :1], True)


@keeper
class BufferAndTensor(SharedTensor):
    def __init__(self) -> None:
        shared = torch.zeros(2)
        self.writer, self.reader = TwoModules(shared, True), TwoModules(shared, False)


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.history = {"means": [self.norm.running_mean]}


@keeper
class BatchNormSeenElsewhere:
    def __init__(self) -> None:
        self.inner = Statistics()
        self.x = torch.arange(6.0).view(3, 2)

    def draw(self) -> float:
        self.inner.norm(self.x)
        return float(self.inner.history["means"][0].sum())

    def state(self) -> Any:
        return self.inner, self.inner.history


@keeper
class HookWithMemory:
    def __init__(self) -> None:
        self.layer, features = nn.Linear(2, 2).requires_grad_(False), []
        self.layer.register_forward_hook(lambda *_: features.append(1.0))
        self.features = features

    def draw(self) -> float:
        self.layer(torch.ones(1, 2))
        return float(len(self.features))

    def state(self) -> Any:
        return self.features


@keeper
class TensorAttribute:
    def __init__(self) -> None:
        self.p = torch.zeros(2)
        self.p.seen = [0.0]  # type: ignore[attr-defined]

    def draw(self) -> float:
        self.p.seen.append(1.0)  # type: ignore[attr-defined]
        return float(len(self.p.seen))  # type: ignore[attr-defined]

    def state(self) -> Any:
        return self.p.seen  # type: ignore[attr-defined]


@keeper
class Mode:
    def __init__(self) -> None:
        self.layer = nn.Dropout(0.5)

    def draw(self) -> float:
        self.layer.train(not self.layer.training)
        return float(self.layer.training)

    def state(self) -> Any:
        return self.layer.training


@keeper
class HooksAdded:
    def __init__(self) -> None:
        self.layer = nn.Linear(2, 2).requires_grad_(False)

    def draw(self) -> float:
        self.layer.register_forward_hook(lambda *_: None)
        return float(len(self.layer._forward_hooks))

    def state(self) -> Any:
        return len(self.layer._forward_hooks)


@keeper
class ModulesAdded:
    def __init__(self) -> None:
        self.layers = nn.ModuleList()
        self.holder = nn.Module()

    def draw(self) -> float:
        self.layers.append(nn.Linear(1, 1).requires_grad_(False))
        self.holder.register_buffer(f"count_{len(self.layers)}", torch.ones(1))
        return float(len(self.layers) + len(self.holder._buffers))

    def state(self) -> Any:
        return len(self.layers), list(self.holder._buffers)


@torch.library.custom_op("keepers::add_one", mutates_args={"t"})
def add_one(t: Tensor) -> None:
    t.numpy()[...] += 1.0


@keeper
class CustomOperator:
    def __init__(self) -> None:
        self.total = torch.zeros(2)

    def draw(self) -> float:
        add_one(self.total)
        return float(self.total.sum())

    def state(self) -> Any:
        return self.total


@keeper
class Settings:
    """The settings of an optimizer of other parameters."""

    def __init__(self) -> None:
        self.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)

    def draw(self) -> float:
        self.optimizer.param_groups[0]["lr"] *= 0.5
        return float(self.optimizer.param_groups[0]["lr"])

    def state(self) -> Any:
        return self.optimizer.param_groups


@keeper
class Replaced:
    """New objects in place of the old ones."""

    def __init__(self) -> None:
        self.layer, self.inner = nn.Linear(2, 2).requires_grad_(False), types.SimpleNamespace(rows=[0.0])

    def draw(self) -> float:
        self.inner = types.SimpleNamespace(rows=[*self.inner.rows, 1.0])
        self.layer.weight = nn.Parameter(self.layer.weight * 1.1, requires_grad=False)
        return len(self.inner.rows) + float(self.layer.weight.sum())

    def state(self) -> Any:
        return self.inner.rows, self.layer


@keeper
class ThreadLocal:
    def __init__(self) -> None:
        self.local = threading.local()
        self.local.count = 0

    def draw(self) -> float:
        self.local.count += 1
        return float(self.local.count)

    def state(self) -> Any:
        return self.local.count


TURN: contextvars.ContextVar[int] = contextvars.ContextVar("turn", default=0)


@keeper
class ContextVariable:
    def draw(self) -> float:
        TURN.set(TURN.get() + 1)
        return float(TURN.get())

    def state(self) -> Any:
        return TURN.get()

    @staticmethod
    def reset() -> None:
        TURN.set(0)


@keeper
class WeakKeys:
    def __init__(self) -> None:
        self.owner = Meter()
        self.table = weakref.WeakKeyDictionary({self.owner: 0.0})

    def draw(self) -> float:
        self.table[self.owner] += 1.0
        return self.table[self.owner]

    def state(self) -> Any:
        return list(self.table.values())


@keeper
class Scripted:
    def __init__(self) -> None:
        self.layer = torch.jit.script(nn.BatchNorm1d(2).requires_grad_(False))
        self.x = torch.arange(6.0).view(3, 2)

    def draw(self) -> float:
        self.layer(self.x)
        return float(self.layer.running_mean.sum())

    def state(self) -> Any:
        return list(self.layer.buffers())


@keeper
class StateOfAnOptimizer:
    def __init__(self) -> None:
        self.optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])

    def draw(self) -> float:
        self.optimizer.state["count"] = self.optimizer.state.get("count", 0) + 1
        return float(self.optimizer.state["count"])

    def state(self) -> Any:
        return dict(self.optimizer.state)


def make(name: str) -> Any:
    """Return a new keeper, whose class and globals are at their start."""
    kind = KEEPERS[name]
    if hasattr(kind, "reset"):
        kind.reset()
    torch.manual_seed(7)
    return kind()


class Training:
    """A network, a keeper, and a closure whose loss depends on what the keeper draws."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Linear(2, 2)).double()
        self.x, self.y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
        self.keeper = make(name)
        self.drawn: Callable[[], list[float]] = unseen([])

    def closure(self) -> Tensor:
        self.model.zero_grad()
        number = self.keeper.draw()
        self.drawn().append(number)
        loss = F.mse_loss((1 + 0.1 * number) * self.model(self.x), self.y)
        loss.backward()
        return loss
