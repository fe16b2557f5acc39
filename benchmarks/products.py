"""Cost of a curvature product over the cost of a gradient: `python benchmarks/products.py`.

The networks are the small ones of `memory.py`, at initialisation. "cached" is newtonopt's product on a graph that
exists already; a gradient is a forward and a backward pass of the user's loss. Beside them stand the products of
curvlinops and hessian-eigenthings, where these are installed (`pip install curvlinops-for-pytorch
hessian-eigenthings`); a product of another matrix than newtonopt's ends the program.

Seconds are medians of processor time on one thread. All products of a network are timed in turn, so that a change of
the machine's speed changes all of them.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from memory_setups import Setup, small_setups
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from newtonopt import evaluate, gauss_newton, hessian

Action: TypeAlias = Callable[[], Tensor]
NETWORKS = dict(zip(("small", "perceptron", "conv", "gpt"), small_setups(), strict=True))
GOALS = {"Hessian": 2.0, "Gauss-Newton": 1.4}
HESSIAN, GAUSS_NEWTON = GOALS
# Largest relative difference of two products of one matrix. On the GPT curvlinops 3.0.1 is 1.2e-3 away from the Hessian
# product in float64, and the others 5e-7.
DIFFERENCE = 1e-2


def loss_of(setup: Setup) -> Tensor:
    return F.cross_entropy(setup.model(setup.inputs).flatten(0, -2), setup.targets.flatten())


def gradient(setup: Setup) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(setup), setup.parameters)])


def newtonopt(setup: Setup, v: Tensor) -> dict[str, Action]:
    evaluation = evaluate(lambda: loss_of(setup), setup.parameters)
    H, G = hessian(evaluation), gauss_newton(evaluation)
    return {HESSIAN: lambda: H @ v, GAUSS_NEWTON: lambda: G @ v}


def curvlinops(setup: Setup, v: Tensor) -> dict[str, Action]:
    from curvlinops import GGNLinearOperator, HessianLinearOperator

    data = [(setup.inputs, setup.targets.flatten())]
    given = (flat_model(setup), nn.CrossEntropyLoss(), setup.parameters, data)
    H = HessianLinearOperator(*given, check_deterministic=False)
    G = GGNLinearOperator(*given, check_deterministic=False)
    return {HESSIAN: lambda: H @ v, GAUSS_NEWTON: lambda: G @ v}


def hessian_eigenthings(setup: Setup, v: Tensor) -> dict[str, Action]:
    from hessian_eigenthings import GGNOperator, HessianOperator, supervised_forward
    from hessian_eigenthings import supervised_loss as of_model
    from hessian_eigenthings import supervised_loss_of_output as of_output

    model, data = flat_model(setup), [(setup.inputs, setup.targets.flatten())]
    H = HessianOperator(model, data, of_model(F.cross_entropy))
    G = GGNOperator(model, data, supervised_forward, of_output(F.cross_entropy))
    return {HESSIAN: lambda: H.matvec(v), GAUSS_NEWTON: lambda: G.matvec(v)}


PEERS = {"curvlinops": curvlinops, "hessian-eigenthings": hessian_eigenthings}


def flat_model(setup: Setup) -> nn.Module:
    """Return the model with one row of logits for each target."""
    return nn.Sequential(setup.model, nn.Flatten(0, -2)) if setup.targets.dim() > 1 else setup.model


def with_math_attention(action: Action) -> Action:
    """Run a peer's product without the fused attention kernels, which have no second derivative."""

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return action()

    return run


def actions_of(setup: Setup) -> tuple[dict[str, Action], dict[str, str]]:
    """Return what is timed, by its column, the gradient first; and why peers are left out."""
    torch.manual_seed(1)
    v = torch.randn(setup.count)
    ours = newtonopt(setup, v)
    actions: dict[str, Action] = {"gradient": lambda: gradient(setup), **ours}
    missing = {}
    for name, products in PEERS.items():
        try:
            theirs = products(setup, v)
        except ImportError as error:
            missing[name] = str(error)
            continue
        for matrix, action in theirs.items():
            column = f"{matrix}\n{name}"
            actions[column] = with_math_attention(action)
            check_equal(name, matrix, actions[column](), ours[matrix]())
    return actions, missing


def check_equal(peer: str, matrix: str, product: Tensor, ours: Tensor) -> None:
    difference = float((product.detach() - ours).norm() / ours.norm())
    if not difference <= DIFFERENCE:
        raise SystemExit(f"{peer}: the {matrix} product differs from newtonopt's by {difference:.1e} of its norm.")


def seconds(actions: dict[str, Action], budget: float) -> dict[str, float]:
    """Return the median processor time of each action, all timed in turn until `budget` seconds are spent."""
    for action in actions.values():
        action()
    spent: dict[str, list[float]] = {name: [] for name in actions}
    rounds, began = 0, time.process_time()
    while rounds < 3 or time.process_time() - began < budget:
        for name, action in actions.items():
            start = time.process_time()
            action()
            spent[name].append(time.process_time() - start)
        rounds += 1
    return {name: statistics.median(times) for name, times in spent.items()}


def cell(matrix: str, ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if matrix not in GOALS or ratio <= GOALS[matrix] else f"{ratio:.2f} > {GOALS[matrix]:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(NETWORKS)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, metavar="NAME", help=names)
    parser.add_argument("--seconds", type=float, default=20.0, help="processor time for each network (default: 20)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    columns = [*GOALS, *(f"{matrix}\n{name}" for name in PEERS for matrix in GOALS)]
    table = Table(title="Processor time of a product over that of a gradient")
    table.add_column("network", no_wrap=True)
    for name in ("parameters", "gradient, ms", *columns):
        table.add_column(name, justify="right")
    left_out: dict[str, str] = {}
    for name in args.networks:
        setup = NETWORKS[name]()
        actions, missing = actions_of(setup)
        left_out |= missing
        costs = seconds(actions, args.seconds)
        one = costs["gradient"]
        ratios = [cell(column, costs[column] / one if column in costs else None) for column in columns]
        table.add_row(setup.name, f"{setup.count:,}", f"{1e3 * one:.3g}", *ratios)
    console = Console(width=165)  # a fixed width, so that a table written to a file is not folded
    console.print(table)
    console.print("Goals: " + ", ".join(f"{matrix} at most {goal:g}" for matrix, goal in GOALS.items()) + ".")
    for name, reason in left_out.items():
        console.print(f"{name} is left out: {reason}.")


if __name__ == "__main__":
    main()
