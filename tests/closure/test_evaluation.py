"""An evaluation: complete when made, refused where the parameters have moved or the graph was freed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import Batches, Doubled, Held, build
from torch import Tensor, nn

from newtonopt import Evaluation, HessianFree, evaluate, gauss_newton, hessian, jacobian
from newtonopt.closure.evaluation import KeptGraph, Known, Manner, Standing, Verdict
from newtonopt.closure.objective import Objective
from newtonopt.curvature import sharpness

ALL = pytest.mark.parametrize("operator", [hessian, gauss_newton, jacobian], ids=lambda f: f.__name__)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_evaluation_from_a_bare_loss() -> None:
    theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    H = hessian(Evaluation.from_loss((theta[0] ** 2 * theta[1]).sum(), [theta]))
    close(H.dense(), torch.tensor([[4.0, 2.0], [2.0, 0.0]], dtype=torch.float64))


def test_decay_joins_loss_gradient_and_operators() -> None:
    theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    decay = torch.tensor([0.5, 2.0], dtype=torch.float64)
    evaluation = Evaluation.from_loss(F.mse_loss(theta, torch.zeros(2).double()), [theta], decay=decay)
    close(evaluation.loss, torch.tensor(2.5 + 0.25 + 4.0).double())
    close(evaluation.gradient, torch.tensor([1.5, 6.0]).double())
    close(hessian(evaluation).dense(), torch.diag(torch.tensor([1.5, 3.0]).double()))


def test_freed_evaluation_refuses_products() -> None:
    case = build("mlp", "mse")
    evaluation = evaluate(case.closure, case.params)
    evaluation.free()
    with pytest.raises(RuntimeError, match="freed"):
        hessian(evaluation)


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
    with pytest.raises(RuntimeError, match="does not depend on any of the given parameters"):
        evaluate(lambda: nn.Linear(2, 1)(torch.ones(1, 2)).sum(), [nn.Parameter(torch.ones(2))], products=products)


def test_an_evaluation_outlives_trials_and_says_when_the_parameters_moved() -> None:
    case = build("mlp", "mse")
    evaluation = evaluate(case.closure, case.params)
    before = hessian(evaluation).dense()
    sharpness(case.closure, case.params, max_gradients=8)
    assert torch.equal(hessian(evaluation).dense(), before)
    H = hessian(evaluation)
    HessianFree(case.params).step(case.closure)
    with pytest.raises(RuntimeError, match="changed after this evaluation was made"):
        H.dense()


def test_nothing_sets_an_attribute_of_an_evaluation() -> None:
    case = build("mlp", "mse")
    evaluation = Objective(case.closure, case.params).record()
    for field in dataclasses.fields(evaluation):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(evaluation, field.name, None)


def test_a_copy_with_another_gradient_shares_graph_and_verdicts() -> None:
    """An optimizer gives the loss's gradient to an evaluation of other data, for curvature."""
    case = build("mlp", "cross_entropy")
    evaluation = evaluate(case.closure, case.params)
    copy = dataclasses.replace(evaluation, gradient=2 * evaluation.gradient)
    product = hessian(copy) @ evaluation.gradient
    assert torch.equal(product, hessian(evaluation) @ evaluation.gradient)
    assert evaluation.verdicts == copy.verdicts != {}
    assert evaluation.checks == copy.checks > 0
    copy.free()
    with pytest.raises(RuntimeError, match="was freed"):
        hessian(evaluation)


def test_known_verdicts_spare_the_checks() -> None:
    case = build("mlp", "mse")
    first = Objective(case.closure, case.params).evaluate()
    v = first.gradient
    hessian(first) @ v
    second = Objective(case.closure, case.params, known=Known(first.verdicts)).evaluate()
    hessian(second) @ v
    assert first.checks > 0 and second.checks == 0
    assert second.verdict("hessian") == first.verdict("hessian")
    assert second.verdict("gauss_newton") is None


def test_a_verdict_holds_for_the_form_that_was_checked() -> None:
    standing = Standing("cached")
    standing.judge("hessian", Verdict(Manner("cached"), "", 0.0, 4))
    standing.judge("jacobian", Verdict(Manner("cached"), "rough", 0.1, 2))
    assert standing.checks == 6
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
    evaluation = dataclasses.replace(Evaluation.from_loss(theta.square().sum(), [theta]), standing=standing)
    assert evaluation.verdict("hessian") is not None
    evaluation.turn_to("finite_difference")
    assert evaluation.form == "finite_difference" and evaluation.verdict("hessian") is None


def test_a_graph_that_is_dropped_remembers_its_penalties() -> None:
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
    graph = KeptGraph(theta.square().sum())
    graph.drop([theta])
    assert graph.leaves_outputs_out([theta])
    graph.check_alive()
    with pytest.raises(RuntimeError, match="was freed"):
        _ = graph.live
    graph.free()
    with pytest.raises(RuntimeError, match="was freed"):
        graph.check_alive()


@pytest.mark.parametrize("change", [1.0, 1.001])
def test_a_rerun_with_another_loss_or_gradient_is_refused(change: float) -> None:
    theta = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    evaluation = Evaluation.from_loss(theta.square().sum(), [theta])
    loss, gradient, eps = 5.0, evaluation.gradient, evaluation.eps
    if change == 1.0:
        evaluation.check_same(loss, gradient, 1e-6, eps)
        assert evaluation.standing.replayed and evaluation.standing.graph_eps == eps
        return
    with pytest.raises(RuntimeError, match=r"computed the loss 5\.005 at the same parameters where"):
        evaluation.check_same(change * loss, gradient, 1e-6, eps)
    with pytest.raises(RuntimeError, match=r"another gradient .* by 0\.001 times its norm"):
        evaluation.check_same(loss, change * gradient, 1e-6, eps)
    assert not evaluation.standing.replayed


def test_no_outputs_were_recorded_for_a_bare_loss() -> None:
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
    evaluation = Evaluation.from_loss(F.mse_loss(theta, torch.zeros(2).double()), [theta])
    with pytest.raises(RuntimeError, match=r"no outputs were recorded .* newtonopt.evaluate\(closure, params\)"):
        gauss_newton(evaluation)
