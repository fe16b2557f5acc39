"""Dense matrices from several products at once, and the diagonal blocks of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from problems import build, error
from torch import Tensor, nn

from newtonopt import LinearOperator, evaluate, gauss_newton, hessian
from newtonopt.closure.evaluation import Evaluation, Products
from newtonopt.operators import linear_operator
from newtonopt.operators import products as _products
from newtonopt.operators.matrices import diagonal_blocks


class Picky(torch.autograd.Function):
    """Squares its input, with derivatives that no batch of tensors can pass: they go through NumPy."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        Picky.calls += 1
        torch.from_numpy(g.detach().numpy())
        return 2 * g * x


@pytest.mark.parametrize("at_once", [1, 3, 128])
@pytest.mark.parametrize("of", [hessian, gauss_newton])
def test_products_of_any_size_give_the_same_matrix(of: Any, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build("mlp", "cross_entropy")
    A = of(evaluate(case.closure, case.params))
    n = A.shape[0]
    singly = torch.stack([A @ unit for unit in torch.eye(n, dtype=torch.float64)])
    sizes = []
    plain = _products.flatten_rows

    def seen(tensors: Any, like: Any, count: int) -> Tensor:
        sizes.append(count)
        return plain(tensors, like, count)

    monkeypatch.setattr(_products, "flatten_rows", seen)
    monkeypatch.setattr(_products, "_MOST_ROWS", at_once)
    A = of(evaluate(case.closure, case.params))
    assert error(A.dense(), (singly + singly.T) / 2) < 1e-12
    assert A.products - 1 == n == 43  # and one that checks them
    assert sizes == {1: [], 3: [3] * 14 + [1], 128: [43]}[at_once]


def test_products_are_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many bytes at once, by what the gradients in both passes of a product take."""
    sizes: list[int] = []
    plain = _products.flatten_rows
    monkeypatch.setattr(
        _products, "flatten_rows", lambda t, like, count: [sizes.append(count), plain(t, like, count)][1]
    )
    model = nn.Linear(10, 1).double()
    for rows in (100, 1000):
        x = torch.randn(rows, 10).double()
        monkeypatch.setattr(_products, "_BATCH_BYTES", 100 * 8 * 40)
        hessian(evaluate(lambda x=x: model(x).square().mean(), model.parameters())).dense()  # type: ignore[misc]
    assert 1 < max(sizes) < 11
    assert sum(sizes) == 11  # of the larger batch one by one


def test_operations_that_allow_no_products_are_passed_one_by_one() -> None:
    theta = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    H = hessian(evaluate(lambda: Picky.apply(theta).square().sum(), [theta]))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(H.dense(), torch.diag(12 * theta.detach().square()))
    assert H.products == 4  # one of them checks the others


def test_an_error_of_the_products_is_not_taken_for_one_of_products() -> None:
    theta = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            if g.grad_fn is None and g.requires_grad is False and Broken.armed:
                raise ZeroDivisionError("of the user's")
            return g * 1.0

        armed = False

    H = hessian(evaluate(lambda: Broken.apply(theta).pow(3).sum(), [theta]))  # type: ignore[no-untyped-call]
    Broken.armed = True
    with pytest.raises(ZeroDivisionError, match="of the user's"):
        H.dense()


@pytest.mark.parametrize("products", [form for form in get_args(Products) if form != "auto"])
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("decay", [0.0, "per entry"])
def test_blocks_are_those_of_the_matrix(curvature: Any, products: Any, decay: Any) -> None:
    case = build("words", "cross_entropy")
    evaluation: Evaluation = evaluate(case.closure, case.params, products)
    if decay:
        evaluation = replace(evaluation, decay=torch.rand_like(evaluation.gradient))
    A = case.dense_hessian() if curvature == "hessian" else case.dense_gauss_newton()
    A = A + torch.diag(evaluation.decay) if isinstance(evaluation.decay, Tensor) else A
    first = 0
    for block, p in zip(diagonal_blocks(evaluation, curvature), case.params, strict=True):
        part = slice(first, first + p.numel())
        assert block.shape == (p.numel(), p.numel())
        assert error(block.dense(), A[part, part]) < (1e-6 if products == "finite_difference" else 1e-12)
        checks = int(products == "cached" and p.numel() > 1)
        assert block.products == p.numel() + checks
        assert block.psd is (curvature == "gauss_newton")
        first += p.numel()


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
