"""Every check of an argument: the values on both sides of its limit, and the sentence that refuses one."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from newtonopt import checks
from newtonopt.checks import (
    check_choice,
    check_closure,
    check_flag,
    check_instance,
    check_seed,
    check_weight,
    check_whole,
    explains_arguments,
    instead,
    kind_of,
    listed,
    listed_group,
    listed_groups,
    shown,
    warn,
)

NO_NUMBERS = (True, "1", None, math.nan, torch.tensor(0.5), np.float32(0.5), [0.5])
# Check, its range in words, numbers inside and numbers just outside.
NUMBERS: dict[str, tuple[Callable[[str, object], None], str, list[float], list[float]]] = {
    "share": (checks.check_share, "must be in (0, 1)", [1e-9, 0.5, 1 - 1e-9], [0, 1, -0.5, math.inf]),
    "positive_share": (
        checks.check_positive_share,
        "must be above 0 and at most 1",
        [1e-9, 1, 0.5],
        [0.0, 1.0000001, -1],
    ),
    "up_to_one": (checks.check_up_to_one, "must be between 0 and 1", [0, 0.0, 0.5, 1], [-1e-9, 1.0000001, math.inf]),
    "positive": (checks.check_positive, "must be positive and finite", [5e-324, 1, 1e300], [0, -1.0, math.inf]),
    "not_negative": (
        checks.check_not_negative,
        "must be zero or positive, and finite",
        [0, 0.0, 1e300],
        [-5e-324, math.inf],
    ),
    "above_one": (checks.check_above_one, "must be above 1 and finite", [1.0000001, 7], [1, 1.0, math.inf, -2]),
    "below_one": (checks.check_below_one, "must be in [0, 1)", [0, 0.0, 1 - 1e-9], [1, -1e-9, math.inf]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_inside_pass_and_outside_are_refused(name: str) -> None:
    check, words, inside, outside = NUMBERS[name]
    for value in inside:
        check("argument", value)
    for value in (*outside, *NO_NUMBERS):
        with pytest.raises(ValueError, match=f"^{re.escape(f'argument {words}, got {value!r}.')}"):
            check("argument", value)


@pytest.mark.parametrize(("name", "value"), [("share", 95), ("positive_share", 95.0), ("below_one", 95)])
def test_a_percentage_is_written_as_a_share(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=r"Write 0\.95 for 95 %\.$"):
        NUMBERS[name][0]("argument", value)


@pytest.mark.parametrize("value", [np.float64(-1.0), np.int64(0), torch.tensor(2.0), torch.ones(1)])
def test_numbers_of_other_libraries_are_told_how_to_become_pythons(value: Any) -> None:
    for call in (lambda: check_whole("argument", value, 1), lambda: check_seed(value), lambda: check_weight(value)):
        with pytest.raises(ValueError, match=r"Write a Python number: \.item\(\) gives it\.$"):
            call()


def test_whole_numbers() -> None:
    for value in (3, 10**30):
        check_whole("argument", value, 3)
    for value in (2, 3.0, True, "3", None, -3):
        with pytest.raises(ValueError, match=f"^argument must be a whole number and at least 3, got {value!r}"):
            check_whole("argument", value, 3)


def test_seeds_are_those_of_torchs_generators() -> None:
    for seed in (0, 2**64 - 1):
        check_seed(seed)
        torch.Generator().manual_seed(seed)
    for value in (-1, 2**64, 1.0, True, None):
        with pytest.raises(ValueError, match=rf"^seed must be a whole number from 0 to 2\*\*64 - 1, got {value!r}"):
            check_seed(value)


def test_weights_may_be_left_out() -> None:
    for weight in (None, 1, 0.5):
        check_weight(weight)
    for value in (0, -1.0, math.inf, True, "1"):
        with pytest.raises(ValueError, match=f"^weight must be positive and finite, or None, got {value!r}"):
            check_weight(value)


def test_flags_and_choices() -> None:
    for flag in (True, False):
        check_flag("argument", flag)
    for value in (0, 1, None, "True"):
        with pytest.raises(ValueError, match=f"^argument must be True or False, got {value!r}"):
            check_flag("argument", value)
    for choice in ("a", None):
        check_choice("argument", choice, ("a", "b", None))
    # An array is compared with none of them, entry by entry.
    for choice, text in (("c", "'c'"), (np.array(["a", "b"]), "array(['a', 'b'], dtype='<U1')")):
        with pytest.raises(ValueError, match=re.escape(f"argument must be 'a' or 'b' or None, got {text}.")):
            check_choice("argument", choice, ("a", "b", None))


def test_instances() -> None:
    check_instance("argument", 3, int, "an int", "Write 3.")
    with pytest.raises(TypeError, match=r"^argument must be an int, got '3'\. Write 3\.$"):
        check_instance("argument", "3", int, "an int", "Write 3.")


def test_values_are_shown_short() -> None:
    assert shown("x" * 58) == repr("x" * 58)
    assert shown("x" * 59) == "a str"
    assert shown(torch.ones(2, 2)) == "a Tensor"  # of two lines
    assert [kind_of(value) for value in (None, 3, nn.Linear(1, 1), {})] == ["None", "an int", "a Linear", "a dict"]


def loss(inputs: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
    return scale * F.mse_loss(inputs, targets)


class Penalty(nn.Module):
    """A loss of its own parameters, which takes no argument."""

    def forward(self) -> Tensor:
        return torch.zeros(())


def test_closures_take_no_argument() -> None:
    for closure in (lambda: loss(torch.ones(1), torch.ones(1)), lambda *args, **kwargs: None, Penalty(), print):
        check_closure(closure)
    for closure, words in (
        (loss, "got <function loss at 0x.*>, which takes inputs, targets. .* functools.partial.function, inputs, targ"),
        (nn.MSELoss(), "got the module MSELoss. Write such a function around it"),
        (nn.MSELoss, "got <class .*MSELoss'>"),
        (torch.zeros(()), r"got tensor\(0\.\)\. Give the function itself, not the loss that it returns"),
        (3.0, r"got 3\.0\.$"),
        (nn.Module(), "got the module Module"),
        # Wrappers, whose own forward takes anything.
        (nn.DataParallel(nn.Linear(1, 1)), "got the module DataParallel"),
    ):
        with pytest.raises(TypeError, match=f"^curvature_closure must be a function without arguments .*{words}"):
            check_closure(closure, "curvature_closure")
    check_closure(nn.DataParallel(Penalty()))


class Optimizer:
    @explains_arguments({"momentum": "Leave it out.", "learning_rate": "lr", "zzz": "gone"})
    def __init__(self, params: object, lr: float = 1.0, weight_decay: float = 0.0) -> None:
        self.settings = (params, lr, weight_decay)


def test_an_unknown_argument_is_told_what_to_write() -> None:
    assert Optimizer([], weight_decay=0.5).settings == ([], 1.0, 0.5)
    for name, remedy in {
        "momentum": "Leave it out.",
        "learning_rate": "Write lr=...",
        "weigth_decay": "Write weight_decay=...",
        "zzz": "Its arguments are params, lr, weight_decay.",
    }.items():
        with pytest.raises(TypeError, match=f"^Optimizer takes no {name}, got {name}=0.9. {re.escape(remedy)}$"):
            Optimizer([], **{name: 0.9})


def test_names_that_only_begin_alike_are_not_confused() -> None:
    assert instead("max_radius", ["max_trials"], {}) == "Its arguments are max_trials."
    assert instead("max_trial", ["max_trials"], {}) == "Write max_trials=..."


def test_a_warning_names_the_line_outside_of_the_package() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("Message.")
        tree_map(warn, ["Message."])  # from a function of torch's
    assert [(warning.filename, str(warning.message)) for warning in caught] == [(__file__, "Message.")] * 2


def test_iterables_become_lists() -> None:
    given = [1, 2, 3]
    for items in (given, tuple(given), iter(given), {1: "a", 2: "b", 3: "c"}.keys()):
        assert listed("items", items, "numbers", "numbers()") == given
    assert listed("items", [], "numbers", "numbers()") == []
    for items, words in (
        (torch.ones(2), "got a Tensor. Write a list with one entry."),
        (nn.Linear(1, 1), "got a Linear. Write numbers()."),
        ({"a": 1}, "got a dict. Write numbers(), or a list of the mapping's entries."),
        ("abc", "got a str. Write numbers()."),
        ({1, 2}, "got a set. Write a list, which keeps its order."),
        (3, "got an int. Write numbers()."),
        (None, "got None. Write numbers()."),
    ):
        with pytest.raises(TypeError, match=f"^{re.escape('items must be an iterable of numbers, ' + words)}$"):
            listed("items", items, "numbers", "numbers()")
    used = iter(given)
    list(used)
    with pytest.raises(ValueError, match=r"^items must hold at least one entry, got a list_iterator that gave none"):
        listed("items", used, "numbers", "numbers()")


def test_parameters_become_groups() -> None:
    p, q = torch.ones(1), torch.ones(1)
    assert listed_groups([p, q]) == [{"params": [p, q]}]
    assert listed_groups(iter([("p", p)])) == [{"params": [("p", p)]}]
    groups = [{"params": p, "lr": 1.0}, {"params": [q]}]
    assert listed_groups(groups) == groups
    with pytest.raises(ValueError, match=r"^params must hold at least one tensor, got \[\]\. Write model\.parameters"):
        listed_groups([])


def test_a_group_is_copied_with_a_list() -> None:
    p = torch.ones(1)
    group = {"params": p, "lr": 1.0}
    found = listed_group(group)
    assert found["params"][0] is p and found["lr"] == 1.0
    assert group["params"] is p
    assert listed_group({"params": iter([("p", p)])})["params"] == [("p", p)]
    for wrong, words in (
        ([p], "A parameter group must be a dict with an entry 'params', got a list."),
        ({"lr": 1.0}, "A parameter group must be a dict with an entry 'params', got one with lr."),
        ({}, "got one with nothing."),
        ({"params": [p, 3]}, "params must hold tensors only, got an int in it. Write model.parameters()."),
        ({"params": nn.Linear(1, 1)}, "params must be an iterable of tensors, got a Linear."),
    ):
        with pytest.raises(TypeError, match=re.escape(words)):
            listed_group(wrong)
