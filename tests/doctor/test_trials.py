"""Each set-up works here, and says so where its subject is broken."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import newtonopt.callbacks
from newtonopt import Evaluation, HessianFree, LevenbergMarquardt, LinearOperator, evaluate, hessian
from newtonopt.curvature import Spectrum, extreme_eigenvalues
from newtonopt.doctor import trials
from newtonopt.doctor.examination import Finding, Status, tried

HERE = {
    "HessianFree": partial(trials.steps, HessianFree),
    "LevenbergMarquardt": partial(trials.steps, LevenbergMarquardt),
    "eigenvalues": trials.eigenvalue,
    "attention": trials.attention,
    "LSTM": trials.recurrent,
    "autocast": trials.autocast,
    "CurvatureMonitor": trials.monitor,
    "tab": trials.tab,
}


@pytest.mark.parametrize("name", HERE)
def test_a_set_up_works_here(name: str) -> None:
    found = tried(HERE[name])
    assert found.status is Status.OK, found


def fails(attempt: Callable[[], str], words: str) -> None:
    found = tried(attempt)
    assert found.status is Status.FAILS, found
    assert words in found.detail
    assert found.remedy


def unavailable(attempt: Callable[[], str], words: str) -> Finding:
    found = tried(attempt)
    assert found.status is Status.UNAVAILABLE, found
    assert words in found.detail
    return found


def lazy(params: Iterable[Tensor]) -> HessianFree:
    """An optimizer whose steps are too short."""
    return HessianFree(params, lr=0.1)


def test_steps_that_do_not_reach_the_minimum() -> None:
    fails(partial(trials.steps, lazy), "10 steps leave 0.")  # type: ignore[arg-type]


def test_steps_that_raise() -> None:
    def broken(params: Iterable[Tensor]) -> HessianFree:
        raise RuntimeError("no kernel image is available")

    fails(partial(trials.steps, broken), "RuntimeError: no kernel image")  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_steps_on_a_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there: Any = torch.cuda if device == "cuda" else torch.backends.mps
    monkeypatch.setattr(there, "is_available", lambda: False)
    unavailable(partial(trials.device_steps, device), "no such device")
    monkeypatch.setattr(there, "is_available", lambda: True)
    taken = []
    monkeypatch.setattr(trials, "steps", lambda kind, device: taken.append(device) or "reaches")
    assert tried(partial(trials.device_steps, device)).status is Status.OK
    assert taken == [device]


def test_an_eigenvalue_outside_of_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(operator: LinearOperator, top: int, bottom: int) -> Spectrum:
        found = extreme_eigenvalues(operator, top, bottom)
        wrong = replace(found.top[0], lower=1.01 * found.top[0].upper, upper=1.1 * found.top[0].upper)
        return replace(found, top=(wrong,))

    monkeypatch.setattr(trials, "extreme_eigenvalues", off)
    fails(trials.eigenvalue, "an eigenvalue is")


@pytest.mark.parametrize("attempt", [trials.attention, trials.recurrent], ids=["attention", "LSTM"])
def test_products_that_are_wrong_or_formed_in_another_way(
    attempt: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trials, "hessian", lambda evaluation: hessian(evaluation).shift(1.0))
        fails(attempt, "a product is wrong by")

    def differenced(closure: Callable[[], Any], params: Iterable[Tensor]) -> Evaluation:
        return evaluate(closure, params, products="finite_difference")

    monkeypatch.setattr(trials, "_TOLERANCE", 1.0)
    monkeypatch.setattr(trials, "evaluate", differenced)
    fails(attempt, "products are formed as finite_difference")


def test_autocast_that_keeps_steps_from_the_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "HessianFree", lazy)
    fails(trials.autocast, "10 steps leave")


def no_compiler(z: Tensor) -> Tensor:
    raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand more")


class Compiled(nn.Module):
    """Stand in for a compiled model, which computes something else after the steps."""

    def __init__(self, model: nn.Module, after: Callable[[Tensor], Tensor], stepped: list[None]) -> None:
        super().__init__()
        self.model, self.after, self.stepped = model, after, stepped

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.model(x)
        return self.after(z) if self.stepped else z


@pytest.mark.parametrize("after", [torch.clone, no_compiler, torch.exp])
def test_compiled_models(after: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    stepped: list[None] = []
    steps = trials.step_to_the_minimum
    monkeypatch.setattr(trials, "step_to_the_minimum", lambda *args: (steps(*args), stepped.append(None)))
    monkeypatch.setattr(torch, "compile", lambda model: Compiled(model, after, stepped))
    if after is torch.clone:
        assert tried(trials.compiled).status is Status.OK
    elif after is no_compiler:
        found = unavailable(trials.compiled, "steps work, but torch.compile itself does not (RuntimeError: Invalid")
        assert "C++ compiler" in found.remedy
    else:
        fails(trials.compiled, "computes something else")


def test_compiled_models_on_which_steps_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "HessianFree", lazy)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    fails(trials.compiled, "10 steps leave")


def test_two_processes_that_go_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_in_two_processes", lambda work: torch.zeros(4, dtype=torch.float64))
    fails(trials.data_parallel, "steps of two processes differ from those of one by")
    monkeypatch.setattr(trials, "_in_two_processes", lambda work: torch.tensor([9.0, 1.0, 8.0]))
    fails(trials.sharded, "10 steps leave 0.88")


@pytest.mark.parametrize("attempt", [trials.data_parallel, trials.sharded], ids=["DDP", "FSDP2"])
def test_a_torch_without_gloo(attempt: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    unavailable(attempt, "without torch.distributed or gloo")


@pytest.mark.skipif(sys.platform != "linux", reason="Gloo reads this variable on Linux")
def test_a_machine_whose_network_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonesuch0")
    found = unavailable(trials.data_parallel, "torch.distributed itself does not start")
    assert "GLOO_SOCKET_IFNAME" in found.remedy


def test_lightning_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(newtonopt, "callbacks")
    monkeypatch.delitem(sys.modules, "newtonopt.callbacks")
    monkeypatch.setitem(sys.modules, "newtonopt.callbacks.curvature_monitor", None)
    assert "lightning>=" in unavailable(trials.monitor, "newtonopt.callbacks needs Lightning and TensorBoard").remedy


class Silent(lightning.pytorch.Callback):
    def __init__(self, every_n_train_steps: int) -> None:
        super().__init__()


class Doubling(Silent):
    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.logger.log_metrics({"curvature/lambda_max": 7.0}, trainer.global_step)


@pytest.mark.parametrize(
    ("monitor", "words"),
    [(Silent, "hold no curvature/lambda_max"), (Doubling, "lambda_max is logged as 7, but is 3.5")],
)
def test_a_monitor_that_does_not_log_the_truth(
    monitor: type[Silent], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newtonopt.callbacks, "CurvatureMonitor", monitor)
    fails(trials.monitor, words)


def test_a_tab_that_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "entry_points", lambda group, name: ())
        fails(trials.tab, "TensorBoard is not told of the tab")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorboard.plugins.base_plugin", None)
        unavailable(trials.tab, "tensorboard is not installed")
    monkeypatch.setattr("newtonopt_tensorboard.plugin.CurvatureTab.is_active", lambda tab: False)
    fails(trials.tab, "the tab does not see a run")


@pytest.mark.slow
def test_processes_after_a_group_that_did_not_start_here() -> None:
    with pytest.raises(RuntimeError, match=r"(?i)time"):
        dist.init_process_group(
            "gloo", store=dist.HashStore(), rank=0, world_size=2, timeout=timedelta(milliseconds=10)
        )
    found = tried(trials.data_parallel)
    assert found.status is Status.OK, found


@pytest.mark.slow
@pytest.mark.parametrize("attempt", [trials.compiled, trials.data_parallel, trials.sharded])
def test_set_ups_with_processes_work_here(attempt: Callable[[], str]) -> None:
    found = tried(attempt)
    assert found.status is Status.OK, found
