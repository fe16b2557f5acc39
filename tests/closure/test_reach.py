"""State that a closure can reach: the search leaves out what is not its own, and names what cannot be put back."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from keepers import Training, content
from torch import Tensor
from torch.utils.data import DataLoader

from newtonopt import HessianFree
from newtonopt.curvature import measure


def stream() -> Iterator[float]:
    number = 0.0
    while True:
        number += 1.0
        yield number


STREAMS: dict[str, Callable[[], Iterator[Any]]] = {
    "generator": stream,
    "list": lambda: iter([1.0, 2.0, 3.0, 4.0] * 30),
    "count": lambda: itertools.count(1),
    "zip": lambda: (a + b for a, b in zip(itertools.count(), itertools.count(), strict=False)),
    "keys": lambda: iter(dict.fromkeys(range(200))),
    "accumulate": lambda: itertools.accumulate(itertools.repeat(1.0), lambda a, b: a + b, initial=0.0),
    "cycle": lambda: itertools.cycle([1.0, 2.0, 3.0] * 99),
    "islice": lambda: itertools.islice(range(10**6), 5, None),
    "chain": lambda: itertools.chain(range(500), range(500)),
    "map": lambda: map(abs, range(500)),
    "enumerate": lambda: enumerate(range(500)),
    "loader": lambda: iter(DataLoader(torch.arange(200.0), batch_size=1)),
}


@pytest.mark.parametrize("name", STREAMS)
def test_an_iterator_that_the_loss_does_not_depend_on_is_named_once(name: str) -> None:
    if sys.version_info >= (3, 12) and name in ("accumulate", "cycle", "islice", "chain"):
        pytest.skip("from Python 3.12 on these do not tell where they are without a warning")
    training, owner = Training("Counts"), types.SimpleNamespace(spinner=STREAMS[name]())

    def closure() -> Tensor:
        next(owner.spinner)
        return training.closure()

    optimizer = HessianFree(training.model.parameters())
    with pytest.warns(UserWarning, match=r"The closure changes owner\.spinner, which cannot be restored after a trial"):
        optimizer.step(closure)
    optimizer.step(closure)
    with pytest.raises(
        RuntimeError, match=r"The closure changes owner\.spinner, which cannot be restored: an iterator"
    ):
        measure(closure, training.model.parameters(), top=1, bottom=0, max_products=2)


def test_an_iterator_that_does_not_tell_where_it_is_is_no_error() -> None:
    training, pairs, copies = Training("Counts"), itertools.pairwise(range(99)), itertools.tee(range(99))

    def closure() -> Tensor:
        assert pairs is not None and len(copies) == 2
        return training.closure()

    HessianFree(training.model.parameters()).step(closure)


def test_what_is_too_large_to_be_copied_is_named() -> None:
    training, table, rows = Training("Counts"), np.zeros(2**22), [0.0] * 200_000

    def closure() -> Tensor:
        table[:] += 1.0
        rows.append(1.0)
        return training.closure()

    with pytest.warns(UserWarning, match=r"The closure changes (table, rows|rows, table), which cannot be restored"):
        HessianFree(training.model.parameters()).step(closure)


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one, whose state it shows as its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.state, self.inner, self.param_groups = inner.state, inner, inner.param_groups

    def step(self, closure: Any) -> Any:
        return self.inner.step(closure)


def test_the_optimizers_own_state_is_not_taken_for_the_closures() -> None:
    ends = []
    for wraps in (False, True):
        training = Training("Counts")
        inner = HessianFree(training.model.parameters())
        optimizer = Wrapper(inner) if wraps else inner

        def closure(training: Training = training, optimizer: Any = optimizer) -> Tensor:
            assert optimizer.param_groups
            return training.closure()

        for _ in range(3):
            optimizer.step(closure)
        ends.append([content(training.model), inner.last_step, inner._state.steps, inner._state.control])
    assert ends[0] == ends[1]
    assert ends[0][2] == 3
