"""Arguments that no optimizer can do with: what was meant is said before anything is changed."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn

from newtonopt import CubicNewton, DampedNewton, HessianFree, LevenbergMarquardt, NewtonCG, TrustRegionNewton

FAMILY = [CubicNewton, DampedNewton, HessianFree, LevenbergMarquardt, NewtonCG, TrustRegionNewton]


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("momentum", 0.9, "Leave it out: a Newton step takes the curvature instead."),
        ("betas", (0.9, 0.99), "Leave it out: a Newton step takes the curvature instead."),
        ("max_eval", 25, "Write max_trials=..."),
        ("tolerance_grad", 1e-7, "Write tolerance_gradient=..."),
        ("curvatur", "hessian", "Write curvature=..."),
        ("learning_rate", 1.0, "Write lr=..."),
        ("max_iter", 20, "Write steps_per_call=... for the Newton steps of one call"),
        ("zzz", 1, "Its arguments are params, lr, curvature, "),
    ],
)
def test_an_argument_of_another_optimizer_is_told_what_takes_its_place(
    kind: Any, name: str, value: Any, remedy: str
) -> None:
    if kind is LevenbergMarquardt and name == "momentum":
        return  # it has one
    words = re.escape(f"{kind.__name__} takes no {name}, got {name}={value!r}. {remedy}")
    with pytest.raises(TypeError, match=f"^{words}"):
        kind([torch.ones(2, requires_grad=True)], **{name: value})


def test_an_argument_of_another_member_is_told_by_whom_it_is_taken() -> None:
    with pytest.raises(TypeError, match=r"HessianFree takes no radius, .*by radius=... in TrustRegionNewton"):
        HessianFree([torch.ones(2, requires_grad=True)], radius=1.0)  # type: ignore[call-arg]
    for name, whose in {
        "subproblem": "TrustRegionNewton and CubicNewton have it",
        "max_radius": "by radius=... in TrustRegionNewton",
        "line_search": "NewtonCG has it",
        "blocks": "DampedNewton has it",
        "scaling": "LevenbergMarquardt has it",
        "curvature_closure": r"Give it to the step",
    }.items():
        with pytest.raises(TypeError, match=f"HessianFree takes no {name}, .*{whose}"):
            HessianFree([torch.ones(2, requires_grad=True)], **{name: 1})
    with pytest.raises(TypeError, match=r"NewtonCG takes no line_search_fn, got .* Write line_search=..."):
        NewtonCG([torch.ones(2, requires_grad=True)], line_search_fn="strong_wolfe")  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", FAMILY)
def test_the_signature_is_the_arguments(kind: Any) -> None:
    parameters = inspect.signature(kind).parameters
    assert "lr" in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    optimizer = kind([torch.ones(2, requires_grad=True)], lr=0.5)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("kind", FAMILY)
def test_parameters_of_another_kind_are_told_how_to_be_written(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    used = model.parameters()
    list(used)
    for params, words in (
        (
            model,
            "params must be an iterable of tensors or of parameter groups, got a Sequential. Write model.parameters()",
        ),
        (nn.Linear(1, 1), "got a Linear. Write model.parameters()"),
        (next(model.parameters()), "got a Parameter. Write a list with one entry"),
        (model.parameters, "got a method. Write model.parameters()"),
        (dict(model.named_parameters()), "got a dict. Write model.parameters(), or a list of the mapping's entries"),
        (None, "got None. Write model.parameters()"),
        ([list(model.parameters())], "params must hold tensors only, got a list in it"),
        ([{"params": model}], "params must be an iterable of tensors, got a Sequential"),
        ([{"lr": 1.0}], "A parameter group must be a dict with an entry 'params', got one with lr"),
        (
            [{"params": model.parameters()}, next(model.parameters())],
            "must be a dict with an entry 'params', got a Par",
        ),
    ):
        with pytest.raises(TypeError, match=re.escape(words)):
            kind(params)
    for params, words in (
        (used, "params must hold at least one entry, got a generator that gave none: it was empty, or was used"),
        ([{"params": used}], "params must hold at least one entry, got a generator that gave none"),
        ([], "params must hold at least one tensor, got []. Write model.parameters()"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            kind(params)


def test_a_group_of_another_kind_is_refused_and_none_is_added() -> None:
    optimizer, more = HessianFree([torch.ones(2, requires_grad=True)]), nn.Linear(2, 1)
    for group in (more, {"params": more}, {"params": [more]}, {"lr": 1.0}, list(more.parameters())):
        with pytest.raises(TypeError, match=r"must be a dict with an entry 'params'|params must"):
            optimizer.add_param_group(group)  # type: ignore[arg-type]
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": more.parameters()})
    optimizer.add_param_group({"params": torch.ones(3, requires_grad=True)})
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2, 1]


def test_named_parameters_are_taken() -> None:
    assert HessianFree(nn.Linear(2, 1).named_parameters()).param_groups[0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("kind", FAMILY)
def test_a_module_for_a_closure_is_refused(kind: Any) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"closure must be a function without arguments .*, got the module Linear"):
        kind(model.parameters()).step(model)


@pytest.mark.parametrize("kind", FAMILY)
def test_a_group_with_a_setting_under_another_name_is_refused(kind: Any) -> None:
    p = torch.ones(2, requires_grad=True)
    for entry, remedy in {
        "learning_rate": "Write lr=",
        "weigth_decay": "Write weight_decay=",
        "momentum": "Leave",
    }.items():
        if kind is LevenbergMarquardt and entry == "momentum":
            continue  # it has one
        with pytest.raises(TypeError, match=f"A parameter group takes no {entry}, got 0.5. {remedy}"):
            kind([{"params": [p], entry: 0.5}])
    optimizer = kind([{"params": [p], "name": "mine", "initial_lr": 1.0}])
    assert optimizer.param_groups[0]["name"] == "mine"
