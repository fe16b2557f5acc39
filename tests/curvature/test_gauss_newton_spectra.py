"""Exact Gauss-Newton spectra against dense truth and closed forms, with honest rounding errors, and their figure."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import Case, build
from spectra import softmax_eigenvalues, softmax_regression
from torch import Tensor, nn

from newtonopt import Evaluation, Objective, evaluate, gauss_newton
from newtonopt.curvature import ExactSpectrum, effective_dimension, gauss_newton_spectra, gauss_newton_spectrum
from newtonopt.operators.rows import RowsError
from newtonopt.vectors import memory


def check(found: ExactSpectrum, dense: Tensor) -> None:
    """Check eigenvalues, their errors, the other eigenvalues and the vectors against a dense matrix."""
    truth = torch.linalg.eigvalsh(dense).flip(0)
    k, largest = len(found.values), float(truth[0])
    torch.testing.assert_close(found.values, truth[:k], rtol=1e-9, atol=1e-13 * largest)
    torch.testing.assert_close(truth[k:], torch.full_like(truth[k:], found.rest), rtol=1e-9, atol=1e-13 * largest)
    assert found.size == len(truth)
    assert bool((found.errors <= 1e-10 * largest).all())
    assert found.trace == pytest.approx(float(dense.trace()), rel=1e-12)
    if found.vectors is not None:
        V = found.vectors
        torch.testing.assert_close(V.T @ V, torch.eye(k).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(dense @ V, V * found.values, rtol=0, atol=1e-12 * largest)


def more_samples(case: Case, times: int) -> Case:
    """Repeat a case's inputs with noise, so that there are more rows than parameters."""
    noise = 0.3 * torch.randn(times * len(case.inputs), *case.inputs.shape[1:], dtype=torch.float64)
    inputs = case.inputs.repeat(times, *[1] * (case.inputs.dim() - 1)) + noise
    target = torch.randn(len(inputs), 3, dtype=torch.float64)
    return Case(case.model, inputs, lambda z: F.mse_loss(z, target))


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "ignore_index", "bce_with_logits", "by_hand"])
@pytest.mark.parametrize("model", ["linear", "mlp", "conv", "lstm", "odd"])
def test_it_equals_the_dense_eigenvalues(model: str, loss: str, vectors: bool) -> None:
    case = build(model, loss)
    check(gauss_newton_spectrum(evaluate(case.closure, case.params), vectors), case.dense_gauss_newton())


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("model", ["linear", "mlp", "odd"])
def test_more_rows_than_parameters(model: str, vectors: bool) -> None:
    case = more_samples(build(model, "mse"), 40)
    found = gauss_newton_spectrum(evaluate(case.closure, case.params), vectors)
    assert len(found.values) == found.size
    check(found, case.dense_gauss_newton())


def decayed(case: Case, decay: float | Tensor) -> Evaluation:
    return Objective(case.closure, case.params, decay=decay).evaluate()


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("times", [1, 40])
@pytest.mark.parametrize("kind", ["one", "equal", "different"])
def test_weight_decay_is_added(kind: str, times: int, vectors: bool) -> None:
    case = more_samples(build("mlp", "mse"), times)
    n = case.flat().numel()
    different = 0.01 * torch.arange(n).double()
    decay = {"one": 0.3, "equal": torch.full((n,), 0.3).double(), "different": different}[kind]
    found = gauss_newton_spectrum(decayed(case, decay), vectors)
    assert len(found.values) == (n if kind == "different" else min(n, 18 * times))
    check(found, case.dense_gauss_newton() + decay * torch.eye(n).double())


def test_two_losses_of_outputs_with_different_numbers_of_samples() -> None:
    case = build("mlp", "mse")
    points = torch.randn(3, 4, dtype=torch.float64)

    def both(flat: Tensor) -> Tensor:
        more = Case(case.model, points, case.loss).outputs_at(flat)
        return torch.cat([case.outputs_at(flat).reshape(-1) / 3, math.sqrt(2.0 / 3.0) * more[:, 0]])

    def closure() -> Tensor:
        loss = F.mse_loss(case.model(case.inputs), torch.ones(6, 3).double())
        return loss + F.mse_loss(case.model(points)[:, 0], torch.zeros(3).double())

    J = torch.func.jacrev(both)(case.flat())
    check(gauss_newton_spectrum(evaluate(closure, case.params), True), J.T @ J)


def test_softmax_regression_at_zero() -> None:
    evaluation, S = softmax_regression()
    found, truth = gauss_newton_spectrum(evaluation), softmax_eigenvalues(S).sort(descending=True).values
    torch.testing.assert_close(found.values, truth, rtol=1e-10, atol=1e-13 * float(truth[0]))
    assert found.rank == 45  # one class is redundant
    assert found.condition_number == pytest.approx(float(truth[0] / truth[44]), rel=1e-9)
    assert found.effective_dimension(0.01) == pytest.approx(float((truth / (truth + 0.01)).sum()), rel=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_the_effective_dimension_counts_all_eigenvalues(decay: float) -> None:
    case = build("mlp", "mse")
    evaluation = decayed(case, decay)
    expected = effective_dimension(gauss_newton(evaluation), 0.1)
    assert expected.standard_error == 0.0
    assert gauss_newton_spectrum(evaluation).effective_dimension(0.1) == pytest.approx(expected.value, rel=1e-9)


def test_rank_and_condition_number_count_decay() -> None:
    case = build("mlp", "mse")
    plain, shifted = (gauss_newton_spectrum(decayed(case, decay)) for decay in (0.0, 0.5))
    assert (plain.rank, shifted.rank) == (18, 43)
    assert shifted.condition_number == pytest.approx((float(plain.values[0]) + 0.5) / 0.5)


def graded(rows: int, columns: int) -> tuple[Evaluation, Tensor]:
    """Return a linear regression without noise whose rows have the singular values 1, 1/10, 1/100 ..."""
    k = min(rows, columns)
    s = 10.0 ** -torch.arange(k).double()
    generator = torch.Generator().manual_seed(0)
    U, V = (
        torch.linalg.qr(torch.randn(size, k, dtype=torch.float64, generator=generator)).Q for size in (rows, columns)
    )
    inputs = math.sqrt(rows / 2) * (U * s) @ V.T
    w = torch.zeros(columns, dtype=torch.float64, requires_grad=True)
    return evaluate(lambda: F.mse_loss(inputs @ w, torch.ones(rows).double()), [w]), s


@pytest.mark.parametrize(("rows", "columns"), [(10, 40), (40, 10), (10, 10)])
@pytest.mark.parametrize("vectors", [False, True])
def test_small_eigenvalues_are_exact_far_below_the_rounding_of_products(rows: int, columns: int, vectors: bool) -> None:
    evaluation, s = graded(rows, columns)
    found = gauss_newton_spectrum(evaluation, vectors)
    torch.testing.assert_close(found.values.sqrt(), s, rtol=0, atol=1e-14)
    assert bool(((found.values - s.square()).abs() <= found.errors).all())
    assert found.rank == 10  # the smallest is 1e-18 of the largest
    assert found.condition_number == pytest.approx(1e18, rel=1e-3)


def test_from_products_where_there_are_many_more_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation, s = graded(10, 200)
    monkeypatch.setattr(gauss_newton_spectra, "_CHEAP", 0.0)
    found = gauss_newton_spectrum(evaluation)
    torch.testing.assert_close(found.values, s.square(), rtol=0, atol=1e-14)
    assert bool(((found.values - s.square()).abs() <= found.errors).all())
    assert 5 <= found.rank <= 9  # below 1e-15 of the largest all is rounding, and `errors` says so
    torch.testing.assert_close(gauss_newton_spectrum(evaluation, vectors=True).values.sqrt(), s, rtol=0, atol=1e-14)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("model", ["linear", "mlp", "conv"])
def test_from_products_equals_the_dense_eigenvalues(model: str, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build(model, loss)
    monkeypatch.setattr(gauss_newton_spectra, "_takes_products", lambda rows: True)
    check(gauss_newton_spectrum(evaluate(case.closure, case.params)), case.dense_gauss_newton())


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("times", [1, 40])
def test_float32_is_as_exact_as_its_rows(times: int, vectors: bool) -> None:
    case = more_samples(build("mlp", "mse"), times)
    truth = torch.linalg.eigvalsh(case.dense_gauss_newton()).flip(0)
    case.model.float()
    inputs, target = case.inputs.float(), torch.zeros(len(case.inputs), 3)
    found = gauss_newton_spectrum(evaluate(lambda: F.mse_loss(case.model(inputs), target), case.params), vectors)
    assert found.values.dtype == torch.float64
    assert bool(((found.values - truth[: len(found.values)]).abs() <= found.errors).all())
    assert bool((found.errors <= 1e-2 * truth[0]).all())
    if vectors:
        assert found.vectors is not None and found.vectors.dtype == torch.float32


def test_errors_count_the_rounding_of_a_loss_that_couples_outputs() -> None:
    case = build("odd", "cross_entropy")
    found = gauss_newton_spectrum(evaluate(case.closure, case.params))
    assert bool((found.errors >= torch.finfo(torch.float64).eps * found.values[0]).all())
    assert found.rank == 12  # two outputs of three for each of six samples


def test_a_matrix_of_zeros() -> None:
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    found = gauss_newton_spectrum(evaluate(lambda: F.mse_loss(w**2, torch.zeros(3).double()), [w]))
    assert (found.trace, found.rank, found.effective_dimension(1.0)) == (0.0, 0, 0.0)
    assert math.isnan(found.condition_number)
    assert found.plot().axes[0].get_title() == "3 eigenvalues, 0 not zero"


def test_coupled_samples_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    inputs = torch.randn(600, 2, dtype=torch.float64)
    evaluation = evaluate(lambda: F.mse_loss(model(inputs), torch.zeros(600, 3).double()), model.parameters())
    with pytest.raises(RowsError, match=r"BatchNorm.*Use spectral_density\(gauss_newton\(evaluation\)\)"):
        gauss_newton_spectrum(evaluation)


def test_streamed_products_are_refused() -> None:
    case = build("mlp", "mse")
    with pytest.raises(RowsError, match='products="cached"'):
        gauss_newton_spectrum(evaluate(case.closure, case.params, products="streamed"))


def test_arguments_are_checked() -> None:
    evaluation, _ = graded(3, 4)
    with pytest.raises(ValueError, match="vectors must be True or False, got 3"):
        gauss_newton_spectrum(evaluation, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="evaluation must be an Evaluation"):
        gauss_newton_spectrum(gauss_newton(evaluation))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="damping must be positive and finite, got 0"):
        gauss_newton_spectrum(evaluation).effective_dimension(0.0)
    evaluation.free()
    with pytest.raises(RuntimeError, match="freed"):
        gauss_newton_spectrum(evaluation)


def test_a_row_that_is_not_finite_is_an_error() -> None:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    evaluation = evaluate(lambda: F.mse_loss((w - 1.0).abs().sqrt(), torch.zeros(2).double()), [w])
    with pytest.raises((FloatingPointError, RowsError)):
        gauss_newton_spectrum(evaluation)


@pytest.mark.parametrize("vectors", [False, True])
def test_a_matrix_that_does_not_fit_is_refused(vectors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation, _ = graded(40, 20)
    monkeypatch.setattr(memory, "available_memory", lambda device: 6500)
    with pytest.raises(MemoryError, match=r"would take .* bytes .*Use spectral_density\(gauss_newton"):
        gauss_newton_spectrum(evaluation, vectors)


def test_the_figure_shows_what_is_not_rounding() -> None:
    evaluation, _ = graded(10, 40)
    found = gauss_newton_spectrum(evaluation)
    axes = found.plot().axes[0]
    assert axes.get_yscale() == "log"
    assert torch.tensor(axes.lines[0].get_ydata()).tolist() == found.values.tolist()
    assert axes.get_title().startswith("40 eigenvalues, 10 not zero, condition number 10¹⁸")
    assert repr(found).startswith("ExactSpectrum(largest=") and repr(found).endswith(", rest=0, size=40)")


def test_a_figure_without_matplotlib_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = gauss_newton_spectrum(graded(3, 4)[0])
    for name in ("matplotlib.figure", "matplotlib.pyplot"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ImportError, match="needs matplotlib, which is not installed"):
        found.plot()
