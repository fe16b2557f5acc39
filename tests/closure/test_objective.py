"""The tap, the objective and their isolation: every trap of a user's closure."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import build, models
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from newtonopt import evaluate, hessian
from newtonopt.closure.objective import Objective


class Noisy(nn.Module):
    """Everything that a forward pass can leave behind: BatchNorm, Dropout, a power iteration, a counter, other random
    streams.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh())
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2))
        self.calls = 0
        self.seen: list[float] = []
        self.total = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.total += 1.0
        self.last_output = self.head(self.body(x)) + random.random() + float(np.random.rand())
        self.seen.append(float(self.last_output.detach().sum()))
        return self.last_output


def noisy() -> tuple[Noisy, list[nn.Parameter], Tensor, Tensor]:
    model = Noisy()
    return model, list(model.parameters()), torch.randn(6, 3), torch.randn(6, 2)


def traces(model: Noisy) -> list[object]:
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None), model.total]
    others = [model.calls, tuple(model.seen), random.getstate(), tuple(np.random.get_state()[1]), id(model.last_output)]
    return [t.clone() for t in tensors] + [torch.get_rng_state(), *others]


def same(a: list[object], b: list[object]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


def test_a_replay_is_the_same_function_and_leaves_no_trace() -> None:
    model, params, x, y = noisy()

    def closure() -> Tensor:
        model.zero_grad(set_to_none=False)
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    closure()
    objective = Objective(closure, params)
    first = objective.record()
    after = traces(model)
    zero = torch.zeros_like(first.gradient)
    assert objective.loss_at(zero) == float(first.loss)
    assert same(traces(model), after)
    loss, gradient = objective.gradient_at(zero)
    assert loss == float(first.loss)
    assert torch.equal(gradient, first.gradient)
    assert objective.loss_at(0.1 * gradient) != float(first.loss)
    assert same(traces(model), after)


def test_evaluate_leaves_no_trace() -> None:
    model, params, x, y = noisy()

    def closure() -> Tensor:
        model.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    closure()
    before = traces(model)
    evaluation = evaluate(closure, params)
    assert same(traces(model), before)
    gradient = evaluation.gradient.clone()
    closure()  # the same random numbers follow
    torch.testing.assert_close(gradient, torch.cat([p.grad.reshape(-1) for p in params]))


@pytest.mark.parametrize("mode", ["record", "replay"])
def test_a_closure_that_raises_leaves_no_trace(mode: str) -> None:
    model, params, x, y = noisy()
    broken = False

    def closure() -> Tensor:
        model.zero_grad(set_to_none=False)
        out = model(x)
        if broken:
            raise KeyError("half way")
        loss = F.mse_loss(out, y)
        loss.backward()
        return loss

    closure()
    objective = Objective(closure, params)
    if mode == "replay":
        objective.record()
    buffers = [b.clone() for b in model.buffers()]
    state, start = torch.get_rng_state(), [p.detach().clone() for p in params]
    broken = True
    with pytest.raises(KeyError, match="half way"):
        objective.record() if mode == "record" else objective.loss_at(torch.ones_like(objective.point))
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(start, params, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    broken = False
    closure()  # and the tap is gone: backward works as ever
    assert all(p.grad is not None for p in params)


def test_autocast_in_bfloat16_gives_products() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = torch.randn(16, 3), torch.randn(16, 2)

    def closure() -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.mse_loss(model(x).float(), y)
        loss.backward()
        return loss

    H = hessian(evaluate(closure, model.parameters())).dense()
    exact = hessian(evaluate(lambda: F.mse_loss(model(x), y), model.parameters())).dense()
    assert H.dtype == torch.float32
    assert float((H - exact).norm() / exact.norm()) < 0.05


def test_clipping_is_seen_and_accumulation_is_an_error() -> None:
    case = build("mlp", "mse")

    def clipped() -> Tensor:
        loss = case.closure()
        torch.nn.utils.clip_grad_norm_(case.params, 1e-3)
        return loss

    objective = Objective(clipped, case.params)
    assert objective.record().clipped

    def accumulating() -> Tensor:
        loss = case.loss(case.model(case.inputs))
        loss.backward()
        return loss

    case.closure()
    with pytest.raises(RuntimeError, match=r"zero_grad.*accumulate_grad_batches=1"):
        Objective(accumulating, case.params).record()


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"params must hold at least one tensor, got none\. Write model\.parameters\(\)"
    ):
        evaluate(lambda: torch.zeros(()), [])
    with pytest.raises(ValueError, match="at least one tensor that requires a gradient, got 2 that do not"):
        evaluate(lambda: torch.zeros(()), [torch.zeros(1), torch.zeros(1)])
    with pytest.raises(ValueError, match=r"got cpu, meta"):
        evaluate(
            lambda: torch.zeros(()),
            [torch.zeros(1, requires_grad=True), torch.zeros(1, device="meta", requires_grad=True)],
        )
    for dtype, advice in {
        torch.float16: r"Keep the weights in float32.*bf16-mixed",
        torch.complex64: r"must be real, got torch\.complex64\. Keep .*torch\.view_as_complex",
    }.items():
        with pytest.raises(ValueError, match=advice):
            evaluate(lambda: torch.zeros(()), [torch.zeros(1, dtype=dtype, requires_grad=True)])
    with pytest.raises(TypeError, match=r"iterable of tensors, got a Linear\. Write model\.parameters\(\)"):
        evaluate(lambda: torch.zeros(()), nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"params must be an iterable of tensors, got a Tensor. Write a list"):
        evaluate(lambda: torch.zeros(()), torch.zeros(1, requires_grad=True))
    with pytest.raises(TypeError, match=r"params must hold tensors only, got a tuple in it"):
        evaluate(lambda: torch.zeros(()), nn.Linear(1, 1).named_parameters())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"closure must be a function without arguments .*, got tensor"):
        evaluate(torch.zeros(()), [torch.zeros(1, requires_grad=True)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"products must be 'auto' or .*, got 'exact'"):
        evaluate(lambda: torch.zeros(()), [torch.zeros(1, requires_grad=True)], products="exact")  # type: ignore[arg-type]


def test_a_loss_of_other_parameters_is_refused() -> None:
    case, other = build("mlp", "mse"), build("mlp", "mse")
    with pytest.raises(RuntimeError, match="does not depend on any of the given parameters"):
        evaluate(case.closure, other.params)


def test_reentrant_checkpoints_are_refused_and_others_work() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3).double().requires_grad_(), torch.randn(5, 2).double()

    def loss(reentrant: bool) -> Tensor:
        return F.mse_loss(model[2](checkpoint(model[:2], x, use_reentrant=reentrant)), y)

    plain = evaluate(lambda: F.mse_loss(model(x), y), model.parameters())
    through = evaluate(lambda: loss(False), model.parameters())
    torch.testing.assert_close(hessian(through).dense(), hessian(plain).dense())
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        evaluate(lambda: loss(True), model.parameters())


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    with pytest.raises(RuntimeError, match="sparse=False"):
        evaluate(lambda: table(torch.tensor([1])).square().sum(), table.parameters())


def test_every_model_replays_bit_equal() -> None:
    for name in models():
        case = build(name, "cross_entropy")
        objective = Objective(case.closure, case.params)
        loss = float(objective.record().loss)
        assert objective.loss_at(torch.zeros_like(objective.point)) == loss, name


def test_gradient_and_hessian_can_share_one_backward_pass() -> None:
    """Loss, gradient and products are those of two passes, and the graphs go with the evaluation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, labels = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2

    def closure() -> Tensor:
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    apart, joined = (Objective(closure, model.parameters(), twice=twice).evaluate() for twice in (False, True))
    assert apart.recording.graph.gradients is None
    assert joined.recording.graph.gradients is not None
    assert not joined.gradient.requires_grad
    torch.testing.assert_close(joined.gradient, apart.gradient, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(hessian(joined).dense(), hessian(apart).dense(), rtol=1e-10, atol=1e-12)
    joined.free()
    assert joined.recording.graph.gradients is None
