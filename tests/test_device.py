"""What crosses between a device and the host: scalars, once an iteration."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import build
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from newtonopt import HessianFree, evaluate, gauss_newton, hessian
from newtonopt.solvers.cg import conjugate_gradients

# What makes the host wait for a device.
WAITS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.cpu,
    Tensor.numpy,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__bool__,
    Tensor.__index__,
    Tensor.nonzero,
}


class Waits(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in WAITS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("operator", [hessian, gauss_newton], ids=lambda f: f.__name__)
def test_an_iteration_of_conjugate_gradients_waits_once(operator: Any) -> None:
    case = build("mlp", "mse")
    evaluation = evaluate(case.closure, case.params)
    A = operator(evaluation).shift(1.0)
    counts = {}
    for iterations in (3, 8):
        with Waits() as waits:
            solution = conjugate_gradients(
                A, evaluation.gradient, max_iterations=iterations, progress_tolerance=1e-9, keep_path=True
            )
        assert solution.iterations == iterations
        counts[iterations] = waits.count
    assert counts[8] - counts[3] <= 5


@contextmanager
def synchronisations() -> Iterator[list[str]]:
    """The warnings that torch gives of synchronising calls on CUDA."""
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
            found.extend(str(w.message) for w in caught if "synchronizing" in str(w.message))


@pytest.mark.gpu
def test_on_a_gpu_an_iteration_of_conjugate_gradients_waits_once() -> None:
    case = build("mlp", "mse", device="cuda")
    evaluation = evaluate(case.closure, case.params)
    A = gauss_newton(evaluation).shift(1e-3)
    A @ evaluation.gradient
    counts = {}
    for iterations in (3, 8):
        with synchronisations() as found:
            conjugate_gradients(A, evaluation.gradient, max_iterations=iterations, progress_tolerance=1e-9)
        counts[iterations] = len(found)
    assert counts[8] - counts[3] <= 5


@pytest.mark.gpu
def test_on_a_gpu_only_scalars_come_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10)).cuda()
    x, y = torch.randn(128, 64, device="cuda"), torch.randint(0, 10, (128,), device="cuda")
    optimizer = HessianFree(model.parameters(), preconditioner=None, max_iterations=20)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], profile_memory=True) as profile:
        optimizer.step(closure)
    copies = [e for e in profile.profiler.kineto_results.events() if "Memcpy DtoH" in e.name()]
    assert copies
    assert max(e.nbytes() for e in copies) <= 64
