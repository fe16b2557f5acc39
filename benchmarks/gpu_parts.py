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
    from memory_setups import Setup, gpt, resnet, small_setups

    from newtonopt import evaluate, gauss_newton, hessian

    # As large as ResNet-18, and as the smallest GPT-2.
    large: list[Callable[[], Setup]] = [lambda: resnet(32), lambda: gpt(12, 768, 12, 50_257, batch=4, length=256)]
    tiny: list[Callable[[], Setup]] = [
        lambda: resnet(4, width=2, size=64, classes=5),
        lambda: gpt(1, 8, 2, 16, batch=2, length=4),
    ]
    setups = [*small_setups()[:1], *tiny] if where.small else [*small_setups(), *large]

    def loss_of(setup: Setup) -> torch.Tensor:
        return F.cross_entropy(setup.model(setup.inputs).flatten(0, -2), setup.targets.flatten())

    def cost(action: Callable[[], Any]) -> dict[str, float]:
        for _ in range(2):
            action()
        seconds: list[float] = []
        with peak_memory(where.device) as memory:
            # Long actions are repeated less often.
            while len(seconds) < 2 or (not where.small and len(seconds) < 20 and sum(seconds) < 1.0):
                began = now(where.device)
                action()
                seconds.append(now(where.device) - began)
        return {"seconds": statistics.median(seconds), **memory}

    for make in setups:
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
    """Record loss and error of an autoencoder on a grid of times, on the wall clock."""
    from training import Contender, Stepping

    from newtonopt import HessianFree

    if not importable("sklearn", note):
        return
    from autoencoder import digits_autoencoder

    optimizer = partial(HessianFree, **({"preconditioner": None, "max_iterations": 3} if where.small else {}))
    contender = Contender("HessianFree", ((1.0, Stepping(optimizer)),), "HessianFree")
    curve("autoencoder", digits_autoencoder, contender, 0.5 if where.small else 15.0, where, note)


def levenberg_marquardt(where: Where, note: Note) -> None:
    """Record loss and error of two physics-informed networks in float64 with both optimizers, on the wall clock."""
    from equations import EQUATIONS, HORIZONS, ON_A_GPU, convection, poisson
    from training import Contender, Stepping

    from newtonopt import HessianFree, LevenbergMarquardt

    equations: dict[str, tuple[Callable[[int], Any], float]] = {
        "convection-30": (EQUATIONS["convection-30"].problem, 20.0),
        "poisson-5d-large": (ON_A_GPU["poisson-5d-large"].problem, 40.0),
    }
    if where.small:
        few = partial(poisson, dimensions=5, widths=(8,), count=30, edge_count=10, anew=True)
        equations = {"convection-30": (partial(convection, beta=30.0, count=30), 0.3), "poisson-5d-large": (few, 0.3)}
    for name, (problem, seconds) in equations.items():
        horizon = HORIZONS.get(name)
        for optimizer in (LevenbergMarquardt, HessianFree):
            contender = Contender(optimizer.__name__, ((1.0, Stepping(optimizer)),), optimizer.__name__)
            title = f"{name}, {optimizer.__name__}"
            curve(title, problem, contender, seconds, where, note, horizon)


def curve(
    name: str,
    problem: Callable[[int], Any],
    contender: Any,
    seconds: float,
    where: Where,
    note: Note,
    horizon: float | None = None,
) -> None:
    """Note loss and error on a grid of times, and what the error would be at a later time, the horizon."""
    from training import Message, extrapolated, on_device, train

    so_far: list[Message] = []

    def report(message: Message) -> None:
        so_far.append(message)
        note(name, {"so far": so_far})

    run = train(partial(on_device, problem, where.device), contender, 0, seconds, "wall", report)
    later = {} if horizon is None else {"horizon": horizon, "error there, extrapolated": extrapolated(run, horizon)}
    note(name, {**asdict(run), **later})


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


def monitor(where: Where, note: Note) -> None:
    """Time steps of a GPT in bf16-mixed, and measurements between them: certified ones and those that track one."""
    from memory_setups import gpt
    from monitor_overhead import BUDGET, CERTIFIED_SHARE, EVERY, MONITORS, Stopwatch, Timed, Times, overhead, train

    def small() -> Any:
        return gpt(2, 16, 2, 32, batch=2, length=8)

    def large() -> Any:
        return gpt(12, 768, 12, 50_257, batch=8, length=256)

    clock = partial(now, where.device)
    # Steps between two measurements: a measurement's cost does not depend on them, and the overhead is that of EVERY.
    apart = 2 if where.small else 10
    for name, settings in MONITORS.items():
        setup = moved((small if where.small else large)(), where.device)
        times, watch = Times(), Stopwatch(clock)
        # A certified measurement, two that track it, and once more; the first round warms up.
        timed = Timed(times, clock, every_n_train_steps=apart, budget=BUDGET, **settings)
        accelerator = "gpu" if where.device == "cuda" else "cpu"
        train(setup, 6 * apart, [watch, timed], accelerator, "bf16-mixed")
        step = statistics.median(watch.steps)
        tracked, certified = statistics.median(times.tracked[2:]), times.certified[-1]
        note(
            name,
            {
                "parameters": setup.count,
                "step": step,
                "tracked": tracked,
                "certified": certified,
                "products": {kind: times.products[key] for kind, key in (("tracked", 0.0), ("certified", 1.0))},
                "every": EVERY,
                "certified share": CERTIFIED_SHARE,
                "overhead": overhead(tracked / step, certified / step, EVERY),
            },
        )


def billion(where: Where, note: Note) -> None:
    """Certify the largest eigenvalue of the Hessian of a GPT, from streamed products, in the memory that there is."""
    import torch.nn.functional as F
    from memory_setups import gpt

    from newtonopt import evaluate, hessian
    from newtonopt.curvature import extreme_eigenvalues

    with torch.device(where.device):
        setup = gpt(2, 16, 2, 32, batch=2, length=8) if where.small else gpt(18, 2048, 16, 50_257, batch=1, length=128)
    vectors = 16  # the fewest; each is as large as the model

    def closure() -> torch.Tensor:
        loss = F.cross_entropy(setup.model(setup.inputs).flatten(0, -2), setup.targets.flatten())
        loss.backward()
        return loss

    with peak_memory(where.device) as memory:
        began = now(where.device)
        evaluation = evaluate(closure, setup.parameters, products="streamed")
        A = hessian(evaluation)
        A @ evaluation.gradient
        checked = now(where.device)
        note(setup.name, {"parameters": setup.count, "seconds until the first product": checked - began})
        found = extreme_eigenvalues(A, top=1, bottom=0, tolerance=1e-2, max_products=60, max_vectors=vectors)
        seconds = now(where.device) - checked
    [largest] = found.top
    note(
        setup.name,
        {
            "parameters": setup.count,
            "seconds until the first product": checked - began,
            "seconds": seconds,
            "products": found.products,
            "vectors": vectors,
            "value": largest.value,
            "lower": largest.lower,
            "upper": largest.upper,
            "certified": found.certified,
            **memory,
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
            "products": measured["curvature-bookkeeping/products"],
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
