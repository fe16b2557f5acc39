"""The programs that print what products and steps cost work on small problems."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

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
