"""The league of physics-informed networks poses the equations it names and keeps its record."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from math import inf, isnan, nan, pi
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch.func import vmap

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ["convection-30", "convection-50", "reaction", "wave", "burgers", "allen-cahn", "helmholtz", "poisson-2d"]
NAMES += ["poisson-5d", "inverse-burgers", "convection-30-more", "convection-30-anew"]
NAMES += ["convection-50-anew"]
LARGE = ["poisson-5d-large", "poisson-10d-large"]


@pytest.fixture(scope="module")
def programs() -> SimpleNamespace:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return SimpleNamespace(
            **{
                name: importlib.import_module(name)
                for name in ("equations", "references", "training", "league", "peers", "pinn")
            }
        )
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_every_equation_is_tried_here(programs: SimpleNamespace) -> None:
    assert list(programs.pinn.ALL) == NAMES + LARGE


@pytest.mark.parametrize("name", NAMES + LARGE)
def test_an_equation_lives_on_the_device_that_it_was_posed_on(programs: SimpleNamespace, name: str) -> None:
    problem = programs.training.on_device(programs.pinn.ALL[name].problem, "meta", 0)
    for _ in range(2):
        assert problem.loss().device.type == "meta"
        problem.draw()
    model = problem.model
    counts = {"poisson-5d-large": 10_065, "poisson-10d-large": 118_145}
    assert sum(p.numel() for p in model.parameters()) == counts.get(name, sum(p.numel() for p in model.parameters()))


def test_an_error_is_extended_as_a_power_of_the_time(programs: SimpleNamespace) -> None:
    grid = [0.5 * index for index in range(21)]
    errors = [1.0, *(second**-2 for second in grid[1:])]
    run = programs.training.Run("LevenbergMarquardt", "LevenbergMarquardt", 0, 9, 1.0, grid, errors, errors)
    assert programs.training.extrapolated(run, 100.0) == pytest.approx(1e-4)
    assert isnan(programs.training.extrapolated(replace(run, error=grid), 100.0))
    assert isnan(programs.training.extrapolated(replace(run, failure="it broke"), 100.0))
    entries = (programs.league.Entry("burgers", "abc", run),)
    conditions = {"processor": "one", "cores": 4, "card": "a card"}
    league = programs.league.League(conditions, {}, 10.0, {"burgers": "u_t"}, {"LevenbergMarquardt": "defaults"})
    text = programs.league.markdown(replace(league, entries=entries, horizons={"burgers": 100.0, "wave": 9.0}))
    assert text.startswith("10 seconds of wall time a run, one thread, one with 4 cores, a card.")
    assert "Extrapolated, not measured: LevenbergMarquardt, burgers, seed 0: error 1.0e-02 at 10 s, 1.0e-04 at" in text
    assert "Extrapolated" not in programs.league.markdown(replace(league, entries=entries))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "allen-cahn"])
def test_the_solution_has_no_residual(programs: SimpleNamespace, name: str) -> None:
    equation = programs.pinn.ALL[name]
    problem = equation.problem(0)
    if name == "inverse-burgers":
        for coefficient, value in zip(problem.model.coefficients, (1.0, 0.01 / pi), strict=True):
            coefficient.data.fill_(value)
    for term in problem.terms():
        targets = 0.0 if term.targets is None else term.targets
        residual = vmap(lambda p, term=term: term.residual(lambda q: equation.solution(*q), p))(term.points)
        assert (residual - targets).abs().max() < 1e-11


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_mean_square_of_the_terms(programs: SimpleNamespace, name: str) -> None:
    problem = programs.pinn.ALL[name].problem(1)
    if name == "inverse-burgers":
        for coefficient in problem.model.coefficients:
            coefficient.data.fill_(0.3)
    for _ in range(2):
        problem.draw()
        residuals = programs.peers.Residuals(problem)
        inputs, targets = residuals.samples()
        with torch.no_grad():
            mean = (residuals(inputs) - targets).square().mean()
        torch.testing.assert_close(problem.loss().detach(), mean, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_points_are_drawn_anew_only_where_that_is_said(programs: SimpleNamespace, name: str) -> None:
    problem = programs.pinn.ALL[name].problem(0)
    before = problem.loss().item()
    assert problem.loss().item() == before
    problem.draw()
    assert (problem.loss().item() != before) == (name == "poisson-5d" or name.endswith("-anew"))


def test_seeds_change_weights_and_points(programs: SimpleNamespace) -> None:
    first, again, other = (programs.equations.convection(seed, 30.0) for seed in (0, 0, 1))
    assert first.loss().item() == again.loss().item() != other.loss().item()
    assert first.error() == again.error() != other.error()


def test_burgers_reference_does_not_depend_on_its_nodes(programs: SimpleNamespace) -> None:
    x, t = torch.rand(2, 500, dtype=torch.float64)
    coarse, fine = (programs.references.burgers_solution(2 * x - 1, t, 0.01 / pi, nodes) for nodes in (100, 200))
    torch.testing.assert_close(coarse, fine, rtol=0.0, atol=1e-13)


def test_allen_cahn_reference_agrees_with_scipy(programs: SimpleNamespace) -> None:
    modes = 256
    x, waves = -1 + 2 * np.arange(modes) / modes, pi * np.arange(modes // 2 + 1)

    def slope(t: float, u: np.ndarray) -> np.ndarray:
        return 1e-4 * np.fft.irfft(-(waves**2) * np.fft.rfft(u), modes) + 5 * (u - u**3)

    start = x**2 * np.cos(pi * x)
    found = solve_ivp(slope, (0.0, 1.0), start, "DOP853", np.linspace(0.0, 1.0, 64), rtol=1e-9, atol=1e-11).y
    ours = programs.references.allen_cahn_solution(129, modes, 16)
    assert ours.shape == (129, 64)
    np.testing.assert_allclose(ours[:-1], found[::2], rtol=0.0, atol=1e-7)
    assert torch.equal(ours[-1], ours[0])


def run(programs: SimpleNamespace, method: str, seed: int, loss: float, error: float) -> object:
    return programs.league.Run(method, method, seed, 7, 0.9, [0.0, 1.0], [1.0, loss], [1.0, error])


@pytest.fixture
def league(programs: SimpleNamespace) -> object:
    runs = [
        ("wave", run(programs, "LevenbergMarquardt", 1, 3e-9, 2.0)),
        ("wave", run(programs, "LevenbergMarquardt", 0, 1e-9, 1e-4)),
        ("wave", run(programs, "Adam", 0, 4e-4, 1e-1)),
        ("burgers", run(programs, "Adam", 0, nan, nan)),
    ]
    entries = tuple(programs.league.Entry(equation, "abc", made) for equation, made in runs)
    formulas, settings = {"wave": "u_tt", "burgers": "u u_x"}, {"LevenbergMarquardt": "defaults", "Adam": "1e-3"}
    return programs.league.League({"processor": "a", "cores": 2}, {"torch": "2"}, 60.0, formulas, settings, {}, entries)


def test_the_record_is_read_as_it_was_written(programs: SimpleNamespace, league: object, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    league.save(path)  # type: ignore[attr-defined]
    back = programs.league.League.load(path)
    assert repr(back) == repr(league)
    assert isnan(back.entries[-1].run.loss[-1])
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert back.entries[0].key == ("wave", "LevenbergMarquardt", 1)
    assert sorted(tmp_path.iterdir()) == [path]


def test_tables_hold_medians_and_ratios(programs: SimpleNamespace, league: object) -> None:
    losses, errors = (line for line in programs.league.markdown(league).splitlines() if line.startswith("| wave"))
    assert losses == "| wave | 0 1 | **2.0e-09** | 4.0e-04 (2e+05) | 2e+05 |"
    assert errors == "| wave | 0 1 | 1.0e+00 | **1.0e-01** (0.1) | 0.1 |"
    assert "| burgers | 0 |  | diverged |  |" in programs.league.markdown(league)
    figure = programs.league.draw(league, lambda run: run.loss, "loss")
    assert [axis.get_title() for axis in figure.axes] == ["wave", "burgers"]


def test_spurious_solutions_are_counted(programs: SimpleNamespace, league: object) -> None:
    [line] = [line for line in programs.league.spurious(league).splitlines() if line.startswith("| u_tt")]
    assert line == "| u_tt | 2 | 1 (seeds 1) | 1 | 0 | 2.0e-09 | 1e-04 2e+00 |"


def test_the_first_seed_of_every_equation_comes_first(programs: SimpleNamespace) -> None:
    tasks = programs.pinn.tasks(None, ["Adam", "SOAP"], None)
    assert tasks[:3] == [("convection-30", "Adam", 0), ("convection-30", "SOAP", 0), ("convection-50", "Adam", 0)]
    assert [seed for _, _, seed in tasks] == [0] * 20 + [1, 2] * 4
    assert len(set(tasks)) == len(tasks)


def test_a_missing_package_is_named(programs: SimpleNamespace) -> None:
    adam = programs.peers.METHODS["Adam"]
    assert adam.missing is None
    assert replace(adam, package="no-such-package").missing.startswith("no-such-package is not installed")


def test_momentum_is_tried_where_points_are_drawn_anew(programs: SimpleNamespace) -> None:
    tasks = programs.pinn.tasks(["wave", "poisson-5d"], None, None)
    assert [name for name, method, _ in tasks if method == programs.league.MOMENTUM] == ["poisson-5d"]
    assert [name for name, method, _ in tasks if method == programs.league.OURS] == ["wave", "poisson-5d"]


def test_an_error_ends_a_run_where_it_stood(programs: SimpleNamespace) -> None:
    def begin(task: object) -> object:
        def step() -> None:
            for param in task.model.parameters():  # type: ignore[attr-defined]
                param.data.zero_()
            raise ZeroDivisionError("boom\nand more")

        return step

    contender = programs.training.Contender("broken", ((0.5, begin), (1.0, begin)), "broken")
    problem = programs.equations.EQUATIONS["poisson-2d"].problem
    made = programs.training.train(problem, contender, 0, 1.0, "processor", lambda message: None)
    assert made.failure == "ZeroDivisionError: boom" and made.steps == 1
    assert made.loss == [problem(0).loss().item()] * 21 and made.error == [problem(0).error()] * 21
    assert len(made.seconds) == 21


@pytest.mark.slow
def test_an_interrupted_league_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "record.json"

    def program(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(BENCHMARKS / "pinn.py"), "--output", str(path), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    short = ("--seconds", "0.3", "--equations", "poisson-2d", "--methods", "Adam")
    assert program(*short).returncode == 0
    first = json.loads(path.read_text())
    assert [entry["run"]["seed"] for entry in first["entries"]] == [0]
    refused = program(*short)
    assert refused.returncode == 1 and "Add --resume" in refused.stderr
    assert program(*short, "--seeds", "0", "1", "--resume").returncode == 0
    second = json.loads(path.read_text())
    assert second["entries"][:1] == first["entries"]
    assert [entry["run"]["seed"] for entry in second["entries"]] == [0, 1]
    other = program("--seconds", "5", *short[2:], "--resume")
    assert other.returncode == 1 and "under other conditions" in other.stderr
    for name in ("record.md", "record_loss.png", "record_error.png"):
        (tmp_path / name).unlink()
    drawn = program("--draw")
    assert drawn.returncode == 0 and "| poisson-2d | 0 1 |" in drawn.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        "record.json",
        "record.md",
        "record_loss.png",
        "record_error.png",
    }


def test_a_diverged_run_is_worse_than_any_other(programs: SimpleNamespace) -> None:
    assert programs.league.middle([1.0, nan, nan]) == inf
    assert programs.league.middle([1.0, 2.0, nan]) == 2.0
    assert isnan(programs.league.middle([]))
