"""The gallery's programs run from the command line, their numbers are right, and their pictures are on the page."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted((ROOT / "examples" / "gallery").glob("*.py"))
PAGE = (ROOT / "docs" / "gallery.md").read_text()
LARGEST = 60_000  # most bytes of a picture


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a program, check its picture, and return the numbers that it prints."""
    program = ROOT / "examples" / "gallery" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(program), "--output", str(folder / "new")])
    numbers: dict[str, Any] = runpy.run_path(str(program), run_name="__main__")["numbers"]
    picture = (folder / "new" / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert 5_000 < len(picture) < LARGEST
    return numbers


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_is_short_and_on_the_page(program: Path) -> None:
    assert len(program.read_text().splitlines()) < 80
    assert f"](../examples/gallery/{program.name})" in PAGE
    assert f"](pictures/gallery/{program.stem}.png)" in PAGE
    assert (ROOT / "docs" / "pictures" / "gallery" / f"{program.stem}.png").stat().st_size < LARGEST


def test_there_are_seven() -> None:
    assert len(PROGRAMS) == 7


def test_batch_jacobian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = run("batch_jacobian", tmp_path, monkeypatch)
    assert numbers["jacobians differ by"] < 1e-12
    assert numbers["chain rule"] < 1e-13
    assert numbers["best differences"] < 1e-10


def test_hessian_spectrum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = run("hessian_spectrum", tmp_path, monkeypatch)
    assert numbers["largest error"] < 1e-12
    assert numbers["outside their bounds"] == 0
    # The eigenvalues of a matrix and of the matrix with further rows and columns interlace.
    assert 0 < numbers["negative"] <= numbers["with input"] <= numbers["negative"] + 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0, 3.0], "sizes differ 3-fold\nall positive: locally convex"),
        ([1.0, 1000.0], "sizes differ 1000-fold: ill-conditioned\nall positive: locally convex"),
        ([0.0, 0.0, 2.0], "sizes differ 1-fold\n2 zero: flat valleys or symmetry"),
        ([-1.0, 2.0], "sizes differ 2-fold\nmixed signs: curved as at a saddle"),
    ],
)
def test_the_spectrum_is_read_in_words(values: list[float], said: str) -> None:
    reading = runpy.run_path(str(ROOT / "examples/gallery/hessian_spectrum.py"))["reading"]
    assert reading(torch.tensor(values)) == said


def test_quadratic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = run("quadratic", tmp_path, monkeypatch)
    assert numbers["products against A + A'"] < 1e-12
    assert numbers["dense against A + A'"] < 1e-12
    assert numbers["products against their transpose"] < 1e-12
    assert numbers["A against its transpose"] > 1


def test_critical_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run("critical_points", tmp_path, monkeypatch)
    cubic = "3x³ - 6y² + 3"
    assert [said[f"{cubic} at {p}"] for p in ((1.2, 3.4), (-1.0, 1.0))] == ["not critical"] * 2
    decided = {"x² + y² - y³": "minimum", "-x² - y²": "maximum", "x² - y²": "saddle"}
    assert {function: said[f"{function} at (0.0, 0.0)"] for function in decided} == decided
    assert said["x² + y² - y³, remark"] == f"local: it falls to {1.5**2 - 1.5**3:.2f} elsewhere"
    for function, naive in ((cubic, "maximum"), ("x² + y⁴", "minimum"), ("x² - y⁴", "minimum")):
        assert said[f"{function} at (0.0, 0.0)"] == "degenerate"
        assert said[f"{function}, shortcut"] == naive


def test_saddle_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = run("saddle_map", tmp_path, monkeypatch)
    places = 41**2
    assert shares["x³ - 3xy²: saddle"] == pytest.approx(1 - 1 / places)
    assert shares["x³ - 3xy²: degenerate"] == pytest.approx(1 / places)
    assert shares["the origin is degenerate"]
    quadrants = [shares[f"x³ + y³: {kind}"] for kind in ("convex", "concave", "saddle", "degenerate")]
    assert quadrants == pytest.approx([20**2 / places, 20**2 / places, 2 * 20**2 / places, 81 / places])


def test_fastest_direction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = run("fastest_direction", tmp_path, monkeypatch)
    assert numbers["within its bounds"]
    assert numbers["fastest curvature"] > 1e4 * abs(numbers["flat curvature"])
    assert numbers["fastest rise"] == pytest.approx(numbers["fastest curvature"] / 2, rel=0.2)
    assert numbers["flat rise"] < 0.1 * numbers["fastest rise"]


def test_taylor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = run("taylor", tmp_path, monkeypatch)
    for name, bend in (("negative", -1.0), ("zero", 0.0), ("positive", 1.5)):
        assert numbers[f"{name}: promised"] == pytest.approx(0.8)
        assert numbers[f"{name}: actual"] == pytest.approx(0.8 - 0.32 * bend)
        assert numbers[f"{name}: happened"] == pytest.approx(numbers[f"{name}: actual"])
        assert numbers[f"{name}: best"] == pytest.approx(1 / bend if bend > 0 else math.inf)
