"""Results on a device equal those on the CPU, and only scalars cross to the host, once an iteration."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES, SLOW_ON_CPU, read_sizes, waits
from optimizer_db import OPTIMIZERS
from problems import Case, build
from torch import Tensor, nn

from newtonopt import HessianFree, LevenbergMarquardt, evaluate, gauss_newton, hessian
from newtonopt.closure.evaluation import Products
from newtonopt.curvature import (
    Density,
    GaussNewtonSpectrum,
    Layers,
    LossSlice,
    Trace,
    gauss_newton_spectrum,
    measure,
    neural_tangent_kernel,
)
from newtonopt.operators.rows import residual_rows
from newtonopt.solvers.cg import conjugate_gradients


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operator", [hessian, gauss_newton], ids=lambda f: f.__name__)
def test_an_iteration_of_conjugate_gradients_waits_once(operator: Any, device: str) -> None:
    case = build("mlp", "mse", device=device)
    evaluation = evaluate(case.closure, case.params)
    A = operator(evaluation).shift(1.0)
    A @ evaluation.gradient
    counts = {}
    for iterations in (3, 8):
        with waits(device) as found:
            solution = conjugate_gradients(
                A, evaluation.gradient, max_iterations=iterations, progress_tolerance=1e-9, keep_path=True
            )
        assert solution.iterations == iterations
        counts[iterations] = found.total()
    assert counts[3] > 0
    assert counts[8] - counts[3] <= 5


@pytest.mark.parametrize("device", DEVICES)
def test_only_scalars_come_back(device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10)).to(device)
    x, y = torch.randn(128, 64, device=device), torch.randint(0, 10, (128,), device=device)
    optimizer = HessianFree(model.parameters(), preconditioner=None, max_iterations=20)
    assert_only_scalars_come_back(device, optimizer, lambda: F.cross_entropy(model(x), y))


def assert_only_scalars_come_back(device: str, optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> None:
    """Look at what a second step reads from the device."""

    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    optimizer.step(closure)
    with read_sizes(device) as sizes:
        optimizer.step(closure)
    assert sizes
    assert max(sizes) <= 16


def moved(case: Case, device: str) -> Case:
    """Return the case on a device; its loss compares with targets on the CPU."""
    x = case.inputs.to(device)
    return Case(copy.deepcopy(case.model).to(device), x, lambda z: case.loss(z.cpu()).to(device))


@pytest.mark.parametrize("device", SLOW_ON_CPU)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_as_on_the_cpu(name: str, device: str) -> None:
    case = build("mlp", "cross_entropy")
    there = moved(case, device)
    here, other = OPTIMIZERS[name](case.params), OPTIMIZERS[name](there.params)
    for _ in range(2):
        here.step(case.closure)
        other.step(there.closure)
        assert other.last_step.accepted == here.last_step.accepted
    other.load_state_dict(copy.deepcopy(other.state_dict()))
    here.step(case.closure)
    other.step(there.closure)
    assert all(p.device.type == device for p in there.params)
    torch.testing.assert_close(there.flat().cpu(), case.flat(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("device", SLOW_ON_CPU)
@pytest.mark.parametrize("model", ["conv", "batch_norm", "words"])
def test_measurements_are_those_on_the_cpu(model: str, device: str) -> None:
    case = build(model, "cross_entropy")
    there = moved(case, device)
    further = [Trace(), Density(), LossSlice(), Layers(), GaussNewtonSpectrum()]
    settings: dict[str, Any] = {"measurements": further, "max_products": 60}
    one, other = (measure(c.closure, list(c.model.named_parameters()), **settings) for c in (case, there))
    assert one.keys() == other.keys()
    for tag in one.keys() - {f"curvature-bookkeeping/{name}" for name in ("seconds", "products", "converged")}:
        assert other[tag] == pytest.approx(one[tag], rel=1e-3, abs=1e-6), tag


@pytest.mark.parametrize("device", SLOW_ON_CPU)
@pytest.mark.parametrize("products", ["cached", "streamed", "finite_difference"])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_networks_have_the_products_of_the_cpu(kind: Any, products: Products, device: str) -> None:
    torch.manual_seed(0)
    network, x, y, v = kind(3, 4, batch_first=True).double(), torch.randn(5, 6, 3), torch.randn(5, 6, 4), None
    found = []
    for where in ("cpu", device):
        model, inputs, targets = copy.deepcopy(network).to(where), x.double().to(where), y.double().to(where)
        evaluation = evaluate(lambda m=model, i=inputs, t=targets: F.mse_loss(m(i)[0], t), model.parameters(), products)
        v = torch.randn_like(evaluation.gradient) if v is None else v.to(where)
        found.append([evaluation.gradient.cpu(), *((A(evaluation) @ v).cpu() for A in (hessian, gauss_newton))])
    tolerance = 1e-6 if products == "finite_difference" else 1e-9
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_attention_under_autocast_has_products(device: str) -> None:
    """In bfloat16 torch would choose the fused kernels, which have no second derivative."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True).to(device)
    x, y = torch.randn(4, 8, 16, device=device), torch.randn(4, 8, 16, device=device)
    flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()

    def loss(enabled: bool) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            z = attention(x, x, x, need_weights=False)[0]
        return F.mse_loss(z.float(), y)

    v = None
    images = []
    for enabled in (False, True):
        evaluation = evaluate(lambda enabled=enabled: loss(enabled), attention.parameters())
        v = torch.randn_like(evaluation.gradient) if v is None else v
        images.append(torch.cat([hessian(evaluation) @ v, gauss_newton(evaluation) @ v]))
    assert float((images[1] - images[0]).norm() / images[0].norm()) < 0.1
    assert flags == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("products", ["cached", "streamed"])
def test_random_numbers_of_the_device_are_drawn_again_and_put_back(products: Products, device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 2)).double().to(device)
    x, y = (torch.randn(16, n, dtype=torch.float64, device=device) for n in (4, 2))

    def state() -> Tensor:
        return torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()

    def loss() -> Tensor:
        return F.mse_loss(model(x) + 0.1 * torch.randn(16, 2, dtype=torch.float64, device=device), y)

    torch.manual_seed(1)
    expected = loss().detach()
    torch.manual_seed(1)
    before = state()
    evaluation = evaluate(loss, model.parameters(), products)
    A = hessian(evaluation)
    v = torch.randn(A.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu").to(
        device
    )
    torch.testing.assert_close(A @ v, A @ v)
    measure(loss, model.parameters(), products=products)
    assert torch.equal(state(), before)
    assert torch.equal(evaluation.loss, expected)


def images() -> nn.Module:
    """Return a network with the norms that have kernels of their own on a GPU, its statistics fixed."""
    torch.manual_seed(0)
    norms = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
    layers = [nn.Conv2d(2, 4, 2), norms[0], nn.Tanh(), nn.Conv2d(4, 4, 2), norms[1], nn.Flatten(), nn.Linear(16, 6)]
    model = nn.Sequential(*layers, nn.RMSNorm(6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2)).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    nn.init.uniform_(norms[0].running_mean)
    nn.init.uniform_(norms[0].running_var, 0.5, 2.0)
    return model


def rows_case(name: str) -> Case:
    if name != "images":
        return build(name, "cross_entropy")
    y = torch.linspace(-1, 1, 12, dtype=torch.float64).view(6, 2)
    x = torch.linspace(-1, 1, 6 * 2 * 16, dtype=torch.float64).sin().view(6, 2, 4, 4)
    return Case(images(), x, lambda z: F.mse_loss(z, y))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", ["images", "mlp", "conv", "words"])
def test_rows_are_those_on_the_cpu(model: str, device: str) -> None:
    case = rows_case(model)
    there = moved(case, device)
    R, other = (residual_rows(evaluate(c.closure, c.params)) for c in (case, there))
    assert other.residuals.device.type == device
    for product in ((lambda rows: rows.dense().T @ rows.residuals), (lambda rows: rows.parameter_gram())):
        torch.testing.assert_close(product(other).cpu(), product(R), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other.gram(), other.dense() @ other.dense().T, rtol=1e-9, atol=1e-9)
    one, two = (gauss_newton_spectrum(evaluate(c.closure, c.params), vectors=True) for c in (case, there))
    torch.testing.assert_close(two.values.cpu(), one.values, rtol=1e-8, atol=1e-8)
    kernels = [neural_tangent_kernel(evaluate(c.closure, c.params)).cpu() for c in (case, there)]
    torch.testing.assert_close(kernels[1], kernels[0], rtol=1e-9, atol=1e-9)


SETTINGS: dict[str, dict[str, Any]] = {
    "samples": {"solve": "samples"},
    "parameters": {"solve": "parameters", "weight_decay": 0.1},
    "some rows": {"rows": 4, "solve": "samples"},
    "momentum": {"momentum": 0.5},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_levenberg_marquardt_steps_as_on_the_cpu(settings: str, device: str) -> None:
    case = build("mlp", "mse")
    there = moved(case, device)
    here, other = (LevenbergMarquardt(c.params, **SETTINGS[settings]) for c in (case, there))
    for _ in range(3):
        here.step(case.closure)
        other.step(there.closure)
        assert other.last_step is not None and here.last_step is not None
        assert (other.last_step.accepted, other.last_step.rows) == (here.last_step.accepted, here.last_step.rows)
    other.load_state_dict(copy.deepcopy(other.state_dict()))
    here.step(case.closure)
    other.step(there.closure)
    torch.testing.assert_close(there.flat().cpu(), case.flat(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("device", DEVICES)
def test_levenberg_marquardt_brings_only_scalars_back(device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).double().to(device)
    x, y = (torch.randn(64, n, dtype=torch.float64, device=device) for n in (8, 1))
    optimizer = LevenbergMarquardt(model.parameters())
    assert_only_scalars_come_back(device, optimizer, lambda: F.mse_loss(model(x), y))


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_default_device_of_the_user_does_not_matter_to_rows(settings: str, elsewhere: ExitStack) -> None:
    with torch.device("cpu"):
        case = build("mlp", "mse")
        alone = copy.deepcopy(case)
    optimizer = LevenbergMarquardt(case.params, **SETTINGS[settings])
    for _ in range(3):
        optimizer.step(case.closure)
    spectrum = gauss_newton_spectrum(evaluate(case.closure, case.params), vectors=True)
    figures = spectrum.values, spectrum.vectors, neural_tangent_kernel(evaluate(case.closure, case.params))
    elsewhere.close()
    plain = LevenbergMarquardt(alone.params, **SETTINGS[settings])
    for _ in range(3):
        plain.step(alone.closure)
    assert torch.equal(case.flat(), alone.flat())
    assert all(t is not None and t.device.type == "cpu" and bool(t.isfinite().all()) for t in figures)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_default_device_of_the_user_does_not_matter(name: str, elsewhere: ExitStack) -> None:
    with torch.device("cpu"):
        case = build("mlp", "mse")
        alone = copy.deepcopy(case)
    optimizer = OPTIMIZERS[name](case.params)
    for _ in range(2):
        optimizer.step(case.closure)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step(case.closure)
    elsewhere.close()
    plain = OPTIMIZERS[name](alone.params)
    for _ in range(3):
        plain.step(alone.closure)
    assert torch.equal(case.flat(), alone.flat())


@pytest.mark.parametrize("products", ["cached", "streamed", "finite_difference"])
def test_a_default_device_of_the_user_does_not_matter_to_measurements(products: Products, elsewhere: ExitStack) -> None:
    with torch.device("cpu"):
        case = build("mlp", "mse")
    everything: dict[str, Any] = {"measurements": [Trace(), Density(), LossSlice(), Layers(), GaussNewtonSpectrum()]}

    def values() -> dict[str, float]:
        named = list(case.model.named_parameters())
        found = measure(case.closure, named, products=products, max_products=12, **everything)
        return {tag: value for tag, value in found.items() if tag != "curvature-bookkeeping/seconds"}

    there = values()
    elsewhere.close()
    assert there == values()


@pytest.fixture
def elsewhere() -> Iterator[ExitStack]:
    """Set a default device on which no number can be read, as `torch.set_default_device("cuda")` sets another one."""
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        yield stack
