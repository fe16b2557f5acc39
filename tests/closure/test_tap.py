"""The tap: which losses it sees, where it is in force, and which outputs it keeps alive."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import Batches, build, unseen
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from newtonopt import HessianFree, evaluate, gauss_newton, hessian, mark_outputs


def test_the_tap_is_gone_after_a_step_that_raised() -> None:
    model = nn.Linear(2, 1)
    optimizer = HessianFree(model.parameters())

    def closure() -> Tensor:
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        optimizer.step(closure)
    loss = model(torch.ones(1, 2)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()  # the graph was not retained


def test_the_tap_nests_with_other_modes() -> None:
    class Counting(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls = unseen([])

        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.calls().append(func)
            return func(*args, **(kwargs or {}))

    case = build("mlp", "by_hand")
    plain = gauss_newton(evaluate(case.closure, case.params)).dense()
    inner, outer = Counting(), Counting()

    def closure() -> Tensor:
        with inner:
            return case.closure()

    with outer:
        nested = gauss_newton(evaluate(closure, case.params)).dense()
    assert torch.equal(plain, nested)
    assert inner.calls() and outer.calls()


def test_the_tap_is_local_to_its_thread() -> None:
    case, other = build("mlp", "mse"), build("mlp", "mse", seed=1)
    inside, finished = threading.Event(), threading.Event()

    def work() -> None:
        inside.wait(10)
        other.closure()
        finished.set()

    def closure() -> Tensor:
        inside.set()
        assert finished.wait(10)
        return case.closure()

    thread = threading.Thread(target=work)
    thread.start()
    evaluation = evaluate(closure, case.params)
    thread.join()
    assert all(p.grad is not None and bool(p.grad.any()) for p in other.params)  # a real backward
    torch.testing.assert_close(evaluation.loss, case.loss(case.model(case.inputs)).detach())


def test_a_live_loss_without_backward() -> None:
    case = build("mlp", "cross_entropy")
    with_backward = evaluate(case.closure, case.params)
    live = evaluate(lambda: case.loss(case.model(case.inputs)), case.params)
    assert torch.equal(with_backward.gradient, live.gradient)
    assert torch.equal(hessian(with_backward).dense(), hessian(live).dense())


def test_backward_with_a_gradient_scales_the_objective() -> None:
    case = build("mlp", "mse")
    plain = evaluate(case.closure, case.params)
    scaled = evaluate(lambda: case.loss(case.model(case.inputs)).backward(torch.tensor(3.0).double()), case.params)
    torch.testing.assert_close(scaled.gradient, 3 * plain.gradient)
    torch.testing.assert_close(scaled.loss, 3 * plain.loss)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda loss: loss.item(), r"loss\.backward\(\); return loss"),
        (lambda loss: None, r"it returned a NoneType.*loss\.backward\(\); return loss"),
        (lambda loss: (loss, "aux"), r"it returned a tuple.*loss\.backward\(\); return loss"),
        (lambda loss: loss.detach(), r"it returned a Tensor without a graph.*no torch\.no_grad"),
        (lambda loss: loss.detach().expand(2), "it returned a Tensor without a graph"),
        (lambda loss: loss.expand(3), "return a scalar"),
    ],
)
def test_a_closure_without_a_loss_says_what_to_do(end: object, words: str) -> None:
    case = build("mlp", "mse")
    with pytest.raises(RuntimeError, match=words):
        evaluate(lambda: end(case.loss(case.model(case.inputs))), case.params)  # type: ignore[operator]


def test_autograd_backward_is_answered_with_the_method() -> None:
    case = build("mlp", "mse")

    def closure() -> Tensor:
        loss = case.loss(case.model(case.inputs))
        torch.autograd.backward(loss)
        return loss

    with pytest.raises(RuntimeError, match=r"torch\.autograd\.backward\(loss\).*loss\.backward\(\) inside"):
        evaluate(closure, case.params)


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has one precision for all of cuDNN")
def test_recurrent_networks_keep_the_precision_that_the_user_chose() -> None:
    kinds = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = [kind.fp32_precision for kind in kinds]
    network, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    kinds[0].fp32_precision, kinds[1].fp32_precision = "ieee", "tf32"
    try:
        A = hessian(evaluate(lambda: F.mse_loss(network(x)[0], torch.zeros(5, 2, 4)), network.parameters()))
        assert torch.isfinite(A @ torch.ones(A.shape[1])).all()
        assert [kind.fp32_precision for kind in kinds] == ["ieee", "tf32"]
        assert torch.backends.cudnn.enabled
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


def test_mark_outputs_is_an_identity_anywhere() -> None:
    z = torch.randn(3, requires_grad=True)
    assert mark_outputs(z) is z


def test_mark_outputs_names_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"z must be a tensor, got a value of type str. Give the model's output"):
        mark_outputs("x")  # type: ignore[arg-type]


class Watched(torch.autograd.Function):
    """An identity whose result's memory can be watched."""

    alive: ClassVar[Callable[[], list[weakref.ref[np.ndarray]]]] = unseen([])

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        memory = x.detach().numpy().copy()
        Watched.alive().append(weakref.ref(memory))
        return torch.from_numpy(memory)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


@pytest.mark.parametrize("loss", ["marked", "recognised", "log_softmax"])
def test_outputs_are_let_go(loss: str) -> None:
    problem, counts = Batches(), unseen([])
    functions = {
        "marked": lambda z, y: F.softplus(mark_outputs(z)).mean(),
        "recognised": F.cross_entropy,
        "log_softmax": lambda z, y: F.nll_loss(F.log_softmax(z, 1), y),
    }

    def closure() -> None:
        Watched.alive().clear()
        for x, y in problem.loader:
            functions[loss](Watched.apply(problem.model(x)), y).backward()
            counts().append(sum(ref() is not None for ref in Watched.alive()))

    H = hessian(evaluate(closure, problem.params, products="streamed"))
    counts().clear()
    H @ torch.ones(H.shape[1], dtype=torch.float64)
    assert max(counts()) == 0
