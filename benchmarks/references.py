"""Accurate solutions of equations that have none in closed form: Burgers' and Allen and Cahn's.

Both are checked against themselves at twice the resolution, by `python benchmarks/references.py` and by a test.
"""

from math import pi

import numpy as np
import torch
from torch import Tensor

NODES = 100  # of the Gauss-Hermite rule
MODES = 4096  # of the Fourier series on [-1, 1]; the slope of x^2 cos(pi x) jumps at the ends, hence so many
TIMES = 64  # rows of the Allen-Cahn reference, from t = 0 to t = 1
SUBSTEPS = 16  # time steps between two rows


def burgers_solution(x: Tensor, t: Tensor, viscosity: float, nodes: int = NODES) -> Tensor:
    """Return the solution of u_t + u u_x = viscosity u_xx with u(x, 0) = -sin(pi x), zero at x = -1 and 1.

    The Cole-Hopf transform turns the equation into the heat equation, so that u is a ratio of two integrals over the
    real line with the weight exp(-z^2) (Basdevant et al. 1986). Torch can differentiate the result.

    Args:
        x: Places, of any shape.
        t: Times of the same shape, all positive or zero.
        viscosity: Coefficient of u_xx.
        nodes: Nodes of the Gauss-Hermite rule.
    """
    points, weights = (torch.from_numpy(a).to(x.device) for a in np.polynomial.hermite.hermgauss(nodes))
    places = x[..., None] - 2 * (viscosity * t[..., None]).sqrt() * points
    # The logarithm of the heat equation's initial value. Its largest value is 1 / (2 pi viscosity), which is taken off
    # both integrals, lest they overflow.
    exponent = -(1 + torch.cos(pi * places)) / (2 * pi * viscosity)
    exponent = exponent - exponent.detach().amax(dim=-1, keepdim=True)
    density = weights * exponent.exp()
    return -(torch.sin(pi * places) * density).sum(dim=-1) / density.sum(dim=-1)


def allen_cahn_solution(places: int, modes: int = MODES, substeps: int = SUBSTEPS) -> Tensor:
    """Return the solution of u_t = 1e-4 u_xx + 5 (u - u^3) with u(x, 0) = x^2 cos(pi x), periodic on [-1, 1].

    A Fourier series in space, and the fourth-order exponential scheme ETDRK4 in time (Cox & Matthews 2002) with the
    coefficients as means over a circle (Kassam & Trefethen 2005).

    Args:
        places: Number of places, both ends of [-1, 1] included; `places - 1` has to divide `modes`.
        modes: Grid points of the series.
        substeps: Time steps between two rows.

    Returns:
        Values of shape `(places, TIMES)`, evenly spaced in both directions.
    """
    x = -1 + 2 * np.arange(modes) / modes
    waves = pi * np.arange(modes // 2 + 1)
    linear = -1e-4 * waves**2
    step = 1 / (TIMES - 1) / substeps

    circle = np.exp(2j * pi * (np.arange(32) + 0.5) / 32)
    z = step * linear[:, None] + circle
    half = step * ((np.exp(z / 2) - 1) / z).mean(axis=1).real
    first = step * ((-4 - z + np.exp(z) * (4 - 3 * z + z**2)) / z**3).mean(axis=1).real
    middle = step * ((2 + z + np.exp(z) * (z - 2)) / z**3).mean(axis=1).real
    last = step * ((-4 - 3 * z - z**2 + np.exp(z) * (4 - z)) / z**3).mean(axis=1).real
    whole_decay, half_decay = np.exp(step * linear), np.exp(step * linear / 2)

    def reaction(series: np.ndarray) -> np.ndarray:
        values = np.fft.irfft(series, modes)
        return np.fft.rfft(5 * (values - values**3))

    v = np.fft.rfft(x**2 * np.cos(pi * x))
    rows = [v]
    for _ in range(TIMES - 1):
        for _ in range(substeps):
            at_start = reaction(v)
            a = half_decay * v + half * at_start
            at_a = reaction(a)
            b = half_decay * v + half * at_a
            at_b = reaction(b)
            c = half_decay * a + half * (2 * at_b - at_start)
            v = whole_decay * v + first * at_start + 2 * middle * (at_a + at_b) + last * reaction(c)
        rows.append(v)
    values = np.stack([np.fft.irfft(row, modes) for row in rows], axis=1)
    # The series has its first place at x = -1; the last place, x = 1, is the first one again.
    return torch.from_numpy(np.concatenate([values, values[:1]])[:: modes // (places - 1)])


def differences() -> dict[str, float]:
    """Return for each reference its relative L2 distance from the reference at twice the resolution."""
    x, t = (grid.reshape(-1) for grid in torch.meshgrid(_linspace(-1.0, 128), _linspace(0.0, 64), indexing="ij"))
    coarse, fine = (burgers_solution(x, t, 0.01 / pi, nodes) for nodes in (NODES, 2 * NODES))
    found = {"Burgers": float((coarse - fine).norm() / fine.norm())}
    coarse, fine = (allen_cahn_solution(129, k * MODES, k * SUBSTEPS) for k in (1, 2))
    return found | {"Allen-Cahn": float((coarse - fine).norm() / fine.norm())}


def _linspace(start: float, count: int) -> Tensor:
    return torch.linspace(start, 1.0, count, dtype=torch.float64)


if __name__ == "__main__":
    for name, difference in differences().items():
        print(f"{name}: relative L2 distance from twice the resolution {difference:.1e}")
