"""Cost of the three largest eigenvalues and the smallest to 1e-3: `python benchmarks/eigenvalues.py`.

The matrix is the Hessian of each network at initialisation. Three methods: newtonopt on cached products, SciPy's
`eigsh` on the same products (once for each end), and `eigsh` on the products of curvlinops where that is installed
(`pip install curvlinops-for-pytorch`, which brings torchvision). `eigsh` stops at residuals of 1e-3 times the
eigenvalue and bounds nothing. newtonopt stops where the intervals are that narrow, and also looks for copies of equal
eigenvalues. The truth is newtonopt's answer in float64 to 1e-6. Seconds count the user's whole wait, the evaluation
included.

An error is relative to the eigenvalue, or to 1e-3 of the largest one where the eigenvalue is smaller than that.
"""

import argparse
import contextlib
import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from memory_setups import Setup, small_setups
from rich.console import Console
from rich.table import Table
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from newtonopt import evaluate, hessian
from newtonopt.curvature import Spectrum, extreme_eigenvalues

try:
    from curvlinops import HessianLinearOperator
except ImportError:
    HessianLinearOperator = None

NETWORKS = dict(zip(("small", "perceptron", "conv", "gpt"), small_setups(), strict=True))
TOLERANCE = 1e-3
# Numbers of largest and of smallest eigenvalues.
Ends = tuple[int, int]
# Limit on the products of eigsh at each end; an end that has not converged by then is given up.
MOST = 500


@dataclass(frozen=True)
class Answer:
    """Eigenvalues, the largest first; fewer where the method gave up. Bounds are None where the method has none."""

    values: list[float]
    products: int
    bounds: list[tuple[float, float]] | None = None


def spectrum_of(setup: Setup, wanted: Ends, tolerance: float, seed: int) -> Spectrum:
    A = hessian(evaluate(lambda: loss_of(setup), setup.parameters))
    return extreme_eigenvalues(A, *wanted, tolerance, max_products=2000, seed=seed)


def loss_of(setup: Setup) -> Tensor:
    return F.cross_entropy(setup.model(setup.inputs).flatten(0, -2), setup.targets.flatten())


def newtonopt(setup: Setup, wanted: Ends, seed: int) -> Answer:
    found = spectrum_of(setup, wanted, TOLERANCE, seed)
    entries = (*found.top, *found.bottom)
    return Answer([e.value for e in entries], found.products, [(e.lower, e.upper) for e in entries])


def scipy(setup: Setup, wanted: Ends, seed: int) -> Answer:
    A = hessian(evaluate(lambda: loss_of(setup), setup.parameters))
    return ends(lambda v: (A @ torch.from_numpy(v)).numpy(), setup.count, wanted, seed)


def curvlinops(setup: Setup, wanted: Ends, seed: int) -> Answer:
    data = [(setup.inputs, setup.targets.flatten())]
    model = nn.Sequential(setup.model, nn.Flatten(0, -2)) if setup.targets.dim() > 1 else setup.model
    A = HessianLinearOperator(model, nn.CrossEntropyLoss(), setup.parameters, data, check_deterministic=False)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        return ends(lambda v: (A @ torch.from_numpy(v)).numpy(), setup.count, wanted, seed)


def ends(product: Callable[[Any], Any], size: int, wanted: Ends, seed: int) -> Answer:
    """Compute both ends by `eigsh`, the top first."""
    count = 0

    def counted(v: Any) -> Any:
        nonlocal count
        count += 1
        return product(v.reshape(-1))

    operator = LinearOperator((size, size), counted, dtype=np.float32)
    start = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    values: list[float] = []
    for which, many in zip(("LA", "SA"), wanted, strict=True):
        # Products per restart with the default basis of 20 vectors.
        settings = {"which": which, "v0": start, "tol": TOLERANCE, "maxiter": MOST // (20 - many)}
        with contextlib.suppress(ArpackNoConvergence):
            found = [] if many == 0 else eigsh(operator, k=many, return_eigenvectors=False, **settings)
            values += sorted(map(float, found), reverse=which == "LA")
    return Answer(values, count)


def truth_of(setup: Setup, wanted: Ends) -> list[float]:
    """Compute the truth in float64, where intervals of 1e-6 are far wider than rounding."""
    inputs = setup.inputs.double() if setup.inputs.is_floating_point() else setup.inputs
    found = spectrum_of(replace(setup, model=copy.deepcopy(setup.model).double(), inputs=inputs), wanted, 1e-6, seed=1)
    if not found.converged:
        raise RuntimeError(f"{setup.name}: the eigenvalues to compare with did not converge in 2000 products")
    return [e.value for e in (*found.top, *found.bottom)]


def largest_error(answer: Answer, truth: list[float]) -> float:
    if len(answer.values) < len(truth):
        return math.nan
    floor = TOLERANCE * abs(truth[0])
    return max(abs(v - t) / max(abs(t), floor) for v, t in zip(answer.values, truth, strict=True))


def held(answer: Answer, truth: list[float]) -> str:
    """Count the intervals that hold the truth, up to the rounding of float32 that they allow for."""
    if answer.bounds is None:
        return "none given"
    doubt = 64 * torch.finfo(torch.float32).eps * abs(truth[0])
    inside = [low - doubt <= t <= high + doubt for (low, high), t in zip(answer.bounds, truth, strict=True)]
    return f"{sum(inside)} of {len(truth)}"


METHODS: dict[str, Callable[[Setup, Ends, int], Answer]] = {"newtonopt": newtonopt, "eigsh, our products": scipy}
if HessianLinearOperator is not None:
    METHODS["eigsh, curvlinops"] = curvlinops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(NETWORKS)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK", help=f"{names} (all)")
    parser.add_argument("--top", type=int, default=3, help="default: 3")
    parser.add_argument("--bottom", type=int, default=1, help="default: 1")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each from another start; default: 3")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help="default: wall")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    wanted = args.top, args.bottom
    table = Table(title=f"The Hessian's {args.top} largest and {args.bottom} smallest eigenvalues to 1e-3")
    for column in ("network", "method", "products", "seconds", "largest error", "bounds that hold"):
        table.add_column(column, justify="left" if column in ("network", "method") else "right")
    for name in args.networks:
        setup = NETWORKS[name]()
        truth = truth_of(setup, wanted)
        ours: tuple[float, float] | None = None
        for method, solve in METHODS.items():
            seconds, answers = [], []
            for seed in range(args.rounds):
                began = clock()
                answers.append(solve(setup, wanted, seed))
                seconds.append(clock() - began)
            cost = statistics.median(a.products for a in answers), statistics.median(seconds)
            ours = ours or cost
            products, taken = (f"{c:.3g} ({c / own:.2g} x)" for c, own in zip(cost, ours, strict=True))
            worst = max((largest_error(a, truth) for a in answers), key=lambda e: math.inf if math.isnan(e) else e)
            error = "not converged" if math.isnan(worst) else f"{worst:.1e}"
            table.add_row(name, method, products, taken, error, min(held(a, truth) for a in answers))
    Console().print(table)


if __name__ == "__main__":
    main()
