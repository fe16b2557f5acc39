"""Physics-informed networks: the Newton methods beside Adam and L-BFGS.

    convection  u_t + beta u_x = 0,  u(x, 0) = sin x,  u(0, t) = u(2 pi, t),  0 <= x <= 2 pi,  0 <= t <= 1
    wave        u_tt = 4 u_xx,  u(x, 0) = sin(pi x) + sin(beta pi x) / 2,  u_t(x, 0) = 0,  u(0, t) = u(1, t) = 0

The solutions are sin(x - beta t), and sin(pi x) cos(2 pi t) + sin(beta pi x) cos(2 beta pi t) / 2. At beta = 30 and 5
these are standard failure cases of first-order training (Rathore et al. 2024): the loss is small and the solution
wrong, or the valley is too narrow to follow.
"""

from collections.abc import Callable
from functools import partial
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import Problem


def convection(seed: int, beta: float) -> Problem:
    """The problem in float64: 1000 residual points at random, 128 initial points, 64 boundary times.

    Args:
        seed: Seed of the weights and the residual points.
        beta: Speed of the convection; the larger, the harder.
    """
    torch.manual_seed(seed)
    model = tanh_network()
    x, t = _random_points(1000, length=2 * pi)
    initial = torch.cartesian_prod(_linspace(2 * pi, 128), _linspace(0.0, 1))
    left, right = _edges(2 * pi, 64)

    def loss() -> Tensor:
        u = model(torch.cat([x, t], dim=1))
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        return (
            F.mse_loss(u_t + beta * u_x, torch.zeros_like(u))
            + F.mse_loss(model(initial), initial[:, :1].sin())
            + F.mse_loss(model(left), model(right))
        )

    return Problem(model, loss, _error(model, 2 * pi, lambda x, t: torch.sin(x - beta * t)))


def wave(seed: int, beta: float) -> Problem:
    """The problem in float64, points as for `convection`: second derivatives in space and time.

    Args:
        seed: Seed of the weights and the residual points.
        beta: Frequency of the second part of the solution; the larger, the harder.
    """
    torch.manual_seed(seed)
    model = tanh_network()
    x, t = _random_points(1000, length=1.0)
    places = _linspace(1.0, 128)[:, None]
    start = torch.zeros_like(places).requires_grad_()
    left, right = _edges(1.0, 64)

    def exact(x: Tensor, t: Tensor) -> Tensor:
        first = torch.sin(pi * x) * torch.cos(2 * pi * t)
        return first + torch.sin(beta * pi * x) * torch.cos(2 * beta * pi * t) / 2

    def loss() -> Tensor:
        u = model(torch.cat([x, t], dim=1))
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        (u_tt,) = torch.autograd.grad(u_t.sum(), t, create_graph=True)
        initial = model(torch.cat([places, start], dim=1))
        (speed,) = torch.autograd.grad(initial.sum(), start, create_graph=True)
        edges = model(torch.cat([left, right]))
        return (
            F.mse_loss(u_tt - 4 * u_xx, torch.zeros_like(u))
            + F.mse_loss(initial, exact(places, torch.zeros_like(places)))
            + F.mse_loss(speed, torch.zeros_like(speed))
            + F.mse_loss(edges, torch.zeros_like(edges))
        )

    return Problem(model, loss, _error(model, 1.0, exact))


def tanh_network() -> nn.Sequential:
    """A 2-40-40-40-1 network with tanh units, Xavier normal weights and zero biases, in float64."""
    layers = [nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)]
    model = nn.Sequential(*layers).double()
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def _random_points(count: int, length: float) -> tuple[Tensor, Tensor]:
    """Return `x` and `t`, a column each, uniform in `[0, length] x [0, 1]`, that require gradients."""
    inside = torch.rand(count, 2, dtype=torch.float64) * torch.tensor([length, 1.0], dtype=torch.float64)
    x, t = inside.chunk(2, dim=1)
    return x.requires_grad_(), t.requires_grad_()


def _edges(length: float, count: int) -> tuple[Tensor, Tensor]:
    times = _linspace(1.0, count)
    left, right = (torch.stack([torch.full_like(times, edge), times], dim=1) for edge in (0.0, length))
    return left, right


def _linspace(end: float, count: int) -> Tensor:
    return torch.linspace(0.0, end, count, dtype=torch.float64)


def _error(model: nn.Module, length: float, exact: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], float]:
    """Return the relative L2 error on a grid of 128 places and 64 times."""
    grid = torch.cartesian_prod(_linspace(length, 128), _linspace(1.0, 64))
    solution = exact(grid[:, :1], grid[:, 1:])

    @torch.no_grad()
    def error() -> float:
        return float((model(grid) - solution).norm() / solution.norm())

    return error


EQUATIONS = {"convection": (convection, [10.0, 30.0]), "wave": (wave, [5.0])}


if __name__ == "__main__":
    from side_by_side import arguments, main

    parser = arguments(__doc__)
    parser.add_argument("--equation", choices=EQUATIONS, default="convection", help="default: convection")
    parser.add_argument(
        "--beta", type=float, nargs="+", help="one problem each (default: 10 30 for convection, 5 for wave)"
    )
    args = parser.parse_args()
    equation, betas = EQUATIONS[args.equation]
    for beta in args.beta or betas:
        main(f"{args.equation}-{beta:g}", partial(equation, beta=beta), "relative L2 error", args)
