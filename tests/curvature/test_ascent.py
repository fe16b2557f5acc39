"""Where an ascent begins, against the quadratic model's maximum over the whole ball."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from newtonopt import evaluate, hessian
from newtonopt.closure.objective import Objective
from newtonopt.curvature import extreme_eigenvalues, measure, sharpness
from newtonopt.curvature.sharpness import ball_around
from newtonopt.solvers.dense import solve_ball

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
        quick = measure(network.closure, params, sharpness=kind, sharpness_radius=radius)
        assert 0.98 * whole.value <= quick["curvature/sharpness"] <= 1.001 * whole.value
        for _ in range(20):
            optimizer.zero_grad()
            network.closure()
            optimizer.step()
