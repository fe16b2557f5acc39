"""The methods of the league table: ours, torch's and other people's, each with one stated setting.

Settings are the packages' defaults but for those named here. A method whose package is not installed is left out:
`pip install -e .[benchmarks]` brings them all.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from league import MOMENTUM, OURS
from torch import Tensor, nn
from torch.func import vmap
from torch.optim import Adam, Optimizer
from training import LBFGS_METHOD, Contender, Problem, Stepping

import newtonopt


def levenberg_marquardt(params: list[nn.Parameter]) -> Optimizer:
    return newtonopt.LevenbergMarquardt(params)


def with_momentum(params: list[nn.Parameter]) -> Optimizer:
    return newtonopt.LevenbergMarquardt(params, momentum=0.9)


def soap(params: list[nn.Parameter]) -> Optimizer:
    from pytorch_optimizer import SOAP

    # The package's default weight decay of 0.01 pulls the solution towards zero.
    return SOAP(params, weight_decay=0.0)


def nystrom_newton_cg(task: Problem) -> Callable[[], object]:
    """DeepXDE's NNCG; it differentiates the loss itself, and prints a line at each step."""
    os.environ["DDE_BACKEND"] = "pytorch"
    with _silence():
        from deepxde.optimizers.pytorch.nncg import NNCG
    # The defaults of deepxde.optimizers.set_NNCG_options, which differ from the constructor's, but for the number of
    # iterations: 1000 of them, which an absolute tolerance of 1e-16 always takes, are one or two steps in a minute.
    optimizer = NNCG(task.model.parameters(), lr=1, rank=50, mu=1e-1, cg_max_iters=200, line_search_fn="armijo")

    def step() -> None:
        # NNCG makes its vectors in the default type.
        with _default_type(torch.float64), _silence():
            optimizer.step(task.loss)

    return step


def torchzero_method(task: Problem, module: str) -> Callable[[], object]:
    """A quasi-Newton module of torchzero under its line search for the strong Wolfe conditions."""
    import torchzero as tz

    optimizer = tz.Optimizer(task.model.parameters(), getattr(tz.m, module)(), tz.m.StrongWolfe())

    def closure(backward: bool = True) -> Tensor:
        # Torchzero evaluates trial points without gradients, which the derivatives inside the loss need.
        with torch.enable_grad():
            loss = task.loss()
        if backward:
            optimizer.zero_grad()
            loss.backward()
        return loss

    return lambda: optimizer.step(closure)


class Residuals(nn.Module):
    """All residuals of a problem as outputs of a module, weighted so that their mean square is the loss.

    Samples have to look alike, so each evaluates every term and keeps its own by a weight: a row holds the point, then
    a weight for each term, all but one of them zero.
    """

    def __init__(self, task: Problem) -> None:
        super().__init__()
        assert task.terms is not None
        self.model, self._terms = task.model, task.terms

    def samples(self) -> tuple[Tensor, Tensor]:
        """Return inputs and targets with the points of this step."""
        terms = self._terms()
        count = sum(len(term.points) for term in terms)
        weights = [(count / len(term.points)) ** 0.5 * torch.ones_like(term.points[:, :1]) for term in terms]
        targets = [torch.zeros_like(t.points[:, 0]) if t.targets is None else t.targets for t in terms]
        inputs = torch.cat([torch.cat([term.points for term in terms]), torch.block_diag(*weights)], dim=1)
        return inputs, torch.cat(targets)[:, None] * torch.cat(weights)

    def forward(self, inputs: Tensor) -> Tensor:
        formulas = [term.residual for term in self._terms()]

        def one(sample: Tensor) -> Tensor:
            point, weights = sample[: -len(formulas)], sample[-len(formulas) :]
            return torch.stack([formula(lambda p: self.model(p[None])[0, 0], point) for formula in formulas]) @ weights

        return vmap(one)(inputs)[:, None]


def torch_levenberg_marquardt(task: Problem) -> Callable[[], object]:
    """The package of that name with its defaults, on residuals rewritten for it: it cannot take the closure.

    Its Jacobians are taken by torch.func, a sample at a time, where `torch.autograd.grad` in the loss is an error.
    """
    from torch_levenberg_marquardt.training import LevenbergMarquardtModule

    residuals = Residuals(task)
    module = LevenbergMarquardtModule(residuals)
    return lambda: module.training_step(*residuals.samples())


@dataclass(frozen=True)
class Method:
    """Contenders that stand for one method, the package they need, and their settings in words."""

    contenders: tuple[Contender, ...]
    setting: str
    package: str = "torch"
    by_default: bool = True
    for_new_points: bool = False  # run by default where points are drawn anew in each step

    @property
    def missing(self) -> str | None:
        """Why the method cannot run here; None if it can."""
        if self.package == "newtonopt":
            name = self.contenders[0].method.split("+")[0]
            return None if hasattr(newtonopt, name) else f"{name} is not in newtonopt {newtonopt.__version__}"
        if importlib.util.find_spec(MODULES.get(self.package, self.package)) is None:
            return f"{self.package} is not installed: pip install -e .[benchmarks]"
        return None


MODULES = {"pytorch-optimizer": "pytorch_optimizer", "torch-levenberg-marquardt": "torch_levenberg_marquardt"}
_warm_up = (1 / 3, Stepping(partial(Adam, lr=1e-3)))


def _one(name: str, *phases: tuple[float, Callable[[Problem], Callable[[], object]]]) -> tuple[Contender, ...]:
    return (Contender(name, phases, name),)


METHODS = {
    OURS: Method(_one(OURS, (1.0, Stepping(levenberg_marquardt))), "defaults", "newtonopt"),
    MOMENTUM: Method(
        _one(MOMENTUM, (1.0, Stepping(with_momentum))),
        "momentum .9",
        "newtonopt",
        by_default=False,
        for_new_points=True,
    ),
    "HessianFree": Method(_one("HessianFree", (1.0, Stepping(newtonopt.HessianFree))), "defaults", "newtonopt"),
    "Adam": Method(_one("Adam", (1.0, Stepping(partial(Adam, lr=1e-3)))), "learning rate 1e-3"),
    "L-BFGS": Method(_one("L-BFGS", (1.0, LBFGS_METHOD)), "strong Wolfe, history 100", by_default=False),
    "Adam+L-BFGS": Method(
        _one("Adam+L-BFGS", _warm_up, (1.0, LBFGS_METHOD)),
        "a third of the time Adam 1e-3, then L-BFGS, strong Wolfe, history 100",
    ),
    "SOAP": Method(
        _one("SOAP", (1.0, Stepping(soap))),
        "pytorch-optimizer, learning rate 3e-3, no weight decay",
        "pytorch-optimizer",
    ),
    "NNCG": Method(
        _one("NNCG", (1 / 6, _warm_up[1]), (1 / 2, LBFGS_METHOD), (1.0, nystrom_newton_cg)),
        "a sixth of the time Adam 1e-3, a third L-BFGS, then NNCG, DeepXDE's defaults but 200 iterations",
        "deepxde",
    ),
    "BFGS": Method(
        _one("BFGS", (1.0, partial(torchzero_method, module="BFGS"))), "torchzero, strong Wolfe; defaults", "torchzero"
    ),
    "SSVM": Method(
        _one("SSVM", (1.0, partial(torchzero_method, module="SSVM"))),
        "torchzero, self-scaled (Oren and Spedicato), strong Wolfe; defaults",
        "torchzero",
        by_default=False,  # it multiplies n x n matrices in each step: three steps in six seconds
    ),
    "torch-levenberg-marquardt": Method(
        _one("torch-levenberg-marquardt", (1.0, torch_levenberg_marquardt)),
        "defaults, on residuals rewritten for torch.func",
        "torch-levenberg-marquardt",
    ),
}


def versions() -> dict[str, str]:
    """Return the versions of torch, of this package and of the peers that are installed."""
    packages = dict.fromkeys(["newtonopt", "torch", "numpy", *(method.package for method in METHODS.values())])
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@contextlib.contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
