"""Damped least squares in its three forms, against a dense solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from newtonopt.solvers.least_squares import Weight, in_parameters, in_samples, metric, orthogonal

FORMS: dict[str, Callable[..., Any]] = {"samples": in_samples, "parameters": in_parameters, "orthogonal": orthogonal}


@dataclass(frozen=True)
class Dense:
    """A matrix whose columns belong to a 2 x 3 matrix and a vector of 2 entries."""

    matrix: Tensor
    sizes: tuple[int, ...] = (6, 2)

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def push(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def pull(self, u: Tensor) -> Tensor:
        return self.matrix.T @ u

    def gram(self, weights: Sequence[Weight] | None = None, out: Tensor | None = None) -> Tensor:
        assert weights is not None and out is None
        whole = []
        for weight, size in zip(weights, self.sizes, strict=True):
            if not isinstance(weight, tuple):
                whole.append(self.matrix.new_full((size,), weight))
            else:
                left, right = weight
                whole.append(left if right is None else torch.outer(left, right).reshape(-1))
        return (self.matrix * torch.cat(whole)) @ self.matrix.T

    def parameter_gram(self) -> Tensor:
        return self.matrix.T @ self.matrix

    def column_squares(self) -> list[tuple[Tensor, Tensor | None]]:
        squares = self.matrix.square().sum(0)
        whole = squares[:6].view(2, 3)
        return [(whole.sum(1), whole.sum(0)), (squares[6:], None)]

    def dense(self) -> Tensor:
        return self.matrix


def problem(rows: int) -> tuple[Dense, Tensor, Tensor]:
    torch.manual_seed(0)
    scale = torch.logspace(-2, 1, 8, dtype=torch.float64)
    R = torch.randn(rows, 8, dtype=torch.float64) * scale
    return Dense(R), torch.randn(rows, dtype=torch.float64), torch.randn(8, dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.2, "own"])
def test_every_form_is_the_dense_solution(form: str, rows: int, power: float, decay: Any) -> None:
    matrix, r, u = problem(rows)
    R = matrix.matrix
    D = torch.tensor([0.2] * 6 + [0.0] * 2, dtype=torch.float64) if decay == "own" else decay
    M = metric(matrix, D, power)
    equations = FORMS[form](matrix, M)
    for damping in (1e-3, 5.0):
        A = R.T @ R + (torch.zeros(8, dtype=torch.float64) + D).diag() + damping * M.spread.diag()
        solve = equations.factored(damping)
        for outside in (None, u):
            expected = -torch.linalg.solve(A, R.T @ r + (0.0 if outside is None else outside))
            torch.testing.assert_close(solve(r, outside), expected, rtol=1e-9, atol=1e-10)


def test_the_units_of_the_damping_are_those_of_the_matrix() -> None:
    matrix, _, _ = problem(20)
    squares = matrix.matrix.square().sum(0)
    mean = squares.mean()
    assert torch.equal(metric(matrix, 0.0, 0.0).spread, mean.expand(8))
    whole = squares[:6].view(2, 3)
    outer = torch.outer(whole.mean(1), whole.mean(0)) / whole.mean()
    expected = torch.cat([outer.reshape(-1), squares[6:]])
    torch.testing.assert_close(metric(matrix, 0.0, 1.0).spread, expected)
    torch.testing.assert_close(metric(matrix, 0.0, 0.5).spread, (expected * mean).sqrt())
    # Where there is decay a matrix has one number.
    torch.testing.assert_close(
        metric(matrix, 0.1, 1.0).spread, torch.cat([whole.mean().expand(6), squares[6:].mean().expand(2)])
    )


def test_a_column_of_zeros_is_damped_a_little() -> None:
    matrix, r, _ = problem(20)
    matrix.matrix[:, 7] = 0.0
    M = metric(matrix, 0.0, 1.0)
    assert bool((M.spread > 0).all())
    for make in FORMS.values():
        step = make(matrix, M).factored(1e-3)(r, None)
        assert bool(step.isfinite().all()) and abs(float(step[7])) < 1e-12


def test_a_small_damping_loses_no_digits_in_the_range_of_the_rows() -> None:
    matrix, r, _ = problem(4)
    step = in_samples(matrix, metric(matrix, 0.0, 0.0)).factored(1e-18)(r, None)  # type: ignore[misc]
    expected = -torch.linalg.pinv(matrix.matrix) @ r
    torch.testing.assert_close(step, expected, rtol=1e-10, atol=1e-12)


def test_orthogonal_factors_square_no_condition_number() -> None:
    torch.manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(30, 8, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    matrix = Dense(U @ torch.logspace(0, -8, 8, dtype=torch.float64).diag() @ V.T)
    solution = torch.ones(8, dtype=torch.float64)
    equations = orthogonal(matrix, metric(matrix, 0.0, 0.0))
    step = equations.factored(equations.floor)(-(matrix.matrix @ solution), None)  # type: ignore[misc]
    torch.testing.assert_close(step, solution, rtol=0, atol=1e-6)
    assert equations.floor < 1e-25 < 1e-16 < in_parameters(matrix, metric(matrix, 0.0, 0.0)).floor


def test_a_matrix_that_is_not_definite_is_told() -> None:
    R = torch.ones(5, 8, dtype=torch.float64)
    equations = in_samples(Dense(R), metric(Dense(R), 0.0, 0.0))
    assert equations.factored(-1.0) is None and equations.factored(1.0) is not None
