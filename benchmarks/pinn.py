"""A physics-informed network for the convection equation: HessianFree beside Adam and L-BFGS.

    u_t + beta u_x = 0,  u(x, 0) = sin x,  u(0, t) = u(2 pi, t),  0 <= x <= 2 pi,  0 <= t <= 1

The solution is sin(x - beta t). At beta = 30 this is a standard failure case of first-order training: the loss is small
and the solution wrong, or the valley is too narrow to follow.
"""

from functools import partial
from math import pi

import torch
import torch.nn.functional as F
from side_by_side import ADAM_THEN_LBFGS, LBFGS_ALONE, adam, arguments, main
from torch import Tensor, nn
from training import Problem


def convection(seed: int, beta: float) -> Problem:
    """The problem in float64: 1000 residual points at random, 128 initial points, 64 boundary times.

    Args:
        seed: Of the weights and the residual points.
        beta: Speed of the convection; the larger, the harder.
    """
    torch.manual_seed(seed)
    model = tanh_network()
    inside = torch.rand(1000, 2, dtype=torch.float64) * torch.tensor([2 * pi, 1.0], dtype=torch.float64)
    x, t = (column.requires_grad_() for column in inside.chunk(2, dim=1))
    initial = torch.cartesian_prod(_linspace(2 * pi, 128), _linspace(0.0, 1))
    times = _linspace(1.0, 64)
    left, right = (torch.stack([torch.full_like(times, edge), times], dim=1) for edge in (0.0, 2 * pi))

    def loss() -> Tensor:
        u = model(torch.cat([x, t], dim=1))
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        return (
            F.mse_loss(u_t + beta * u_x, torch.zeros_like(u))
            + F.mse_loss(model(initial), initial[:, :1].sin())
            + F.mse_loss(model(left), model(right))
        )

    grid = torch.cartesian_prod(_linspace(2 * pi, 128), _linspace(1.0, 64))
    exact = torch.sin(grid[:, :1] - beta * grid[:, 1:])

    @torch.no_grad()
    def error() -> float:
        return float((model(grid) - exact).norm() / exact.norm())

    return Problem(model, loss, error)


def tanh_network() -> nn.Sequential:
    """A 2-40-40-40-1 network with tanh units, Xavier normal weights and zero biases, in float64."""
    layers = [nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)]
    model = nn.Sequential(*layers).double()
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def _linspace(end: float, count: int) -> Tensor:
    return torch.linspace(0.0, end, count, dtype=torch.float64)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--beta", type=float, default=30.0, help="speed of the convection (default: 30)")
    args = parser.parse_args()
    peers = (adam(1e-3), LBFGS_ALONE, ADAM_THEN_LBFGS)
    main("pinn", partial(convection, beta=args.beta), "relative L2 error", peers, args)
