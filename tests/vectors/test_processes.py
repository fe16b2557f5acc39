"""Exchanges between the processes of a group, and errors of one that reach the others."""

from __future__ import annotations

import pytest
import torch
from processes import run
from torch import Tensor

from newtonopt.vectors.processes import Processes


def test_one_process_talks_to_itself() -> None:
    alone = Processes(torch.zeros(3))
    assert (alone.count, alone.rank) == (1, 0)
    result, table = alone.gather(lambda: ("mine", (2.0, torch.tensor(3.0))))
    assert result == "mine" and table.tolist() == [[2.0, 3.0]] and table.dtype == torch.float64
    assert alone.together(lambda: 5) == 5
    v = torch.ones(3)
    assert alone.sum(lambda: v) is v and alone.first(v) is v
    alone.check_same(v)
    with pytest.raises(KeyError):
        alone.together(lambda: {}[0])


def exchange(rank: int) -> tuple[str, Tensor, Tensor, Tensor, Tensor]:
    group = Processes(torch.zeros(3))
    result, table = group.gather(lambda: (f"of {rank}", (float(rank), torch.tensor(0.5))))
    whole = group.sum(lambda: torch.full((3,), 1.0 + rank))
    matrix = group.sum(lambda: torch.full((2, 2), 1.0 + rank), torch.empty(2, 2))
    return result, table, whole, matrix, group.first(torch.full((3,), float(rank)))


def test_two_processes_exchange_in_closed_form() -> None:
    for rank, (result, table, whole, matrix, first) in enumerate(run(exchange)):
        assert result == f"of {rank}"
        assert table.tolist() == [[0.0, 0.5], [1.0, 0.5]]
        assert whole.tolist() == [3.0] * 3 and matrix.tolist() == [[3.0, 3.0]] * 2
        assert first.tolist() == [0.0] * 3


def collect(rank: int) -> list[list[Tensor]]:
    group = Processes(torch.zeros(3))
    shapes = [(2, 3), (4, 1)] if rank == 0 else [(1, 5), (0, 2)]
    return [group.collect(torch.full(shape, 1.1 + rank, dtype=torch.float64)) for shape in shapes]


def test_two_processes_collect_tensors_of_other_shapes() -> None:
    for found in run(collect):
        assert [[tuple(t.shape) for t in tensors] for tensors in found] == [[(2, 3), (1, 5)], [(4, 1), (0, 2)]]
        assert all(t.dtype == torch.float64 for tensors in found for t in tensors)
        assert all(bool((t == 1.1 + rank).all()) for tensors in found for rank, t in enumerate(tensors))
    alone = torch.ones(2)
    assert Processes(alone).collect(alone)[0] is alone


def fail(rank: int) -> list[str]:
    group, messages = Processes(torch.zeros(3)), []

    def compute() -> Tensor:
        if rank == 1:
            raise KeyError("mine")
        return torch.ones(3)

    for call in (group.sum, group.together):
        try:
            call(compute)
        except (KeyError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    try:
        group.check_same(torch.full((3,), 1.0 + rank))
    except RuntimeError as error:
        messages.append(str(error))
    return messages


def test_an_error_of_one_process_reaches_the_other() -> None:
    first, second = run(fail)
    assert second[:2] == ["KeyError: 'mine'"] * 2
    assert first[:2] == ["RuntimeError: The closure failed on another process; see the error message there."] * 2
    for messages in (first, second):
        assert "The 2 processes hold different parameters (norms 1.73205, 3.4641)" in messages[2]
