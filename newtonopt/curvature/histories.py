"""Histories of measurements: the values of one run over its steps, thinned so that memory stays flat."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from newtonopt.curvature.measurements.measurement import Histogram, Measured

Numbers = NDArray[np.float64]
Item = TypeVar("Item")

# Steps that a history keeps: a figure has hardly more pixels for them.
MOST_STEPS = 1000
# Names that one history keeps: a run that writes more is not one of ours.
_MOST_NAMES = 1000
# Larger numbers are no measurement's, and overflow in a figure's arithmetic.
_LARGEST = 1e100
# Bars of a histogram, and the decimal logarithm of what one of them may count.
_MOST_BARS, _MOST_DECADES = 10_000, 20.0
# Name of the histogram that is drawn as the density of eigenvalues: log10(1 + count) in each of equal ranges.
DENSITY = "eigenvalues_log_count"
_HELD_OUT = re.compile("val|test|eval", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Bars:
    """Counts of eigenvalues in ranges.

    Attributes:
        edges: Ends of the ranges `(bars + 1,)`, ascending.
        counts: Number of eigenvalues in each `(bars,)`.
    """

    edges: Numbers
    counts: Numbers


@dataclass(frozen=True, eq=False)
class History:
    """The values of one run over its steps.

    Attributes:
        name: Name of the run; empty if it needs none.
        measured: By step, the values of a measurement by name, without the prefix.
        training: By tag, the values by step of what the run logs beside: the loss, and `newton/...`.
        densities: Counts of eigenvalues by step.
        words: Sentences of the last measurement.
        loss: Tag of the training loss; empty if there is none.
    """

    name: str
    measured: Mapping[int, Mapping[str, float]]
    training: Mapping[str, Mapping[int, float]]
    densities: Mapping[int, Bars]
    words: tuple[str, ...]
    loss: str

    def series(self, name: str) -> tuple[Numbers, Numbers]:
        """Return the steps at which a value is known, ascending, and the values there."""
        if name in self.training:
            pairs = sorted(self.training[name].items())
        else:
            pairs = [(step, self.measured[step][name]) for step in sorted(self.measured) if name in self.measured[step]]
        steps, values = np.array([s for s, _ in pairs], float), np.array([v for _, v in pairs], float)
        return steps, values

    def beside(self, name: str, other: str) -> Numbers:
        """Return the values of another name at the steps of a name; NaN where they are not known."""
        steps = [step for step in sorted(self.measured) if name in self.measured[step]]
        return np.array([self.measured[step].get(other, math.nan) for step in steps], float)

    def names(self) -> set[str]:
        """Return the names of all values, and the tags of what the run logs beside."""
        return {name for values in self.measured.values() for name in values} | {*self.training}


class Thinned(Generic[Item]):
    """Items by step, of at most `most` steps, evenly spaced in the order in which they came, and of the last one.

    Args:
        most: How many steps are kept, beside the last one. Default 1000.
    """

    def __init__(self, most: int = MOST_STEPS) -> None:
        self._most = most
        self._stride, self._seen = 1, 0
        self._items: dict[int, tuple[int, Item]] = {}
        self._last: int | None = None
        self._farthest = -math.inf

    def put(self, step: int, item: Item) -> None:
        """Keep the item of a step; it replaces the one that is there."""
        self._farthest = max(self._farthest, step)
        if step in self._items:
            self._items[step] = self._items[step][0], item
            return
        if self._last is not None and self._items[self._last][0] % self._stride:
            del self._items[self._last]  # kept only because it was the last one
        self._items[step] = self._seen, item
        self._last = step
        self._seen += 1
        if len(self._items) > self._most + 1:
            self._stride *= 2
            even = {s: entry for s, entry in self._items.items() if entry[0] % self._stride == 0 or s == step}
            self._items = even

    def rewind(self, step: int) -> None:
        """Forget the items of later steps."""
        if self._farthest > step:
            self._items = {s: entry for s, entry in self._items.items() if s <= step}
            self._last = next(reversed(self._items), None)
            self._farthest = max(self._items, default=-math.inf)

    def get(self, step: int) -> Item | None:
        """Return the item of a step; None where there is none."""
        return self._items[step][1] if step in self._items else None

    def items(self) -> dict[int, Item]:
        """Return the items by step, in the order in which they came."""
        return {step: item for step, (_, item) in self._items.items()}


class Log:
    """A history in the making: it takes measurements, or single values as they are read from a file."""

    def __init__(self) -> None:
        self._measured: Thinned[dict[str, float]] = Thinned()
        self._training: dict[str, Thinned[float]] = {}
        self._densities: Thinned[Bars] = Thinned()
        self._words: tuple[str, ...] = ()
        self._names: set[str] = set()

    def add(self, step: int, measured: Measured) -> None:
        """Add a measurement, of which only numbers, words and the histogram of eigenvalues are kept."""
        for name in measured.names():
            value = measured.read(name)
            if value is not None:
                self.add_value(step, name, value)
        for measurement, result in measured.results():
            histogram: Histogram | None = measurement.histograms(result).get(DENSITY)
            if histogram is not None:
                self.add_density(step, histogram.edges.numpy(), histogram.heights.numpy())
        self.add_words(measured.in_words().splitlines())

    def add_value(self, step: int, name: str, value: float) -> None:
        """Add a value of a measurement; numbers that cannot be drawn are passed over."""
        if not self._takes(name, value):
            return
        self._measured.put(step, {**(self._measured.get(step) or {}), name: value})

    def add_training(self, step: int, tag: str, value: float) -> None:
        """Add a value that the run logs beside its measurements."""
        if self._takes(tag, value):
            self._training.setdefault(tag, Thinned()).put(step, value)

    def add_density(self, step: int, edges: Iterable[float], heights: Iterable[float]) -> None:
        """Add a histogram of eigenvalues with log10(1 + count) as heights; one that is damaged is passed over."""
        ends, logs = np.fromiter(edges, float), np.fromiter(heights, float)
        whole = 0 < len(logs) == len(ends) - 1 <= _MOST_BARS
        if whole and (np.abs(ends) < _LARGEST).all() and (np.diff(ends) > 0).all() and _are_counts(logs):
            self._densities.put(step, Bars(ends, 10.0**logs - 1.0))

    def add_words(self, words: Iterable[str]) -> None:
        """Replace the sentences by those of a later measurement."""
        self._words = tuple(words)

    def rewind(self, step: int) -> None:
        """Forget all of later steps, as where a run was resumed from an earlier one."""
        self._measured.rewind(step)
        self._densities.rewind(step)
        for values in self._training.values():
            values.rewind(step)

    def history(self, name: str = "", loss: str | None = None) -> History:
        """Return the history so far.

        Args:
            name: Name of the run. Default "".
            loss: Tag of the training loss; None (default): the likeliest among the tags, see `loss_tag`.
        """
        tag = loss_tag(self._training) if loss is None else loss
        return History(
            name,
            self._measured.items(),
            {name: values.items() for name, values in self._training.items()},
            self._densities.items(),
            self._words,
            tag if tag in self._training else "",
        )

    def _takes(self, name: str, value: float) -> bool:
        if not abs(value) < _LARGEST or (name not in self._names and len(self._names) >= _MOST_NAMES):
            return False
        self._names.add(name)
        return True


def may_be_loss(tag: str) -> bool:
    """Return whether a tag may be that of the training loss: it says "loss", and does not speak of held-out data."""
    return "loss" in tag.lower() and not _HELD_OUT.search(tag)


def loss_tag(tags: Iterable[str]) -> str:
    """Return the likeliest tag of the training loss: one of steps, of training, the shortest; empty if none may be."""
    found = [tag for tag in tags if may_be_loss(tag)]
    return min(found, key=lambda tag: ("epoch" in tag, "train" not in tag, len(tag), tag), default="")


def _are_counts(logs: Numbers) -> bool:
    return bool(((logs >= 0.0) & (logs < _MOST_DECADES)).all())
