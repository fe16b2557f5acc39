"""Available memory, and optimizers and operators that refuse a matrix that would not fit before anything happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import build

from newtonopt import CubicNewton, DampedNewton, HessianFree, NewtonCG, TrustRegionNewton, evaluate, hessian
from newtonopt.vectors import memory

NEEDING_THE_MATRIX = {
    "damped_newton": (DampedNewton, {}, 'blocks="parameter", or HessianFree'),
    "trust_region": (TrustRegionNewton, {"subproblem": "exact"}, 'subproblem="steihaug"'),
    "cubic": (CubicNewton, {"subproblem": "exact"}, 'subproblem="lanczos"'),
}


@pytest.mark.parametrize("name", NEEDING_THE_MATRIX)
def test_nothing_happens_before_the_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, settings, remedy = NEEDING_THE_MATRIX[name]
    case = build("batch_norm", "mse")
    n = len(case.flat())
    optimizer = kind(case.params, **settings)
    before, state = case.flat(), {k: v.clone() for k, v in case.model.state_dict().items()}
    monkeypatch.setattr(memory, "available_memory", lambda device: 4 * n**2 * 8 - 1)
    with pytest.raises(MemoryError, match=f"{4 * n**2 * 8:,} bytes.*{4 * n**2 * 8 - 1:,}.*{remedy}"):
        optimizer.step(case.closure)
    assert torch.equal(case.flat(), before)
    assert all(p.grad is None for p in case.params)
    assert all(torch.equal(v, state[k]) for k, v in case.model.state_dict().items())
    assert optimizer.last_step is None
    assert optimizer.state_dict()["state"] == {}
    monkeypatch.setattr(memory, "available_memory", lambda device: 4 * n**2 * 8)
    optimizer.step(case.closure)
    assert optimizer.last_step.products == n + 1  # and one that checks those formed at once


def test_blocks_fit_where_the_matrix_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    case = build("mlp", "mse")  # tensors of 20, 5, 15 and 3 entries
    needed = 8 * (20**2 + 5**2 + 15**2 + 3**2 + 3 * 20**2)
    monkeypatch.setattr(memory, "available_memory", lambda device: needed)
    optimizer = DampedNewton(case.params, blocks="parameter")
    optimizer.step(case.closure)
    assert optimizer.last_step is not None and optimizer.last_step.accepted
    with pytest.raises(MemoryError, match=r"blocks=.parameter."):
        DampedNewton(case.params).step(case.closure)
    monkeypatch.setattr(memory, "available_memory", lambda device: needed - 1)
    with pytest.raises(MemoryError, match=r"parameter of shape \(5, 4\).*Take HessianFree"):
        optimizer.step(case.closure)
    with pytest.raises(MemoryError, match=r"The curvature matrix of 43 parameters.*Take HessianFree"):
        DampedNewton(case.params).step(case.closure)


@pytest.mark.parametrize(("kind", "other"), [(HessianFree, '"empirical_fisher"'), (NewtonCG, "preconditioner=None")])
def test_a_sketch_that_does_not_fit_names_what_the_optimizer_has(
    kind: type[HessianFree | NewtonCG], other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = build("mlp", "mse")
    monkeypatch.setattr(memory, "available_memory", lambda device: 100)
    with pytest.raises(MemoryError, match=f"sketch of rank=60.*smaller rank or .*{other}"):
        kind(case.params, preconditioner="nystrom", rank=60).step(case.closure)


def test_dense_refuses_what_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = build("linear", "mse")
    H = hessian(evaluate(case.closure, case.params))
    monkeypatch.setattr(memory, "available_memory", lambda device: 8 * 15**2 - 1)
    with pytest.raises(MemoryError, match=r"A 15 x 15 matrix would take 1,800 bytes.*1,799"):
        H.dense()
    assert H.products == 0


def test_a_matrix_larger_than_any_machine_is_refused() -> None:
    """No monkeypatch: the memory of this machine decides."""
    theta = torch.empty(10**7, requires_grad=True)  # whose pages nobody touches
    with pytest.raises(MemoryError, match=r"1,600,000,000,000,000 bytes"):
        DampedNewton([theta]).step(lambda: pytest.fail("the closure ran"))


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux tells what is free")
def test_available_memory_is_below_the_machines() -> None:
    available = memory.available_memory(torch.device("cpu"))
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert available is not None and 2**20 < available <= total
    assert memory.available_memory(torch.device("meta")) is None


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: dict[str, Any] = {"memory.max": 1000, "memory.current": 700, "memory.stat": "anon 500\ninactive_file 150"}
    for name, content in files.items():
        (tmp_path / name).write_text(str(content))
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    assert memory.available_memory(torch.device("cpu")) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory(torch.device("cpu")) == pytest.approx(memory._left_by_the_machine(), rel=0.05)


def test_a_full_container_has_nothing_left_and_one_without_figures_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    machine = memory._left_by_the_machine()
    assert memory.available_memory(torch.device("cpu")) == pytest.approx(machine, rel=0.05)
    for name, content in {"memory.max": "100", "memory.current": "130", "memory.stat": "inactive_file 10"}.items():
        (tmp_path / name).write_text(content)
    assert memory.available_memory(torch.device("cpu")) == 0
    assert not memory.fits(1, torch.float32, torch.device("cpu"))


def test_the_machines_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    monkeypatch.setattr(memory, "_MACHINE", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal:       32 kB\nMemFree:        2 kB\nMemAvailable:   8 kB\n")
    assert memory.available_memory(torch.device("cpu")) == 8 * 1024
    assert memory.fits(1024, torch.float64, torch.device("cpu"))
    assert not memory.fits(1025, torch.float64, torch.device("cpu"))
    with pytest.raises(
        MemoryError, match=r"^The matrix would take 8,200 bytes .* but only 8,192 .* on cpu\. Take less\.$"
    ):
        memory.check_room(1025, torch.float64, torch.device("cpu"), "The matrix", "Take less.")
    memory.check_room(10**15, torch.float64, torch.device("meta"), "The matrix", "Take less.")  # unknown
