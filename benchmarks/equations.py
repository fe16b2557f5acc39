"""Physics-informed networks: one network and one set of points for each equation, in float64.

Each loss is an ordinary sum of `mse_loss` terms with derivatives taken by `torch.autograd.grad`, as one finds it in
papers. No weights balance the terms. `Problem.terms` says the same residuals a second time, for one point each, to
methods that want functions of one sample; a test holds both forms against each other and against the solutions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import pi

import torch
import torch.nn.functional as F
from references import allen_cahn_solution, burgers_solution
from torch import Tensor, nn
from training import Field, Problem, Term, keep

VISCOSITY = 0.01 / pi  # Burgers' equation, Raissi et al. 2019
Solution = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Equation:
    """An equation, the problem that it poses to a network, and the meaning of `Problem.error`.

    `solution` takes one tensor a coordinate; None where only a table of values is at hand.
    """

    formula: str
    problem: Callable[[int], Problem]
    solution: Callable[..., Tensor] | None
    error: str = "relative L2 error"
    anew: bool = False  # whether points are drawn anew in each step


def convection(seed: int, beta: float, count: int = 1000, anew: bool = False, times: int = 64) -> Problem:
    """The problem with `count` residual points at random, 128 initial points and `times` boundary times.

    Args:
        seed: Seed of the weights and the residual points.
        beta: Speed of the convection; the larger, the harder.
        count: Number of residual points.
        anew: Whether residual points are drawn anew before each step.
        times: Number of times at which the values at both edges agree. In the time between two of them the solution
            moves by `beta / (times - 1)`.
    """
    torch.manual_seed(seed)
    model = tanh_network()
    inside = _Points(count, (0.0, 0.0), (2 * pi, 1.0))
    initial = torch.cartesian_prod(_linspace(0.0, 2 * pi, 128), _linspace(0.0, 0.0, 1))
    left, right = _edges(0.0, 2 * pi, times)

    def loss() -> Tensor:
        x, t = inside.columns
        u = model(torch.cat([x, t], dim=1))
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        return (
            F.mse_loss(u_t + beta * u_x, torch.zeros_like(u))
            + F.mse_loss(model(initial), initial[:, :1].sin())
            + F.mse_loss(model(left), model(right))
        )

    def terms() -> list[Term]:
        return [
            Term(inside.rows(), lambda u, p: _slope(u, 1)(p) + beta * _slope(u, 0)(p)),
            Term(initial, lambda u, p: u(p) - torch.sin(p[0])),
            Term(left, lambda u, p: u(p) - u(p + _unit(p, 0) * 2 * pi)),
        ]

    error = _error_in_time(model, 0.0, 2 * pi, partial(convection_solution, beta=beta))
    return Problem(model, loss, error, inside.draw if anew else keep, terms)


def convection_solution(x: Tensor, t: Tensor, beta: float) -> Tensor:
    return torch.sin(x - beta * t)


def reaction(seed: int, rho: float) -> Problem:
    """Logistic growth at each place on its own, from a bell: points as for `convection`."""
    torch.manual_seed(seed)
    model = tanh_network()
    inside = _Points(1000, (0.0, 0.0), (2 * pi, 1.0))
    initial = torch.cartesian_prod(_linspace(0.0, 2 * pi, 128), _linspace(0.0, 0.0, 1))
    start = _bell(initial[:, :1])
    left, right = _edges(0.0, 2 * pi, 64)

    def loss() -> Tensor:
        x, t = inside.columns
        u = model(torch.cat([x, t], dim=1))
        (u_t,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        return (
            F.mse_loss(u_t - rho * u * (1 - u), torch.zeros_like(u))
            + F.mse_loss(model(initial), start)
            + F.mse_loss(model(left), model(right))
        )

    def terms() -> list[Term]:
        return [
            Term(inside.rows(), lambda u, p: _slope(u, 1)(p) - rho * u(p) * (1 - u(p))),
            Term(initial, lambda u, p: u(p) - _bell(p[0])),
            Term(left, lambda u, p: u(p) - u(p + _unit(p, 0) * 2 * pi)),
        ]

    return Problem(model, loss, _error_in_time(model, 0.0, 2 * pi, partial(reaction_solution, rho=rho)), terms=terms)


def reaction_solution(x: Tensor, t: Tensor, rho: float) -> Tensor:
    grown = _bell(x) * torch.exp(rho * t)
    return grown / (grown + 1 - _bell(x))


def _bell(x: Tensor) -> Tensor:
    return torch.exp(-(((x - pi) / (pi / 4)) ** 2) / 2)


def wave(seed: int, beta: float) -> Problem:
    """The problem with points as for `convection`: second derivatives in space and time.

    Args:
        seed: Seed of the weights and the residual points.
        beta: Frequency of the second part of the solution; the larger, the harder.
    """
    torch.manual_seed(seed)
    model = tanh_network()
    inside = _Points(1000, (0.0, 0.0), (1.0, 1.0))
    places = _linspace(0.0, 1.0, 128)[:, None]
    start = torch.zeros_like(places).requires_grad_()
    left, right = _edges(0.0, 1.0, 64)
    initial_values = wave_solution(places, torch.zeros_like(places), beta)

    def loss() -> Tensor:
        x, t = inside.columns
        u = model(torch.cat([x, t], dim=1))
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        (u_tt,) = torch.autograd.grad(u_t.sum(), t, create_graph=True)
        initial = model(torch.cat([places, start], dim=1))
        (speed,) = torch.autograd.grad(initial.sum(), start, create_graph=True)
        edges = model(torch.cat([left, right]))
        return (
            F.mse_loss(u_tt - 4 * u_xx, torch.zeros_like(u))
            + F.mse_loss(initial, initial_values)
            + F.mse_loss(speed, torch.zeros_like(speed))
            + F.mse_loss(edges, torch.zeros_like(edges))
        )

    def terms() -> list[Term]:
        initial = torch.cat([places, start.detach()], dim=1)
        return [
            Term(inside.rows(), lambda u, p: _bend(u, 1)(p) - 4 * _bend(u, 0)(p)),
            Term(initial, lambda u, p: u(p) - wave_solution(p[0], torch.zeros_like(p[1]), beta)),
            Term(initial, lambda u, p: _slope(u, 1)(p)),
            Term(torch.cat([left, right]), lambda u, p: u(p)),
        ]

    return Problem(model, loss, _error_in_time(model, 0.0, 1.0, partial(wave_solution, beta=beta)), terms=terms)


def wave_solution(x: Tensor, t: Tensor, beta: float) -> Tensor:
    first = torch.sin(pi * x) * torch.cos(2 * pi * t)
    return first + torch.sin(beta * pi * x) * torch.cos(2 * beta * pi * t) / 2


def burgers(seed: int) -> Problem:
    """The problem with 1500 residual points at random, 128 initial points and 64 times on each edge.

    Every tenth residual point has |x| < .01, where the shock stands. Of 1000 points evenly spread too few do: the
    residual then vanishes at all of them for wrong solutions too.
    """
    torch.manual_seed(seed)
    model = tanh_network()
    inside = _Points(1500, (-1.0, 0.0), (1.0, 1.0), squared=True)
    initial = torch.cartesian_prod(_linspace(-1.0, 1.0, 128), _linspace(0.0, 0.0, 1))
    start = -torch.sin(pi * initial[:, :1])
    edges = torch.cat(_edges(-1.0, 1.0, 64))

    def loss() -> Tensor:
        x, t = inside.columns
        u = model(torch.cat([x, t], dim=1))
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        at_edges = model(edges)
        return (
            F.mse_loss(u_t + u * u_x - VISCOSITY * u_xx, torch.zeros_like(u))
            + F.mse_loss(model(initial), start)
            + F.mse_loss(at_edges, torch.zeros_like(at_edges))
        )

    def terms() -> list[Term]:
        return [
            Term(
                inside.rows(),
                lambda u, p: _slope(u, 1)(p) + u(p) * _slope(u, 0)(p) - VISCOSITY * _bend(u, 0)(p),
            ),
            Term(initial, lambda u, p: u(p) + torch.sin(pi * p[0])),
            Term(edges, lambda u, p: u(p)),
        ]

    return Problem(model, loss, _error_in_time(model, -1.0, 1.0, _burgers), terms=terms)


def _burgers(x: Tensor, t: Tensor) -> Tensor:
    return burgers_solution(x, t, VISCOSITY)


def allen_cahn(seed: int) -> Problem:
    """The problem with points as for `convection`; values and slopes agree at both ends."""
    torch.manual_seed(seed)
    model = tanh_network()
    inside = _Points(1000, (-1.0, 0.0), (1.0, 1.0))
    initial = torch.cartesian_prod(_linspace(-1.0, 1.0, 128), _linspace(0.0, 0.0, 1))
    start = initial[:, :1] ** 2 * torch.cos(pi * initial[:, :1])
    times = _linspace(0.0, 1.0, 64)[:, None]
    left, right = (torch.full_like(times, edge).requires_grad_() for edge in (-1.0, 1.0))

    def loss() -> Tensor:
        x, t = inside.columns
        u = model(torch.cat([x, t], dim=1))
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        u_left, u_right = model(torch.cat([left, times], dim=1)), model(torch.cat([right, times], dim=1))
        (slope_left,) = torch.autograd.grad(u_left.sum(), left, create_graph=True)
        (slope_right,) = torch.autograd.grad(u_right.sum(), right, create_graph=True)
        return (
            F.mse_loss(u_t - 1e-4 * u_xx - 5 * (u - u**3), torch.zeros_like(u))
            + F.mse_loss(model(initial), start)
            + F.mse_loss(u_left, u_right)
            + F.mse_loss(slope_left, slope_right)
        )

    def terms() -> list[Term]:
        edge = torch.cat([left.detach(), times], dim=1)
        return [
            Term(
                inside.rows(),
                lambda u, p: _slope(u, 1)(p) - 1e-4 * _bend(u, 0)(p) - 5 * (u(p) - u(p) ** 3),
            ),
            Term(initial, lambda u, p: u(p) - p[0] ** 2 * torch.cos(pi * p[0])),
            Term(edge, lambda u, p: u(p) - u(p + 2 * _unit(p, 0))),
            Term(edge, lambda u, p: _slope(u, 0)(p) - _slope(u, 0)(p + 2 * _unit(p, 0))),
        ]

    grid = torch.cartesian_prod(_linspace(-1.0, 1.0, 129), _linspace(0.0, 1.0, 64))
    return Problem(
        model, loss, _error(model, grid, allen_cahn_solution(129).to(grid.device).reshape(-1, 1)), terms=terms
    )


def helmholtz(seed: int) -> Problem:
    """The problem with 1000 residual points at random and 64 points on each edge."""
    torch.manual_seed(seed)
    model = tanh_network()
    inside = _Points(1000, (-1.0, -1.0), (1.0, 1.0))
    left, right = _edges(-1.0, 1.0, 64, start=-1.0)
    edges = torch.cat([left, right, left.flip(1), right.flip(1)])

    def loss() -> Tensor:
        x, y = inside.columns
        u = model(torch.cat([x, y], dim=1))
        u_x, u_y = torch.autograd.grad(u.sum(), (x, y), create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        (u_yy,) = torch.autograd.grad(u_y.sum(), y, create_graph=True)
        source = (1 - 17 * pi**2) * helmholtz_solution(x.detach(), y.detach())
        at_edges = model(edges)
        return F.mse_loss(u_xx + u_yy + u, source) + F.mse_loss(at_edges, torch.zeros_like(at_edges))

    def terms() -> list[Term]:
        return [
            Term(
                inside.rows(),
                lambda u, p: _bend(u, 0)(p) + _bend(u, 1)(p) + u(p) - (1 - 17 * pi**2) * helmholtz_solution(*p),
            ),
            Term(edges, lambda u, p: u(p)),
        ]

    grid = torch.cartesian_prod(_linspace(-1.0, 1.0, 101), _linspace(-1.0, 1.0, 101))
    return Problem(model, loss, _error(model, grid, helmholtz_solution(grid[:, :1], grid[:, 1:])), terms=terms)


def helmholtz_solution(x: Tensor, y: Tensor) -> Tensor:
    return torch.sin(pi * x) * torch.sin(4 * pi * y)


def poisson(seed: int, dimensions: int, widths: tuple[int, ...], count: int, edge_count: int, anew: bool) -> Problem:
    """The problem in the unit cube, with points at random inside and on the faces.

    Args:
        seed: Seed of the weights, the points and the grid of the error.
        dimensions: Number of coordinates; the solution is a product of sines in two, a sum of cosines in more.
        widths: Widths of the network's layers between input and output.
        count: Number of residual points.
        edge_count: Number of points on the faces.
        anew: Whether points are drawn anew before each step.
    """
    torch.manual_seed(seed)
    model = tanh_network(dimensions, *widths, 1)
    exact = poisson_2d_solution if dimensions == 2 else poisson_solution
    eigenvalue = pi**2 * (2 if dimensions == 2 else 1)  # -Laplacian u = eigenvalue u
    inside = _Points(count, (0.0,) * dimensions, (1.0,) * dimensions)
    faces = _Points(edge_count, (0.0,) * dimensions, (1.0,) * dimensions, on_faces=True)
    grid = torch.rand(10_000, dimensions, dtype=torch.float64)

    def draw() -> None:
        inside.draw()
        faces.draw()

    def loss() -> Tensor:
        columns, edges = inside.columns, faces.rows()
        u = model(torch.cat(columns, dim=1))
        slopes = torch.autograd.grad(u.sum(), columns, create_graph=True)
        bends = [
            torch.autograd.grad(slope.sum(), x, create_graph=True)[0] for slope, x in zip(slopes, columns, strict=True)
        ]
        source = eigenvalue * exact(*(x.detach() for x in columns))
        return F.mse_loss(-sum(bends[1:], bends[0]), source) + F.mse_loss(model(edges), exact(*edges.split(1, dim=1)))

    def terms() -> list[Term]:
        return [
            Term(inside.rows(), lambda u, p: -sum(_bend(u, i)(p) for i in range(dimensions)) - eigenvalue * exact(*p)),
            Term(faces.rows(), lambda u, p: u(p) - exact(*p)),
        ]

    return Problem(model, loss, _error(model, grid, exact(*grid.split(1, dim=1))), draw if anew else keep, terms)


def poisson_2d_solution(x: Tensor, y: Tensor) -> Tensor:
    return torch.sin(pi * x) * torch.sin(pi * y)


def poisson_solution(*coordinates: Tensor) -> Tensor:
    return torch.stack([torch.cos(pi * x) for x in coordinates]).sum(dim=0)


class WithCoefficients(nn.Module):
    """A network, and the unknown coefficients of the equation that it solves."""

    def __init__(self, network: nn.Module, count: int) -> None:
        super().__init__()
        self.network = network
        self.coefficients = nn.ParameterList([nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def inverse_burgers(seed: int) -> Problem:
    """Both coefficients of Burgers' equation from the solution at 500 points at random, without noise.

    The equation's residual is taken at the same points (Raissi et al. 2019). Both coefficients start at zero.
    """
    torch.manual_seed(seed)
    model = WithCoefficients(tanh_network(), 2)
    speed, viscosity = model.coefficients
    inside = _Points(500, (-1.0, 0.0), (1.0, 1.0))
    data = _burgers(*inside.rows().split(1, dim=1))

    def loss() -> Tensor:
        x, t = inside.columns
        u = model(torch.cat([x, t], dim=1))
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        return F.mse_loss(u_t + speed * u * u_x - viscosity * u_xx, torch.zeros_like(u)) + F.mse_loss(u, data)

    def residual(u: Field, p: Tensor) -> Tensor:
        # Under functional_call the module's attributes are the parameters that it is called with.
        speed, viscosity = model.coefficients
        return _slope(u, 1)(p) + speed * u(p) * _slope(u, 0)(p) - viscosity * _bend(u, 0)(p)

    def terms() -> list[Term]:
        return [Term(inside.rows(), residual), Term(inside.rows(), lambda u, p: u(p), data[:, 0])]

    @torch.no_grad()
    def error() -> float:
        found, true = torch.stack([*model.coefficients]), speed.new_tensor([1.0, VISCOSITY])
        return float((found / true - 1).square().mean().sqrt())

    return Problem(model, loss, error, terms=terms)


EQUATIONS = {
    "convection-30": Equation(
        "u_t + 30 u_x = 0", partial(convection, beta=30.0), partial(convection_solution, beta=30.0)
    ),
    "convection-50": Equation(
        "u_t + 50 u_x = 0", partial(convection, beta=50.0), partial(convection_solution, beta=50.0)
    ),
    "reaction": Equation("u_t = 5 u (1 - u)", partial(reaction, rho=5.0), partial(reaction_solution, rho=5.0)),
    "wave": Equation("u_tt = 4 u_xx", partial(wave, beta=5.0), partial(wave_solution, beta=5.0)),
    "burgers": Equation("u_t + u u_x = (.01 / pi) u_xx", burgers, _burgers),
    "allen-cahn": Equation("u_t = 1e-4 u_xx + 5 (u - u^3)", allen_cahn, None),
    "helmholtz": Equation("u_xx + u_yy + u = f, wave numbers 1 and 4", helmholtz, helmholtz_solution),
    "poisson-2d": Equation(
        "-Laplacian u = f",
        partial(poisson, dimensions=2, widths=(40, 40, 40), count=1000, edge_count=256, anew=False),
        poisson_2d_solution,
    ),
    "poisson-5d": Equation(
        "-Laplacian u = f in 5 dimensions, points drawn anew in each step",
        partial(poisson, dimensions=5, widths=(40, 40, 40), count=900, edge_count=200, anew=True),
        poisson_solution,
        anew=True,
    ),
    "inverse-burgers": Equation(
        "u_t + a u u_x = b u_xx, a and b unknown", inverse_burgers, _burgers, "relative error of a and b"
    ),
}
# Convection with more points, and with points drawn anew: remedies for spurious solutions. At the higher speed 64 times
# at the edges are too few: the solution moves by an eighth of its period between two of them, and what lies in between
# is free: with points drawn anew, seed 0 ended at a loss of 4e-14 and an error of 3e-3.
REMEDIES = {
    "convection-30-more": Equation(
        "u_t + 30 u_x = 0, 2000 points",
        partial(convection, beta=30.0, count=2000),
        EQUATIONS["convection-30"].solution,
    ),
    "convection-30-anew": Equation(
        "u_t + 30 u_x = 0, points drawn anew in each step",
        partial(convection, beta=30.0, anew=True),
        EQUATIONS["convection-30"].solution,
        anew=True,
    ),
    "convection-50-anew": Equation(
        "u_t + 50 u_x = 0, points drawn anew in each step, 200 times at the edges",
        partial(convection, beta=50.0, anew=True, times=200),
        EQUATIONS["convection-50"].solution,
        anew=True,
    ),
}


# As published for one GPU (Guzman-Cordero et al. 2025): 10,065 and 118,145 parameters.
ON_A_GPU = {
    "poisson-5d-large": Equation(
        "-Laplacian u = f in 5 dimensions, 3000 + 500 points drawn anew in each step",
        partial(poisson, dimensions=5, widths=(64, 64, 48, 48), count=3000, edge_count=500, anew=True),
        poisson_solution,
        anew=True,
    ),
    "poisson-10d-large": Equation(
        "-Laplacian u = f in 10 dimensions, 3000 + 1000 points drawn anew in each step",
        partial(poisson, dimensions=10, widths=(256, 256, 128, 128), count=3000, edge_count=1000, anew=True),
        poisson_solution,
        anew=True,
    ),
}
# Seconds of a GPU at which an error is asked for.
HORIZONS = {"poisson-5d-large": 700.0, "poisson-10d-large": 900.0, "burgers": 300.0}


def tanh_network(*widths: int) -> nn.Sequential:
    """A network with tanh units, Xavier normal weights and zero biases; 2-40-40-40-1 unless widths are given."""
    widths = widths or (2, 40, 40, 40, 1)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).double()
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


class _Points:
    """Points uniform in a box or on its faces: a column for each coordinate, that requires gradients."""

    def __init__(
        self,
        count: int,
        low: tuple[float, ...],
        high: tuple[float, ...],
        on_faces: bool = False,
        squared: bool = False,  # the first coordinate is the signed square of a uniform one, and so often near zero
    ) -> None:
        self._count, self._on_faces, self._squared = count, on_faces, squared
        self._low, self._high = (torch.tensor(corner, dtype=torch.float64) for corner in (low, high))
        self.draw()

    def draw(self) -> None:
        """Draw new points."""
        points = torch.rand(self._count, len(self._low), dtype=torch.float64, device=self._low.device)
        if self._on_faces:
            faces = torch.randint(2 * len(self._low), (self._count, 1), device=points.device)
            points.scatter_(1, faces // 2, (faces % 2).double())
        points = self._low + points * (self._high - self._low)
        if self._squared:
            points[:, 0] *= points[:, 0].abs()
        self.columns = tuple(column.requires_grad_() for column in points.split(1, dim=1))

    def rows(self) -> Tensor:
        """Return the points, a row each."""
        return torch.cat(self.columns, dim=1).detach()


def _edges(left: float, right: float, count: int, start: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return two lines of points, with the first coordinate fixed and the second one from `start` to 1."""
    times = _linspace(start, 1.0, count)
    first, second = (torch.stack([torch.full_like(times, edge), times], dim=1) for edge in (left, right))
    return first, second


def _linspace(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64)


def _error_in_time(model: nn.Module, left: float, right: float, exact: Solution) -> Callable[[], float]:
    """Return the relative L2 error on a grid of 128 places and 64 times."""
    grid = torch.cartesian_prod(_linspace(left, right, 128), _linspace(0.0, 1.0, 64))
    return _error(model, grid, exact(grid[:, :1], grid[:, 1:]))


def _error(model: nn.Module, grid: Tensor, solution: Tensor) -> Callable[[], float]:
    @torch.no_grad()
    def error() -> float:
        return float((model(grid) - solution).norm() / solution.norm())

    return error


def _unit(p: Tensor, coordinate: int) -> Tensor:
    return F.one_hot(torch.tensor(coordinate), p.numel()).to(p)


def _slope(u: Field, coordinate: int) -> Field:
    """Return the derivative of `u` along a coordinate, a function of one point `(d,)`."""
    return lambda p: torch.func.jvp(u, (p,), (_unit(p, coordinate),))[1]


def _bend(u: Field, coordinate: int) -> Field:
    """Return the second derivative of `u` along a coordinate."""
    return _slope(_slope(u, coordinate), coordinate)
