"""A matrix known by its products: shifted, scaled, cut out, transposed, written out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from problems import build, error
from torch import Tensor, nn

from newtonopt import LinearOperator, evaluate, gauss_newton, hessian
from newtonopt.operators import linear_operator
from newtonopt.operators.linear_operator import Trust


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def of(matrix: Tensor, **settings: Any) -> LinearOperator:
    return LinearOperator(lambda v: matrix @ v, (matrix.shape[0], matrix.shape[1]), matrix, **settings)


def test_derived_operators_are_the_matrices_in_closed_form() -> None:
    B = torch.randn(5, 5, dtype=torch.float64)
    B, d = B + B.T, torch.randn(5, dtype=torch.float64)
    A = of(B)
    close(A.dense(), B)
    close(A.shift(2.0).dense(), B + 2.0 * torch.eye(5, dtype=torch.float64))
    close(A.shift(d).dense(), B + torch.diag(d))
    close(A.scale(d).dense(), torch.diag(d) @ B @ torch.diag(d))
    index = torch.tensor([0, 3, 4])
    close(A.block([(0, 1), (3, 5)]).dense(), B[index][:, index])
    assert A.products == 4 * 5 + 3  # all of them share one count


def test_a_rectangle_and_its_transpose() -> None:
    J = torch.randn(3, 5, dtype=torch.float64)
    A = of(J, transpose=lambda u: J.T @ u)
    close(A.dense(), J)
    assert A.products == 3  # by rows, of which there are fewer
    close(A.T.dense(), J.T)
    close(A.T.T @ torch.ones(5, dtype=torch.float64), J.sum(1))
    assert A.products == A.T.products == 7


def test_derived_operators_are_trusted_as_far_as_their_matrix() -> None:
    B = torch.eye(3, dtype=torch.float64)
    doubted, rough, exact = of(B, psd=True, trust=lambda: Trust("by a test")), of(B, psd=True), of(B, psd=True)
    rough = of(B, psd=True, trust=lambda: Trust(error=0.2))
    for derive in (lambda A: A, lambda A: A.shift(1.0), lambda A: A.scale(B[0]), lambda A: A.block([(0, 2)])):
        assert derive(doubted).trust.doubt == "by a test" and not derive(doubted).psd
        assert derive(rough).trust.error == 0.2 and not derive(rough).psd
        assert derive(exact).psd
    assert not exact.shift(-1.0).psd


def test_operator_counts_shifts_and_checks() -> None:
    case = build("mlp", "mse")
    H = hessian(evaluate(case.closure, case.params))
    n = H.shape[0]
    v = torch.randn(n, 3, dtype=torch.float64)
    close(H.shift(2.0) @ v, H @ v + 2.0 * v)
    assert H.products == 6
    close(H.shift(1.0).shift(torch.ones(n).double()) @ v[:, 0], H @ v[:, 0] + 2 * v[:, 0])
    assert H.T is H
    with pytest.raises(ValueError, match=r"v must be of shape .*, got shape \(3,\)"):
        H @ torch.zeros(3)
    with pytest.raises(TypeError, match=r"v must be a tensor of shape \(.*, got a value of type list"):
        H @ ([0.0] * n)  # type: ignore[operator]


def test_the_bar_goes_to_the_last_product(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    @contextmanager
    def progress(total: int, what: str) -> Iterator[Any]:
        done.append((total, what))
        yield done.append

    monkeypatch.setattr(linear_operator, "progress", progress)
    monkeypatch.setattr(linear_operator, "_ROWS", 20)
    case = build("mlp", "mse")
    A = hessian(evaluate(case.closure, case.params)).dense()
    assert done == [(43, "curvature matrix"), 20, 20, 3]
    torch.testing.assert_close(A, case.dense_hessian())


def _one_sample(groups: int, dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
    """A loss with `GroupNorm` over one sample, of which torch's batching rule mixes the batch with the groups."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, 4)
    net = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).to(dtype)
    x, y = torch.randn(1, 2, 4, dtype=dtype), torch.tensor([1])
    return lambda: nn.functional.cross_entropy(net(x), y), list(net.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("of", [hessian, gauss_newton])
def test_an_operation_that_mixes_the_rows_is_passed_one_by_one(of: Any, dtype: torch.dtype) -> None:
    closure, params = _one_sample(1, dtype)
    A = of(evaluate(closure, params))
    n = A.shape[0]
    singly = torch.stack([A @ unit for unit in torch.eye(n, dtype=dtype)])
    matrix = of(evaluate(closure, params)).dense()
    assert error(matrix, (singly + singly.T) / 2) < 1e3 * torch.finfo(dtype).eps
    exact = _one_sample(1, torch.float64)
    truth = of(evaluate(*exact, products="finite_difference")).dense()
    assert error(matrix.double(), truth) < 1e-4


@pytest.mark.parametrize("wrong", ["one row", "all rows", "nan", "inf", ""])
@pytest.mark.parametrize("n", [2, 40, 300])
def test_products_at_once_are_compared_with_a_single_one(wrong: str, n: int) -> None:
    """For each number of rows formed at once, before anybody sees the matrix."""
    g = torch.Generator().manual_seed(0)
    B = torch.randn(n, n, generator=g, dtype=torch.float64)
    B = B + B.T

    def rows(V: Tensor) -> Tensor:
        images = V @ B
        if wrong in ("nan", "inf"):
            images[-1, 0] = float(wrong)
        elif wrong:
            mixed = images if wrong == "all rows" else images[:1]
            mixed += 1e-4 * images.mean(0)
        return images

    A = LinearOperator(lambda v: B @ v, (n, n), B[0], rows=rows)
    shifted = A.shift(2.0)
    assert error(shifted.dense(), B + 2.0 * torch.eye(n, dtype=torch.float64)) < 1e-14
    numbers = {2: [2], 40: [40], 300: [128, 128, 44]}[n]
    # Those at once, one that compares, and on failure one for what rounding does, and all one by one.
    checks = len(set(numbers)) if not wrong else numbers[0] + (1 if wrong in ("nan", "inf") else 2)
    assert A.products == n + checks


def test_rounding_of_autocast_is_no_difference() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(64, 10), torch.randint(0, 3, (64,))

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.cross_entropy(net(x), y)

    A = hessian(evaluate(closure, net.parameters()))
    A.dense()
    assert A.products == A.shape[0] + 2


def test_scipy_finds_the_eigenvalues_of_the_dense_matrix() -> None:
    w = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).requires_grad_()
    mix = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = hessian(evaluate(lambda: (mix @ w).tanh().square().sum() + w.pow(4).sum(), [w]))
    truth = torch.linalg.eigvalsh(A.dense())
    before = A.products
    found = scipy.sparse.linalg.eigsh(A.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    close(torch.tensor(sorted(found)), truth[-3:])
    assert A.products > before


def test_scipy_solves_least_squares_with_a_rectangle() -> None:
    B = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = torch.arange(7, dtype=torch.float64)
    A = of(B, transpose=lambda u: B.T @ u).to_scipy()
    assert A.shape == (7, 4) and A.dtype == np.float64
    solution = scipy.sparse.linalg.lsqr(A, b.numpy(), atol=1e-14, btol=1e-14)[0]
    close(torch.from_numpy(solution), torch.linalg.lstsq(B, b[:, None]).solution[:, 0])
    close(torch.from_numpy(A @ np.eye(4)), B)
    close(torch.from_numpy(A.T @ np.eye(7)), B.T)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, np.float32), (torch.bfloat16, np.float64)])
def test_scipy_gets_the_operators_dtype_where_numpy_has_it(dtype: torch.dtype, expected: Any) -> None:
    A = of(torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=dtype))).to_scipy()
    vector = np.ones(6)[::-2]  # neither contiguous nor of the operator's dtype
    vector.setflags(write=False)
    assert A.dtype == expected and (A @ vector).dtype == expected
    assert (A @ vector).tolist() == [1.0, 2.0, 4.0] and (A @ vector[:, None]).shape == (3, 1)


def test_arrays_of_any_kind_but_complex_ones_are_multiplied() -> None:
    A = of(torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))).to_scipy()
    v = np.array([1.0, -1.0, 0.5])
    for kind in (">f8", "float32", "longdouble", "int64"):
        np.testing.assert_allclose(A @ v.astype(kind), [1.0, 2.0, 4.0] * v.astype(kind).astype(float))
    assert (A @ np.zeros((3, 0))).shape == (3, 0)
    with pytest.raises(TypeError, match="v must be real, as the operator is, got an array of complex128"):
        A @ (v * 1j)


def test_scipy_that_is_missing_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match="to_scipy needs SciPy, which is not installed: pip install scipy"):
        of(torch.eye(2)).to_scipy()
