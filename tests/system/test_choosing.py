"""The chart of the page on choosing is the one that its program draws, and its figures are those of the league."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from newtonopt import optimizers

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "choosing.md").read_text()


def test_the_chart_is_the_one_that_the_program_draws_and_names_every_optimizer() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_choice.py"))
    assert drawn["PICTURE"].read_text() == drawn["chart"](), "run python docs/draw_choice.py"
    described = re.search(r"!\[(.*?)\]\(pictures/choosing\.svg\)", PAGE)[1]  # type: ignore[index]
    for name in optimizers.__all__:
        if hasattr(getattr(optimizers, name), "step"):
            assert name in drawn["chart"]() and name in described


def test_errors_beside_adam_are_those_of_the_league() -> None:
    league = (ROOT / "benchmarks" / "results" / "pinn.md").read_text().split("Error at the end")[1]
    head, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"^\|.*\|$", league, re.M))
    errors = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    _, *table = re.findall(r"^\| ([a-z][\w-]+) \| (.+) \|$", PAGE.split("instead\n")[1].split("## Two")[0], re.M)
    assert len(table) == 10
    for equation, cells in table:
        figures = [errors[equation][method] for method in ("Adam", "Adam+L-BFGS", "HessianFree", "LevenbergMarquardt")]
        assert cells.split(" | ") == [figure.replace("*", "").split(" ")[0] for figure in figures]
