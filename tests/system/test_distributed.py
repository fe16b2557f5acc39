"""Two processes with a part of the batch each equal one process with the whole: by hand and in Lightning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from lightning_problems import quiet_trainer
from optimizer_db import OPTIMIZERS
from problems import unseen
from processes import run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from newtonopt import HessianFree, Objective, curvature, evaluate, gauss_newton, hessian
from newtonopt.callbacks import Budget, CurvatureMonitor
from newtonopt.curvature import (
    Alignment,
    GaussNewtonSpectrum,
    RelativeSharpness,
    extreme_eigenvalues,
    gauss_newton_spectrum,
    sharpness,
)

ROWS = 12
CUTS = pytest.mark.parametrize("cut", [6, 4], ids=["halves", "unequal"])
WAYS = pytest.mark.parametrize("products", ["cached", "streamed", "finite_difference"])


class Problem:
    """A small classifier; each process takes its part of the data."""

    def __init__(self, part: slice = slice(None), **ddp: Any) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.x, self.y = torch.randn(ROWS, 4, dtype=torch.float64), torch.randint(0, 3, (ROWS,))
        self.y[1] = -100  # an ignored target
        self.x, self.y = self.x[part], self.y[part]
        several = dist.is_initialized()
        self.model = DistributedDataParallel(network, **ddp) if several else network

    def closure(self) -> Tensor:
        self.model.zero_grad()
        loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        return loss

    def flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])


def part_of(rank: int, cut: int) -> slice:
    return slice(0, cut) if rank == 0 else slice(cut, None)


def matrices(rank: int, problem: Problem, products: Any) -> tuple[Tensor, ...]:
    evaluation = evaluate(problem.closure, problem.model.parameters(), products=products)
    H, G = hessian(evaluation), gauss_newton(evaluation)
    return evaluation.loss, evaluation.gradient, H.dense(), G.dense()


def measure(rank: int, cut: int, products: Any, options: dict[str, Any]) -> tuple[Tensor, ...]:
    return matrices(rank, Problem(part_of(rank, cut), **options), products)


@CUTS
@WAYS
def test_loss_gradient_and_products_are_those_of_the_whole_batch(cut: int, products: Any) -> None:
    expected = matrices(0, Problem(), "cached")
    results = run(measure, cut, products, {})
    close = {"rtol": 1e-5, "atol": 1e-9} if products == "finite_difference" else {"rtol": 1e-10, "atol": 1e-12}
    for found, true in zip(results[0], expected, strict=True):
        torch.testing.assert_close(found, true, **close)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "the processes disagree"


@pytest.mark.parametrize(
    "options",
    [{"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_wrapper_change_nothing(options: dict[str, Any]) -> None:
    expected = matrices(0, Problem(), "cached")
    for found, true in zip(run(measure, 6, "cached", options)[0], expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)


def train(
    rank: int, cut: int | None, name: str, settings: dict[str, Any], **ddp: Any
) -> tuple[Tensor, list[dict[str, Any]]]:
    problem = Problem(slice(None) if cut is None else part_of(rank, cut), **ddp)
    optimizer = OPTIMIZERS[name](problem.model.parameters(), weight_decay=1e-3, **settings)
    reports = []
    for _ in range(4):
        optimizer.step(problem.closure)
        assert optimizer.last_step is not None
        reports.append(dataclasses.asdict(optimizer.last_step))
    return problem.flat(), reports


def train_with(rank: int, options: dict[str, Any]) -> Tensor:
    return train(rank, 6, "hessian_free", {}, **options)[0]


def train_in_phases(rank: int, cut: int) -> Tensor:
    problem = Problem(part_of(rank, cut))

    def closure() -> Tensor:
        problem.model.zero_grad()
        F.cross_entropy(problem.model(problem.x.flip(0)), problem.y).backward()
        return problem.closure()

    optimizer = OPTIMIZERS["hessian_free"](problem.model.parameters(), weight_decay=1e-3)
    for _ in range(4):
        optimizer.step(closure)
    return problem.flat()


def step_for_some(rank: int) -> str:
    problem = Problem(part_of(rank, 6))
    params = list(problem.model.parameters())

    def closure() -> Tensor:
        problem.model.zero_grad()
        loss = F.cross_entropy(problem.model(problem.x), problem.y)
        loss.backward(inputs=params[:1])
        return loss

    with pytest.raises(RuntimeError, match=r"for only some of the parameters.* Give each network its own optimizer"):
        evaluate(closure, params)
    return "refused"


def test_a_phase_whose_gradients_are_cleared_does_not_count() -> None:
    expected, _ = train(0, None, "hessian_free", {})
    first, second = run(train_in_phases, 4)
    torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-10)
    assert torch.equal(first, second)


def test_losses_that_count_for_some_of_the_parameters_are_an_error() -> None:
    assert run(step_for_some) == ["refused"] * 2


@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph", "gradient_as_bucket_view"])
def test_steps_with_options_of_the_wrapper_are_the_same(option: str) -> None:
    plain, other = run(train_with, {})[0], run(train_with, {option: True})[0]
    torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_whole_batch(name: str) -> None:
    parameters, reports = train(0, None, name, {})
    (first, first_reports), (second, second_reports) = run(train, 4, name, {})
    torch.testing.assert_close(first, parameters, rtol=1e-9, atol=1e-10)
    assert torch.equal(first, second), "the processes drift apart"
    assert str(first_reports) == str(second_reports)
    for found, true in zip(first_reports, reports, strict=True):
        assert found["accepted"] == true["accepted"]
        assert found["loss"] == pytest.approx(true["loss"], rel=1e-9)
        assert found["ratio"] == pytest.approx(true["ratio"], rel=1e-5)


@WAYS
@pytest.mark.parametrize("name", ["hessian_free_plain", "newton_cg", "trust_region", "cubic_newton"])
def test_steps_with_other_products_are_those_of_the_whole_batch(name: str, products: Any) -> None:
    settings = {"products": products, "max_iterations": 5}
    parameters, _ = train(0, None, name, settings)
    (first, _), (second, _) = run(train, 4, name, settings)
    torch.testing.assert_close(first, parameters, rtol=1e-4, atol=1e-6)
    assert torch.equal(first, second)


class Scored(nn.Module):
    """A model that returns its loss, a square written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return ((self.network(x) - y) ** 2).mean()


def steps_with_the_loss_inside(rank: int, cut: int | None, products: Any) -> Tensor:
    torch.manual_seed(0)
    module = Scored().double()
    x, y = torch.randn(ROWS, 4, dtype=torch.float64), torch.randn(ROWS, 3, dtype=torch.float64)
    part = slice(None) if cut is None else part_of(rank, cut)
    model = module if cut is None else DistributedDataParallel(module)
    optimizer = HessianFree(module.parameters(), products=products, max_iterations=5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x[part], y[part])
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


@WAYS
def test_a_loss_inside_the_wrapped_module_is_found_in_every_run(products: Any) -> None:
    first, second = run(steps_with_the_loss_inside, 6, products)
    torch.testing.assert_close(first, steps_with_the_loss_inside(0, None, products), rtol=1e-4, atol=1e-6)
    assert torch.equal(first, second)


def in_one_call(rank: int, cut: int | None) -> tuple[Tensor, str]:
    """Take three steps with the curvature of every other row."""
    problem = Problem(slice(None) if cut is None else part_of(rank, cut))
    optimizer = OPTIMIZERS["hessian_free"](problem.model.parameters(), steps_per_call=3)

    def part() -> Tensor:
        problem.model.zero_grad()
        loss = F.cross_entropy(problem.model(problem.x[::2]), problem.y[::2])
        loss.backward()
        return loss

    optimizer.step(problem.closure, curvature_closure=part)
    gradient = torch.cat([p.grad.reshape(-1) for p in problem.model.parameters()])
    return torch.cat([problem.flat(), gradient]), str(optimizer.last_step)


def test_steps_of_one_call_with_other_curvature_are_those_of_the_whole_batch() -> None:
    expected, _ = in_one_call(0, None)
    (first, report), (second, other) = run(in_one_call, 4)
    torch.testing.assert_close(first, expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(first, second) and report == other and "steps=3" in report


def fail_late(rank: int) -> bool:
    problem = Problem(part_of(rank, 6))
    optimizer = OPTIMIZERS["newton_cg"](problem.model.parameters(), steps_per_call=5)
    start = problem.flat()

    def closure() -> Tensor:
        if rank == 1 and optimizer.last_step is not None and optimizer.last_step.steps == 2:
            raise ValueError("the disk is full")
        return problem.closure()

    with pytest.raises((RuntimeError, ValueError), match=r"the disk is full|failed on another process"):
        optimizer.step(closure)
    return torch.equal(problem.flat(), start) and optimizer._state.steps == 0


def test_an_error_in_a_later_step_undoes_the_call_on_all_processes() -> None:
    assert run(fail_late) == [True, True]


def count_collectives(rank: int, products: Any) -> dict[str, list[int]]:
    problem = Problem(part_of(rank, 6))
    sizes: list[int] = []
    real = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    found = {}
    evaluation = evaluate(problem.closure, problem.model.parameters(), products=products)
    v = torch.ones_like(evaluation.gradient)
    dist.all_reduce = counted
    try:
        for operator in (hessian, gauss_newton):
            A = operator(evaluation)
            A @ v  # the first product is checked
            sizes.clear()
            A @ v
            found[operator.__name__] = list(sizes)
    finally:
        dist.all_reduce = real
    return found


@WAYS
def test_a_product_costs_one_all_reduce(products: Any) -> None:
    for found in run(count_collectives, products):
        for name, sizes in found.items():
            assert len(sizes) == 1, name


def measure_curvature(rank: int, cut: int | None) -> list[float]:
    problem = Problem(slice(None) if cut is None else part_of(rank, cut))
    params = list(problem.model.parameters())
    spectrum = extreme_eigenvalues(hessian(evaluate(problem.closure, params)), top=1, bottom=1)
    rise = sharpness(problem.closure, params).value
    whole = gauss_newton_spectrum(evaluate(problem.closure, params))
    found = curvature.measure(
        problem.closure, params, measurements=[GaussNewtonSpectrum()], sharpness=None, max_seconds=60.0
    )
    assert found.read("gauss_newton_trace") == whole.trace
    return [spectrum.top[0].value, spectrum.bottom[0].value, rise, whole.rank, *whole.values[:10].tolist()]


def test_measurements_are_those_of_the_whole_batch() -> None:
    expected = measure_curvature(0, None)
    first, second = run(measure_curvature, 4)
    assert first == pytest.approx(expected, rel=1e-6)
    assert first == second


def measure_terms(rank: int, cut: int | None) -> dict[str, float]:
    problem = Problem(slice(None) if cut is None else part_of(rank, cut))
    params = list(problem.model.parameters())

    def closure() -> Tensor:
        penalty = torch.stack([p.square().sum() for p in params]).sum()
        return F.cross_entropy(problem.model(problem.x), problem.y) + 0.1 * penalty

    other = RelativeSharpness(lambda: F.cross_entropy(problem.model(problem.x + 0.1), problem.y))
    found = curvature.measure(closure, params, measurements=[Alignment(), other], sharpness=None)
    tags = {tag for measurement in (Alignment, other) for tag in measurement.tags}
    names = [name for name in found.names() if any(tag.fits(name) for tag in tags)]
    return {name: found[f"curvature/{name}"] for name in names}


def test_terms_and_other_data_are_compared_over_the_whole_batch() -> None:
    expected = measure_terms(0, None)
    assert len(expected) == 10
    first, second = run(measure_terms, 4)
    assert first == pytest.approx(expected, rel=1e-4)
    assert first == second


def raise_in(rank: int, when: str) -> str:
    problem = Problem(part_of(rank, 6))
    calls: Callable[[], list[int]] = unseen([])

    def closure() -> Tensor:
        calls().append(1)
        if rank == 0 and len(calls()) > {"evaluate": 0, "product": 1, "trial": 1}[when]:
            raise OverflowError("here")
        return problem.closure()

    before = problem.flat()
    try:
        if when == "trial":
            HessianFree(problem.model.parameters()).step(closure)
        else:
            evaluation = evaluate(closure, problem.model.parameters(), products="streamed")
            hessian(evaluation) @ torch.ones_like(evaluation.gradient)
    except (OverflowError, RuntimeError) as error:
        assert torch.equal(problem.flat(), before)
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize("when", ["evaluate", "product", "trial"])
def test_an_error_on_one_process_reaches_the_other_at_once(when: str) -> None:
    assert run(raise_in, when) == [
        "OverflowError: here",
        "RuntimeError: The closure failed on another process; see the error message there.",
    ]


def raise_before_backward(rank: int) -> str:
    problem = Problem(part_of(rank, 6), process_group=dist.new_group(timeout=timedelta(seconds=2)))

    def closure() -> Tensor:
        if rank == 0:
            raise OverflowError("here")
        return problem.closure()

    try:
        HessianFree(problem.model.parameters()).step(closure)
    except (OverflowError, RuntimeError) as error:
        return type(error).__name__
    return "nothing"


def test_an_error_before_backward_reaches_the_other_within_the_time_out() -> None:
    assert run(raise_before_backward) == ["OverflowError", "RuntimeError"]


def hold_different_parameters(rank: int) -> str:
    theta = nn.Parameter(torch.full((3,), float(rank + 1)))
    try:
        HessianFree([theta]).step(lambda: F.mse_loss(theta, torch.zeros(3)))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_processes_with_different_parameters_are_an_error() -> None:
    for message in run(hold_different_parameters):
        assert "The 2 processes hold different parameters" in message
        assert "Wrap the model in DistributedDataParallel" in message


def clamp_in_the_closure(rank: int) -> str:
    theta = nn.Parameter(torch.full((2,), 3.0))

    def closure() -> Tensor:
        theta.data.clamp_(-1, 1)
        return F.mse_loss(theta, torch.zeros(2))

    try:
        HessianFree([theta]).step(closure)
    except RuntimeError as error:
        return f"{error} {theta.tolist()}"
    return "no error"


@pytest.mark.slow
def test_a_closure_that_clamps_weights_is_an_error() -> None:
    for message in run(clamp_in_the_closure):
        assert "With several processes it must not" in message and message.endswith("[3.0, 3.0]")


def penalise_by_hand(rank: int, weight: bool) -> Tensor:
    """Return a loss that does not show what it is a mean over."""
    theta, x = nn.Parameter(torch.ones(2, dtype=torch.float64)), torch.arange(6.0, dtype=torch.float64)
    mine = x[part_of(rank, 2)]
    evaluation = evaluate(
        lambda: (theta.sum() * mine).square().mean(), [theta], weight=float(len(mine)) if weight else None
    )
    return evaluation.loss


def test_weights_are_the_users_where_the_loss_tells_none() -> None:
    x = torch.arange(6.0, dtype=torch.float64)
    whole = (2 * x).square().mean()
    plain = ((2 * x[:2]).square().mean() + (2 * x[2:]).square().mean()) / 2
    torch.testing.assert_close(run(penalise_by_hand, True)[0], whole)
    torch.testing.assert_close(run(penalise_by_hand, False)[0], plain)


def move_apart(rank: int) -> Tensor:
    theta = nn.Parameter(torch.ones(3, dtype=torch.float64))
    objective = Objective(lambda: theta.sum(), [theta])
    # As if machines had rounded differently.
    objective.move(torch.full((3,), 1.0 + 1e-9 * rank, dtype=torch.float64))
    return theta.detach()


def test_a_move_is_the_first_processes() -> None:
    first, second = run(move_apart)
    assert torch.equal(first, second)


def tracked(rank: int, count: int) -> tuple[bool, dict[str, float | None]]:
    rows = ROWS // count
    problem = Problem(slice(rank * rows, (rank + 1) * rows))
    params = list(problem.model.parameters())
    first = curvature.measure(problem.closure, params, sharpness=None)
    with torch.no_grad():
        for p in params:
            p.mul_(0.99)
    found = curvature.measure(problem.closure, params, sharpness=None, last=first)
    names = ("lambda_max", "lambda_2", "lambda_min", "gradient_curvature", "certified")
    return first.differenced and found.differenced, {name: found.read(name) for name in names}


def test_tracking_by_differences_is_the_whole_batchs() -> None:
    alone = tracked(0, 1)
    assert alone[0] and alone[1]["certified"] == 0.0
    for found in run(tracked, 2):
        assert found[0] and found[1] == pytest.approx(alone[1], rel=1e-5)


class Regression(L.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        self.name = name
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.layers(batch[0]), batch[1])
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        if self.name == "SGD":
            return torch.optim.SGD(self.parameters(), lr=0.1)
        if self.name == "Adam":
            return torch.optim.Adam(self.parameters(), lr=0.01)
        return HessianFree(self.parameters(), rank=5)


def fit(rank: int, count: int, name: str, folder: str) -> tuple[Tensor, dict[str, float]]:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(*(torch.randn(16, k, generator=generator, dtype=torch.float64) for k in (4, 1)))
    model = Regression(name)
    monitor = CurvatureMonitor(every_n_train_steps=1, top=2, budget=Budget(certify_every=1))
    settings: dict[str, Any] = {"callbacks": [monitor], "max_epochs": 3, "default_root_dir": folder, "logger": False}
    if count > 1:
        settings |= {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": count, "accelerator": "cpu"}
    trainer = quiet_trainer(**settings)
    trainer.fit(model, DataLoader(data, batch_size=16 // count))
    curvature = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.endswith("seconds")}
    return torch.cat([p.detach().reshape(-1) for p in model.layers.parameters()]), curvature


def fit_as_launched(rank: int, count: int, name: str, folder: str) -> tuple[Tensor, dict[str, float]]:
    with pytest.MonkeyPatch.context() as patch:
        # Set the variables as torchrun does.
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
        for key, value in {
            **launched,
            "TORCHELASTIC_RUN_ID": "test",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": 0,
        }.items():
            patch.setenv(key, str(value))
        return fit(rank, count, name, folder)


@pytest.mark.parametrize("name", ["SGD", "Adam", "HessianFree"])
def test_lightning_trains_and_measures_as_one_process_with_the_whole_batch(name: str, tmp_path: Any) -> None:
    parameters, curvature = fit(0, 1, name, str(tmp_path / "one"))
    (first, measured), (second, _) = run(fit_as_launched, 2, name, str(tmp_path / "two"))
    torch.testing.assert_close(first, parameters, rtol=1e-7, atol=1e-9)
    assert torch.equal(first, second)
    assert measured == pytest.approx(curvature, rel=1e-4)
    assert ("curvature/preconditioned_lambda_max" in measured) == (name == "Adam")
