"""The use of `step` as torch.optim allows it: hooks, groups, schedulers, odd parameters, modes, states, errors."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from optimizer_db import OPTIMIZERS, Build
from problems import Unseen
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler

import newtonopt
from newtonopt import HessianFree
from newtonopt.optimizers.newton import NewtonOptimizer

INPUTS = torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
TARGETS = torch.tensor([0.0, 1.0, 1.0, 0.0])


@pytest.fixture(params=OPTIMIZERS)
def build(request: pytest.FixtureRequest) -> Build:
    return OPTIMIZERS[request.param]


class Logistic:
    """Three weights in pieces, and the closure of a smooth convex loss of them."""

    def __init__(self, *sizes: int, dtype: torch.dtype = torch.float32) -> None:
        self.pieces = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in sizes or (3,)]
        self.x, self.y = INPUTS.to(dtype), TARGETS.to(dtype)
        self.set_to_none = True

    def closure(self) -> Tensor:
        for p in self.pieces:
            if self.set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()
        loss = F.binary_cross_entropy_with_logits(self.x @ torch.cat(self.pieces), self.y)
        loss.backward()
        return loss

    def flat(self) -> Tensor:
        return torch.cat(self.pieces).detach().clone()


def after(build: Build, steps: int, problem: Logistic | None = None) -> Tensor:
    problem = problem or Logistic()
    optimizer = build(problem.pieces)
    for _ in range(steps):
        optimizer.step(problem.closure)
    return problem.flat()


def test_the_state_lies_under_the_first_parameter_and_the_settings_show(build: Build) -> None:
    problem = Logistic(1, 2)
    optimizer = build([{"params": [problem.pieces[0]]}, {"params": [problem.pieces[1]], "lr": 0.25}])
    optimizer.step(problem.closure)
    assert list(optimizer.state) == [problem.pieces[0]]
    text = repr(optimizer)
    assert text.startswith(f"{type(optimizer).__name__} (")
    for name in optimizer.defaults:
        for group in optimizer.param_groups:
            assert f"    {name}: {group[name]}\n" in text


def test_hooks_run_around_steps_and_states(build: Build) -> None:
    problem = Logistic()
    optimizer = build(problem.pieces)
    seen: list[str] = []

    def before_step(optimizer: Any, args: Any, kwargs: Any) -> Any:
        seen.append(f"before {optimizer.last_step is not None}")
        return args, {"closure": kwargs["closure"]}

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(f"after {opt.last_step.accepted}"))
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda opt, state: {**state, "param_groups": [{**state["param_groups"][0], "lr": 0.125}]}
    )
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    optimizer.step(closure=problem.closure)
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert seen == ["before False", "after True", "saving", "loaded"]


def test_a_group_added_after_steps_joins_them(build: Build) -> None:
    problem, twin = Logistic(2, 1), Logistic(2, 1)
    optimizer = build([problem.pieces[0]])
    for _ in range(2):
        optimizer.step(problem.closure)
    assert not problem.pieces[1].any()
    optimizer.add_param_group({"params": [problem.pieces[1]], "lr": 0.5, "weight_decay": 0.1})
    twin_optimizer = build([{"params": [twin.pieces[0]]}, {"params": [twin.pieces[1]]}])
    for p, q in zip(twin.pieces, problem.pieces, strict=True):
        p.data.copy_(q)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        optimizer.step(problem.closure)
        twin_optimizer.step(twin.closure)
    assert problem.pieces[1].any()
    assert torch.equal(problem.flat(), twin.flat())


# Every scheduler in torch, as a user builds it; a new one is missed here until it is added.
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.5),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 2]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 1),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, total_iters=2),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)], [1]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 3),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, 2, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1.0, 5, cycle_momentum=False),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.5, 2),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    there = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, LRScheduler) and not name.endswith("LRScheduler")
    }
    assert there == set(SCHEDULERS)


# torch 2.8's SequentialLR calls what torch warns of.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
def test_every_scheduler_sets_the_rate_of_the_step(build: Build) -> None:
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def closure() -> Tensor:
        theta.grad = None
        loss = F.mse_loss(theta, torch.ones(2, dtype=torch.float64))
        loss.backward()
        return loss

    build([theta]).step(closure)
    whole = theta.detach().clone()
    for name, schedule in SCHEDULERS.items():
        theta.data.zero_()
        optimizer, oracle = build([theta], lr=1.0), torch.optim.SGD([theta], lr=1.0)
        pairs = [(o, schedule(o)) for o in (optimizer, oracle)]
        rates = []
        for _ in range(3):
            for o, scheduler in pairs:
                theta.data.zero_()
                if o is optimizer:
                    o.state.clear()  # every step is a first one
                    rates.append(o.param_groups[0]["lr"])
                    o.step(closure)
                    if o.defaults.get("line_search") != "strong_wolfe":  # which goes on to where the slope levels off
                        torch.testing.assert_close(theta.detach(), rates[-1] * whole, rtol=1e-9, atol=1e-12)
                else:
                    o.step()
                if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(1.0)
                else:
                    scheduler.step()
            assert optimizer.param_groups[0]["lr"] == oracle.param_groups[0]["lr"], name
        assert len({*rates, optimizer.param_groups[0]["lr"]}) > 1, name
        pairs[0][1].load_state_dict(copy.deepcopy(pairs[0][1].state_dict()))


@pytest.mark.parametrize("kind", [lr_scheduler.CyclicLR, lr_scheduler.OneCycleLR])
def test_cycling_a_momentum_that_is_not_there_is_torchs_error(kind: Any) -> None:
    settings = {"base_lr": 0.1} if kind is lr_scheduler.CyclicLR else {"total_steps": 5}
    optimizer = HessianFree([torch.zeros(1, requires_grad=True)])
    with pytest.raises(ValueError, match="support momentum or beta1 with `cycle_momentum`"):
        kind(optimizer, max_lr=1.0, **settings)


def test_gradients_may_be_zeroed_either_way(build: Build) -> None:
    in_place = Logistic()
    in_place.set_to_none = False
    assert torch.equal(after(build, 3, in_place), after(build, 3))


class Odd:
    """A view, a scalar, an empty, a non-contiguous and a tied parameter, with the same numbers in one vector."""

    SIZES = (3, 1, 0, 6, 2)

    def __init__(self, *, whole: bool) -> None:
        torch.manual_seed(0)
        start = 0.3 * torch.randn(12, dtype=torch.float64)
        view, scalar, empty, turned, tied = start.clone().split(self.SIZES)
        self.storage = torch.stack([view, torch.ones(3).double()], dim=1)
        self.parts = [
            nn.Parameter(self.storage[:, 0]),
            nn.Parameter(scalar.reshape(())),
            nn.Parameter(empty.reshape(0, 3)),
            nn.Parameter(turned.reshape(2, 3).T.contiguous().T),
            nn.Parameter(tied),
        ]
        self.vector = nn.Parameter(start)
        self.params = [self.vector] if whole else self.parts

    def closure(self) -> Tensor:
        for p in self.params:
            p.grad = None
        pieces = self.params[0].split(self.SIZES) if len(self.params) == 1 else self.params
        view, scalar, empty, turned, tied = pieces
        z = turned.reshape(2, 3) @ view + scalar.exp() * tied + tied.square() + empty.sum()
        loss = F.mse_loss(z, torch.tensor([1.0, -1.0]).double())
        loss.backward()
        return loss


def test_views_scalars_empty_tied_and_non_contiguous_parameters(build: Build) -> None:
    one, parts = Odd(whole=True), Odd(whole=False)
    defaults = build(parts.params).defaults
    # These differ by how the numbers are split.
    blocks = defaults.get("blocks") == "parameter" or "scaling" in defaults
    assert not parts.parts[0].is_contiguous() and not parts.parts[3].is_contiguous()
    optimizers = build(one.params), build(parts.params)
    for _ in range(3):
        optimizers[0].step(one.closure)
        optimizers[1].step(parts.closure)
    together = torch.cat([p.detach().reshape(-1) for p in parts.parts])
    if not blocks:
        # A truncated solve may end an iteration earlier by rounding.
        torch.testing.assert_close(together, one.vector.detach(), rtol=1e-4, atol=2e-5)
    assert torch.equal(parts.storage[:, 0], parts.parts[0])
    assert torch.equal(parts.storage[:, 1], torch.ones(3).double())


def test_a_parameter_given_twice_is_an_error() -> None:
    theta, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="got the same one twice"):
        HessianFree([theta, other, theta])


def test_nothing_but_empty_parameters_is_an_error(build: Build) -> None:
    theta = nn.Parameter(torch.zeros(0))
    with pytest.raises(RuntimeError, match="frozen or empty"):
        build([theta]).step(lambda: theta.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_dtype_changes_nothing(build: Build, dtype: torch.dtype) -> None:
    expected = after(build, 2, Logistic(dtype=dtype))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if dtype == torch.float32 else torch.float32)
    try:
        assert torch.equal(after(build, 2, Logistic(dtype=dtype)), expected)
    finally:
        torch.set_default_dtype(before)


def test_inference_mode_around_a_step_changes_nothing(build: Build) -> None:
    problem = Logistic()
    optimizer = build(problem.pieces)
    with torch.inference_mode():
        for _ in range(3):
            loss = optimizer.step(problem.closure)
    assert not loss.is_inference()
    assert torch.equal(problem.flat(), after(build, 3))
    problem.closure()  # and autograd still works on the parameters


def test_tensors_made_in_inference_mode_are_an_error_that_changes_nothing(build: Build) -> None:
    with torch.inference_mode():
        model, data = nn.Linear(2, 1), torch.ones(4, 3)
    with pytest.raises(
        ValueError, match=r"params must have derivatives, got one made under torch.inference_mode.*deepcopy"
    ):
        build(model.parameters())
    build(copy.deepcopy(model).parameters())
    problem = Logistic()
    optimizer = build(problem.pieces)
    optimizer.step(problem.closure)
    here = problem.flat()
    problem.x = data
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        optimizer.step(problem.closure)
    assert torch.equal(problem.flat(), here)


class Noisy:
    """Dropout, BatchNorm and three kinds of random numbers; raises in the call of a given number, half way."""

    calls = Unseen(int)

    def __init__(self) -> None:
        torch.manual_seed(2)
        random.seed(2)
        np.random.seed(2)
        self.model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Dropout(0.3), nn.Linear(2, 2))
        self.x, self.y = torch.randn(8, 2), torch.arange(8) % 2
        self.fails_at = 0

    def closure(self) -> Tensor:
        self.calls += 1
        self.model.zero_grad()
        scale = 1 + 0.1 * random.random() + 0.1 * np.random.rand()
        loss = F.cross_entropy(scale * self.model(self.x), self.y)
        if self.calls == self.fails_at:
            raise KeyError("half way")
        loss.backward()
        return loss

    def everything(self, optimizer: NewtonOptimizer) -> list[Any]:
        state = copy.deepcopy([value for key, value in vars(optimizer._state).items() if key != "layout"])
        tensors = [t.clone() for t in self.model.state_dict().values()]
        return [*tensors, torch.get_rng_state(), random.getstate(), str(np.random.get_state()), *state]


def same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("steps", [0, 2], ids=["in the first step", "later"])
@pytest.mark.parametrize("call", [1, 2], ids=["at the start", "in a trial"])
def test_a_closure_that_raises_half_way_leaves_all_as_before(build: Build, call: int, steps: int) -> None:
    problem = Noisy()
    optimizer = build(problem.model.parameters())
    for _ in range(steps):
        optimizer.step(problem.closure)
    before = problem.everything(optimizer)
    problem.fails_at = problem.calls + call
    with pytest.raises(KeyError, match="half way"):
        optimizer.step(problem.closure)
    assert same(problem.everything(optimizer), before)
    optimizer.step(problem.closure)
    twin = Noisy()
    twin_optimizer = build(twin.model.parameters())
    for _ in range(steps + 1):
        twin_optimizer.step(twin.closure)
    assert same(problem.everything(optimizer), twin.everything(twin_optimizer))


def test_the_command_line_builds_each_from_its_configuration() -> None:
    """Nothing but an optimizer's name and settings in YAML, as LightningCLI reads them."""
    yaml = pytest.importorskip("yaml")
    jsonargparse = pytest.importorskip("jsonargparse")
    configs = [
        yaml.safe_load(path.read_text()) for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    ]
    members = {f"newtonopt.{kind.__name__}" for kind in kinds()}
    found = [config["optimizer"] for config in configs if config["optimizer"]["class_path"] in members]
    assert {optimizer["class_path"] for optimizer in found} == members
    theta = nn.Parameter(torch.zeros(3))
    for settings in found:
        parser = jsonargparse.ArgumentParser()
        parser.add_subclass_arguments(torch.optim.Optimizer, "optimizer", skip={"params"}, instantiate=False)
        config = parser.parse_object({"optimizer": settings})
        name = settings["class_path"].split(".")[-1]
        optimizer = getattr(newtonopt, name)([theta], **config.optimizer.init_args)
        assert {key: optimizer.param_groups[0][key] for key in settings["init_args"]} == settings["init_args"]


def kinds() -> Iterable[type[NewtonOptimizer]]:
    public = (getattr(newtonopt, name) for name in newtonopt.__all__)
    return [kind for kind in public if inspect.isclass(kind) and issubclass(kind, NewtonOptimizer)]
