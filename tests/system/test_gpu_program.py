"""The program of `make gpu` works, on small problems and on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

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
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert record["card"] == "CPU" and record["commit"] == "abc123" and record["small"]
    assert record["parts"].keys() == program.PARTS.keys()
    assert {part["status"] for part in record["parts"].values()} == {"passed"}
    found = {name: part["found"] for name, part in record["parts"].items()}
    assert found["tests"]["counts"].keys() == {"passed"} and found["tests"]["failures"] == {}
    [product] = found["products"].values()
    assert product["by gradient"].keys() >= {"hessian", "gauss_newton"}
    assert found["hessian_free"].keys() == {"convection, beta 30", "autoencoder"}
    for figures in found["hessian_free"].values():
        assert figures["steps"] >= 1 and len(figures["loss"]) == len(figures["seconds"])
    for figures in found["lightning"].values():
        assert figures["monitors change no bit"]
        assert "curvature/lambda_max" in figures["logged"]
    assert "newton/ratio" in found["lightning"]["HessianFree"]["logged"]
    [synchronised] = found["synchronisations"].values()
    assert synchronised["gauss_newton, an iteration"] == 1.0
    for name in program.PARTS:
        assert f"{name}: passed" in run.stdout


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


def test_the_limits_add_up_to_six_minutes(program: ModuleType) -> None:
    assert sum(part.limit + program.GRACE for part in program.PARTS.values()) <= 360
