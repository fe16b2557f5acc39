"""A closure may keep state in every way that Python has: a step leaves what one run leaves, a measurement nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from keepers import KEEPERS, Training, content
from torch import Tensor, nn

from newtonopt import DampedNewton, HessianFree, evaluate, hessian
from newtonopt.curvature import measure

KEPT = pytest.mark.parametrize("name", KEEPERS)


@KEPT
@pytest.mark.parametrize("kind", [HessianFree, pytest.param(DampedNewton, marks=pytest.mark.slow)])
def test_a_step_leaves_what_one_run_leaves_and_trials_repeat_it(kind: Any, name: str) -> None:
    once = Training(name)
    for _ in range(3):
        once.closure()
    expected, drawn = content(once.keeper.state()), once.drawn()
    assert len(set(drawn)) > 1, "a keeper draws other numbers each time"
    training = Training(name)
    optimizer = kind(training.model.parameters())
    for step in range(3):
        training.drawn().clear()
        optimizer.step(training.closure)
        assert len(training.drawn()) > 1, "trials run the closure"
        assert set(training.drawn()) == {drawn[step]}
    assert content(training.keeper.state()) == expected


@KEPT
def test_a_measurement_leaves_no_trace(name: str) -> None:
    training = Training(name)
    training.closure()
    before = content(training.keeper.state())
    H = hessian(evaluate(training.closure, training.model.parameters(), products="streamed"))
    training.drawn().clear()
    H @ torch.ones(H.shape[1], dtype=torch.float64)
    measure(training.closure, training.model.parameters(), top=1, bottom=0, max_products=2)
    assert len(set(training.drawn())) == 1
    assert content(training.keeper.state()) == before


@KEPT
def test_a_closure_that_raises_takes_its_state_back(name: str) -> None:
    training = Training(name)
    before = content(training.keeper.state())

    def failing() -> Tensor:
        training.closure()
        raise KeyError("half way")

    with pytest.raises(KeyError, match="half way"):
        HessianFree(training.model.parameters()).step(failing)
    assert content(training.keeper.state()) == before


# Parameters.


class Scaled(nn.Module):
    """A network whose scale is a tensor that is no `nn.Parameter`, held in several places."""

    def __init__(self, held: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2).double()
        self.scale = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
        self.places: Any = {"list": [self.scale], "dict": {"scale": self.scale}}.get(held)
        scale = self.scale
        self.of_closure = lambda: scale
        self.held = held
        if held != "attribute":
            del self.scale

    def forward(self, x: Tensor) -> Tensor:
        where: Any = {"list": 0, "dict": "scale"}.get(self.held)
        scale = self.scale if self.held == "attribute" else self.of_closure() if where is None else self.places[where]
        return scale * self.layer(x)


@pytest.mark.parametrize("products", ["cached", "streamed", "finite_difference"])
@pytest.mark.parametrize("held", ["attribute", "list", "dict", "closure"])
def test_a_parameter_is_never_copied_wherever_it_is_held(held: str, products: Any) -> None:
    model = Scaled(held)
    scale = model.of_closure()
    params = [*model.parameters(), scale]
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()

    def loss_of(weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        return F.mse_loss(scale * F.linear(x, weight, bias), y)

    rows = torch.autograd.functional.hessian(loss_of, tuple(params))
    blocks = [torch.cat([h.reshape(p.numel(), -1) for h in row], 1) for row, p in zip(rows, params, strict=True)]
    truth = torch.cat(blocks)
    evaluation = evaluate(lambda: F.mse_loss(model(x), y), params, products=products)
    torch.testing.assert_close(hessian(evaluation).dense(), truth, rtol=1e-6, atol=1e-8)
    expected = torch.autograd.grad(loss_of(*params), params)
    torch.testing.assert_close(evaluation.gradient, torch.cat([g.reshape(-1) for g in expected]))


def test_parameters_that_share_memory_are_refused() -> None:
    words = r"params must not share memory, got two parameters that do.*Use one parameter in both places"
    encoder, decoder = nn.Linear(3, 2), nn.Linear(2, 3)
    decoder.weight.data = encoder.weight.data.t()
    tied = [*encoder.parameters(), *decoder.parameters()]
    memory = torch.randn(4, 6)
    overlapping = [nn.Parameter(memory[:3]), nn.Parameter(memory[2:])]
    wide = [nn.Parameter(torch.zeros(1).expand(5))]
    crossed = [nn.Parameter(memory[:, 1:]), nn.Parameter(memory[:, 0]), nn.Parameter(memory[1, :2])]
    for params in (tied, overlapping, wide, crossed):
        before = [p.detach().clone() for p in params]
        for refused in (
            lambda params=params: HessianFree(params),
            lambda params=params: evaluate(lambda: None, params),
        ):
            with pytest.raises(ValueError, match=words):
                refused()
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    # Tied between two steps.
    other = nn.Linear(2, 3)
    optimizer = HessianFree([*encoder.parameters(), *other.parameters()])
    other.weight.data = encoder.weight.data.t()
    with pytest.raises(ValueError, match=words):
        optimizer.step(lambda: encoder.weight.sum() + other.weight.sum())


def test_parameters_that_lie_side_by_side_are_taken() -> None:
    memory = torch.randn(4, 6)
    for params in (
        [nn.Parameter(memory[:2]), nn.Parameter(memory[2:])],
        [nn.Parameter(memory[:, ::2]), nn.Parameter(memory[:, 1::2])],
    ):
        evaluation = evaluate(lambda params=params: sum(p.square().sum() for p in params), params)
        torch.testing.assert_close(hessian(evaluation).dense(), 2 * torch.eye(24))


# State that the loss's graph keeps.


@pytest.mark.parametrize("products", ["cached", "streamed"])
def test_hooks_that_products_run_leave_nothing(products: Any) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)), torch.randn(8, 3), torch.randn(8, 2)
    norms: list[float] = []
    source = random.Random(0)

    def hook(gradient: Tensor) -> None:
        norms.append(source.random() + random.random() + float(torch.rand(())))

    def closure() -> Tensor:
        model.zero_grad()
        z = model(x)
        z.register_hook(hook)
        loss = F.mse_loss(z, y)
        loss.backward()
        return loss

    random.seed(0)
    measure(closure, model.parameters(), top=1, bottom=0, products=products)
    assert norms == []
    state = random.getstate(), torch.get_rng_state()
    closure()
    expected, after = norms[:], (random.getstate(), torch.get_rng_state())
    random.setstate(state[0])
    torch.set_rng_state(state[1])
    source.seed(0)
    norms.clear()
    if products == "streamed":
        return  # differentiates as the closure runs, beside its own backward
    HessianFree(model.parameters(), products=products).step(closure)
    assert norms == expected
    assert random.getstate() == after[0] and torch.equal(torch.get_rng_state(), after[1])
