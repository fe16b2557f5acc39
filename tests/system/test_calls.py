"""One call of `step`: several Newton steps, and curvature from another closure."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optimizer_db import OPTIMIZERS, Build
from problems import Doubled, unseen
from problems import build as build_case
from torch import Tensor, nn

from newtonopt import DampedNewton, HessianFree, NewtonCG, TrustRegionNewton, evaluate, gauss_newton, hessian
from newtonopt.optimizers.newton import NewtonOptimizer

MEMBERS = ["hessian_free", "damped_newton", "levenberg_marquardt", "newton_cg", "trust_region", "cubic_newton"]


@pytest.fixture(params=MEMBERS)
def build(request: pytest.FixtureRequest) -> Build:
    return OPTIMIZERS[request.param]


class Noisy:
    """A model whose loss draws random numbers and moves statistics, and closures of the whole batch and of a part."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3))
        self.model = self.model.double()
        self.x, self.y = torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 3, (20,))
        self.runs = 0

    def closure(self, rows: int = 20) -> Tensor:
        self.runs += 1
        self.model.zero_grad()
        loss = F.cross_entropy(self.model(self.x[:rows]), self.y[:rows])
        loss.backward()
        return loss

    def part(self) -> Tensor:
        return self.closure(rows=8)

    def flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])


# Several steps.


def test_steps_of_one_call_are_those_of_several(build: Build) -> None:
    one, several = build_case("mlp", "mse"), build_case("mlp", "mse")
    by_one, by_several = build(one.params), build(several.params, steps_per_call=3)
    reports = []
    for _ in range(3):
        by_one.step(one.closure)
        reports.append(by_one.last_step)
    first = by_several.step(several.closure)
    assert torch.equal(one.flat(), several.flat())
    last = by_several.last_step
    assert last is not None and last.steps == 3
    assert float(first) == reports[0].loss
    assert (last.loss, last.ratio, last.step_norm) == (reports[2].loss, reports[2].ratio, reports[2].step_norm)
    for count in ("iterations", "products", "trials"):
        assert getattr(last, count) == sum(getattr(report, count) for report in reports)


@pytest.mark.parametrize("curvature", ["closure", "part"])
def test_a_call_leaves_what_one_run_leaves(build: Build, curvature: str) -> None:
    """And all of its steps are on the function of that run: the same Dropout."""
    problem, twin, once = Noisy(), Noisy(), Noisy()
    optimizer, shorter = build(problem.model.parameters(), steps_per_call=3), build(once.model.parameters())
    torch.manual_seed(5)
    optimizer.step(problem.closure, curvature_closure=None if curvature == "closure" else problem.part)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    twin.closure()
    assert torch.equal(after, torch.get_rng_state())
    for a, b in zip(problem.model.buffers(), twin.model.buffers(), strict=True):
        assert torch.equal(a, b)
    for p, q in zip(problem.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    torch.manual_seed(5)
    shorter = build(once.model.parameters(), steps_per_call=2)
    shorter.step(once.closure, curvature_closure=None if curvature == "closure" else once.part)
    assert optimizer.last_step is not None and shorter.last_step is not None
    assert optimizer.last_step.steps == 3
    # What the second step arrived at is where the third began.
    arrived = shorter.last_step.trial_loss if shorter.last_step.accepted else shorter.last_step.loss
    assert optimizer.last_step.loss == pytest.approx(arrived, rel=1e-12)


def test_a_call_ends_at_a_tolerance() -> None:
    case = build_case("linear", "mse")
    optimizer = NewtonCG(case.params, steps_per_call=50, tolerance_gradient=1e-6)
    optimizer.step(case.closure)
    report = optimizer.last_step
    assert report is not None and 1 < report.steps < 50
    assert "above tolerance_gradient, and no negative curvature was found" in report.reason
    optimizer.step(case.closure)
    assert optimizer.last_step is not None and optimizer.last_step.steps == 1
    assert "was found here before" in optimizer.last_step.reason and optimizer.last_step.products == 0
    optimizer = NewtonCG(build_case("mlp", "mse").params, steps_per_call=5, tolerance_step=1e3)
    other = build_case("mlp", "mse")
    optimizer = NewtonCG(other.params, steps_per_call=5, tolerance_step=1e3)
    optimizer.step(other.closure)
    assert optimizer.last_step is not None and optimizer.last_step.steps == 1


def test_the_gauss_newton_matrix_is_not_said_to_have_been_searched() -> None:
    case = build_case("mlp", "mse")
    optimizer = HessianFree(case.params, tolerance_gradient=1e6)
    for _ in range(2):
        optimizer.step(case.closure)
        assert optimizer.last_step is not None
        assert optimizer.last_step.reason == "no entry of the gradient is above tolerance_gradient"


def test_a_call_ends_where_a_line_search_would_only_fail_again() -> None:
    case = build_case("mlp", "mse")
    start = case.flat()
    tries: list[NewtonOptimizer] = [
        NewtonCG(case.params, steps_per_call=4),
        DampedNewton(case.params, steps_per_call=4),
    ]
    for optimizer, steps in zip(tries, (1, 4), strict=True):

        def uphill() -> Tensor:
            loss = case.closure()
            return loss if torch.equal(case.flat(), start) else lift(loss)

        optimizer.step(uphill)
        assert optimizer.last_step is not None and optimizer.last_step.steps == steps
        assert not optimizer.last_step.accepted
    assert torch.equal(case.flat(), start)


def lift(loss: Tensor) -> Tensor:
    """The closure has called backward: another loss that is added to the first."""
    (100.0 * torch.ones((), dtype=loss.dtype, requires_grad=True)).backward()
    return loss


def test_a_call_ends_at_what_is_not_finite(build: Build) -> None:
    """The loss has a root's kink at zero, where its gradient is infinite: the second step meets it."""
    case = build_case("mlp", "mse")
    start = case.flat()

    def closure() -> Tensor:
        case.model.zero_grad()
        moved = not torch.equal(case.flat(), start)
        z = case.model(case.inputs)
        loss = F.mse_loss(z, torch.zeros_like(z))
        if moved:
            loss = loss + 0.0 * (z * 0.0).square().sum().sqrt()
        loss.backward()
        return loss

    optimizer = build(case.params, steps_per_call=5)
    optimizer.step(closure)
    assert optimizer.last_step is not None and optimizer.last_step.steps == 2
    assert "the gradient is not finite" in optimizer.last_step.reason
    assert bool(torch.isfinite(case.flat()).all()) and not torch.equal(case.flat(), start)


@pytest.mark.parametrize("products", ["cached", "streamed"])
def test_an_error_in_a_later_step_undoes_the_call(build: Build, products: Any) -> None:
    if products != "cached" and build is OPTIMIZERS["levenberg_marquardt"]:
        return  # it needs the graph
    problem = Noisy()
    optimizer = build(problem.model.parameters(), products=products)
    optimizer.step(problem.closure)
    for group in optimizer.param_groups:
        group["steps_per_call"] = 4
    start, state, reached = problem.flat(), copy.deepcopy(optimizer._state), unseen([])

    def failing() -> Tensor:
        if not any(torch.equal(problem.flat(), point) for point in reached()):
            reached().append(problem.flat())
        if optimizer.last_step.steps == 2:
            raise ValueError("the disk is full")
        return problem.closure()

    with pytest.raises(ValueError, match="the disk is full"):
        optimizer.step(failing)
    assert len(reached()) > 2, "steps were taken before"
    assert torch.equal(problem.flat(), start)
    assert str(optimizer._state) == str(state)


def test_one_call_falls_back_once() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x = torch.randn(9, 3, dtype=torch.float64)

    def closure() -> Tensor:
        model.zero_grad()
        z = Doubled.apply(model(x))
        loss = F.mse_loss(z.tanh(), torch.ones_like(z))
        loss.backward()
        return loss

    optimizer = HessianFree(model.parameters(), preconditioner=None, steps_per_call=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step(closure)
    assert len(caught) == 1 and "finite differences" in str(caught[0].message)
    assert optimizer.last_step is not None and optimizer.last_step.form == "finite_difference"
    assert optimizer.last_step.steps == 3


# Curvature from another closure.


def with_part() -> tuple[Any, Callable[[], Tensor]]:
    """A case, and the closure of another loss on half of its data."""
    case = build_case("mlp", "mse")

    def part() -> Tensor:
        case.model.zero_grad()
        z = case.model(case.inputs[:3])
        loss = F.mse_loss(z, torch.ones_like(z))
        loss.backward()
        return loss

    return case, part


@pytest.mark.parametrize("products", ["auto", "streamed", "finite_difference"])
@pytest.mark.parametrize("kind", [HessianFree, DampedNewton])
def test_curvature_is_the_other_closures_and_the_gradient_is_not(kind: Any, products: Any) -> None:
    case, part = with_part()
    more: dict[str, Any] = {"preconditioner": None, "progress_tolerance": 0.0} if kind is HessianFree else {}
    gradient = evaluate(case.closure, case.params).gradient + 0.1 * case.flat()
    other = evaluate(part, case.params)
    A = (gauss_newton if kind is HessianFree else hessian)(other).dense()
    A = A + 0.1 * torch.eye(len(A), dtype=A.dtype)
    values, vectors = torch.linalg.eigh(A)
    expected = -vectors @ ((vectors.T @ gradient) / (values.abs() + 30.0))
    start = case.flat()
    optimizer = kind(case.params, damping=30.0, weight_decay=0.1, products=products, **more)
    loss = optimizer.step(case.closure, curvature_closure=part)
    assert torch.equal(loss, build_case("mlp", "mse").closure().detach())
    # Backtracking may prefer an iterate just before the last.
    assert float((case.flat() - start - expected).norm() / expected.norm()) < 1e-3
    report = optimizer.last_step
    predicted = -float(expected @ (gradient + 0.5 * (A @ expected)))
    assert report.predicted_decrease == pytest.approx(predicted, rel=1e-4)
    assert report.form == ("cached" if products == "auto" else products)


@pytest.mark.parametrize("products", ["cached", pytest.param("finite_difference", marks=pytest.mark.slow)])
def test_the_closure_itself_gives_the_same_steps(build: Build, products: Any) -> None:
    """Also with Dropout: both runs begin with the same random numbers."""
    if products != "cached" and build is OPTIMIZERS["levenberg_marquardt"]:
        return  # it needs the graph
    plain, other = Noisy(), Noisy()
    settings = {"products": products, "weight_decay": 0.1, "steps_per_call": 2}
    a, b = build(plain.model.parameters(), **settings), build(other.model.parameters(), **settings)
    for step in range(2):
        torch.manual_seed(step)
        a.step(plain.closure)
        torch.manual_seed(step)
        b.step(other.closure, curvature_closure=other.closure)
    torch.testing.assert_close(other.flat(), plain.flat(), rtol=1e-9, atol=1e-12)


def test_the_losses_graph_is_not_kept_for_another_curvature() -> None:
    problem = Noisy()
    optimizer = TrustRegionNewton(problem.model.parameters())
    backwards: list[bool] = []
    run = torch.autograd.backward

    def backward(*args: Any, **settings: Any) -> None:
        backwards.append(bool(settings.get("retain_graph")))
        run(*args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "backward", backward)
        optimizer.step(problem.closure, curvature_closure=problem.part)
    assert backwards == [False]


def test_nonsense_for_the_curvature_is_refused_before_anything_changes(build: Build) -> None:
    problem, stranger = Noisy(), Noisy()
    optimizer = build(problem.model.parameters())
    start, random = problem.flat(), torch.get_rng_state()
    buffers = [b.clone() for b in problem.model.buffers()]
    with pytest.raises(TypeError, match=r"curvature_closure must be a function without arguments .*, got tensor"):
        optimizer.step(problem.closure, curvature_closure=torch.zeros(()))  # type: ignore[arg-type]
    with pytest.raises(
        RuntimeError, match=r"The curvature_closure failed\. The loss does not depend on any of the given"
    ):
        optimizer.step(problem.closure, curvature_closure=stranger.closure)
    with pytest.raises(RuntimeError, match=r"The curvature_closure failed\. .*backward"):
        optimizer.step(problem.closure, curvature_closure=lambda: None)
    assert problem.runs == 0
    assert torch.equal(problem.flat(), start) and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(buffers, problem.model.buffers(), strict=True))


def test_curvature_that_is_not_finite_moves_nothing(build: Build) -> None:
    problem = Noisy()
    optimizer = build(problem.model.parameters())
    start = problem.flat()

    def broken() -> Tensor:
        problem.model.zero_grad()
        loss = F.cross_entropy(problem.model(problem.x), problem.y) * torch.inf
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(problem.closure, curvature_closure=broken)
        assert optimizer.last_step is not None and not optimizer.last_step.accepted
        assert "curvature_closure's loss is not finite" in optimizer.last_step.reason
    with pytest.raises(RuntimeError, match="curvature_closure's loss was not finite in 5 steps in a row"):
        optimizer.step(problem.closure, curvature_closure=broken)
    assert torch.equal(problem.flat(), start)


class Outside:
    """A loss computed in different places, and closures that use it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
        self.x, self.y = torch.randn(8, 3).double(), torch.randn(8, 1).double()
        self.outputs = self.model(self.x)
        self.loss = F.mse_loss(self.outputs, self.y)
        self.kept: Tensor | None = None

    def backward_only(self) -> Tensor:
        self.model.zero_grad()
        self.loss.backward(retain_graph=True)
        return self.loss

    def returns_it(self) -> Tensor:
        return self.loss

    def outputs_from_outside(self) -> Tensor:
        self.model.zero_grad()
        loss = F.mse_loss(self.outputs, self.y)
        loss.backward(retain_graph=True)
        return loss

    def kept_from_the_first_call(self) -> Tensor:
        self.model.zero_grad()
        if self.kept is None:
            self.kept = F.mse_loss(self.model(self.x), self.y)
        self.kept.backward(retain_graph=True)
        return self.kept

    def inside(self) -> Tensor:
        self.model.zero_grad()
        loss = F.mse_loss(self.model(self.x), self.y)
        loss.backward()
        return loss

    def flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("where", ["backward_only", "returns_it", "outputs_from_outside", "kept_from_the_first_call"])
def test_a_forward_pass_outside_the_closure_is_an_error(build: Build, where: str, weight_decay: float) -> None:
    problem = Outside()
    optimizer = build(problem.model.parameters(), weight_decay=weight_decay)
    problem.kept_from_the_first_call()
    before = problem.flat()
    with pytest.raises(RuntimeError, match=r"(Move the calls of|[Cc]all) the model"):
        optimizer.step(getattr(problem, where))
    assert torch.equal(problem.flat(), before) and not optimizer.state
    optimizer.step(problem.inside)
    assert not torch.equal(problem.flat(), before)


@pytest.mark.filterwarnings("ignore:Finite differences do not respect")  # and see part of the graph move
@pytest.mark.parametrize("products", ["cached", "streamed", pytest.param("finite_difference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["backward_only", "outputs_from_outside"])
def test_a_forward_pass_outside_the_closure_is_an_error_however_products_are_formed(where: str, products: str) -> None:
    problem = Outside()
    optimizer = HessianFree(problem.model.parameters(), curvature="hessian", products=products)
    before = problem.flat()
    with pytest.raises(RuntimeError, match="bit-for-bit the same"):
        optimizer.step(getattr(problem, where))
    assert torch.equal(problem.flat(), before)


def test_the_returned_number_may_be_an_old_one(build: Build) -> None:
    problem = Outside()
    optimizer = build(problem.model.parameters())
    old, before = problem.loss.item(), problem.flat()
    assert optimizer.step(lambda: (problem.inside(), old)[1]) == old
    assert not torch.equal(problem.flat(), before)


def test_a_loss_that_no_longer_changes_is_no_error(build: Build) -> None:
    """At a minimum whose loss is far above zero trials differ from it by less than its last bit."""
    theta = nn.Parameter(torch.ones(2))

    def closure() -> Tensor:
        theta.grad = None
        loss = 1.0 + F.mse_loss(theta, torch.full((2,), 1.0001))
        loss.backward()
        return loss

    optimizer = build([theta])
    for _ in range(3):
        assert float(optimizer.step(closure)) == 1.0


def test_a_loss_without_a_value_far_away_is_no_error(build: Build) -> None:
    theta = nn.Parameter(torch.ones(2))

    def closure() -> Tensor:
        if float((theta.detach() - 1).abs().max()) > 0.01:
            raise ValueError("out of range")
        theta.grad = None
        loss = 1.0 + F.mse_loss(theta, torch.full((2,), 1.0001))
        loss.backward()
        return loss

    assert float(build([theta]).step(closure)) == 1.0


def test_a_backward_outside_the_closure_is_told_to_move_inside(build: Build) -> None:
    problem = Outside()
    optimizer = build(problem.model.parameters())
    loss = F.mse_loss(problem.model(problem.x), problem.y)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"a backward outside the closure.* loss\.backward\(\) inside the closure"):
        optimizer.step(lambda: loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_on_a_plateau_is_no_forward_pass_outside_the_closure(build: Build, dtype: torch.dtype) -> None:
    p = torch.tensor([0.3, 0.7, 2.0], dtype=dtype, requires_grad=True)
    for loss_of in (
        lambda: F.mse_loss(torch.sigmoid(p - 60), torch.ones_like(p)),
        lambda: 1e8 + 1e-9 * F.mse_loss(p, torch.ones_like(p)),
        lambda: F.mse_loss(p + (p.sign() - p).detach(), torch.full_like(p, 0.5)),  # a straight-through estimator
    ):

        def closure(loss_of: Any = loss_of) -> Tensor:
            p.grad = None
            loss = loss_of()
            loss.backward()
            return loss

        optimizer = build([p])
        for _ in range(3):
            optimizer.step(closure)
