"""The parts that `gpu.py` runs, each in a process of its own.

A part receives the device and a function that notes a figure under a name and writes it down at once. Each part has its
own imports, so that a missing package stops that part alone.
"""

import contextlib
import importlib.util
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
# Characters that are kept of a failed test's report.
KEPT = 2000

Note = Callable[[str, Any], None]


@dataclass(frozen=True)
class Where:
    """The device that a part runs on, and whether its problems are small."""

    device: str
    small: bool


def tests(where: Where, note: Note) -> None:
    """Run the `gpu` tests; on a CPU, to try this script, the same tests of one file."""
    import pytest

    counts: Counter[str] = Counter()
    failures: dict[str, str] = {}

    class Record:
        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                self.pytest_runtest_logreport(report)

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                failures[report.nodeid] = report.longreprtext[-KEPT:]
            if report.failed or report.skipped or getattr(report, "when", "") == "call":
                counts[report.outcome] += 1
                note("counts", dict(counts))
                note("failures", failures)

    chosen = (
        ["-m", "gpu", "tests"]
        if where.device == "cuda"
        else ["-m", "not slow and not gpu", "-k", "cpu", "tests/system/test_device.py"]
    )
    options = ["-q", "--continue-on-collection-errors", "-p", "no:cacheprovider", "--durations=10", "--tb=short"]
    code = pytest.main([*options, *chosen], plugins=[Record()])
    if code != 0:
        raise SystemExit(int(code))


def products(where: Where, note: Note) -> None:
    """Take median times of a training step's gradient, and of products on one evaluation."""
    import torch.nn.functional as F
    from memory_setups import Setup, small_setups

    from newtonopt import evaluate, gauss_newton, hessian

    repetitions = 2 if where.small else 20

    def loss_of(setup: Setup) -> torch.Tensor:
        return F.cross_entropy(setup.model(setup.inputs).flatten(0, -2), setup.targets.flatten())

    def cost(action: Callable[[], Any]) -> dict[str, float]:
        for _ in range(2):
            action()
        seconds = []
        with peak_memory(where.device) as memory:
            for _ in range(repetitions):
                began = now(where.device)
                action()
                seconds.append(now(where.device) - began)
        return {"seconds": statistics.median(seconds), **memory}

    for make in small_setups()[: 1 if where.small else None]:
        setup = moved(make(), where.device)
        params = setup.parameters
        costs = {
            "gradient": cost(lambda setup=setup, params=params: torch.autograd.grad(loss_of(setup), params)),
            "evaluation": cost(lambda setup=setup, params=params: evaluate(lambda: loss_of(setup), params)),
        }
        for form, operators in {"": (hessian, gauss_newton), ", finite differences": (hessian,)}.items():
            evaluation = evaluate(lambda setup=setup: loss_of(setup), params, "finite_difference" if form else "auto")
            v = torch.randn_like(evaluation.gradient)
            for operator in operators:
                A = operator(evaluation)
                costs[operator.__name__ + form] = cost(lambda A=A, v=v: A @ v)
        ratios = {name: c["seconds"] / costs["gradient"]["seconds"] for name, c in costs.items()}
        note(setup.name, {"parameters": setup.count, "by gradient": ratios, **costs})


def hessian_free(where: Where, note: Note) -> None:
    """Record loss and error on a grid of times, on the wall clock."""
    from equations import convection
    from training import Contender, Message, Problem, Stepping, train

    from newtonopt import HessianFree

    problems: dict[str, tuple[Callable[[int], Problem], float]] = {
        "convection, beta 30": (partial(convection, beta=30.0), 30.0),
    }
    if importable("sklearn", note):
        from autoencoder import digits_autoencoder

        problems["autoencoder"] = digits_autoencoder, 15.0
    contender = Contender("HessianFree", ((1.0, Stepping(HessianFree)),), "HessianFree")

    def on_device(build: Callable[[int], Problem], seed: int) -> Problem:
        with torch.device(where.device):
            return build(seed)

    for name, (build, seconds) in problems.items():
        so_far: list[Message] = []

        def report(message: Message, name: str = name, so_far: list[Message] = so_far) -> None:
            so_far.append(message)
            note(name, {"so far": so_far})

        run = train(partial(on_device, build), contender, 0, 0.5 if where.small else seconds, "wall", report)
        note(name, asdict(run))


def lightning(where: Where, note: Note) -> None:
    """Run each optimizer twice without monitors, first to warm up, and once with them, from the same weights."""
    import lightning as L
    from lightning.pytorch.loggers import TensorBoardLogger
    from memory_setups import convolutional, perceptron
    from monitor_overhead import Classifier
    from torch.utils.data import DataLoader

    from newtonopt import HessianFree
    from newtonopt.callbacks import CurvatureMonitor, StepMonitor

    class Timed(L.Callback):
        seconds = 0.0

        def on_train_start(self, *_: Any) -> None:
            self.began = now(where.device)

        def on_train_end(self, *_: Any) -> None:
            self.seconds = now(where.device) - self.began

    class WithHessianFree(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return HessianFree(self.parameters(), **({"rank": 5} if where.small else {}))

    def run(kind: type[Classifier], steps: int, monitors: Sequence[L.Callback], folder: str) -> dict[str, Any]:
        setup = perceptron((8, 16, 4), 32) if where.small else convolutional()
        torch.manual_seed(1)
        module, timed = kind(setup), Timed()
        trainer = L.Trainer(
            accelerator="gpu" if where.device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed",
            max_epochs=1,
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*monitors, timed],
        )
        trainer.fit(module, DataLoader([(setup.inputs, setup.targets)] * steps, batch_size=None))
        weights = torch.cat([p.detach().cpu().reshape(-1) for p in module.parameters()])
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return {"seconds": timed.seconds, "weights": weights, "logged": logged}

    for name, kind, steps, every in (("Adam", Classifier, 200, 50), ("HessianFree", WithHessianFree, 20, 10)):
        steps, every = (4, 2) if where.small else (steps, every)
        monitors: list[L.Callback] = [CurvatureMonitor(every_n_train_steps=every)]
        monitors += [StepMonitor()] if kind is WithHessianFree else []
        with tempfile.TemporaryDirectory() as folder:
            first, plain, monitored = (run(kind, steps, chosen, folder) for chosen in ([], [], monitors))
        note(
            name,
            {
                "steps": steps,
                "measurements": steps // every,
                "seconds, warming up": first["seconds"],
                "seconds": plain["seconds"],
                "seconds, monitored": monitored["seconds"],
                "two runs without monitors agree to the bit": torch.equal(first["weights"], plain["weights"]),
                "monitors change no bit": torch.equal(plain["weights"], monitored["weights"]),
                "logged": monitored["logged"],
            },
        )


def synchronisations(where: Where, note: Note) -> None:
    """Count waits; the difference between 8 and 3 iterations gives the waits of one iteration."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch.nn.functional as F
    from devices import waits
    from memory_setups import Setup, small_setups

    from newtonopt import HessianFree, evaluate, gauss_newton, hessian
    from newtonopt.curvature import measure
    from newtonopt.solvers.cg import conjugate_gradients

    def loss_of(setup: Setup) -> torch.Tensor:
        return F.cross_entropy(setup.model(setup.inputs).flatten(0, -2), setup.targets.flatten())

    def places(found: Counter[str]) -> dict[str, int]:
        return {place.removeprefix(f"{ROOT}/"): count for place, count in found.most_common(12)}

    for make in small_setups()[: 1 if where.small else None]:
        setup = moved(make(), where.device)
        result: dict[str, Any] = {}
        for operator, damping in ((gauss_newton, 1e-2), (hessian, 10.0)):
            evaluation = evaluate(lambda setup=setup: loss_of(setup), setup.parameters)
            A = operator(evaluation).shift(damping)
            counts, iterations = [], []
            for limit in (3, 3, 8):  # the first one warms up
                with waits(where.device) as found:
                    solution = conjugate_gradients(A, evaluation.gradient, max_iterations=limit, keep_path=True)
                counts.append(sum(found.values()))
                iterations.append(solution.iterations)
            more = iterations[2] - iterations[1]
            result[f"{operator.__name__}, an iteration"] = (counts[2] - counts[1]) / more if more else None
        optimizer = HessianFree(setup.parameters, **({"rank": 5} if where.small else {}))
        closure = setup.closure(optimizer, 1)
        optimizer.step(closure)
        with waits(where.device) as found:
            optimizer.step(closure)
        step = optimizer.last_step
        result["a step of HessianFree"] = {
            "waits": sum(found.values()),
            "iterations": step.iterations,
            "products": step.products,
            "places": places(found),
        }
        with waits(where.device) as found:
            measured = measure(lambda setup=setup: loss_of(setup), setup.parameters, max_products=24)
        result["a measurement"] = {
            "waits": sum(found.values()),
            "products": measured["curvature/products"],
            "places": places(found),
        }
        note(setup.name, result)


def moved(setup: Any, device: str) -> Any:
    """Return the setup with its model and data on the device."""
    return type(setup)(setup.name, setup.model.to(device), setup.inputs.to(device), setup.targets.to(device))


def now(device: str) -> float:
    """Wait until the device has finished its work, and return the time in seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def peak_memory(device: str) -> Any:
    """Yield a dictionary that receives, at the end, the peak of the device's memory above the start, if known."""
    found: dict[str, float] = {}
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    yield found
    if device == "cuda":
        found["bytes"] = torch.cuda.max_memory_allocated() - before


def importable(package: str, note: Note) -> bool:
    """Return whether a package is installed; note it if not."""
    there = importlib.util.find_spec(package) is not None
    if not there:
        note(f"without {package}", f"what needs {package} was left out")
    return there
