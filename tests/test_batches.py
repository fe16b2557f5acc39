"""Dense matrices from several products at once, and the diagonal blocks of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
from problems import build, error
from torch import Tensor, nn

from newtonopt import _batches, evaluate, gauss_newton, hessian, linear_operator
from newtonopt.evaluation import Evaluation, Products
from newtonopt.operators import diagonal_blocks


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
def test_batches_of_any_size_give_the_same_matrix(of: Any, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build("mlp", "cross_entropy")
    A = of(evaluate(case.closure, case.params))
    n = A.shape[0]
    singly = torch.stack([A @ unit for unit in torch.eye(n, dtype=torch.float64)])
    sizes = []
    plain = _batches.flatten_rows

    def seen(tensors: Any, like: Any, count: int) -> Tensor:
        sizes.append(count)
        return plain(tensors, like, count)

    monkeypatch.setattr(_batches, "flatten_rows", seen)
    monkeypatch.setattr(_batches, "_MOST_ROWS", at_once)
    A = of(evaluate(case.closure, case.params))
    assert error(A.dense(), (singly + singly.T) / 2) < 1e-12
    assert A.products == n == 43
    assert sizes == {1: [], 3: [3] * 14 + [1], 128: [43]}[at_once]


def test_batches_are_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many bytes at once, by what the gradients in both passes of a product take."""
    sizes: list[int] = []
    plain = _batches.flatten_rows
    monkeypatch.setattr(
        _batches, "flatten_rows", lambda t, like, count: [sizes.append(count), plain(t, like, count)][1]
    )
    model = nn.Linear(10, 1).double()
    for rows in (100, 1000):
        x = torch.randn(rows, 10).double()
        monkeypatch.setattr(_batches, "_BATCH_BYTES", 100 * 8 * 40)
        hessian(evaluate(lambda x=x: model(x).square().mean(), model.parameters())).dense()  # type: ignore[misc]
    assert 1 < max(sizes) < 11
    assert sum(sizes) == 11  # of the larger batch one by one


def test_operations_that_allow_no_batches_are_passed_one_by_one() -> None:
    theta = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    H = hessian(evaluate(lambda: Picky.apply(theta).square().sum(), [theta]))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(H.dense(), torch.diag(12 * theta.detach().square()))
    assert H.products == 3


def test_an_error_of_the_products_is_not_taken_for_one_of_batches() -> None:
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
        evaluation.decay = torch.rand_like(evaluation.gradient)
    A = case.dense_hessian() if curvature == "hessian" else case.dense_gauss_newton()
    A = A + torch.diag(evaluation.decay) if isinstance(evaluation.decay, Tensor) else A
    first = 0
    for block, p in zip(diagonal_blocks(evaluation, curvature), case.params, strict=True):
        part = slice(first, first + p.numel())
        assert block.shape == (p.numel(), p.numel())
        assert error(block.dense(), A[part, part]) < (1e-6 if products == "finite_difference" else 1e-12)
        assert block.products == p.numel()
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
