"""The program of `make gpu` works, on small problems and on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    specification = importlib.util.spec_from_file_location("gpu_program", PROGRAM)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["gpu_program"] = module
    sys.path.insert(0, str(PROGRAM.parent))
    try:
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(str(PROGRAM.parent))
    return module


@pytest.mark.slow
def test_all_parts_run_small_on_a_cpu(program: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--device", "cpu", "--small", "--out", str(tmp_path)]
    environment = {**os.environ, "NEWTONOPT_COMMIT": "abc123"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0, run.stdout + run.stderr
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert record["card"] == "CPU" and record["commit"] == "abc123" and record["small"]
    assert record["parts"].keys() == program.PARTS.keys()
    assert {part["status"] for part in record["parts"].values()} == {"passed"}
    found = {name: part["found"] for name, part in record["parts"].items()}
    assert found["tests"]["counts"].keys() == {"passed"} and found["tests"]["failures"] == {}
    assert len(found["products"]) == 3
    for product in found["products"].values():
        assert product["by gradient"].keys() >= {"hessian", "gauss_newton"}
    assert found["hessian_free"].keys() == {"autoencoder"}
    optimizers = "LevenbergMarquardt", "HessianFree"
    assert list(found["levenberg_marquardt"]) == [
        f"{equation}, {name}" for equation in ("convection-30", "poisson-5d-large") for name in optimizers
    ]
    assert found["levenberg_marquardt"]["poisson-5d-large, LevenbergMarquardt"]["horizon"] == 700.0
    for figures in (*found["hessian_free"].values(), *found["levenberg_marquardt"].values()):
        assert figures["steps"] >= 1 and len(figures["loss"]) == len(figures["seconds"])
    for figures in found["lightning"].values():
        assert figures["monitors change no bit"]
        assert "curvature/lambda_max" in figures["logged"]
    assert "newton/ratio" in found["lightning"]["HessianFree"]["logged"]
    assert found["monitor"].keys() == {"defaults", "top eigenvalue alone"}
    for figures in found["monitor"].values():
        assert figures["overhead"] > 0.0 and figures["products"]["certified"]
    [largest] = found["billion"].values()
    assert largest["certified"] and largest["lower"] <= largest["value"] <= largest["upper"]
    [synchronised] = found["synchronisations"].values()
    assert synchronised["gauss_newton, an iteration"] == 1.0
    for name in program.PARTS:
        assert f"{name}: passed" in run.stdout
    assert "extrapolated to 700 s, not measured" in run.stdout
    assert "more time" in run.stdout and "parameters: " in run.stdout


def test_the_large_models_have_the_sizes_that_are_said(program: ModuleType) -> None:
    sys.path.insert(0, str(PROGRAM.parent))
    try:
        from memory_setups import GPT, ResNet
    finally:
        sys.path.remove(str(PROGRAM.parent))

    def count(kind: Callable[..., nn.Module], *sizes: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in kind(*sizes).parameters())

    assert count(ResNet, 64, 1000) == 11_689_512  # torchvision's count
    assert 123e6 < count(GPT, 12, 768, 12, 50_257, 256) < 125e6
    assert 1.0e9 < count(GPT, 18, 2048, 16, 50_257, 128) < 1.02e9


def test_what_fails_or_hangs_is_recorded_and_ended(program: ModuleType) -> None:
    def run(code: str, limit: float, grace: float) -> object:
        return program.run_apart([sys.executable, "-c", code], limit, grace, lambda: None)

    failed = run("print('said'); raise ValueError('boom')", 30.0, 1.0)
    assert failed.status == "failed"  # type: ignore[attr-defined]
    assert "said" in failed.output and "ValueError: boom" in failed.output  # type: ignore[attr-defined]
    dumped = "import faulthandler, time; faulthandler.dump_traceback_later(0.2, exit=True); time.sleep(30)"
    for code, limit, shown in ((dumped, 0.1, "most recent call first"), ("import time; time.sleep(30)", 0.2, "")):
        began = time.perf_counter()
        late = run(code, limit, 10.0 if shown else 0.0)
        assert late.status == "timed out"  # type: ignore[attr-defined]
        assert shown in late.output  # type: ignore[attr-defined]
        assert time.perf_counter() - began < 20


def test_a_part_that_fails_keeps_what_it_found(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import pathlib, sys\n"
        "found = pathlib.Path(sys.argv[sys.argv.index('--found') + 1])\n"
        "found.write_text('{\"a model\": 1}')\n"
        "raise ValueError('boom')\n"
    )
    monkeypatch.setattr(program, "__file__", str(worker))
    record: dict[str, object] = {"parts": {}}
    outcome = program.run_part("products", program.Where("cpu", True), record, tmp_path / "cpu.json")
    assert outcome.status == "failed"
    [part] = json.loads((tmp_path / "cpu.json").read_text())["parts"].values()
    assert part["found"] == {"a model": 1}
    assert "ValueError: boom" in part["output"]


def test_the_limits_add_up_to_ten_minutes(program: ModuleType) -> None:
    assert sum(part.limit + program.GRACE for part in program.PARTS.values()) <= 600
