"""All eigenvalues of a Gauss-Newton matrix beside Lanczos: `python benchmarks/gauss_newton_spectrum.py`.

The first table gives processor seconds for all eigenvalues by `gauss_newton_spectrum`, for the three largest to 1e-3
by `extreme_eigenvalues`, for the density by `spectral_density` with its defaults, and for the trace to 1 %, each from
an evaluation that is there already. `m` is the number of the outputs' entries, `n` that of parameters. A network grows
in width first, then in samples.

The second table compares two ways to the whole Jacobian of the outputs: the rows of all samples at once, as factors and
formed, and vector-Jacobian products with the unit vectors, one after the other. Of more than `--most` products so many
are formed, and the time is scaled up.

Both tables go to one JSON file, with the versions and the machine.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from equations import convection, wave
from memory_setups import Setup, convolutional, perceptron
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from newtonopt import Evaluation, evaluate, gauss_newton, jacobian
from newtonopt.curvature import extreme_eigenvalues, gauss_newton_spectrum, spectral_density, trace
from newtonopt.operators.rows import jacobian_rows

T = TypeVar("T")
RESULTS = Path(__file__).parent / "results" / "gauss_newton_spectrum.json"


@dataclass(frozen=True)
class Case:
    """A loss and its parameters."""

    name: str
    loss: Callable[[], Tensor]
    params: list[nn.Parameter]

    def evaluate(self) -> Evaluation:
        return evaluate(self.loss, self.params)


def regression(width: int, samples: int) -> Case:
    """A tanh network 2-w-w-w-1 in float64, fitted to a product of sines by squares."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(2, width), nn.Tanh()]
    layers += [nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)]
    model, x = nn.Sequential(*layers).double(), 2 * torch.rand(samples, 2, dtype=torch.float64) - 1
    y = (3 * x).sin().prod(1, keepdim=True)
    return Case(f"regression, width {width}", lambda: F.mse_loss(model(x), y), list(model.parameters()))


def physics(name: str) -> Case:
    problem = convection(0, 30.0) if name == "convection" else wave(0, 5.0)
    return Case(f"{name} equation, width 40", problem.loss, list(problem.model.parameters()))


def classifier(setup: Setup) -> Case:
    return Case(setup.name, lambda: F.cross_entropy(setup.model(setup.inputs), setup.targets), setup.parameters)


SPECTRA: dict[str, Callable[[], Case]] = {
    "width-40": lambda: regression(40, 1000),
    "width-128": lambda: regression(128, 1000),
    "width-256": lambda: regression(256, 1000),
    "width-512": lambda: regression(512, 1000),
    "samples-100": lambda: regression(40, 100),
    "samples-4000": lambda: regression(40, 4000),
    "convection": lambda: physics("convection"),
    "perceptron": lambda: classifier(perceptron((2, 32, 32, 10), 256)),
    "conv": lambda: classifier(convolutional()),
    "large": lambda: classifier(perceptron((784, 512, 512, 10), 64)),
}
JACOBIANS: dict[str, Callable[[], Case]] = {
    "convection": lambda: physics("convection"),
    "wave": lambda: physics("wave"),
    "perceptron": lambda: classifier(perceptron((2, 32, 32, 10), 256)),
    "large": lambda: classifier(perceptron((784, 512, 512, 10), 64)),
    "conv": lambda: classifier(convolutional()),
}


def timed(compute: Callable[[], T], rounds: int) -> tuple[float, T]:
    """Return the median processor time of some rounds, and what the last one computed."""
    taken = []
    for _ in range(rounds):
        began = time.process_time()
        value = compute()
        taken.append(time.process_time() - began)
    return statistics.median(taken), value


@dataclass(frozen=True)
class Spectra:
    """Seconds and products for the eigenvalues of one matrix, and how many of them are not zero."""

    case: str
    m: int
    n: int
    dtype: str
    rank: int
    exact: float
    largest: float
    largest_products: int
    largest_converged: bool
    density: float
    density_products: int
    trace: float
    trace_products: int


def spectra(case: Case, rounds: int) -> Spectra:
    evaluation = case.evaluate()
    matrix = gauss_newton(evaluation)
    matrix @ evaluation.gradient  # builds the graph of products, and checks them
    exact, found = timed(lambda: gauss_newton_spectrum(evaluation), rounds)
    largest, top = timed(lambda: extreme_eigenvalues(matrix, 3, 0, 1e-3, max_products=1000), rounds)
    of_density, density = timed(lambda: spectral_density(matrix), rounds)
    of_trace, estimate = timed(lambda: trace(matrix, tolerance=1e-2, max_products=1000), rounds)
    return Spectra(
        case.name,
        sum(evaluation.output_sizes.values()),
        found.size,
        str(evaluation.gradient.dtype).removeprefix("torch."),
        found.rank,
        exact,
        largest,
        top.products,
        top.converged,
        of_density,
        density.products,
        of_trace,
        estimate.products,
    )


@dataclass(frozen=True)
class Jacobians:
    """Seconds for the Jacobian of one model's outputs."""

    case: str
    m: int
    n: int
    factors: float
    formed: float
    products: float
    products_formed: int


def jacobians(case: Case, rounds: int, most: int) -> Jacobians:
    evaluation = case.evaluate()
    transpose = jacobian(evaluation).T
    n, m = transpose.shape
    units = torch.eye(m, dtype=evaluation.gradient.dtype)[:: max(1, -(-m // most))]
    jacobian_rows(evaluation)  # checks the rows
    factors, _ = timed(lambda: jacobian_rows(evaluation), rounds)
    formed, _ = timed(lambda: jacobian_rows(evaluation).dense(), rounds)
    one_by_one, _ = timed(lambda: [transpose @ unit for unit in units], 1)
    return Jacobians(case.name, m, n, factors, formed, one_by_one * m / len(units), len(units))


def table_of(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def of_spectra(found: Spectra) -> list[str]:
    largest = f"{found.largest:.2g} ({found.largest_products}{'' if found.largest_converged else ', not converged'})"
    density, of_trace = f"{found.density:.2g} ({found.density_products})", f"{found.trace:.2g} ({found.trace_products})"
    return [found.case, f"{found.m:,}", f"{found.n:,}", f"{found.exact:.2g}", largest, density, of_trace]


def of_jacobians(found: Jacobians) -> list[str]:
    ratios = f"{found.products / found.factors:.0f}, {found.products / found.formed:.0f}"
    seconds = [f"{value:.2g}" for value in (found.factors, found.formed, found.products)]
    return [found.case, f"{found.m:,}", f"{found.n:,}", *seconds, ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spectra", nargs="*", default=list(SPECTRA), choices=SPECTRA, metavar="CASE", help="all")
    parser.add_argument(
        "--jacobians", nargs="*", default=list(JACOBIANS), choices=JACOBIANS, metavar="CASE", help="all"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each, of which the median; default: 3")
    parser.add_argument("--most", type=int, default=400, help="vector-Jacobian products formed; default: 400")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"file of the figures; default: {RESULTS.name}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    console = Console(width=140)
    every, ways = [], []
    for name in args.spectra:
        every.append(spectra(SPECTRA[name](), args.rounds))
        print(*of_spectra(every[-1]), sep=" | ", flush=True)
    for name in args.jacobians:
        ways.append(jacobians(JACOBIANS[name](), args.rounds, args.most))
        print(*of_jacobians(ways[-1]), sep=" | ", flush=True)
    columns = ["loss", "m", "n", "all eigenvalues", "largest 3 (products)", "density (products)", "trace (products)"]
    console.print(table_of("Gauss-Newton spectra, processor seconds", columns, [of_spectra(s) for s in every]))
    columns = ["loss", "m", "n", "rows as factors", "rows formed", "m products J'u", "products over rows"]
    console.print(table_of("The outputs' Jacobian, processor seconds", columns, [of_jacobians(j) for j in ways]))
    record = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": f"{platform.machine()}, one thread, processor time",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "rounds": args.rounds,
        "spectra": [asdict(s) for s in every],
        "jacobians": [asdict(j) for j in ways],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
