"""The assertions of torch's own battery for optimizers that make sense with a closure, over the database."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from optimizer_db import OPTIMIZERS, Build
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from newtonopt.optimizers.newton import NewtonOptimizer

# With vectors in the state, with other entries, and with a control alone; the rest is tested where time allows.
FIRST = ("hessian_free", "newton_cg_nystrom", "trust_region")


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name not in FIRST)) for name in OPTIMIZERS])
def build(request: pytest.FixtureRequest) -> Build:
    return OPTIMIZERS[request.param]


class Problem:
    """A small network on data of its own, with the closure that torch.optim.LBFGS takes."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).to(dtype)
        self.x = torch.randn(12, 3, dtype=dtype)
        self.y = torch.randn(12, 2, dtype=dtype)

    def closure(self) -> Tensor:
        self.model.zero_grad()
        p = next(self.model.parameters())
        loss = F.mse_loss(self.model(self.x.to(p.dtype)).double(), self.y.double())
        loss.backward()
        return loss

    def flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

    def train(self, optimizer: NewtonOptimizer, steps: int = 1) -> list[float]:
        return [float(optimizer.step(self.closure)) for _ in range(steps)]


def trained(build: Build, steps: int = 2, **settings: Any) -> tuple[Problem, NewtonOptimizer]:
    problem = Problem()
    optimizer = build(problem.model.parameters(), **settings)
    problem.train(optimizer, steps)
    return problem, optimizer


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal to the last bit, dtypes and devices included."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def assert_goes_on_alike(problem: Problem, optimizer: NewtonOptimizer, twin: Problem, other: NewtonOptimizer) -> None:
    assert twin.train(other, 2) == problem.train(optimizer, 2)
    assert torch.equal(twin.flat(), problem.flat())
    assert other.last_step == optimizer.last_step
    assert same(other.state_dict()["state"], optimizer.state_dict()["state"])


# States.


def test_a_state_loads_again_and_again_and_after_every_kind_of_copy(build: Build) -> None:
    problem, optimizer = trained(build)
    twin = copy.deepcopy(problem)
    other = build(twin.model.parameters())
    for _ in range(3):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.defaults == optimizer.defaults
        copied.load_state_dict(optimizer.state_dict())
        other.load_state_dict(copied.state_dict())
        assert copied.defaults == optimizer.defaults
    assert_goes_on_alike(problem, optimizer, twin, other)


def test_loading_changes_nothing_in_the_state_given_nor_shares_numbers_with_it(build: Build) -> None:
    problem, optimizer = trained(build)
    given = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(given)
    twin = copy.deepcopy(problem)
    other = build(twin.model.parameters())
    other.load_state_dict(given)
    twin.train(other, 2)
    assert same(given, before)


def test_what_is_public_survives_a_copy(build: Build) -> None:
    problem, optimizer = trained(build)
    optimizer._experience = replace(optimizer._experience, warned_of_clipping=True)
    for twin_of in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        twin, other = twin_of((problem, optimizer))
        public = [{name for name in vars(o) if not name.startswith("_")} for o in (optimizer, other)]
        assert public[0] == public[1]
        assert other.last_step == optimizer.last_step and other._experience.warned_of_clipping
        reference, again = copy.deepcopy((problem, optimizer))
        assert_goes_on_alike(reference, again, twin, other)


@pytest.mark.parametrize("saved_named", [False, True])
def test_named_parameters_and_states_of_either_kind(build: Build, saved_named: bool) -> None:
    def made(problem: Problem, named: bool) -> NewtonOptimizer:
        return build(problem.model.named_parameters() if named else problem.model.parameters())

    problem = Problem()
    optimizer = made(problem, saved_named)
    problem.train(optimizer, 2)
    names = [name for name, _ in problem.model.named_parameters()]
    assert optimizer.param_groups[0].get("param_names") == (names if saved_named else None)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    for named in (False, True):
        buffer.seek(0)
        twin = copy.deepcopy(problem)
        other = made(twin, named)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert other.param_groups[0].get("param_names") == (names if saved_named or named else None)
        reference, again = copy.deepcopy((problem, optimizer))
        assert_goes_on_alike(reference, again, twin, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_keep_their_precision_under_coarser_parameters(build: Build, dtype: torch.dtype) -> None:
    problem = Problem(dtype)
    optimizer = build(problem.model.parameters())
    problem.train(optimizer, 2)
    twin = copy.deepcopy(problem)
    other = build(twin.model.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_goes_on_alike(problem, optimizer, twin, other)


def test_a_state_loads_into_parameters_of_another_precision(build: Build) -> None:
    _, optimizer = trained(build)
    twin = Problem(torch.float32)
    other = build(twin.model.parameters())
    other.load_state_dict(optimizer.state_dict())
    assert {t.dtype for t in tensors(other) if t.is_floating_point()} <= {torch.float32}
    before, *_, after = twin.train(other, 3)
    assert after < before


def tensors(optimizer: NewtonOptimizer) -> Iterator[Tensor]:
    return (t for memory in optimizer.state.values() for t in memory.values() if isinstance(t, Tensor))


@pytest.mark.parametrize("change", ["double", "float", "bfloat16"])
def test_models_change_their_precision_between_steps(build: Build, change: str) -> None:
    problem = Problem(torch.float32 if change == "double" else torch.float64)
    optimizer = build(problem.model.parameters())
    problem.train(optimizer, 2)
    getattr(problem.model, change)()
    before = problem.flat()
    problem.train(optimizer, 2)
    expected = torch.float64 if change == "double" else torch.float32
    assert {t.dtype for t in tensors(optimizer) if t.is_floating_point()} <= {expected}
    assert change == "bfloat16" or not torch.equal(problem.flat(), before)


def test_half_precision_in_mid_run_is_refused_with_all_as_it_was(build: Build) -> None:
    problem, optimizer = trained(build)
    state = copy.deepcopy(optimizer.state_dict())
    problem.model.half()
    before = problem.flat()
    with pytest.raises(ValueError, match=r"torch\.float16"):
        optimizer.step(problem.closure)
    assert torch.equal(problem.flat(), before)
    assert same(optimizer.state_dict(), state)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"flatten_optimizer_state_dict": True}, id="flat"),
        pytest.param({"full_state_dict": True, "cpu_offload": True}, id="full on the CPU"),
        pytest.param({"full_state_dict": True}, id="full", marks=pytest.mark.slow),
        # Flat and full is beyond torch's own optimizers.
        pytest.param(
            {"flatten_optimizer_state_dict": True, "cpu_offload": True}, id="flat on the CPU", marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "first frozen"])
def test_distributed_checkpoints_state_dict_into_a_new_optimizer(
    build: Build, options: dict[str, bool], frozen: bool
) -> None:
    problem = Problem()
    next(problem.model.parameters()).requires_grad_(not frozen)
    optimizer = build(problem.model.parameters(), lr=0.9)
    problem.train(optimizer, 2)
    wanted = StateDictOptions(**options)
    state = copy.deepcopy(get_optimizer_state_dict(problem.model, optimizer, options=wanted))
    twin = copy.deepcopy(problem)
    twin.model.zero_grad()
    other = build(twin.model.parameters())
    set_optimizer_state_dict(twin.model, other, state, options=wanted)
    assert other.param_groups[0]["lr"] == 0.9
    assert twin.train(other, 2) == problem.train(optimizer, 2)
    assert torch.equal(twin.flat(), problem.flat()) and other.last_step == optimizer.last_step


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")
def test_distributed_checkpoint_to_files_and_back(build: Build, tmp_path: Path) -> None:
    problem, optimizer = trained(build)
    state = get_optimizer_state_dict(problem.model, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    twin = copy.deepcopy(problem)
    twin.model.zero_grad()
    other = build(twin.model.parameters())
    loaded = get_optimizer_state_dict(twin.model, other)
    dcp.load({"optimizer": loaded}, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(twin.model, other, loaded)
    assert twin.train(other, 2) == problem.train(optimizer, 2)
    assert torch.equal(twin.flat(), problem.flat()) and other.last_step == optimizer.last_step


def test_a_state_is_made_for_distributed_checkpoint_and_nothing_else(build: Build) -> None:
    problem = Problem()
    optimizer = build(problem.model.parameters())
    before = problem.flat()
    get_optimizer_state_dict(problem.model, optimizer)
    assert torch.equal(problem.flat(), before) and optimizer.param_groups[0]["lr"] == 1.0
    assert optimizer.last_step is None
    twin = Problem()
    assert problem.train(optimizer, 2) == twin.train(build(twin.model.parameters()), 2)
    assert torch.equal(problem.flat(), twin.flat())
    # A learning rate of zero alone, as a warm-up begins, is no such wish.
    idle = build(problem.model.parameters(), lr=0.0)
    problem.closure()
    with pytest.raises(RuntimeError, match="needs a closure"):
        idle.step()


def test_strings_in_the_state_do_no_harm(build: Build) -> None:
    problem = Problem()
    optimizer = build(problem.model.parameters())
    optimizer.state["note"] = "mine"
    optimizer.state["count"] = 3
    twin = copy.deepcopy(problem)
    problem.train(optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    assert state["state"]["note"] == "mine" and state["state"]["count"] == 3
    other = build(twin.model.parameters())
    other.load_state_dict(state)
    assert other.state["note"] == "mine" and other.state["count"] == 3
    with pytest.raises(KeyError, match="no data"):
        optimizer.step(_without_data)
    assert same(optimizer.state_dict(), state)


def _without_data() -> Tensor:
    raise KeyError("no data")


# Hooks.


def test_hooks_around_steps_run_in_torchs_order(build: Build) -> None:
    problem = Problem()
    optimizer = build(problem.model.parameters())
    seen: list[int] = []

    def noting(number: int) -> Callable[..., None]:
        return lambda optimizer, args, kwargs: seen.append(number)

    handles = [
        register_optimizer_step_pre_hook(noting(0)),
        optimizer.register_step_pre_hook(noting(1)),
        optimizer.register_step_pre_hook(noting(2)),
        optimizer.register_step_post_hook(noting(3)),
        register_optimizer_step_post_hook(noting(4)),
    ]
    try:
        problem.train(optimizer)
        assert seen == [0, 1, 2, 3, 4]
    finally:
        for handle in handles:
            handle.remove()
    problem.train(optimizer)
    assert len(seen) == 5


def test_a_hook_before_the_step_may_give_the_closure(build: Build) -> None:
    problem, twin = Problem(), Problem()
    optimizer, other = build(problem.model.parameters()), build(twin.model.parameters())
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, problem.closure), {}))
    optimizer.step()
    twin.train(other)
    assert torch.equal(problem.flat(), twin.flat())


def test_hooks_around_states_see_and_change_what_is_saved_and_loaded(build: Build) -> None:
    problem, optimizer = trained(build)
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("saving 1"))
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("saving 0"), prepend=True)

    def saved(opt: Any, state: dict[str, Any]) -> dict[str, Any]:
        (memory,) = [memory for memory in state["state"].values() if memory]
        assert torch.equal(memory["layout"], torch.tensor([6, 2, 4, 2]))
        return {**state, "state": {**state["state"], "note": "saved"}}

    optimizer.register_state_dict_post_hook(saved)
    state = optimizer.state_dict()
    assert state["state"]["note"] == "saved" and seen == ["saving 0", "saving 1"]

    twin = copy.deepcopy(problem)
    other = build(twin.model.parameters())
    other.register_load_state_dict_pre_hook(lambda opt, state: seen.append("loading 1"))
    other.register_load_state_dict_pre_hook(lambda opt, state: seen.append("loading 0"), prepend=True)
    other.register_load_state_dict_post_hook(lambda opt: seen.append(f"loaded {len(opt.state_dict()['state']) > 1}"))
    other.load_state_dict(state)
    assert seen[2:] == ["loading 0", "loading 1", "loaded True"]
    assert_goes_on_alike(problem, optimizer, twin, other)


def test_a_hook_before_loading_may_repair_a_state(build: Build) -> None:
    problem, optimizer = trained(build)
    broken = copy.deepcopy(optimizer.state_dict())
    del broken["param_groups"][0]["products"]
    (memory,) = [memory for memory in broken["state"].values() if memory]
    memory["layout"] += 1
    twin = copy.deepcopy(problem)
    other = build(twin.model.parameters())
    for message in ("no products", "another model"):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(broken)
        assert not other.state
        broken["param_groups"][0]["products"] = "auto"

    def repair(opt: Any, state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        (memory,) = [memory for memory in state["state"].values() if memory]
        memory["layout"] -= 1
        return state

    handle = other.register_load_state_dict_pre_hook(repair)
    other.load_state_dict(broken)
    assert_goes_on_alike(problem, optimizer, twin, other)
    handle.remove()
    with pytest.raises(ValueError, match="another model"):
        other.load_state_dict(broken)


# Groups and parameters.


def test_groups_may_be_empty(build: Build) -> None:
    problem, twin = Problem(), Problem()
    optimizer = build([{"params": []}, {"params": problem.model.parameters()}, {"params": [], "lr": 0.5}])
    optimizer.add_param_group({"params": []})
    other = build(twin.model.parameters())
    problem.train(optimizer, 2)
    again = build([{"params": []}, {"params": problem.model.parameters()}, {"params": []}, {"params": []}])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    problem.train(again, 2)
    twin.train(other, 4)
    assert torch.equal(problem.flat(), twin.flat())
    with pytest.raises(ValueError, match="params must hold at least one tensor"):
        build([{"params": []}])


def test_groups_can_be_copied(build: Build) -> None:
    problem, optimizer = trained(build)
    copied = copy.deepcopy(optimizer.param_groups)
    assert [group.keys() for group in copied] == [group.keys() for group in optimizer.param_groups]
    again = build(copied)
    assert all(p is not q for p, q in zip(again.param_groups[0]["params"], problem.model.parameters(), strict=True))


def test_a_rate_may_be_a_tensor(build: Build) -> None:
    problem, twin = Problem(), Problem()
    optimizer = build(problem.model.parameters(), lr=torch.tensor(0.5))
    other = build(twin.model.parameters(), lr=0.5)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, 3) for o in (optimizer, other)]
    for _ in range(4):
        problem.train(optimizer), twin.train(other)
        for schedule in schedules:
            schedule.step()
    torch.testing.assert_close(problem.flat(), twin.flat(), rtol=1e-5, atol=1e-6)  # the tensor's rate is float32
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
    again = build(problem.model.parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.step(problem.closure)
    assert again.last_step.reason == "the learning rate is zero"


def test_rates_that_are_no_number_are_refused(build: Build) -> None:
    with pytest.raises(ValueError, match="lr must be zero or positive, and finite, got tensor"):
        build([torch.zeros(2, requires_grad=True)], lr=torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match=r"lr must be zero or positive, and finite, got -0\.1"):
        build([torch.zeros(2, requires_grad=True)], lr=torch.tensor(-0.1))


def test_what_a_closure_returns_is_what_the_step_returns(build: Build) -> None:
    problem, twin = Problem(), Problem()
    optimizer, other = build(problem.model.parameters()), build(twin.model.parameters())
    for _ in range(2):
        number = optimizer.step(lambda: problem.closure().item())
        assert type(number) is float and number == float(other.step(twin.closure))
    assert torch.equal(problem.flat(), twin.flat())
    # At a minimum, where no step is taken, as elsewhere.
    theta = torch.zeros(2, requires_grad=True)

    def closure() -> Tensor:
        theta.grad = None
        loss = F.mse_loss(theta, torch.zeros(2))
        loss.backward()
        return loss

    optimizer = build([theta], weight_decay=0.0)
    loss = optimizer.step(closure)
    assert isinstance(loss, Tensor) and not loss.requires_grad
    assert torch.equal(theta, torch.zeros(2))  # a gradient of zero moves nothing


def test_a_closure_without_gradients_moves_nothing(build: Build) -> None:
    problem, optimizer = trained(build)
    before, state = problem.flat(), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="neither called"):
        optimizer.step(lambda: torch.ones(()))
    assert torch.equal(problem.flat(), before)
    assert same(optimizer.state_dict(), state)


def test_complex_numbers_as_views_of_real_parameters(build: Build) -> None:
    """By the letter of the error that complex parameters get."""
    torch.manual_seed(0)
    A, b = torch.randn(6, 3, dtype=torch.complex128), torch.randn(6, dtype=torch.complex128)
    start = torch.randn(3, dtype=torch.complex128)
    with pytest.raises(ValueError, match=r"complex128.*view_as_real\(p\.detach\(\)\).*view_as_complex"):
        build([nn.Parameter(start)])
    p = nn.Parameter(torch.view_as_real(start.detach()).clone())
    pieces = nn.Parameter(start.real.clone()), nn.Parameter(start.imag.clone())

    def descend(params: list[nn.Parameter], z: Callable[[], Tensor]) -> Tensor:
        optimizer = build(params)

        def closure() -> Tensor:
            optimizer.zero_grad()
            r = torch.view_as_real(A @ z() - b)
            loss = F.mse_loss(r, torch.zeros_like(r))
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        return z().detach()

    found = descend([p], lambda: torch.view_as_complex(p))
    other = descend(list(pieces), lambda: torch.complex(*pieces))
    whole = build([nn.Parameter(torch.zeros(1))]).defaults.get("blocks") != "parameter"
    exact = torch.linalg.lstsq(A, b[:, None]).solution[:, 0]
    assert float((found - exact).abs().max()) < float((start - exact).abs().max())
    if whole:
        torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-3)


def test_every_state_is_of_use(build: Build) -> None:
    _, optimizer = trained(build)
    assert all(len(memory) > 0 for memory in optimizer.state.values())


def test_the_bad_arguments_of_torchs_list(build: Build) -> None:
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match="params must be an iterable of tensors"):
        build(p)
    with pytest.raises(TypeError, match="params must hold tensors only"):
        build([p, "weight"])
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        build([2 * p])
    with pytest.raises(ValueError, match="with/without names"):
        build([("weight", p), nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="more than one parameter group"):
        build([{"params": [p]}, {"params": [p]}])
    optimizer = build([p])
    with pytest.raises(TypeError, match="parameter group must be a dict"):
        optimizer.add_param_group([p])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(build([{"params": [p]}, {"params": [nn.Parameter(torch.zeros(1))]}]).state_dict())
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(build([p, nn.Parameter(torch.zeros(1))]).state_dict())


def test_more_memory_is_not_taken_step_by_step(build: Build) -> None:
    problem, optimizer = trained(build, 3)
    sizes = [sum(t.numel() for t in tensors(optimizer))]
    problem.train(optimizer, 3)
    assert sum(t.numel() for t in tensors(optimizer)) == sizes[0]
