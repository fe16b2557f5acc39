"""The programs that print what products and steps cost work on small problems."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def imported(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def products() -> ModuleType:
    return imported("products")


def test_products_are_timed_and_missing_peers_named(
    products: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["products.py", "--networks", "small", "--seconds", "0"])
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    threads = torch.get_num_threads()
    try:
        products.main()
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "2-32-32-10" in line)
    assert "1,482" in row
    assert "curvlinops is left out" in printed


def test_the_timed_products_are_those_of_the_gradient(products: ModuleType) -> None:
    setup = products.NETWORKS["small"]()
    v = torch.randn(setup.count, generator=torch.Generator().manual_seed(0))
    (g,) = torch.autograd.grad(
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(products.loss_of(setup), setup.parameters, create_graph=True)]
        )
        @ v,
        [setup.parameters[0]],
    )
    product = products.newtonopt(setup, v)[products.HESSIAN]()
    torch.testing.assert_close(product[: g.numel()], g.flatten(), rtol=1e-4, atol=1e-6)


def test_a_peer_with_another_matrix_ends_the_program(products: ModuleType) -> None:
    ours = torch.ones(3)
    products.check_equal("peer", products.HESSIAN, ours * (1 + 1e-4), ours)
    for other in (2 * ours, ours * float("nan")):
        with pytest.raises(SystemExit, match="peer: the Hessian product differs"):
            products.check_equal("peer", products.HESSIAN, other, ours)


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    return imported("scaling")


def test_a_slope_is_the_power_of_the_last_two_points(scaling: ModuleType) -> None:
    assert scaling.slope([(1, 7.0), (10, 3.0), (1000, 3e4)]) == pytest.approx(2.0)
    for parameters in (1e3, 1e5):
        task = scaling.task_of(parameters, 2)
        assert task.count == scaling.count_of(scaling.width_of(parameters))
        assert task.count == pytest.approx(parameters, rel=0.05)


@pytest.mark.slow
def test_what_would_not_fit_in_memory_is_left_out(scaling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "point", lambda sweep, at, name, make: scaling.Point(sweep, at, name, 1.0, 100 * at))
    memory = SimpleNamespace(available=200 * scaling.count_of(scaling.width_of(1e4)))
    monkeypatch.setattr(scaling.psutil, "virtual_memory", lambda: memory)
    found = [p for p in scaling.sweeps([1e3, 1e4, 1e5, 1e6], 1e3) if p.sweep == "parameters"]
    assert [p.seconds for p in found] == [1.0, 1.0, None, None] * len(scaling.ACTIONS)


def test_scaling_is_measured_small_and_written_into_the_page(scaling: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--largest", "1e4", "--middle", "1e3"]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{scaling.BEGIN}\nold\n{scaling.END}\nafter\n")
    places = ["--results", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.png"), "--page", str(page)]
    subprocess.run([*command, *places], check=True, timeout=300, capture_output=True)
    points = scaling.load(tmp_path / "a.json")
    assert len(points) == len(scaling.ACTIONS) * (2 + len(scaling.BATCHES) + len(scaling.PROCESSES))
    assert all(p.seconds > 0.0 and p.bytes > 0.0 for p in points)
    assert page.read_text() == f"before\n{scaling.BEGIN}\n{scaling.table(points)}\n{scaling.END}\nafter\n"
    assert (tmp_path / "a.png").stat().st_size > 0


def test_the_page_shows_the_recorded_run(scaling: ModuleType) -> None:
    points = scaling.load(scaling.RESULTS)
    assert f"{scaling.BEGIN}\n{scaling.table(points)}\n{scaling.END}" in scaling.PAGE.read_text()
    # The work is linear in the parameters; LAPACK's factorisations of a sketch take a little more.
    for name in scaling.ACTIONS:
        for what in ("seconds", "bytes"):
            assert scaling.slope(scaling.series(points, "parameters", name, what)) < 1.15
