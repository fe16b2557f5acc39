"""Set-ups, each tried with a model of a few parameters whose answer is known."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import multiprocessing
import tempfile
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from newtonopt import HessianFree, LevenbergMarquardt, evaluate, hessian
from newtonopt.curvature import extreme_eigenvalues
from newtonopt.doctor.examination import Unavailable, Wrong, first_line

Closure = Callable[[], Tensor]

# Relative error of a product in float32, with a wide margin.
_TOLERANCE = 1e-3
# Share of the loss above its minimum that may be left after _STEPS steps. All optimizers here leave far less.
_LEFT, _STEPS = 1e-2, 10


def regression(
    dtype: torch.dtype = torch.float64, device: str = "cpu", rank: int = 0, count: int = 1
) -> tuple[nn.Linear, Tensor, Tensor, float]:
    """Return a linear model, a part of its data, and the smallest mean square error on all of the data.

    Args:
        dtype: Precision of all of them.
        device: Device on which they are.
        rank: Number of the part.
        count: Number of parts.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, dtype=torch.float64, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [3.0]], dtype=torch.float64) + 0.5
    y = y + 0.1 * torch.randn(24, 1, dtype=torch.float64, generator=generator)
    whole = torch.cat([x, torch.ones(24, 1, dtype=torch.float64)], dim=1)
    least = float(F.mse_loss(whole @ torch.linalg.lstsq(whole, y).solution, y))
    model = nn.Linear(3, 1, dtype=torch.float64)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    x, y = x.chunk(count)[rank], y.chunk(count)[rank]
    return model.to(device, dtype), x.to(device, dtype), y.to(device, dtype), least


def closure_of(model: nn.Module, loss_of: Closure) -> Closure:
    """Return a closure as `torch.optim.LBFGS` takes it."""

    def closure() -> Tensor:
        model.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    return closure


def step_to_the_minimum(optimizer: Any, closure: Closure, least: float) -> None:
    """Take some steps, and raise an error if too much of the loss above its minimum is left."""
    losses = [float(optimizer.step(closure)) for _ in range(_STEPS + 1)]
    left = (losses[-1] - least) / (losses[0] - least)
    if not left < _LEFT:
        raise Wrong(f"{_STEPS} steps leave {left:.2g} of the loss above its minimum, more than {_LEFT:g}")


# Steps and measurements.


def steps(kind: type[HessianFree] | type[LevenbergMarquardt], device: str = "cpu") -> str:
    """Fit a linear model in float32 and float64, with one of the optimizers."""
    precisions = (torch.float32,) if device == "mps" else (torch.float32, torch.float64)
    for dtype in precisions:
        model, x, y, least = regression(dtype, device)
        closure = closure_of(model, lambda: F.mse_loss(model(x), y))  # noqa: B023
        step_to_the_minimum(kind(model.parameters()), closure, least)
    return f"reaches the least squares solution in {' and '.join(str(d).removeprefix('torch.') for d in precisions)}"


def device_steps(device: str) -> str:
    """Fit a linear model on an accelerator."""
    present = torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available()
    if not present:
        raise Unavailable("no such device")
    return steps(HessianFree, device)


def eigenvalue() -> str:
    """Compare the measured extreme eigenvalues of a small network's Hessian with those of the dense matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(16, 3, dtype=torch.float64), torch.randn(16, 1, dtype=torch.float64)
    parameters = dict(model.named_parameters())

    def loss_at(flat: Tensor) -> Tensor:
        pieces = flat.split([p.numel() for p in parameters.values()])
        at = {name: piece.view_as(p) for (name, p), piece in zip(parameters.items(), pieces, strict=True)}
        return F.mse_loss(torch.func.functional_call(model, at, (x,)), y)

    point = torch.cat([p.detach().flatten() for p in parameters.values()])
    truth: Tensor = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss_at, point))
    found = extreme_eigenvalues(hessian(evaluate(lambda: F.mse_loss(model(x), y), model.parameters())), 1, 1)
    for end, value in ((found.top[0], float(truth[-1])), (found.bottom[0], float(truth[0]))):
        if not end.lower <= value <= end.upper:
            raise Wrong(f"an eigenvalue is {value:.6g}, the interval is [{end.lower:.6g}, {end.upper:.6g}]")
    return f"lambda_max {found.top[0].value:.4f}, dense {float(truth[-1]):.4f}; both ends within their bounds"


# Kernels without a double backward.


def attention() -> str:
    """Compare products through fused attention with those through the mathematical formula."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layer = nn.Linear(8, 24).to(device)
    x = torch.randn(2, 5, 8, device=device)
    kernels = []

    def loss_of() -> Tensor:
        q, k, v = layer(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v)
        kernels.append(type(z.grad_fn).__name__)
        return z.square().mean()

    loss_of()
    fused = kernels[0].removesuffix("0").removesuffix("Backward")
    if "ScaledDotProduct" not in fused:
        fused = "the mathematical formula"
    with sdpa_kernel(SDPBackend.MATH):
        truth = _products(loss_of, list(layer.parameters()))
    form = _compared(layer, loss_of, truth)
    return f"{form} products are right on {device}; outside of steps torch takes {fused}"


def recurrent() -> str:
    """Compare products through an LSTM with those without cuDNN."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4).to(device)
    x = torch.randn(5, 2, 3, device=device)

    def loss_of() -> Tensor:
        z: Tensor = layer(x)[0]
        return z.square().mean()

    with torch.backends.cudnn.flags(enabled=False):
        truth = _products(loss_of, list(layer.parameters()))
    form = _compared(layer, loss_of, truth)
    without = ", without cuDNN" if device == "cuda" and torch.version.hip is None else ""
    return f"{form} products are right on {device}{without}"


def _products(loss_of: Closure, params: list[nn.Parameter]) -> Tensor:
    """Return the product of the Hessian with a vector of ones, by torch alone."""
    gradient = torch.autograd.grad(loss_of(), params, create_graph=True)
    product = torch.autograd.grad([piece.sum() for piece in gradient], params)
    return torch.cat([piece.flatten() for piece in product])


def _compared(model: nn.Module, loss_of: Closure, truth: Tensor) -> str:
    """Compare the product of the Hessian with a vector of ones; return how it was formed."""
    evaluation = evaluate(loss_of, model.parameters())
    product = hessian(evaluation) @ torch.ones_like(truth)
    error = float((product - truth).norm() / truth.norm())
    if not error < _TOLERANCE:
        raise Wrong(f"a product is wrong by {error:.2g} of its length")
    if evaluation.form != "cached":
        raise Wrong(f"products are formed as {evaluation.form}, not from the graph")
    return evaluation.form


# Precision and compilation.


def autocast() -> str:
    """Fit a linear model under bfloat16 autocast."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x, y, least = regression(torch.float32, device)

    def loss_of() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return F.mse_loss(model(x).float(), y)

    step_to_the_minimum(HessianFree(model.parameters()), closure_of(model, loss_of), least)
    return f"HessianFree reaches the least squares solution on {device}"


def compiled() -> str:
    """Fit a compiled linear model, and run it compiled afterwards."""
    model, x, y, least = regression()
    # With this slope the activation is an identity, for which torch compiles a kernel; a linear layer alone needs none.
    fast = torch.compile(nn.Sequential(model, nn.LeakyReLU(1.0)))
    closure = closure_of(model, lambda: F.mse_loss(fast(x), y))
    step_to_the_minimum(HessianFree(model.parameters()), closure, least)
    try:
        with torch.no_grad():
            z = fast(x)
    except Exception as error:
        raise Unavailable(
            f"steps work, but torch.compile itself does not ({first_line(error)[:120]})",
            "Use the model uncompiled, or install a C++ compiler that torch finds: g++, clang++ or cl.",
        ) from error
    if not torch.allclose(z, model(x)):
        raise Wrong("a compiled model computes something else after steps", "Use the model uncompiled.")
    return "steps run the model uncompiled, and it runs compiled elsewhere"


# Several processes.


def data_parallel() -> str:
    """Fit a DistributedDataParallel model on two processes, and compare it with one process and all of the data."""
    model, x, y, _ = regression()
    optimizer = HessianFree(model.parameters())
    closure = closure_of(model, lambda: F.mse_loss(model(x), y))
    for _ in range(3):
        optimizer.step(closure)
    together = _in_two_processes(_data_parallel)
    error = float((together - _flat(model)).abs().max())
    if not error < 1e-8:
        raise Wrong(f"steps of two processes differ from those of one by {error:.2g}")
    return "steps of two gloo processes are those of one with the whole batch"


def _data_parallel(rank: int) -> Tensor:
    model, x, y, _ = regression(rank=rank, count=2)
    parallel = DistributedDataParallel(model)
    optimizer = HessianFree(parallel.parameters())
    closure = closure_of(parallel, lambda: F.mse_loss(parallel(x), y))
    for _ in range(3):
        optimizer.step(closure)
    return _flat(model)


def sharded() -> str:
    """Fit a model sharded by fully_shard on two processes."""
    start, least, end = _in_two_processes(_sharded).tolist()
    left = (end - least) / (start - least)
    if not left < _LEFT:
        raise Wrong(f"{_STEPS} steps leave {left:.2g} of the loss above its minimum, more than {_LEFT:g}")
    return "HessianFree reaches the least squares solution with two gloo processes, by finite differences"


def _sharded(rank: int) -> Tensor:
    from torch.distributed.fsdp import fully_shard

    model, x, y, least = regression(rank=rank, count=2)
    fully_shard(model)
    # Products by differences are the default there; asked for by name they give no warning.
    optimizer = HessianFree(model.parameters(), products="finite_difference")
    closure = closure_of(model, lambda: F.mse_loss(model(x), y))
    for _ in range(_STEPS):
        optimizer.step(closure)
    loss = closure().detach()
    dist.all_reduce(loss)
    first = F.mse_loss(torch.zeros_like(y), y)
    dist.all_reduce(first)
    return torch.stack([first / 2, torch.tensor(least, dtype=loss.dtype), loss / 2])


def _in_two_processes(work: Callable[[int], Tensor]) -> Tensor:
    """Return the result of `work(0)`, run in one process while another runs `work(1)`, both in one gloo group."""
    if not (dist.is_available() and dist.is_gloo_available()):
        raise Unavailable("torch is built without torch.distributed or gloo")
    # Two new processes, not this one and another: torch names a group by the number of groups that its process has
    # tried to start. A start that failed here would make this process wait for a name that the other never gives.
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(2) as pool:
        meeting = str(Path(folder, "meeting"))
        part = functools.partial(_take_part, meeting=meeting, work=work)
        # In the order in which they end, for a process that fails leaves the other one waiting.
        values = dict(pool.imap_unordered(part, range(2)))[0]
    return torch.tensor(values, dtype=torch.float64)


def _take_part(rank: int, meeting: str, work: Callable[[int], Tensor]) -> tuple[int, list[float]]:
    """Join the group, do the work, and return the rank with the numbers found."""
    try:
        # A file, so that no port has to be free. Gloo still connects the processes by a network interface.
        store = dist.FileStore(meeting, 2)  # type: ignore[attr-defined]
        # The limit of the check ends a process that waits in vain.
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=5))
    except RuntimeError as error:
        raise Unavailable(
            f"torch.distributed itself does not start ({first_line(error)[:120]})",
            "Name a network interface that works: GLOO_SOCKET_IFNAME=lo.",
        ) from error
    try:
        return rank, work(rank).tolist()
    finally:
        dist.destroy_process_group()


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# Lightning and TensorBoard.


def monitor() -> str:
    """Train with Lightning and CurvatureMonitor in a temporary folder, and read the eigenvalue from the event files."""
    try:
        from newtonopt import callbacks
    except ImportError as error:
        raise Unavailable(str(error).split(":")[0], "pip install 'lightning>=2.4' 'tensorboard>=2.16.2'") from error
    try:
        lightning: Any = importlib.import_module("lightning.pytorch")
    except ImportError:
        lightning = importlib.import_module("pytorch_lightning")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, x, y, _ = regression(torch.float32)

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, number: int) -> Tensor:
            return F.mse_loss(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    with tempfile.TemporaryDirectory() as folder:
        environment = importlib.import_module(f"{lightning.__name__}.plugins.environments").LightningEnvironment()
        trainer = lightning.Trainer(
            max_steps=4,
            log_every_n_steps=1,
            accelerator="cpu",
            devices=1,
            callbacks=[callbacks.CurvatureMonitor(every_n_train_steps=2)],
            logger=lightning.loggers.TensorBoardLogger(folder, name="", version=""),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            # On a cluster Lightning would look for other processes.
            plugins=[environment],
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x)))
        trainer.loggers[0].finalize("success")
        events = EventAccumulator(folder).Reload()
        tag = "curvature/lambda_max"
        if tag not in events.Tags()["scalars"]:
            raise Wrong(f"the event files hold no {tag}")
        value = events.Scalars(tag)[-1].value
    # The Hessian of a mean square error is 2 X'X / m, everywhere.
    whole = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    truth = float(torch.linalg.eigvalsh(2 * whole.T @ whole / len(x))[-1])
    if not abs(value - truth) < 0.05 * truth:
        raise Wrong(f"lambda_max is logged as {value:.4g}, but is {truth:.4g}")
    return f"lambda_max {value:.4f} in the event files, dense {truth:.4f}"


def tab() -> str:
    """Load the tab by its entry point, as TensorBoard does, and have it look at a run in a temporary folder."""
    try:
        from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
        from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
        from tensorboard.plugins.base_plugin import TBContext
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise Unavailable("tensorboard is not installed", "pip install 'tensorboard>=2.16.2'") from error
    found = importlib.metadata.entry_points(group="tensorboard_plugins", name="newtonopt_curvature")
    if not found:
        raise Wrong("TensorBoard is not told of the tab", "Install newtonopt again: its entry point is missing.")
    loader = next(iter(found)).load()()
    with tempfile.TemporaryDirectory() as folder:
        with closing(SummaryWriter(folder)) as writer:
            writer.add_scalar("newton/damping", 1.0, 1)
        files = EventMultiplexer()
        files.AddRunsFromDirectory(folder)
        files.Reload()
        plugin = loader.load(TBContext(data_provider=MultiplexerDataProvider(files, folder)))
        if not plugin.is_active():
            raise Wrong("the tab does not see a run with steps of newtonopt")
    return "the Curvature tab is installed and finds a run"
