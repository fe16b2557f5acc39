"""What runs of a closure keep, let go, count and remember."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import Batches, Doubled, Held, distances, error, unseen
from torch import Tensor, nn

from newtonopt import HessianFree, evaluate, gauss_newton, hessian, jacobian, mark_outputs

ALL = pytest.mark.parametrize("operator", [hessian, gauss_newton, jacobian], ids=lambda f: f.__name__)
PRODUCTS = pytest.mark.parametrize("products", ["cached", "streamed", "finite_difference"])


@PRODUCTS
def test_products_with_zero_are_zero(products: Any) -> None:
    problem = Batches()
    evaluation = evaluate(problem.closure, problem.params, products=products)
    for operator in (hessian, gauss_newton, jacobian):
        A = operator(evaluation)
        assert torch.equal(A @ torch.zeros(A.shape[1], dtype=A.dtype), torch.zeros(A.shape[0], dtype=A.dtype))


@PRODUCTS
def test_marked_and_recognised_add_up(products: Any) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(6, 4).double(), torch.randn(6, 3).double()

    def closure() -> Tensor:
        return mark_outputs(model(x)).square().mean() + F.mse_loss(model(2 * x), y)

    evaluation = evaluate(closure, model.parameters(), products=products)
    assert error(gauss_newton(evaluation).dense(), hessian(evaluate(closure, model.parameters())).dense()) < 1e-5
    assert sum(evaluation.output_sizes.values()) == 36


@pytest.mark.parametrize("products", ["streamed", "finite_difference"])
@ALL
def test_products_of_changed_parameters_are_an_error_and_leave_them(operator: Any, products: Any) -> None:
    problem = Batches()
    A = operator(evaluate(problem.closure, problem.params, products=products))
    with torch.no_grad():
        problem.params[0].add_(1.0)
    moved = [p.detach().clone() for p in problem.params]
    with pytest.raises(RuntimeError, match="changed after this evaluation"):
        A @ torch.ones(A.shape[1], dtype=torch.float64)
    assert all(torch.equal(p, m) for p, m in zip(problem.params, moved, strict=True))


def _all_by_data(params: list[nn.Parameter]) -> None:
    for p in params:
        p.data = p.data + 1.0


def _in_place_by_data(params: list[nn.Parameter]) -> None:
    params[-1].data.view(-1)[0].add_(1e-3)


def _by_a_vector(params: list[nn.Parameter]) -> None:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(params) + 1.0, params)


@pytest.mark.parametrize("move", [_all_by_data, _in_place_by_data, _by_a_vector])
@pytest.mark.parametrize("after_a_product", [True, False])
@pytest.mark.parametrize("products", ["cached", "streamed", "finite_difference"])
@ALL
def test_products_see_moves_that_autograd_does_not(
    operator: Any, products: Any, move: Any, after_a_product: bool
) -> None:
    problem = Batches()
    A = operator(evaluate(problem.closure, problem.params, products=products))
    v = torch.ones(A.shape[1], dtype=torch.float64)
    before = [p.detach().clone() for p in problem.params]
    first = A @ v if after_a_product else None
    move(problem.params)
    moved = [p.detach().clone() for p in problem.params]
    with pytest.raises(RuntimeError, match="changed after this evaluation"):
        A @ v
    with pytest.raises(RuntimeError, match="changed after this evaluation"):
        A.T @ torch.ones(A.shape[0], dtype=torch.float64)
    assert all(torch.equal(p, m) for p, m in zip(problem.params, moved, strict=True))
    for p, value in zip(problem.params, before, strict=True):
        p.data = value
    assert first is None or torch.equal(A @ v, first)


def test_differences_in_proportion_to_large_parameters() -> None:
    torch.manual_seed(0)
    theta = nn.Parameter(1e4 * torch.randn(20))
    H = hessian(evaluate(lambda: (theta / 1e4).pow(4).sum(), [theta], products="finite_difference"))
    v = torch.randn(20)
    assert error(H @ v, 12e-8 * (theta.detach() / 1e4).square() * v) < 3e-2


def test_differences_at_a_minimum_are_the_same_function() -> None:
    target = torch.randn(5, dtype=torch.float64)
    theta = nn.Parameter(target + 1e-8)
    H = hessian(evaluate(lambda: F.mse_loss(theta, target), [theta], products="finite_difference"))
    v = torch.randn(5, dtype=torch.float64)
    assert error(H @ v, 0.4 * v) < 1e-5


def test_streamed_gauss_newton_pushes_without_a_graph() -> None:
    problem, graphs = Batches(), unseen([])

    def closure() -> Tensor:
        graphs().append(torch.is_grad_enabled())
        return problem.closure()

    G = gauss_newton(evaluate(closure, problem.params, products="streamed"))
    G @ torch.ones(G.shape[1], dtype=torch.float64)  # checked
    graphs().clear()
    G @ torch.ones(G.shape[1], dtype=torch.float64)
    assert graphs() == [False, True]


def test_forward_mode_is_tried_once() -> None:
    torch.manual_seed(0)
    model, x, y, runs = nn.Linear(4, 3).double(), torch.randn(6, 4).double(), torch.randn(6, 3).double(), unseen([])

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            ctx.save_for_backward(z)
            return z * z

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g * ctx.saved_tensors[0]

    def closure() -> Tensor:
        runs().append(1)
        return F.mse_loss(Square.apply(model(x)), y)

    G = gauss_newton(evaluate(closure, model.parameters(), products="streamed"))
    G @ torch.ones(G.shape[1], dtype=torch.float64)  # checked, and forward mode tried in vain
    counts = []
    for _ in range(2):
        runs().clear()
        G @ torch.ones(G.shape[1], dtype=torch.float64)
        counts.append(len(runs()))
    assert counts == [2, 2]


@pytest.mark.parametrize("keep", ["retain_graph", "create_graph"])
def test_a_graph_that_is_kept_stays_whole(keep: str) -> None:
    problem = Batches()
    x, y = next(iter(problem.loader))

    def closure() -> None:
        z = problem.model[0](x).tanh()
        F.mse_loss(z, torch.ones_like(z)).backward(**{keep: True})
        F.cross_entropy(problem.model[4](z), y).backward()

    for operator in (hessian, gauss_newton):
        cached, streamed = (operator(evaluate(closure, problem.params, products=way)) for way in ("cached", "streamed"))  # type: ignore[arg-type]
        v = torch.randn(cached.shape[1], dtype=torch.float64)
        assert error(streamed @ v, cached @ v) < 1e-12


def test_two_operators_warn_once() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 5).double(), torch.randn(5, 4).double(), torch.randn(5, 5).double()
    evaluation = evaluate(lambda: F.mse_loss(distances(model(x)), y), model.parameters())
    operators = [operator(evaluation) for operator in (hessian, gauss_newton)]
    with pytest.warns(UserWarning, match="finite differences") as caught:
        for A in operators:
            A @ torch.ones(25, dtype=torch.float64)
    assert len(caught) == 1


def test_an_output_of_no_parameter() -> None:
    torch.manual_seed(0)
    model, fixed = nn.Linear(4, 3).double(), nn.Parameter(torch.randn(6, 3).double())
    x = torch.randn(6, 4).double()

    def closure() -> Tensor:
        return F.mse_loss(model(x), fixed)

    G = gauss_newton(evaluate(closure, model.parameters()))
    S = gauss_newton(evaluate(closure, model.parameters(), products="streamed"))
    v = torch.randn(15).double()
    assert error(S @ v, G @ v) < 1e-12


def test_falling_back_lets_the_graph_go() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 5).double(), torch.randn(5, 4).double(), torch.randn(5, 5).double()
    Held.alive().clear()
    evaluation = evaluate(lambda: F.mse_loss(Doubled.apply(Held.apply(model(x))), y), model.parameters())
    assert Held.alive()[0]() is not None
    with pytest.warns(UserWarning, match="finite differences"):
        H = hessian(evaluation)
    first = Held.alive()[0]
    H @ torch.ones(25, dtype=torch.float64)
    assert first() is None


def test_products_asked_for_are_not_remembered() -> None:
    problem = Batches()
    optimizer = HessianFree(problem.params, rank=4, products="finite_difference", max_iterations=3)
    optimizer.step(problem.closure)
    optimizer.param_groups[0]["products"] = "cached"
    optimizer.step(problem.closure)
    assert optimizer.last_step is not None
    assert optimizer.last_step.form == "cached"


def crossed(problem: Batches) -> Any:
    """A closure that calls `backward` in another order than it computes the losses."""
    (x, y), (other_x, other_y), *_ = problem.loader

    def closure() -> None:
        first, second = F.cross_entropy(problem.model(x), y), F.cross_entropy(problem.model(other_x), other_y)
        second.backward()
        first.backward()

    return closure


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("products", ["streamed", "finite_difference"])
@pytest.mark.parametrize("make", [lambda problem: problem.closure, crossed], ids=["loop", "crossed"])
def test_rows_of_the_jacobian_are_in_the_order_of_production(make: Any, products: Any, transposed: bool) -> None:
    problem = Batches()
    closure = make(problem)
    cached, other = (jacobian(evaluate(closure, problem.params, products=way)) for way in ("cached", products))
    if transposed:
        cached, other = cached.T, other.T
    v = torch.randn(cached.shape[1], dtype=torch.float64)
    assert error(other @ v, cached @ v) < 1e-5


def test_a_streamed_penalty_outside_the_outputs_is_pointed_out() -> None:
    problem = Batches()
    x, y = next(iter(problem.loader))

    def closure() -> Tensor:
        return F.cross_entropy(problem.model(x), y) + 0.1 * problem.params[0].abs().sum()

    with pytest.warns(UserWarning, match="leaves that part out"):
        gauss_newton(evaluate(closure, problem.params, products="streamed"))


@pytest.mark.parametrize("products", ["streamed", "finite_difference"])
def test_freed_evaluations_refuse_products(products: Any) -> None:
    problem = Batches()
    evaluation = evaluate(problem.closure, problem.params, products=products)
    evaluation.free()
    with pytest.raises(RuntimeError, match="was freed"):
        hessian(evaluation)


@pytest.mark.parametrize("products", ["cached", "streamed", "finite_difference"])
def test_sparse_gradients_and_other_parameters_are_refused(products: Any) -> None:
    table = nn.Embedding(4, 3, sparse=True)
    with pytest.raises(RuntimeError, match="sparse=False"):
        evaluate(lambda: table(torch.arange(4)).square().mean(), table.parameters(), products=products)
    with pytest.raises(RuntimeError, match="does not depend on any of the parameters"):
        evaluate(lambda: nn.Linear(2, 1)(torch.ones(1, 2)).sum(), [nn.Parameter(torch.ones(2))], products=products)
