"""The programs of docs/how_to run in the libraries that they are written for, where these are installed."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
# Warnings of the libraries, about themselves and one another.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a program in an empty folder, and leave the settings of torch and the filters of warnings as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DDE_BACKEND", "pytorch")
    dtype, formatwarning = torch.get_default_dtype(), warnings.formatwarning
    yield
    torch.set_default_dtype(dtype)
    warnings.formatwarning = formatwarning


def program(name: str, *needs: str) -> dict[str, Any]:
    """Return what a program defines; skip the test where a library that it needs is missing."""
    for package in needs:
        pytest.importorskip(package)
    with warnings.catch_warnings():  # PINA shows all warnings from its import on
        return runpy.run_path(str(ROOT / f"examples/how_to/{name}.py"))


def test_a_curve_is_fitted_as_by_scipy(capsys: pytest.CaptureFixture[str]) -> None:
    squares = program("least_squares")["main"]()
    assert squares["LevenbergMarquardt"] == pytest.approx(squares["L-BFGS, parameters of order one"], rel=1e-6)
    rows = re.findall(r"fitted\s+(\S+) \+- (\S+)\s+SciPy\s+(\S+) \+- (\S+)", capsys.readouterr().out)
    assert len(rows) == 8
    for value, error, theirs, their_error in (map(float, row) for row in rows):
        assert value == pytest.approx(theirs, rel=1e-4)
        assert error == pytest.approx(their_error, rel=1e-2)


@pytest.mark.slow
def test_a_physics_informed_network_beats_adam() -> None:
    errors = program("physics_informed")["main"](seconds=4.0)
    assert errors["LevenbergMarquardt"] < 0.1 * min(errors["Adam"], errors["L-BFGS"])


@pytest.mark.slow
def test_a_gaussian_process_is_fitted(capsys: pytest.CaptureFixture[str]) -> None:
    losses = program("gaussian_processes", "gpytorch")["main"]()
    assert losses["DampedNewton"] < losses["Adam, lr=0.1"] - 0.02
    assert losses["DampedNewton"] < losses["... strong_wolfe"] + 1e-3
    output = capsys.readouterr().out
    scales = re.findall(r"raw_lengthscale\s+(\S+) \+- (\S+)", output)
    known = [float(error) for _, error in scales[:2]]
    unknown = [float(error) for _, error in scales[2:]]
    assert len(scales) == 6 and max(known) < 2 < 10 < min(unknown)
    assert "critical point: " in output and max(map(len, output.splitlines())) <= 44


@pytest.mark.slow
def test_deepxde() -> None:
    errors = program("deepxde_model", "deepxde")["main"](lbfgs_steps=900)
    assert errors["LevenbergMarquardt"] < 0.1 * min(errors["adam"], errors["L-BFGS"])


@pytest.mark.slow
def test_pina(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        main = program("pina_solver", "pina")["main"]
        warnings.simplefilter("ignore")
        errors = main(seconds=3.0)
    assert errors["LevenbergMarquardt"] < 0.1 * errors["Adam"]
    assert "lambda_max of Adam's run: " in capsys.readouterr().out


@pytest.mark.slow
def test_skorch(capsys: pytest.CaptureFixture[str]) -> None:
    errors = program("skorch_regressor", "skorch")["main"](seconds=1.5)
    assert errors["HessianFree"] < 0.5 * errors["Adam"]
    assert "The largest eigenvalue is" in capsys.readouterr().out


@pytest.mark.slow
def test_pyro() -> None:
    distances = program("pyro_laplace", "pyro")["main"]()
    assert distances["DampedNewton"] < 1e-3 * distances["SVI with Adam"]


@pytest.mark.slow
def test_fabric(capsys: pytest.CaptureFixture[str]) -> None:
    losses = program("fabric_loop")["main"](seconds=1.5)
    assert losses["HessianFree"] < 0.1 * losses["Adam"]
    assert "times the stability threshold" in capsys.readouterr().out


@pytest.mark.slow
def test_torchrun_trains_as_one_process() -> None:
    printed = []
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        path = str(ROOT / "examples/how_to/torchrun_loop.py")
        run = subprocess.run([*command, path], capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        printed.append([float(loss) for loss in re.findall(r"loss of all data (\S+),", run.stdout)])
        assert "The largest eigenvalue is" in run.stdout
    assert len(printed[0]) == 10
    assert printed[1] == pytest.approx(printed[0], rel=0.02)
    assert printed[0][-1] < 0.5 * printed[0][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "needs", "settings", "steps"),
    [
        ("hugging_face", ["transformers", "accelerate"], {"STEPS": 4, "EVERY": 2}, [1, 2, 4]),
        ("ignite_engine", ["ignite"], {"EPOCHS": 1, "EVERY": 6}, [1, 6, 12]),
    ],
)
def test_the_loops_of_other_libraries_are_watched_and_train_as_before(
    name: str,
    needs: list[str],
    settings: dict[str, int],
    steps: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    main = program(name, *needs)["main"]
    main.__globals__.update(settings)
    watched, alone = main("logs"), main("other", watched=False)
    assert all(torch.equal(p, q) for p, q in zip(watched.parameters(), alone.parameters(), strict=True))
    events = EventAccumulator("logs").Reload()
    assert [event.step for event in events.Scalars("curvature/lambda_max")] == steps
    assert [event.step for event in events.Tensors("curvature/record")] == steps
    assert [event.value for event in events.Scalars("curvature-bookkeeping/certified")] == [1.0, 0.0, 0.0]
    assert len(events.Scalars("curvature/stability_ratio")) == 3
    assert capsys.readouterr().out.count("The largest eigenvalue is") >= 3


@pytest.mark.slow
def test_engines_of_ignite_take_newton_steps() -> None:
    losses = program("ignite_engine", "ignite")["compare"](seconds=1.5)
    assert losses["HessianFree"] < 0.1 * losses["Adam"]
