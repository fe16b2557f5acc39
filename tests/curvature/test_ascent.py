"""Worst and mean rises against closed forms and a brute-force oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from problems import unseen
from torch import Tensor, nn

from newtonopt import evaluate, hessian
from newtonopt.closure.objective import Objective
from newtonopt.curvature import Sharpness, extreme_eigenvalues, measure, sharpness
from newtonopt.curvature.ascent import ball_around
from newtonopt.solvers.dense import solve_ball


def _quadratic(H: Tensor, theta: Tensor, slope: Tensor | None = None) -> Callable[[], Tensor]:
    """The loss (theta - theta_0)' H (theta - theta_0) / 2 + slope' (theta - theta_0), theta_0 the start."""
    origin = theta.detach().clone()

    def closure() -> Tensor:
        d = theta - origin
        loss = 0.5 * d @ (H @ d) + (0.0 if slope is None else slope @ d)
        loss.backward()
        return loss

    return closure


def _matrix(values: Tensor, seed: int = 0) -> Tensor:
    n = values.shape[0]
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return (Q * values) @ Q.T


def _parameter(n: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_()


SPECTRA = {
    "convex": torch.linspace(0.0, 3.0, 30, dtype=torch.float64),
    "close": torch.cat([torch.tensor([3.0, 2.99], dtype=torch.float64), torch.linspace(0, 1, 20, dtype=torch.float64)]),
    "more negative": torch.cat([torch.tensor([-9.0, 2.0], dtype=torch.float64), torch.linspace(-1, 1, 20).double()]),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("radius", [1e-3, 0.05, 2.0])
def test_ball_at_a_stationary_point_is_the_top_eigenvalue(name: str, radius: float) -> None:
    H, theta = _matrix(SPECTRA[name]), _parameter(SPECTRA[name].shape[0])
    found = sharpness(_quadratic(H, theta), [theta], radius=radius)
    assert found.value == pytest.approx(0.5 * radius**2 * float(SPECTRA[name].max()), rel=1e-6)
    assert found.step is not None
    assert float(found.step.norm()) == pytest.approx(radius)
    assert found.converged
    assert found.gradients <= 100


def test_adaptive_ball_scales_by_the_parameters() -> None:
    H, theta = _matrix(SPECTRA["convex"]), _parameter(30)
    with torch.no_grad():
        theta[4] = 0.0
    size = theta.detach().abs()
    found = sharpness(_quadratic(H, theta), [theta], kind="adaptive_ball", radius=0.1)
    top = scipy.linalg.eigvalsh((size[:, None] * H * size).numpy())[-1]
    assert found.value == pytest.approx(0.5 * 0.1**2 * top, rel=1e-6)
    assert found.step is not None
    assert float(found.step[4]) == 0.0


def test_adaptive_ball_is_invariant_to_rescaling() -> None:
    x, factor = torch.linspace(-1.0, 1.0, 16, dtype=torch.float64), 7.0
    values = []
    for share in (1.0, factor):
        a = torch.tensor([0.8 * share], dtype=torch.float64, requires_grad=True)
        b = torch.tensor([1.5 / share], dtype=torch.float64, requires_grad=True)

        def closure(a: Tensor = a, b: Tensor = b) -> Tensor:
            return (a * b * x - x.sin()).square().mean()

        values.append(sharpness(closure, [a, b], kind="adaptive_ball", radius=0.2).value)
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def _exact_ball(H: Tensor, slope: Tensor, radius: float) -> float:
    """Maximum of slope'd + d'Hd/2 over the ball, by the secular equation in the eigenbasis."""
    values, axes = np.linalg.eigh(H.numpy())
    g = axes.T @ slope.numpy()

    def excess(shift: float) -> float:
        return float(np.linalg.norm(g / (shift - values)) - radius)

    low, high = max(values[-1], 0.0), max(values[-1], 0.0) + np.linalg.norm(g) / radius + 1.0
    shift = scipy.optimize.brentq(excess, low + 1e-9, high, xtol=1e-14)
    d = g / (shift - values)
    return float(g @ d + 0.5 * d @ (values * d))


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("seed", range(4))
def test_ball_with_a_gradient_against_the_secular_equation(name: str, seed: int) -> None:
    H = _matrix(SPECTRA[name], seed)
    slope, theta = _parameter(H.shape[0], seed + 20).detach(), _parameter(H.shape[0])
    found = sharpness(_quadratic(H, theta, slope), [theta], radius=1.0, tolerance=1e-9, max_gradients=2000)
    exact = _exact_ball(H, slope, 1.0)
    assert found.value <= exact * (1.0 + 1e-9)
    assert found.value == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("name", SPECTRA)
def test_quadratic_loss_rises_as_its_model_predicts_before_any_ascent(name: str) -> None:
    H = _matrix(SPECTRA[name])
    slope, theta = _parameter(H.shape[0], 5).detach(), _parameter(H.shape[0])
    found = sharpness(_quadratic(H, theta, slope), [theta], radius=1.0, max_gradients=62)
    assert found.prediction is not None
    assert found.prediction == pytest.approx(_exact_ball(H, slope, 1.0), rel=1e-5)
    assert found.prediction * (1 - 1e-9) <= found.value <= found.prediction * (1 + 1e-5)
    centred = sharpness(_quadratic(H, theta), [theta], radius=0.5)
    assert centred.prediction == pytest.approx(0.125 * float(SPECTRA[name].max()), rel=1e-6)


def test_maximum_inside_the_ball_is_found() -> None:
    H = -torch.eye(3, dtype=torch.float64)
    slope, theta = torch.tensor([0.1, 0.0, 0.0], dtype=torch.float64), _parameter(3)
    found = sharpness(_quadratic(H, theta, slope), [theta], radius=1.0, tolerance=1e-8, max_gradients=400)
    assert found.value == pytest.approx(0.005, rel=1e-2)


def test_maximum_itself_has_no_rise() -> None:
    theta = _parameter(3)
    found = sharpness(_quadratic(-torch.eye(3, dtype=torch.float64), theta), [theta], radius=1.0)
    assert found.value == 0.0
    assert found.step is not None
    assert not found.step.any()


def test_budget_is_kept() -> None:
    H, theta = _matrix(SPECTRA["close"]), _parameter(22)
    slope = _parameter(22, 3).detach()
    found = sharpness(_quadratic(H, theta, slope), [theta], radius=1.0, tolerance=1e-12, max_gradients=12)
    assert found.gradients <= 12
    assert not found.converged


def test_average_is_the_trace_and_says_how_well() -> None:
    H, theta = _matrix(SPECTRA["convex"]), _parameter(30)
    exact = 0.5 * 0.05**2 * float(H.trace()) / 30
    found = sharpness(_quadratic(H, theta, _parameter(30, 9).detach()), [theta], kind="average", samples=400)
    assert abs(found.value - exact) < 4.0 * found.standard_error
    assert found.standard_error < 0.03 * exact
    assert found.step is None
    assert not found.converged


@pytest.mark.parametrize("kind", ["ball", "adaptive_ball", "average"])
def test_leaving_the_loss_s_domain_is_an_infinite_rise(kind: str) -> None:
    theta = torch.tensor([0.04, 1.0], dtype=torch.float64, requires_grad=True)

    def closure() -> Tensor:
        loss = -theta[0].log() + theta[1].square()
        loss.backward()
        return loss

    found = sharpness(closure, [theta], kind=kind, radius=1.5 if kind == "adaptive_ball" else 0.5)
    assert found.value == math.inf
    assert found.converged


def _model() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2))
    x, y = torch.randn(32, 4), torch.randint(0, 2, (32,))

    def closure() -> Tensor:
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return model, closure


@pytest.mark.parametrize("kind", ["ball", "adaptive_ball", "average"])
def test_measuring_changes_nothing(kind: str) -> None:
    model, closure = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    first = sharpness(closure, model.parameters(), kind=kind)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    again = sharpness(closure, model.parameters(), kind=kind)
    assert first.value == again.value > 0.0


@pytest.mark.parametrize("call", [2, 5])
def test_parameters_are_put_back_when_the_closure_raises(call: int) -> None:
    model, inner = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls: Callable[[], list[int]] = unseen([])

    def closure() -> Tensor:
        calls().append(1)
        if len(calls()) == call:
            raise KeyError("data")
        return inner()

    with pytest.raises(KeyError, match="data"):
        sharpness(closure, model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_value_is_what_the_loss_does_at_the_step_and_beats_the_second_order_starts() -> None:
    model, closure = _model()
    params = list(model.parameters())
    found = sharpness(closure, params, radius=0.5)
    small = sharpness(closure, params, radius=0.5, max_gradients=12)
    assert found.value >= small.value > 0.0
    random = torch.get_rng_state()
    base = closure().item()
    assert found.step is not None
    with torch.no_grad():
        for p, piece in zip(params, found.step.split([p.numel() for p in params]), strict=True):
            p.add_(piece.view(p.shape))
    torch.set_rng_state(random)
    assert closure().item() - base == pytest.approx(found.value, rel=1e-4)


def test_frozen_parameters_are_left_out() -> None:
    H, theta = _matrix(SPECTRA["convex"]), _parameter(30)
    found = sharpness(_quadratic(H, theta), [torch.zeros(2), theta])
    assert found.step is not None
    assert found.step.shape == (30,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "cube"}, "kind must be 'ball' or 'adaptive_ball' or 'average', got 'cube'"),
        ({"radius": 0.0}, "radius must be positive and finite, got 0.0"),
        ({"tolerance": 1.0}, r"tolerance must be in \(0, 1\), got 1.0"),
        ({"max_gradients": 3}, "max_gradients must be a whole number and at least 4, got 3"),
        ({"samples": 5}, "samples must be even and at least 4, got 5"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], message: str) -> None:
    theta = _parameter(2)
    with pytest.raises(ValueError, match=message):
        sharpness(_quadratic(torch.eye(2, dtype=torch.float64), theta), [theta], **arguments)


def test_no_parameters_and_no_finite_loss() -> None:
    with pytest.raises(ValueError, match="params must hold at least one tensor"):
        sharpness(lambda: torch.zeros(()), [])
    theta = torch.zeros(2, requires_grad=True)
    with pytest.raises(FloatingPointError, match="The loss is inf at the parameters"):
        sharpness(lambda: -theta.sum().log(), [theta])


@pytest.mark.parametrize("kind", ["ball", "adaptive_ball", "average"])
def test_a_closure_that_takes_other_data_each_time_is_refused(kind: Any) -> None:
    model, data = torch.nn.Linear(3, 2), (x for x in torch.randn(100, 5, 3))
    with pytest.raises(RuntimeError, match="the same data"):
        sharpness(lambda: model(next(data)).square().mean(), model.parameters(), kind=kind)


def test_a_sharpness_prints_without_its_vectors() -> None:
    theta = torch.linspace(0.5, 1.5, 100).double().requires_grad_()
    assert len(repr(sharpness(lambda: (theta**4).sum(), [theta]))) < 500


# Where an ascent begins, against the quadratic model's maximum over the whole ball.

VALUES = torch.tensor([5.0, 3.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
THETA = torch.tensor([0.5, -1.0, 2.0, 0.3, 0.0, -0.7, 1.1], dtype=torch.float64)


class _Quadratic:
    """The loss slope'd + d'Hd / 2 around a point, H with three eigenvalues that are not zero."""

    def __init__(self, size: float = 0.2) -> None:
        generator = torch.Generator().manual_seed(0)
        axes = torch.linalg.qr(torch.randn(7, 7, generator=generator, dtype=torch.float64)).Q
        self.hessian = axes @ torch.diag(VALUES) @ axes.T
        self.slope = size * torch.randn(7, generator=generator, dtype=torch.float64)
        self.theta = THETA.clone().requires_grad_()

    def closure(self) -> Tensor:
        d = self.theta - THETA
        loss = self.slope @ d + 0.5 * d @ (self.hessian @ d)
        loss.backward()
        return loss

    def largest_rise(self, scale: Tensor, radius: float) -> float:
        values, vectors = torch.linalg.eigh(-scale[:, None] * self.hessian * scale)
        return solve_ball(values, vectors, -scale * self.slope, radius).decrease


@pytest.mark.parametrize("kind", ["ball", "adaptive_ball"])
@pytest.mark.parametrize("radius", [0.01, 0.3, 4.0])
@pytest.mark.parametrize("size", [0.0, 1e-6, 0.2, 5.0])
def test_the_first_summit_is_the_models_own_where_the_eigenvalues_tell_all(kind, radius, size) -> None:
    problem = _Quadratic(size)
    top = extreme_eigenvalues(hessian(evaluate(problem.closure, [problem.theta])), top=3, bottom=0, tolerance=1e-9).top
    ball = ball_around(Objective(problem.closure, [problem.theta]), kind, radius, 1e-2, 0.0)
    first, mirrored = ball.summits(ball.scale * problem.slope, top)
    assert float(first.norm()) == pytest.approx(radius)
    assert float(mirrored.norm()) == pytest.approx(radius)
    axis = ball.scale * top[0].vector
    assert float(mirrored @ axis) == pytest.approx(-float(first @ axis))
    assert ball.loss_at(first) == pytest.approx(problem.largest_rise(ball.scale, radius), rel=1e-9)


def test_without_a_gradient_and_eigenvalues_there_is_no_summit() -> None:
    problem = _Quadratic()
    ball = ball_around(Objective(problem.closure, [problem.theta]), "ball", 0.1, 1e-2, 0.0)
    assert ball.summits(torch.zeros(7, dtype=torch.float64), ()) == []
    (alone,) = ball.summits(problem.slope, ())
    torch.testing.assert_close(alone, 0.1 * problem.slope / problem.slope.norm())


class _Network:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.inputs, self.targets = torch.randn(60, 5), torch.arange(60) % 3
        self.model = torch.nn.Sequential(torch.nn.Linear(5, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))

    def closure(self) -> Tensor:
        loss = torch.nn.functional.cross_entropy(self.model(self.inputs), self.targets)
        loss.backward()
        return loss


@pytest.mark.parametrize("kind", ["ball", "adaptive_ball"])
@pytest.mark.parametrize("radius", [0.05, 0.5])
def test_a_measurement_finds_what_a_whole_search_finds(kind, radius) -> None:
    network = _Network()
    params = list(network.model.parameters())
    optimizer = torch.optim.SGD(params, lr=0.5)
    for _ in range(3):
        whole = sharpness(network.closure, params, kind=kind, radius=radius)
        quick = measure(network.closure, params, sharpness=Sharpness(kind, radius))
        assert 0.98 * whole.value <= quick["curvature/sharpness"] <= 1.001 * whole.value
        for _ in range(20):
            optimizer.zero_grad()
            network.closure()
            optimizer.step()
