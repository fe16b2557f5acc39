"""LevenbergMarquardt alone: the step equals a dense one, the geodesic, the damping, many rows, momentum."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import build as build_case
from torch import Tensor, nn

from newtonopt import LevenbergMarquardt, evaluate, mark_outputs
from newtonopt.operators.rows import residual_rows
from newtonopt.optimizers.levenberg_marquardt import along_geodesic, most_rows
from newtonopt.optimizers.model import Bend, Proposal, QuadraticModel
from newtonopt.solvers.least_squares import metric
from newtonopt.solvers.solution import Iterate

PLAIN: dict[str, Any] = {"acceleration": False, "max_trials": 1}


def spread_of(case: Any, decay: float | Tensor, power: float) -> Tensor:
    rows = residual_rows(evaluate(case.closure, case.params))
    return metric(rows, decay, power).spread


@pytest.mark.parametrize("damping", [1e-9, 1e-3, 10.0])
@pytest.mark.parametrize("scaling", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("solve", ["samples", "parameters"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_the_step_is_the_dense_solution(loss: str, solve: Any, scaling: float, damping: float) -> None:
    """Also where the loss's Hessian by the outputs is singular, as cross-entropy's is."""
    case = build_case("mlp", loss)
    A, g, start = case.dense_gauss_newton(), evaluate(case.closure, case.params).gradient, case.flat()
    expected = -torch.linalg.solve(A + damping * spread_of(case, 0.0, scaling).diag(), g)
    optimizer = LevenbergMarquardt(
        case.params, solve=solve, scaling=scaling, damping=damping, min_damping=1e-30, acceleration=False
    )
    proposed = proposal_of(optimizer, case)
    close = 1e-10 if damping > 1e-6 else 1e-6  # the dense solution itself loses digits
    torch.testing.assert_close(proposed, expected, rtol=close, atol=close * float(expected.norm()))
    assert torch.equal(case.flat(), start)


def proposal_of(optimizer: LevenbergMarquardt, case: Any) -> Tensor:
    """Return the first proposal's step, which a test need not see accepted."""
    found: list[Tensor] = []
    propose = optimizer._propose

    def keep(model: QuadraticModel, state: Any) -> Any:
        proposal = propose(model, state)
        found.append(proposal.steps[0].step)
        return Proposal([], proposal.state, proposal.reason)

    optimizer._propose = keep  # type: ignore[method-assign]
    optimizer.step(case.closure)
    return found[0]


@pytest.mark.parametrize("solve", ["samples", "parameters"])
@pytest.mark.parametrize("scaling", [0.0, 0.5])
@pytest.mark.parametrize("kinds", ["one decay", "own decays", "own rates", "frozen"])
def test_groups_and_decay_and_frozen_parameters_are_those_of_the_dense_step(
    kinds: str, scaling: float, solve: Any
) -> None:
    case = build_case("mlp", "mse")
    params = list(case.params)
    sizes = [p.numel() for p in params]
    decays, rates, trained = [0.0] * len(params), [1.0] * len(params), [True] * len(params)
    if kinds == "one decay":
        decays = [0.3] * len(params)
    elif kinds == "own decays":
        decays = [0.3 if number % 2 else 0.0 for number in range(len(params))]
    elif kinds == "own rates":
        rates = [0.5 if number % 2 else 0.2 for number in range(len(params))]
    else:
        trained[0] = False
        params[0].requires_grad_(False)
    groups = [{"params": [p], "lr": r, "weight_decay": d} for p, r, d in zip(params, rates, decays, strict=True)]

    def entries(values: list[float]) -> Tensor:
        return torch.cat(
            [torch.full((s,), v, dtype=torch.float64) for s, v, t in zip(sizes, values, trained, strict=True) if t]
        )

    kept = [p for p, t in zip(params, trained, strict=True) if t]
    evaluation = evaluate(case.closure, kept)
    R, D = residual_rows(evaluation).dense(), entries(decays)
    theta = torch.cat([p.detach().reshape(-1) for p in kept])
    C = metric(residual_rows(evaluation), D if len(set(decays)) > 1 else decays[0], scaling).spread
    g = evaluation.gradient + D * theta
    expected = -entries(rates) * torch.linalg.solve(R.T @ R + (D + 1e-3 * C).diag(), g)
    optimizer = LevenbergMarquardt(groups, solve=solve, scaling=scaling, damping=1e-3, acceleration=False)
    torch.testing.assert_close(proposal_of(optimizer, case), expected, rtol=1e-9, atol=1e-10 * float(expected.norm()))


@pytest.mark.parametrize(
    ("parameter", "power"), [(torch.ones(3), 1.0), (torch.ones(3, 1), 0.5)], ids=["vector", "matrix"]
)
def test_parameters_with_units_are_damped_in_these(parameter: Tensor, power: float) -> None:
    """A formula's parameters: a change of their units changes nothing."""
    t = torch.linspace(0, 1, 20, dtype=torch.float64)
    found = {}
    for unit in (1.0, 1e6):
        p = (parameter.double() / torch.tensor([unit, 1.0, 1.0]).view(parameter.shape)).requires_grad_()
        optimizer = LevenbergMarquardt([p], damping=1.0, acceleration=False)

        def closure(p: Tensor = p, unit: float = unit) -> Tensor:
            a, b, c = p.flatten()
            return F.mse_loss(unit * a * t + b * t**2 + c, t.exp())

        optimizer.step(closure)
        found[unit] = p.detach().flatten() * torch.tensor([unit, 1.0, 1.0])
    assert torch.allclose(found[1.0], found[1e6], rtol=1e-8) == (power == 1.0)


def test_a_gradient_outside_the_rows_is_followed_too() -> None:
    """A penalty that does not go through the outputs has no rows."""
    model, x = nn.Linear(3, 1).double(), torch.randn(8, 3, dtype=torch.float64)
    params = list(model.parameters())

    def closure() -> Tensor:
        loss = F.mse_loss(model(x), x[:, :1] + 1) + 0.1 * model.weight.abs().sum()
        loss.backward()
        return loss

    evaluation = evaluate(closure, params)
    R = residual_rows(evaluation).dense()
    expected = -torch.linalg.solve(
        R.T @ R + 1e-2 * metric(residual_rows(evaluation), 0.0, 0.5).spread.diag(), evaluation.gradient
    )
    for solve in ("samples", "parameters"):
        optimizer = LevenbergMarquardt(params, damping=1e-2, solve=solve, acceleration=False)  # type: ignore[arg-type]

        def clean() -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            return closure()

        with pytest.warns(UserWarning, match="leaves that part out"):
            proposed = proposal_of(optimizer, SimpleNamespace(closure=clean))
        torch.testing.assert_close(proposed, expected, rtol=1e-9, atol=1e-12)


def test_ill_conditioned_rows_keep_their_digits() -> None:
    """A condition number of 1e8, which a Gram matrix would square, is solved by orthogonal factors."""
    U, _ = torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    A = U @ torch.logspace(0, -8, 6, dtype=torch.float64).diag() @ V.T
    solution = torch.randn(6, dtype=torch.float64)
    p = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = LevenbergMarquardt([p], damping=1e-15)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(A @ p, A @ solution, reduction="sum")
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(closure)
    torch.testing.assert_close(p.detach(), solution, rtol=0, atol=1e-5)


# The geodesic.


class Curve:
    """Two residuals that are quadratic along one parameter: the second-order step is exact."""

    def __init__(self) -> None:
        self.p = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def outputs(self, p: Tensor) -> Tensor:
        return torch.stack([p[0], p[1] - p[0] ** 2])

    def closure(self) -> Tensor:
        self.p.grad = None
        loss = F.mse_loss(self.outputs(self.p), torch.zeros(2, dtype=torch.float64), reduction="sum")
        loss.backward()
        return loss


def test_the_acceleration_is_the_second_derivative_along_the_step() -> None:
    """a = -R^-1 r_vv; the outputs are quadratic, so that the difference at h = 0.1 has no error."""
    bent, straight = Curve(), Curve()
    LevenbergMarquardt([bent.p], damping=1e-12).step(bent.closure)
    LevenbergMarquardt([straight.p], damping=1e-12, acceleration=False).step(straight.closure)
    start = Curve().p.detach()
    v = straight.p.detach() - start
    J = torch.func.jacrev(bent.outputs)(start)
    second = torch.func.jvp(lambda x: torch.func.jvp(bent.outputs, (x,), (v,))[1], (start,), (v,))[1]
    a = -torch.linalg.solve(J, second)
    torch.testing.assert_close(bent.p.detach() - start, v + 0.5 * a, rtol=1e-6, atol=1e-9)


class Parabola:
    """Objective `(s - 1)^2` of one parameter, or infinite beyond a bound."""

    def __init__(self, bound: float = math.inf) -> None:
        self.bound, self.tried = bound, []  # type: ignore[var-annotated]

    def loss_at(self, step: Tensor) -> float:
        self.tried.append(float(step))
        return (float(step) - 1.0) ** 2 if abs(float(step)) < self.bound else math.inf


def proposed(length: float, decrease: float) -> tuple[QuadraticModel, Proposal[Any]]:
    model = QuadraticModel(torch.tensor([-2.0], dtype=torch.float64), 1.0, 1.0, 2.2e-16)
    step = torch.tensor([length], dtype=torch.float64)
    return model, Proposal([Iterate(step, decrease)], None, "")  # type: ignore[arg-type]


def test_a_path_is_cut_where_its_bend_is_as_long_as_three_quarters() -> None:
    objective, (model, proposal) = Parabola(), proposed(1.0, 1.0)
    bend = Bend(torch.tensor([3.0], dtype=torch.float64), 3.0)
    outcome, shortened = along_geodesic(objective, model, proposal, bend)  # type: ignore[arg-type]
    assert shortened and objective.tried[0] == pytest.approx(0.25 + 0.5 * 0.25**2 * 3)
    assert outcome.acceleration == 3.0 and outcome.accepted
    assert outcome.predicted == pytest.approx(2 * 0.25 - 0.25**2)


def test_a_step_is_shortened_twice_before_it_is_rejected() -> None:
    for bound, accepted in ((0.5, True), (0.1, False)):
        objective, (model, proposal) = Parabola(bound), proposed(1.0, 1.0)
        outcome, _ = along_geodesic(objective, model, proposal, None)  # type: ignore[arg-type]
        assert outcome.accepted is accepted and outcome.first_ratio == -math.inf
        assert objective.tried == pytest.approx([1.0, 0.4] if accepted else [1.0, 0.4, 0.16])


def test_a_predicted_rise_is_a_rejection() -> None:
    objective, (model, proposal) = Parabola(), proposed(-0.5, -1.25)
    outcome, _ = along_geodesic(objective, model, proposal, None)  # type: ignore[arg-type]
    assert not outcome.accepted and outcome.first_ratio == -math.inf


def test_an_acceleration_that_is_not_finite_is_left_out() -> None:
    """The second-order part is taken at a tenth of the step, where this closure has no loss."""
    p = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = LevenbergMarquardt([p], damping=1e-6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        z = 2 * p
        if 0.89 < float(p.detach()) < 0.91:
            z = z + math.nan
        loss = F.mse_loss(z, torch.zeros(1, dtype=torch.float64))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.last_step is not None
    assert optimizer.last_step.accepted and optimizer.last_step.acceleration == 0.0
    assert abs(float(p.detach())) < 1e-5


# The damping.


def fitted(steps: int, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[list[Any], nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1)).to(dtype)
    x = torch.linspace(-1, 1, 60, dtype=dtype)[:, None]
    optimizer = LevenbergMarquardt(model.parameters(), **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), (4 * x).sin())
        loss.backward()
        return loss

    reports = []
    for _ in range(steps):
        optimizer.step(closure)
        reports.append(optimizer.last_step)
    return reports, model


def test_the_damping_follows_the_ratio() -> None:
    reports, _ = fitted(25, max_trials=1)
    smooth = True
    for before, after in itertools.pairwise(reports):
        smooth = smooth and before.first_ratio >= 0.9 and before.acceleration <= 0.1
        low = 1.5 if before.acceleration > 0.75 else 2.0
        ratio = before.first_ratio
        factor = low if ratio < 0.25 else (1 / (10 if smooth else 3) if ratio > 0.75 else 1.0)
        assert after.damping == pytest.approx(factor * before.damping, rel=1e-9)


def test_a_fit_goes_far_below_what_gradients_reach() -> None:
    reports, _ = fitted(45)
    assert reports[-1].loss < 1e-8 < 1e-2 < reports[0].loss


@pytest.mark.parametrize("solve", ["samples", "parameters"])
def test_in_single_precision_trials_end_at_the_rounding_of_the_loss(solve: Any) -> None:
    reports, _ = fitted(60, torch.float32, solve=solve)
    assert all(math.isfinite(report.loss) for report in reports)
    assert reports[-1].loss < 1e-6
    assert sum(report.trials for report in reports[-20:]) <= 20 * 6


def test_no_parameter_moves_where_a_trial_is_not_finite() -> None:
    p = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = LevenbergMarquardt([p])

    def closure() -> Tensor:
        optimizer.zero_grad()
        z = p if float(p.detach()) == 1.0 else p * math.nan
        loss = F.mse_loss(z, torch.zeros(1, dtype=torch.float64))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(p.detach()) == 1.0
    assert optimizer.last_step is not None and not optimizer.last_step.accepted


# Many rows, and momentum.


def test_of_many_rows_some_are_chosen_and_the_reason_says_so() -> None:
    reports, _ = fitted(30, rows=20, solve="samples")
    assert reports[0].rows == 20 and reports[0].solve == "samples"
    assert "for 20 of 60 rows, chosen at random" in reports[0].reason
    assert reports[-1].loss < 0.1 * reports[0].loss
    again, _ = fitted(6, rows=20, solve="samples")
    other, _ = fitted(6, rows=20, solve="samples", seed=1)
    assert [r.loss for r in again] == [r.loss for r in reports[:6]] != [r.loss for r in other]
    assert fitted(1)[0][-1].reason.endswith("the linear equations were solved exactly")


def test_momentum_begins_with_the_last_direction() -> None:
    """SPRING: the second step solves for the residuals after mu d, with d the first direction."""
    A = torch.randn(5, 9, dtype=torch.float64)
    y = torch.randn(5, dtype=torch.float64)
    p = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    optimizer = LevenbergMarquardt([p], damping=0.1, momentum=0.8, acceleration=False, scaling=0.0, solve="samples")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (A @ p - y).square().sum()
        loss.backward()
        return loss

    usual = float(A.square().sum()) / 9
    optimizer.step(closure)
    first = p.detach().clone()
    optimizer.step(closure)
    assert optimizer.last_step is not None and optimizer.last_step.damping is not None
    shift = optimizer.last_step.damping * usual * torch.eye(5, dtype=torch.float64)
    d = 0.8 * first
    expected = d - A.T @ torch.linalg.solve(A @ A.T + shift, A @ first - y + A @ d)
    torch.testing.assert_close(p.detach() - first, expected, rtol=1e-9, atol=1e-12)


def test_a_rejected_step_forgets_the_direction_but_keeps_its_entry() -> None:
    """A state without the entry would not load through `torch.distributed.checkpoint`."""
    p = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = LevenbergMarquardt([p], momentum=0.5)

    def closure() -> Tensor:
        z = p if bool((p == 1).all()) else p * math.nan
        return F.mse_loss(z, torch.zeros(2, dtype=torch.float64))

    optimizer.step(closure)
    assert optimizer.last_step is not None and not optimizer.last_step.accepted
    assert torch.equal(optimizer.state[p]["last"], torch.zeros(2, dtype=torch.float64))


def test_few_parameters_take_all_rows() -> None:
    reports, _ = fitted(1, rows=20, solve="parameters")
    assert reports[0].rows == 20  # more parameters than the limit
    p = torch.ones(2, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    optimizer = LevenbergMarquardt([p], rows=20)
    optimizer.step(lambda: F.mse_loss(p[0] * torch.exp(-p[1] * t), t))
    assert optimizer.last_step is not None and optimizer.last_step.rows == 50
    optimizer = LevenbergMarquardt([p], rows=20, solve="samples")
    optimizer.step(lambda: F.mse_loss(p[0] * torch.exp(-p[1] * t), t))
    assert optimizer.last_step is not None and optimizer.last_step.rows == 20
    assert most_rows(10**6, "auto", 4096) == 4096 and most_rows(1000, "auto", 4096) == 2**27 // 1000


def test_a_loss_without_rows_is_refused() -> None:
    model, x = nn.Linear(2, 1), torch.randn(30, 2)
    optimizer = LevenbergMarquardt(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = mark_outputs(model(x)).cos().mean()
        loss.backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="Use HessianFree"):
        optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
