"""States, and the dictionaries that they are kept and saved in."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from optimizer_db import OPTIMIZERS
from torch import Tensor

from newtonopt import NewtonCG
from newtonopt.optimizers.hessian_free import HessianFreeState
from newtonopt.optimizers.state import State, empty_entries, fitted, followed, home, layout_now, packed, read, write

PARAMS = [torch.zeros(2, 3).double().requires_grad_(), torch.zeros(4).double().requires_grad_()]
NYSTROM = {"preconditioner": "nystrom", "rank": 3}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_is_frozen_and_each_of_its_entries_comes_back(name: str) -> None:
    optimizer = OPTIMIZERS[name](PARAMS)
    values: dict[str, Any] = {"control": 2.0, "layout": (6, 4)}
    for field in dataclasses.fields(optimizer.state_type):
        if field.metadata:
            values[field.name] = torch.ones(2)
        elif field.name not in values:
            values[field.name] = True if field.default is False else 3
    state = optimizer.state_type(**values)
    entries: dict[str, Any] = {"mine": "kept"}
    write(state, entries, optimizer.control)
    assert entries["mine"] == "kept" and entries["layout"] == [6, 4]
    assert (optimizer.control is None) == ("agreements" not in entries) and "control" not in entries
    again = read(optimizer.state_type, entries, optimizer.control)
    unsaved = {"control", "agreements"} if optimizer.control is None else set()
    assert {name: value for name, value in vars(again).items() if name not in unsaved} == {
        name: value for name, value in vars(state).items() if name not in unsaved
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.steps = 1


def test_an_entry_of_a_vector_goes_with_the_vector() -> None:
    entries: dict[str, Any] = {}
    write(HessianFreeState(solution=torch.ones(2)), entries, "damping")
    assert "solution" in entries
    write(HessianFreeState(), entries, "damping")
    assert "solution" not in entries and entries["damping"] == math.inf


def test_a_flag_that_was_saved_as_a_number_is_a_flag_again() -> None:
    assert read(HessianFreeState, {"confirmed": 1}, "damping").confirmed is True


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (NYSTROM, {"sketch_vectors": (10, 3), "sketch_values": (3,), "solution": (10,)}),
        ({**NYSTROM, "rank": 50}, {"sketch_vectors": (10, 10), "sketch_values": (10,), "solution": (10,)}),
        ({"preconditioner": "empirical_fisher", "rank": 3}, {"squared_gradients": (10,), "solution": (10,)}),
        ({"preconditioner": None, "rank": 3}, {"solution": (10,)}),
    ],
)
def test_a_blank_state_holds_what_its_settings_may_need(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    entries = empty_entries(HessianFreeState, settings, PARAMS)
    assert entries.pop("layout") == [6, 4]
    assert {name: tuple(value.shape) for name, value in entries.items()} == expected
    assert not any(bool(value.any()) for value in entries.values())
    assert empty_entries(HessianFreeState, settings, [torch.zeros(2)]) == {"layout": [0]}


def vectors(state: State) -> list[Tensor]:
    return [value for value in vars(state).values() if isinstance(value, Tensor)]


def test_vectors_are_dropped_where_other_parameters_are_trained_and_before_the_first_step() -> None:
    state = HessianFreeState(steps=2, layout=(6, 4), settled_loss=1.0, solution=torch.ones(10).double())
    assert vars(fitted(state, PARAMS)) == vars(state) and len(vectors(fitted(state, PARAMS))) == 1
    frozen = [PARAMS[0], PARAMS[1].detach()]
    after = fitted(state, frozen)
    assert not vectors(after) and after.layout == (6, 0) and after.settled_loss == math.inf and after.steps == 2
    assert not vectors(fitted(dataclasses.replace(state, steps=0), PARAMS))


def test_vectors_follow_to_another_device_and_precision() -> None:
    """No second device is at hand: what a state on the meta device becomes is asked for."""
    state = HessianFreeState(steps=2, solution=torch.zeros(3, device="meta"), layout=(3,))
    moved = followed(state, [torch.zeros(3, device="meta", dtype=torch.float64)])
    assert moved.solution is not None
    assert moved.solution.device.type == "meta" and moved.solution.dtype == torch.float64
    assert {**vars(moved), "solution": None} == {**vars(state), "solution": None}


def test_the_state_is_found_by_an_entry_that_every_state_has() -> None:
    optimizer = NewtonCG(PARAMS)
    assert home(optimizer.state, PARAMS) is None
    optimizer.state[PARAMS[0]]["note"] = "mine"
    assert home(optimizer.state, PARAMS) is None
    write(State(), optimizer.state[PARAMS[1]], None)
    assert home(optimizer.state, PARAMS) is PARAMS[1]


def test_saved_entries_lie_under_the_first_trained_parameter_and_each_trained_one_has_a_place() -> None:
    entries: dict[str, Any] = {"layout": layout_now(PARAMS), "steps": 3}
    saved = packed(entries, State, {}, PARAMS)
    assert saved[1] == {} and saved[0]["steps"] == 3 and torch.equal(saved[0]["layout"], torch.tensor([6, 4]))
    assert set(packed(entries, State, {}, [PARAMS[0].detach(), PARAMS[1]])) == {1}
