"""The Gauss-Newton spectrum as a measurement: values of the dense matrix, and a reason where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import build
from torch import Tensor, nn

from newtonopt.curvature import GaussNewtonSpectrum, Measured, measure
from newtonopt.curvature.showing import written


def of(measurement: GaussNewtonSpectrum, **settings: Any) -> tuple[Measured, Tensor]:
    """Return what is measured of a network, and the dense eigenvalues, descending."""
    case = build("mlp", "mse")
    found = measure(case.closure, case.params, measurements=[measurement], sharpness=None, **settings)
    return found, torch.linalg.eigvalsh(case.dense_gauss_newton()).flip(0)


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_values_are_those_of_the_dense_matrix(curvature: str) -> None:
    found, truth = of(GaussNewtonSpectrum(damping=0.1), curvature=curvature)
    assert found.read("gauss_newton_trace") == pytest.approx(float(truth.sum()), rel=1e-12)
    assert found.read("gauss_newton_rank") == 18
    assert found.read("gauss_newton_condition_number") == pytest.approx(float(truth[0] / truth[17]), rel=1e-9)
    dimension = float((truth / (truth + 0.1)).sum())
    assert found.read("gauss_newton_effective_dimension") == pytest.approx(dimension, rel=1e-9)
    sentence = (
        f"43 eigenvalues, 18 of them not zero, with a condition number of {written(float(truth[0] / truth[17]), 3)}; "
        f"{dimension:.3g} directions stand out of a damping of 0.1."
    )
    assert sentence in found.in_words()


def test_the_damping_is_a_thousandth_of_the_largest_eigenvalue() -> None:
    found, truth = of(GaussNewtonSpectrum())
    assert f"out of a damping of {written(float(1e-3 * truth[0]), 3)}, a thousandth of the largest." in found.in_words()
    expected = float((truth / (truth + 1e-3 * truth[0])).sum())
    assert found.read("gauss_newton_effective_dimension") == pytest.approx(expected, rel=1e-9)


def test_the_histogram_counts_the_logarithms_of_nonzero_eigenvalues() -> None:
    found, truth = of(GaussNewtonSpectrum())
    result = found.of(GaussNewtonSpectrum)
    (histogram,) = GaussNewtonSpectrum().histograms(result).values()
    assert float(histogram.heights.sum()) == 18
    assert float(histogram.heights[0]) >= 1 and float(histogram.heights[-1]) >= 1
    assert histogram.low == pytest.approx(float(truth[17].log10()))
    assert histogram.high == pytest.approx(float(truth[0].log10()))
    assert set(GaussNewtonSpectrum().figures(result)) == {"gauss_newton_spectrum"}


def test_a_matrix_of_zeros_has_no_histogram_and_no_dimension() -> None:
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    closure = lambda: F.mse_loss(w**2, torch.zeros(2).double())  # noqa: E731
    found = measure(closure, [w], measurements=[GaussNewtonSpectrum()], sharpness=None)
    assert found.read("gauss_newton_rank") == 0.0
    assert not [tag for tag in found if "dimension" in tag or "condition" in tag]
    assert GaussNewtonSpectrum().histograms(found.of(GaussNewtonSpectrum)) == {}
    assert "The Gauss-Newton matrix has 2 eigenvalues, 0 of them not zero." in found.in_words()


def test_equal_eigenvalues_have_a_histogram() -> None:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    found = measure(lambda: F.mse_loss(w, torch.zeros(2).double()), [w], measurements=[GaussNewtonSpectrum()])
    (histogram,) = GaussNewtonSpectrum().histograms(found.of(GaussNewtonSpectrum)).values()
    assert float(histogram.heights.sum()) == 2.0
    assert bool((histogram.edges.diff() > 0.0).all())


def reason(closure: Any, params: Any, measurement: GaussNewtonSpectrum | None = None, **settings: Any) -> str:
    """Return why nothing is measured; all else is measured."""
    found = measure(closure, params, measurements=[measurement or GaussNewtonSpectrum()], sharpness=None, **settings)
    assert found.read("lambda_max") is not None
    assert not [tag for tag in found if "gauss_newton" in tag]
    return found.unmeasurable()["GaussNewtonSpectrum"]


def test_it_says_why_there_is_nothing_to_measure() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    inputs = torch.randn(600, 2, dtype=torch.float64)
    coupled = lambda: F.mse_loss(model(inputs), torch.ones(600, 3).double())  # noqa: E731
    assert "BatchNorm" in reason(coupled, model.parameters())
    case = build("mlp", "mse")
    small = GaussNewtonSpectrum(max_size=10)
    assert "The smaller of 18 outputs and 43 parameters is above max_size=10." in reason(
        case.closure, case.params, small
    )
    assert 'products="cached"' in reason(case.closure, case.params, products="streamed")
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    assert "mark_outputs" in reason(lambda: (w**4).sum().cosh(), [w])


def test_without_time_there_is_no_spectrum() -> None:
    found, _ = of(GaussNewtonSpectrum(), max_seconds=1e-9)
    assert not [tag for tag in found if "gauss_newton" in tag]
    assert found.unmeasurable() == {}


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="damping must be positive and finite, got -1"):
        GaussNewtonSpectrum(damping=-1.0)
    with pytest.raises(ValueError, match="max_size must be a whole number and at least 1, got 0"):
        GaussNewtonSpectrum(max_size=0)
