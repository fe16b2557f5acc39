"""Sharded optimizers: rejected steps, memory, checkpoints, and refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from processes import run
from sharded_problems import bits, closure_of, data, network, sharded_network, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from newtonopt import DampedNewton, HessianFree, evaluate, gauss_newton, hessian, jacobian
from newtonopt.curvature import extreme_eigenvalues
from newtonopt.vectors.sharded import Sharded, local_part


def rejected(rank: int) -> None:
    model = sharded_network()
    start = [local_part(p).clone() for p in model.parameters()]
    params = list(model.parameters())
    x, y = (t.chunk(2)[rank] for t in data())

    def closure() -> Tensor:
        far = any(bool(((local_part(p) - s).abs() > 1e-4).any()) for p, s in zip(params, start, strict=True))
        model.zero_grad()
        loss = F.mse_loss(model(x), y) * (torch.nan if far else 1.0)
        loss.backward()
        return loss

    optimizer = HessianFree(params, preconditioner=None)
    before = bits(model)
    optimizer.step(closure)
    report = optimizer.last_step
    assert report is not None and not report.accepted and report.trials > 3
    assert bits(model) == before
    assert all(isinstance(p.grad, DTensor) for p in params)


def test_parameters_after_a_rejected_step_are_the_same_to_the_bit() -> None:
    run(rejected)


def in_parts(rank: int) -> None:
    """Form products of a closure with several losses, next to parameters of the same modules that are not trained."""
    x, y = (t.chunk(2)[rank] for t in data())
    model, twin = sharded_network(), sharded_network()
    trained = [p for name, p in model.named_parameters() if name != "2.bias"]
    other = model[2].bias
    other.grad = torch.ones_like(other)
    kept = other.grad

    def closure() -> Tensor:
        for p in trained:
            p.grad = None
        total = torch.zeros((), dtype=x.dtype)
        for a, b in zip(x.split(2), y.split(2), strict=True):
            loss = F.mse_loss(model(a), b) / 2
            loss.backward()
            total += loss.detach()
        return total

    F.mse_loss(twin(x), y).backward()
    evaluation = evaluate(closure, trained)
    expected = [p.grad.full_tensor().reshape(-1) for name, p in twin.named_parameters() if name != "2.bias"]
    torch.testing.assert_close(evaluation.gradient.full_tensor(), torch.cat(expected))
    for build in (hessian, gauss_newton):
        assert bool(torch.isfinite(build(evaluation) @ evaluation.gradient).all())
    assert other.grad is kept and bool((kept.full_tensor() == 1).all())
    assert all(p.grad is None for p in trained)


def test_parts_of_a_loss_and_parameters_of_others() -> None:
    run(in_parts)


class Largest(TorchDispatchMode):
    """Records the longest dimension of any plain tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, (list, tuple)) else (made,):
            if isinstance(t, Tensor) and not isinstance(t, (Sharded, DTensor)):
                self.length = max(self.length, *t.shape, 0)
        return made


def largest(rank: int) -> tuple[int, int, int]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(100, 100) for _ in range(4)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    x = torch.randn(4, 100)

    def closure() -> Tensor:
        model.zero_grad()
        loss = F.mse_loss(model(x), x)
        loss.backward()
        return loss

    seen = Largest()
    dispatch = Sharded.__torch_dispatch__.__func__  # type: ignore[attr-defined]

    def watched(cls: type, *args: Any) -> Any:
        with seen:
            return dispatch(cls, *args)

    Sharded.__torch_dispatch__ = classmethod(watched)  # type: ignore[assignment]
    try:
        with seen:
            evaluation = evaluate(closure, model.parameters())
            n = evaluation.gradient.numel()
            extreme_eigenvalues(hessian(evaluation), top=1, bottom=1, max_products=3)
            optimizer = HessianFree(model.parameters(), rank=1, max_iterations=3)
            optimizer.step(closure)
            optimizer.load_state_dict(optimizer.state_dict())
    finally:
        Sharded.__torch_dispatch__ = classmethod(dispatch)  # type: ignore[assignment]
    return seen.length, n, evaluation.gradient.to_local().numel()


def test_no_process_holds_a_whole_vector() -> None:
    for length, n, held in run(largest):
        assert n == 4 * 10100
        assert held == n // 2
        assert length <= held


SETTINGS = [
    {"preconditioner": "nystrom", "rank": 4},
    {"preconditioner": "empirical_fisher"},
]


def trained(rank: int, settings: dict[str, Any], steps: int) -> tuple[nn.Module, HessianFree, Callable[[], Tensor]]:
    model = sharded_network()
    optimizer = HessianFree(model.parameters(), max_iterations=4, **settings)
    closure = closure_of(model, rank, dist.get_world_size())
    for _ in range(steps):
        optimizer.step(closure)
    return model, optimizer, closure


def saved(rank: int, settings: dict[str, Any], folder: str, of_torch: bool) -> Tensor:
    model, optimizer, closure = trained(rank, settings, 3)
    state = get_optimizer_state_dict(model, optimizer) if of_torch else optimizer.state_dict()
    dcp.save({"model": model.state_dict(), "optimizer": state}, checkpoint_id=folder)
    optimizer.step(closure)
    return whole(model)


def resumed(rank: int, settings: dict[str, Any], folder: str, of_torch: bool) -> Tensor:
    model, optimizer, closure = trained(rank, settings, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    state = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer) if of_torch else optimizer.state_dict(),
    }
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    if of_torch:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    else:
        optimizer.load_state_dict(state["optimizer"])
    optimizer.step(closure)
    assert int(optimizer.state_dict()["state"][0]["steps"]) == 4
    return whole(model)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["preconditioner"])
@pytest.mark.parametrize(
    "of_torch", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["state_dict", "get_optimizer_state_dict"]
)
def test_checkpoint_resumes_on_as_many_processes_and_on_fewer(
    settings: dict[str, Any], of_torch: bool, tmp_path: Path
) -> None:
    expected = run(saved, settings, str(tmp_path), of_torch)[0]
    assert torch.equal(run(resumed, settings, str(tmp_path), of_torch)[0], expected)
    alone = run(resumed, settings, str(tmp_path), of_torch, count=1)[0]
    torch.testing.assert_close(alone, expected, rtol=1e-6, atol=1e-6)


def refused(rank: int) -> None:
    model = sharded_network()
    params = list(model.parameters())
    closure = closure_of(model, rank, 2)
    with pytest.raises(ValueError, match="params must be whole tensors for DampedNewton"):
        DampedNewton(params)
    for products in ("cached", "streamed"):
        with pytest.raises(ValueError, match=f"products must be 'auto' or .* for modules sharded.*, got '{products}'"):
            evaluate(closure, params, products)
    with pytest.raises(ValueError, match="params must be all sharded or all plain, got 6 sharded and 1 plain"):
        HessianFree([*params, nn.Parameter(torch.ones(2, dtype=torch.float64))])
    whole_one = nn.Parameter(distribute_tensor(torch.ones(4), init_device_mesh("cpu", (2,)), [Replicate()]))
    with pytest.raises(ValueError, match="params must be sharded by fully_shard in dimension 0"):
        HessianFree([whole_one])
    evaluation = evaluate(closure, params)
    with pytest.raises(NotImplementedError, match="jacobian needs each process's own gradients"):
        jacobian(evaluation)
    with pytest.raises(ValueError, match="v must be sharded, like the operator's parameters, got a whole vector"):
        hessian(evaluation).dense()
    with pytest.raises(RuntimeError, match="The sharded parameters received no gradient"):
        evaluate(lambda: torch.ones((), requires_grad=True) * 2, params)
    coarse = fully_shard(network(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"gathers the parameters as torch\.bfloat16, which is too coarse"):
        evaluate(closure_of(coarse, rank, 2), coarse.parameters())
    optimizer = HessianFree(params, max_iterations=2)
    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="changed after this evaluation was made"):
        hessian(evaluation) @ evaluation.gradient
    old = FullyShardedDataParallel(network(), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel \(FSDP1\).*fully_shard"):
        HessianFree(old.parameters())
    flat = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel \(FSDP1\).*fully_shard"):
        HessianFree(flat.parameters())


def weigh_unequally(rank: int) -> str:
    model, (x, y) = sharded_network(), data()
    mine = slice(0, 1) if rank == 0 else slice(1, None)
    with pytest.raises(RuntimeError) as raised:
        evaluate(lambda: F.mse_loss(model(x[mine]), y[mine]), model.parameters())
    return str(raised.value)


def test_unequal_batches_are_refused() -> None:
    """The engine averages gradients with equal weights."""
    for message in run(weigh_unequally):
        assert "fully_shard averages gradients over processes with equal weights" in message


def test_refusals() -> None:
    run(refused)


def test_deepspeed_is_refused_at_the_step_too() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = HessianFree([p])
    p.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="partitioned by DeepSpeed"):
        optimizer.step(lambda: (p**2).sum())


def one_fails(rank: int) -> str:
    model = sharded_network()
    evaluation = evaluate(closure_of(model, rank, 2), model.parameters())
    v = evaluation.gradient
    # As if this process's closure had taken another batch.
    evaluation = dataclasses.replace(evaluation, local_loss=evaluation.local_loss + rank)
    with pytest.raises(RuntimeError) as raised:
        hessian(evaluation) @ v
    return str(raised.value)


def test_an_error_of_one_process_reaches_the_others() -> None:
    here, there = run(one_fails)
    assert "failed on another process" in here
    assert "The closure computed the loss" in there
