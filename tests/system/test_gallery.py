"""The gallery's programs run from the command line, their numbers are right, and the site has a page for each."""

from __future__ import annotations

import ast
import math
import re
import runpy
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

ROOT = Path(__file__).parents[2]
GALLERY = ROOT / "examples" / "gallery"
PROGRAMS = sorted(GALLERY.glob("*.py"))


@pytest.fixture(autouse=True)
def no_display(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Draw without a display, where `plt.show()` does nothing; close the figures and restore the number of threads."""
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", lambda: None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    plt.close("all")


def run(name: str) -> dict[str, Any]:
    """Run a program, draw its figures, and return its variables."""
    names = runpy.run_path(str(GALLERY / f"{name}.py"), run_name="__main__")
    assert plt.get_fignums()
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    return names


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_is_short_and_asks_a_question(program: Path) -> None:
    text = program.read_text()
    assert len(re.findall(r"^ *[^# \n]", text, re.MULTILINE)) <= 110
    title, line, *_ = ast.get_docstring(ast.parse(text)).splitlines()
    assert title.endswith("?")
    assert line == "=" * len(title)
    assert f'"{program.name}"' in (ROOT / "docs" / "conf.py").read_text()


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def test_batch_jacobian() -> None:
    names = run("batch_jacobian")
    for ways in (names["by_inputs"], names["by_weights"]):
        assert gap(ways["torch.func"], ways["by hand"]) < 1e-12
        assert gap(ways["newtonopt"], ways["by hand"]) < 1e-12
    assert gap(names["automatic"], names["analytic"]) < 1e-13
    assert names["errors"].amin(0).max() < 1e-10


def test_hessian_spectrum() -> None:
    names = run("hessian_spectrum")
    for entry, true in zip(names["entries"], names["true"], strict=True):
        assert entry.value == pytest.approx(true, abs=1e-12)
        assert entry.lower <= true <= entry.upper
    # The eigenvalues of a matrix and of the matrix with further rows and columns interlace.
    negative, with_input = (int((names[values] < -1e-12).sum()) for values in ("alone", "together"))
    assert 0 < negative <= with_input <= negative + 2


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
    assert run("hessian_spectrum")["reading"](torch.tensor(values)) == said


def test_quadratic() -> None:
    names = run("quadratic")
    assert gap(names["products"], names["by_hand"]) < 1e-12
    assert gap(names["dense"], names["by_hand"]) < 1e-12
    assert gap(names["products"], names["products"].T) < 1e-12
    assert gap(names["A"], names["A"].T) > 1


def test_critical_points() -> None:
    names = run("critical_points")
    assert [found.kind for found in names["elsewhere"].values()] == ["not critical"] * 2
    kinds = {name: found.kind for name, found in names["verdicts"].items()}
    decided = {"x² + y² - y³": "minimum", "-x² - y²": "maximum", "x² - y²": "saddle"}
    assert {name: kinds[name] for name in decided} == decided
    assert {name: names["guesses"][name] for name in decided} == decided
    assert float(names["heights"]["x² + y² - y³"].min()) == pytest.approx(1.5**2 - 1.5**3)
    for name, guess in ((names["cubic"], "maximum"), ("x² + y⁴", "minimum"), ("x² - y⁴", "minimum")):
        assert (kinds[name], names["guesses"][name]) == ("degenerate", guess)


def test_saddle_map() -> None:
    names = run("saddle_map")
    places = 41**2
    assert list(names["kinds"]) == ["indefinite", "convex", "concave", "degenerate"]
    assert names["shares"]["x³ - 3xy²"] == pytest.approx([1 - 1 / places, 0, 0, 1 / places])
    assert names["verdict"].kind == "degenerate"
    assert names["shares"]["x³ + y³"] == pytest.approx(
        [2 * 20**2 / places, 20**2 / places, 20**2 / places, 81 / places]
    )


def test_fastest_direction() -> None:
    names = run("fastest_direction")
    fastest, flat = names["fastest"], names["flat"]
    assert fastest.lower <= fastest.value <= fastest.upper
    assert fastest.value > 1e4 * abs(flat.value)
    rises = {name: float(along.losses.max() - along.loss) for name, along in names["slices"].items()}
    assert rises["fastest"] == pytest.approx(fastest.value / 2, rel=0.2)
    assert rises["flat"] < 0.1 * rises["fastest"]


def test_taylor() -> None:
    names = run("taylor")
    for name, bend in (("negative", -1.0), ("zero", 0.0), ("positive", 1.5)):
        promised, foretold, actual = names["decreases"][name]
        assert promised == pytest.approx(0.8)
        assert foretold == pytest.approx(0.8 - 0.32 * bend)
        assert actual == pytest.approx(foretold)
        assert names["curvatures"][name].cauchy_step == pytest.approx(1 / bend if bend > 0 else math.inf)


def test_optimizer_paths() -> None:
    names = run("optimizer_paths")
    needs = {name: len(losses) - 1 for name, (_, losses) in names["valley"].items()}
    first_order = ["gradient descent", "Adam"]
    assert {name for name, (_, losses) in names["valley"].items() if losses[-1] > 1e-12} == set(first_order)
    assert min(needs, key=lambda name: needs[name]) == "LevenbergMarquardt"
    assert all(losses[0] == pytest.approx(24.2) for _, losses in names["valley"].values())
    leave = {"DampedNewton", "NewtonCG", "TrustRegionNewton", "CubicNewton"}
    for name, (points, losses) in names["ends"].items():
        if name in leave:
            assert losses[-1] <= 1e-12
            assert points[-1].abs().tolist() == pytest.approx([1, 1], abs=1e-5)
        else:
            assert losses[-1] == pytest.approx(0.25)
            assert points[-1].tolist() == pytest.approx([0, 0], abs=1e-2)


def test_tangent_kernel() -> None:
    names = run("tangent_kernel")
    for when, spectrum in names["spectra"].items():
        kernel = 2 / names["m"] * torch.linalg.eigvalsh(names["kernels"][when]).flip(0)
        assert spectrum.size == 673
        assert spectrum.values.tolist() == pytest.approx(kernel.tolist(), rel=1e-6, abs=1e-12 * float(kernel[0]))
    before, after = (spectrum.effective_dimension(1e-3) for spectrum in names["spectra"].values())
    assert 4 < before < 8 < after < 20


@pytest.mark.slow
def test_gpt_learning_rate() -> None:
    names = run("gpt_learning_rate")
    losses = {name: losses for name, (losses, _, _) in names["runs"].items()}
    ratios = {
        name: [measured["curvature/stability_ratio"] for measured in found.values()]
        for name, (_, _, found) in names["runs"].items()
    }
    low, high, failing = names["runs"]
    assert losses[low][-1] < 0.5
    assert losses[high][-1] < 0.5
    assert sum(losses[failing][50:]) > 2 * sum(losses[high][50:])
    assert ratios[failing][0] > 50
    assert ratios[failing][0] > 10 * ratios[high][0]
    # The low rate comes to the edge of stability after the warm-up, for some time and not for good.
    assert 0.8 < max(ratios[low][4:]) < 4
    assert statistics.median(ratios[failing]) > 4 * statistics.median(ratios[low])
    margins = {name: [found.margin for found in margins.values()] for name, (_, margins, _) in names["runs"].items()}
    assert max(margins[low][:3]) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_the_notebook_runs_cell_by_cell(program: Path, tmp_path: Path) -> None:
    gen_gallery = pytest.importorskip("sphinx_gallery.gen_gallery")
    notebook = pytest.importorskip("sphinx_gallery.notebook")
    parser = pytest.importorskip("sphinx_gallery.py_source_parser")
    settings = {**gen_gallery.DEFAULT_GALLERY_CONF, "src_dir": str(GALLERY), "ignore_repr_types": ""}
    _, blocks = parser.split_code_and_text_blocks(str(program))
    cells = notebook.jupyter_notebook(blocks, settings, str(tmp_path))["cells"]
    names: dict[str, Any] = {"__name__": "__main__"}
    kinds = [cell["cell_type"] for cell in cells]
    assert kinds.count("markdown") >= 2
    assert kinds.count("code") >= 2
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            exec(compile(text, program.name, "exec"), names)
        else:
            assert ":math:" not in text
            assert not re.search(r":\w+:`", text), "a role, which a notebook shows as it is"
