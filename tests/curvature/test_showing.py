"""Results are readable in a terminal and in a notebook, whatever stands in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from newtonopt import LinearOperator, evaluate
from newtonopt.curvature import (
    Measured,
    Trace,
    critical_point,
    diagonal,
    effective_dimension,
    extreme_eigenvalues,
    frobenius_norm,
    gauss_newton_spectrum,
    gradient_curvature,
    loss_slice,
    measure,
    sharpness,
    spectral_density,
    trace,
)
from newtonopt.curvature.showing import as_table, as_text, html_table, text_table, written


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.0123, 4, "0.0123"),
        (5.02149, 4, "5.021"),
        (250.0, 2, "250"),
        (-0.30000000000000004, 4, "-0.3"),
        (0.0, 4, "0"),
        (6260.0, 2, "6300"),
        (38123.0, 3, "38\u00a0100"),
        (999999.9, 4, "10⁶"),
        (1.2e-7, 2, "1.2×10⁻⁷"),  # noqa: RUF001
        (-1e-7, 4, "-10⁻⁷"),
        (-3.25e-301, 3, "-3.25×10⁻³⁰¹"),  # noqa: RUF001
        (0.0001, 4, "0.0001"),
        (math.nan, 4, "NaN"),
        (-math.inf, 4, "-∞"),
    ],
)
def test_numbers_in_sentences_have_one_form(value: float, digits: int, text: str) -> None:
    assert written(value, digits) == text


WEIGHTS = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)


@dataclass(frozen=True)
class Thing:
    number: float
    numbers: Tensor
    many: tuple[float, ...]
    hidden: Tensor = field(repr=False)


THING = Thing(1 / 3, torch.tensor([1.0, 2.0]), (0.5,) * 9, torch.zeros(9))


def operator() -> LinearOperator:
    return LinearOperator(lambda v: WEIGHTS * v, (3, 3), WEIGHTS, psd=True)


def weights() -> Tensor:
    return torch.ones(3, dtype=torch.float64, requires_grad=True)


def measured(**settings: Any) -> Measured:
    w = weights()
    return measure(lambda: 0.5 * (WEIGHTS * w**2).sum(), [w], measurements=[Trace()], sharpness=None, **settings)


def residuals() -> Any:
    w = weights()
    return evaluate(lambda: torch.nn.functional.mse_loss(w, WEIGHTS), [w])


RESULTS: dict[str, Callable[[], Any]] = {
    "Spectrum": lambda: extreme_eigenvalues(operator(), 1, 1),
    "TraceEstimate": lambda: trace(operator()),
    "FrobeniusNorm": lambda: frobenius_norm(operator()),
    "Diagonal": lambda: diagonal(operator()),
    "SpectralDensity": lambda: spectral_density(operator()),
    "EffectiveDimension": lambda: effective_dimension(operator(), 1.0),
    "ExactSpectrum": lambda: gauss_newton_spectrum(residuals()),
    "CriticalPoint": lambda: critical_point(residuals()),
    "GradientCurvature": lambda: gradient_curvature(residuals()),
    "SharpnessEstimate": lambda: sharpness(lambda: THETA.square().sum(), [THETA]),
    "LossSurface": lambda: loss_slice(lambda: WEIGHTS.sum() * THETA.square().sum(), [THETA], [torch.ones(3)], points=3),
}
THETA = torch.zeros(3, requires_grad=True)


def test_a_result_is_one_line_of_short_numbers() -> None:
    assert as_text(THING) == "Thing(number=0.3333, numbers=(1, 2), many=(0.5, 0.5, 0.5, 0.5, 0.5, 0.5, ...))"
    assert as_text(THING, {"rank": 3}).startswith("Thing(rank=3, number=")


def test_a_large_tensor_is_shown_by_its_shape() -> None:
    assert "numbers=a tensor of shape (2, 4)" in as_text(Thing(math.inf, torch.zeros(2, 4), (), torch.zeros(0)))


def test_a_table_has_a_row_for_each_value() -> None:
    rows = ElementTree.fromstring(f"<div>{as_table(THING)}</div>").findall("table/tr")
    assert [[cell.text or "" for cell in row] for row in rows] == [
        ["number", "0.3333", ""],
        ["numbers", "(1, 2)", ""],
        ["many", "(0.5, 0.5, 0.5, 0.5, 0.5, 0.5, ...)", ""],
    ]


def test_all_text_is_escaped() -> None:
    evil = "<script>alert('x')</script> & \""
    shown = html_table(evil, [(evil, evil, evil)], [evil])
    assert "<script" not in shown and shown.count("&lt;script&gt;") == 5
    root = ElementTree.fromstring(f"<div>{shown}</div>")
    assert root.findtext("p") == root.findtext("table/caption") == evil


def test_columns_are_aligned() -> None:
    assert text_table("Title", [("a", "1.5", "L"), ("longer", "10", "")], ["End."]) == (
        "Title\n  a       1.5  L\n  longer   10\nEnd."
    )


@pytest.mark.parametrize("name", RESULTS)
def test_every_result_is_readable_in_a_terminal_and_in_a_notebook(name: str) -> None:
    found = RESULTS[name]()
    assert repr(found).startswith(f"{name}(") and len(repr(found)) < 400 and "tensor(" not in repr(found)
    root = ElementTree.fromstring(f"<div>{found._repr_html_()}</div>")
    assert root.findtext("table/caption") == name and len(root.findall("table/tr")) >= 2


def test_measured_values_are_shown_with_units_and_sentences() -> None:
    found = measured()
    lines = repr(found).splitlines()
    assert lines[0] == "Measured"
    assert ["lambda_max", "5", "L", "/", "θ²"] in [line.split() for line in lines]
    assert repr(found).endswith(found.in_words())
    root = ElementTree.fromstring(f"<div>{found._repr_html_()}</div>")
    rows = {row[0].text: (row[1].text, row[2].text or "") for row in root.findall("table/tr")}
    assert [*rows] == found.names()
    assert rows["lambda_max"] == ("5", "L / θ²") and rows["trace"] == ("8", "L / θ²") and rows["seconds"][1] == "s"
    assert [entry.text for entry in root.findall("p")] == found.in_words().splitlines()
