"""The curvature matrices against dense truth in float64, whole and by blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES
from problems import Case, build, error, losses, models
from torch import Tensor, nn

from newtonopt import Evaluation, evaluate, gauss_newton, hessian, jacobian, mark_outputs
from newtonopt.closure.evaluation import Products
from newtonopt.operators.matrices import diagonal_blocks

PAIRS = [(model, "cross_entropy") for model in models()] + [("mlp", loss) for loss in losses(3, 6)] + [("odd", "mse")]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.fixture(params=PAIRS, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    return build(*request.param)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_products_equal_the_dense_truth(pair: tuple[str, str], device: str) -> None:
    case = build(*pair, device=device)
    truth = case.dense_hessian(), case.dense_gauss_newton(), case.dense_jacobian()
    torch.manual_seed(0)
    evaluation = evaluate(case.closure, case.model.parameters())
    close(hessian(evaluation).dense(), truth[0])
    close(gauss_newton(evaluation).dense(), truth[1])
    close(jacobian(evaluation).dense(), truth[2])


def test_jacobian_is_adjoint_to_its_transpose(case: Case) -> None:
    J = jacobian(evaluate(case.closure, case.params))
    u, v = torch.randn(J.shape[0], dtype=J.dtype), torch.randn(J.shape[1], dtype=J.dtype)
    close(u @ (J @ v), (J.T @ u) @ v)


def test_gauss_newton_is_positive_semidefinite_and_symmetric(case: Case) -> None:
    G = gauss_newton(evaluate(case.closure, case.params))
    raw = G @ torch.eye(G.shape[0], dtype=G.dtype)
    close(raw, raw.T)
    assert G.psd or case.tapped_loss is not None  # of marked outputs nobody can know
    assert torch.linalg.eigvalsh(raw)[0] >= -1e-12


def test_two_losses_of_one_network_add_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()

    def loss_of(scale: float) -> torch.Tensor:
        return scale * F.mse_loss(model(scale * x), y)

    def one() -> torch.Tensor:
        loss = loss_of(1.0) + loss_of(2.0)
        loss.backward()
        return loss

    def two() -> None:
        loss_of(1.0).backward()
        loss_of(2.0).backward()

    first, second = evaluate(one, model.parameters()), evaluate(two, model.parameters())
    close(first.gradient, second.gradient)
    close(hessian(first).dense(), hessian(second).dense())
    close(gauss_newton(first).dense(), gauss_newton(second).dense())
    parts = [gauss_newton(Evaluation_of(model, lambda s=s: loss_of(s))).dense() for s in (1.0, 2.0)]
    close(gauss_newton(second).dense(), parts[0] + parts[1])


def Evaluation_of(model: nn.Module, loss: object) -> Evaluation:
    return evaluate(loss, model.parameters())  # type: ignore[arg-type]


def test_difference_losses_take_curvature_from_both_arguments() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    left, right = torch.randn(6, 2).double(), torch.randn(6, 2).double()
    periodic = evaluate(lambda: F.mse_loss(model(left), model(right)), model.parameters())
    by_difference = evaluate(
        lambda: F.mse_loss(model(left) - model(right), torch.zeros(6, 1).double()), model.parameters()
    )
    close(gauss_newton(periodic).dense(), gauss_newton(by_difference).dense())


def test_derivatives_inside_the_loss() -> None:
    """A physics-informed residual: the Gauss-Newton matrix is J'J of the residual, whose own Jacobian is taken by
    finite differences.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.linspace(0, 1, 7).double()[:, None].requires_grad_()

    def residual() -> torch.Tensor:
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return slope + u

    evaluation = evaluate(lambda: F.mse_loss(residual(), torch.zeros(7, 1).double()), model.parameters())
    J = jacobian(evaluation).dense()
    params = list(model.parameters())
    start = torch.nn.utils.parameters_to_vector(params).detach()
    columns = []
    for direction in torch.eye(len(start), dtype=torch.float64):
        ends = []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(start + sign * 1e-6 * direction, params)
            ends.append(residual().detach()[:, 0])
        columns.append((ends[0] - ends[1]) / 2e-6)
    torch.nn.utils.vector_to_parameters(start, params)
    torch.testing.assert_close(J, torch.stack(columns, 1), rtol=1e-6, atol=1e-8)
    close(gauss_newton(evaluation).dense(), 2 / 7 * J.T @ J)


def test_unrecognised_loss_says_what_to_do() -> None:
    case = build("mlp", "mse")
    case.loss = lambda z: z.cosh().log().mean()
    with pytest.raises(RuntimeError, match=r"mark_outputs\(z\).*curvature=\"hessian\""):
        gauss_newton(evaluate(case.closure, case.params))


def test_penalty_outside_the_outputs_is_pointed_out() -> None:
    case = build("mlp", "mse")
    penalty = lambda: sum(p.abs().sum() for p in case.params)  # noqa: E731
    evaluation = evaluate(lambda: case.loss(case.model(case.inputs)) + penalty(), case.params)
    with pytest.warns(UserWarning, match="weight_decay"):
        G = gauss_newton(evaluation)
    plain = gauss_newton(evaluate(case.closure, case.params))
    close(G.dense(), plain.dense())


def test_marked_outputs_take_precedence_over_a_loss_fed_from_them() -> None:
    from newtonopt import mark_outputs

    case = build("mlp", "cross_entropy")
    plain = gauss_newton(evaluate(case.closure, case.params)).dense()
    case.tapped_loss = lambda z: case.loss(mark_outputs(z) / 1.0)
    close(gauss_newton(evaluate(case.closure, case.params)).dense(), plain)
    assert torch.equal(mark_outputs(case.inputs), case.inputs)


def test_operators_are_made_from_evaluations() -> None:
    case = build("mlp", "mse")
    for make in (hessian, gauss_newton, jacobian):
        with pytest.raises(
            TypeError, match=r"evaluation must be an Evaluation, got a method\. Write newtonopt\.evaluate"
        ):
            make(case.closure)  # type: ignore[arg-type]


def test_a_loss_linear_in_a_scalar_output_has_no_curvature_there() -> None:
    theta = torch.tensor([1.0, 2.0], requires_grad=True)
    evaluation = evaluate(lambda: mark_outputs(theta.square().sum()), [theta])
    with pytest.raises(RuntimeError, match="the Gauss-Newton matrix of that part is zero"):
        gauss_newton(evaluation)
    assert torch.equal(jacobian(evaluation) @ torch.ones(2), torch.tensor([6.0]))


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
