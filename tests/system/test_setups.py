"""The optimizers and measurements work in common training set-ups unmodified, or an error says what to change."""

from __future__ import annotations

import copy
import random
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from problems import unseen
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, RandomSampler
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional import log_cosh_error, mean_squared_error

from newtonopt import DampedNewton, HessianFree, NewtonCG, evaluate, gauss_newton, hessian, mark_outputs

PRODUCTS = ("cached", "streamed", "finite_difference")
TOLERANCE = {"cached": 1e-8, "streamed": 1e-8, "finite_difference": 1e-5}
NEWTON = pytest.mark.parametrize("optimizer", [HessianFree, DampedNewton])


@dataclass(frozen=True)
class Setup:
    """A model, the closure that trains it, and its loss in the plainest form."""

    model: nn.Module
    closure: Callable[[], Any]
    plain: Callable[[], Tensor]
    curvature: str = "gauss_newton"

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def dense_hessian(self) -> Tensor:
        """Return the Hessian by torch's double backward of the plain loss, with the random numbers after seed 0."""
        whole = Whole(self.model, self.plain)
        named = dict(whole.named_parameters())
        sizes = [p.numel() for p in named.values()]

        def loss_at(flat: Tensor) -> Tensor:
            pieces = zip(named.items(), flat.split(sizes), strict=True)
            buffers = {name: b.clone() for name, b in whole.named_buffers()}
            torch.manual_seed(0)
            values = {name: piece.view(p.shape) for (name, p), piece in pieces}
            with sdpa_kernel(SDPBackend.MATH):
                return functional_call(whole, {**values, **buffers})

        point = torch.cat([p.detach().reshape(-1) for p in named.values()])
        return torch.autograd.functional.hessian(loss_at, point)


class Whole(nn.Module):
    """The loss as a module, so that `functional_call` can give it other parameters."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self) -> Tensor:
        return self.loss()


def usual(
    model: nn.Module,
    loss: Callable[[], Tensor],
    plain: Callable[[], Tensor] | None = None,
    curvature: str = "gauss_newton",
) -> Setup:
    def closure() -> Tensor:
        model.zero_grad()
        value = loss()
        value.backward()
        return value

    return Setup(model, closure, plain or loss, curvature)


class Attention(nn.Module):
    """Attention with two heads, in the shape that torch's fused kernels take."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.mix(x).unflatten(-1, (2, 6)).transpose(1, 2).chunk(3, -1)
        return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    """A recurrent network of two layers that returns its last state."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.body = kind(4, 3, num_layers=2, dropout=0.2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)[0][:, -1]


class Cube(torch.autograd.Function):
    """A custom function whose backward can itself be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class OnceDifferentiableCube(Cube):
    """A custom function whose backward cannot be differentiated."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class Heads(nn.Module):
    """One body, a classifier and a regressor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.scores = nn.Linear(5, 3)
        self.value = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.scores(features), self.value(features)


def mlp(inputs: int = 4, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs))


def regression(model: nn.Module, *shape: int) -> Setup:
    x = torch.randn(*shape)
    y = torch.randn_like(model(x))
    return usual(model, lambda: F.mse_loss(model(x), y))


def attention_function() -> Setup:
    return regression(Attention(), 3, 5, 4)


def multihead_attention() -> Setup:
    return regression(SelfAttention(4, 2, dropout=0.2, batch_first=True), 3, 5, 4)


def transformer_encoder() -> Setup:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, activation="gelu", batch_first=True)
    return regression(nn.TransformerEncoder(layer, num_layers=2).train(), 3, 5, 4)


def lstm() -> Setup:
    return regression(Recurrent(nn.LSTM), 3, 5, 4)


def gru() -> Setup:
    return regression(Recurrent(nn.GRU), 3, 5, 4)


def checkpointed() -> Setup:
    model, x, y = nn.Sequential(mlp(), nn.Dropout(0.2), mlp(3, 2)), torch.randn(6, 4), torch.randn(6, 2)

    def through_checkpoint() -> Tensor:
        return F.mse_loss(model[2](checkpoint(model[:2], x, use_reentrant=False)), y)

    return usual(model, through_checkpoint, plain=lambda: F.mse_loss(model(x), y))


def checkpointed_attention() -> Setup:
    model, x, y = nn.Sequential(nn.Linear(4, 4), Attention()), torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    return usual(
        model,
        lambda: F.mse_loss(checkpoint(model, x, use_reentrant=False), y),
        plain=lambda: F.mse_loss(model(x), y),
    )


def checkpointed_loss() -> Setup:
    model, x, y = mlp(), torch.randn(6, 4), torch.randint(0, 3, (6,))
    return usual(
        model,
        lambda: checkpoint(lambda z: F.cross_entropy(model[2](z), y), model[:2](x), use_reentrant=False),
        plain=lambda: F.cross_entropy(model(x), y),
    )


def custom_function() -> Setup:
    model, x, y = mlp(), torch.randn(6, 4), torch.randn(6, 3)
    return usual(model, lambda: F.mse_loss(Cube.apply(model(x)), y), plain=lambda: F.mse_loss(model(x) ** 3, y))


def weight_normed(through: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__) -> Setup:
    model = nn.Sequential(weight_norm(nn.Linear(4, 5)), nn.Tanh(), weight_norm(nn.Linear(5, 3)))
    x, y = torch.randn(6, 4), torch.randn(6, 3)

    def by_hand(layer: Any, x: Tensor) -> Tensor:
        length, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
        return F.linear(x, length * direction / direction.norm(dim=1, keepdim=True), layer.bias)

    # The double backward of torch._weight_norm takes the norms for constants, so it is no truth to compare with.
    return usual(
        model,
        lambda: F.mse_loss(through(model, x), y),
        plain=lambda: F.mse_loss(by_hand(model[2], by_hand(model[0], x).tanh()), y),
    )


def checkpointed_weight_norm() -> Setup:
    return weight_normed(lambda model, x: checkpoint(model, x, use_reentrant=False))


def spectral_normed() -> Setup:
    return regression(nn.Sequential(spectral_norm(nn.Linear(4, 5)), nn.Tanh(), spectral_norm(nn.Linear(5, 3))), 6, 4)


def metric_as_loss() -> Setup:
    model, x, y = mlp(), torch.randn(6, 4), torch.randn(6, 3)
    return usual(model, lambda: mean_squared_error(model(x), y), plain=lambda: F.mse_loss(model(x), y))


def segmentation() -> Setup:
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 1))
    x, y = torch.randn(2, 1, 5, 5), torch.randint(0, 3, (2, 5, 5))
    y[:, 0] = 255
    known = (y != 255)[:, None]
    truth = F.one_hot(y.clamp(max=2), 3).movedim(-1, 1) * known

    def loss() -> Tensor:
        logits = mark_outputs(model(x))
        share = logits.softmax(1) * known
        overlap = (share * truth).sum((0, 2, 3))
        dice = 1 - (2 * overlap / (share + truth).sum((0, 2, 3))).mean()
        return F.cross_entropy(logits, y, ignore_index=255) + dice

    return usual(model, loss)


def sum_of_losses() -> Setup:
    model, x, labels, values = Heads(), torch.randn(6, 4), torch.randint(0, 3, (6,)), torch.randn(6, 1)

    def loss() -> Tensor:
        scores, value = model(x)
        return F.cross_entropy(scores, labels) + 0.3 * F.mse_loss(value, values)

    return usual(model, loss)


def explicit_penalty() -> Setup:
    model, x, y = mlp(), torch.randn(6, 4), torch.randn(6, 3)

    def loss() -> Tensor:
        return F.mse_loss(model(x), y) + 0.1 * sum(p.square().sum() for p in model.parameters())

    return usual(model, loss, curvature="hessian")


def physics_informed() -> Setup:
    model, points = mlp(1, 1), torch.linspace(0, 1, 7)[:, None]

    def loss() -> Tensor:
        x = points.clone().requires_grad_()
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return F.mse_loss(bend + u, x.detach()) + F.mse_loss(model(points[:1]), points[:1])

    return usual(model, loss)


def physics_informed_by_transforms() -> Setup:
    model, points = mlp(1, 1), torch.linspace(0, 1, 7)

    def u(x: Tensor) -> Tensor:
        return model(x[None])[0]

    def loss() -> Tensor:
        return F.mse_loss(vmap(grad(grad(u)))(points) + vmap(u)(points), points)

    return usual(model, loss)


def several_backward_calls() -> Setup:
    model, x, y = mlp(), torch.randn(6, 4), torch.randn(6, 3)

    def closure() -> Tensor:
        model.zero_grad()
        parts = [F.mse_loss(model(a), b) / 2 for a, b in zip(x.chunk(2), y.chunk(2), strict=True)]
        for part in parts:
            part.backward()
        return torch.stack(parts).sum().detach()

    return Setup(model, closure, lambda: F.mse_loss(model(x), y))


def backward_of_a_vector_with_weights() -> Setup:
    model, x, y = mlp(), torch.randn(6, 4), torch.randint(0, 3, (6,))
    weights = torch.rand(6)

    def closure() -> Tensor:
        model.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")
        losses.backward(gradient=weights)
        return losses.detach() @ weights

    return Setup(model, closure, lambda: F.cross_entropy(model(x), y, reduction="none") @ weights)


SETUPS: dict[str, Callable[[], Setup]] = {
    builder.__name__: builder
    for builder in (
        attention_function,
        multihead_attention,
        transformer_encoder,
        lstm,
        gru,
        checkpointed,
        checkpointed_attention,
        checkpointed_loss,
        custom_function,
        weight_normed,
        checkpointed_weight_norm,
        spectral_normed,
        metric_as_loss,
        segmentation,
        sum_of_losses,
        explicit_penalty,
        physics_informed,
        physics_informed_by_transforms,
        several_backward_calls,
        backward_of_a_vector_with_weights,
    )
}


def build(make: Callable[[], Any]) -> Any:
    """Build a set-up in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return make()
    finally:
        torch.set_default_dtype(before)


@pytest.fixture
def setup(request: pytest.FixtureRequest) -> Setup:
    return build(SETUPS[request.param])


# Power iterations have no graph: finite differences see how the vectors change, derivatives take them as constants.
ITERATED = {("finite_difference", "spectral_normed")}


def every(failing: set[tuple[str, str]]) -> Any:
    """Return all ways to form products, with all set-ups."""
    cases = [
        pytest.param(products, name, marks=pytest.mark.xfail if (products, name) in failing else ())
        for products in PRODUCTS
        for name in SETUPS
    ]
    return pytest.mark.parametrize(("products", "setup"), cases, indirect=["setup"])


def assert_close(a: Tensor, b: Tensor, products: str = "cached") -> None:
    assert float((a - b).norm()) <= TOLERANCE[products] * float(b.norm())


def traces(*holders: Any) -> list[Tensor]:
    """Return parameters, gradients and buffers of modules, tensors of dicts, and torch's random state."""
    modules = [holder for holder in holders if isinstance(holder, nn.Module)]
    dicts = [holder for holder in holders if isinstance(holder, dict)]
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())] + [t for d in dicts for t in d.values()]
    gradients = [t.grad for t in tensors if t.grad is not None]
    return [torch.get_rng_state(), *(t.detach().clone() for t in tensors + gradients)]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@every(ITERATED)
def test_hessian_products_equal_the_dense_truth(setup: Setup, products: str) -> None:
    truth = setup.dense_hessian()
    vectors = torch.randn(len(truth), 3, dtype=truth.dtype)
    torch.manual_seed(0)
    evaluation = evaluate(setup.closure, setup.params, products=products)
    assert_close(hessian(evaluation) @ vectors, truth @ vectors, products)


@pytest.mark.filterwarnings(
    "ignore:Finite differences do not respect"
)  # differences see a spectral norm's vectors move
@pytest.mark.slow
@every(set())
def test_steps_decrease_the_loss(setup: Setup, products: str) -> None:
    optimizer = HessianFree(setup.params, curvature=setup.curvature, products=products, rank=10)
    losses = []
    for _ in range(3):
        torch.manual_seed(0)  # the same Dropout masks in each step
        losses.append(float(optimizer.step(setup.closure)))
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.filterwarnings(
    "ignore:Finite differences do not respect"
)  # differences see a spectral norm's vectors move
@every(set())
def test_a_measurement_leaves_no_trace(setup: Setup, products: str) -> None:
    setup.closure()
    before = traces(setup.model)
    evaluation = evaluate(setup.closure, setup.params, products=products)
    hessian(evaluation) @ evaluation.gradient
    assert_same(traces(setup.model), before)


@pytest.mark.slow
@pytest.mark.parametrize("products", PRODUCTS)
def test_checkpoints_of_compiled_models_have_products(products: str) -> None:
    model, x, y = mlp().double(), torch.randn(6, 4).double(), torch.randn(6, 3).double()
    compiled, plain = Compiled(model), usual(model, lambda: F.mse_loss(model(x), y))
    through = usual(model, lambda: F.mse_loss(checkpoint(compiled.model, x, use_reentrant=False), y))
    through.closure()
    truth = plain.dense_hessian()
    v = torch.randn_like(truth[0])
    assert_close(hessian(evaluate(through.closure, through.params, products=products)) @ v, truth @ v, products)


class Compiled:
    """A compiled model that counts compilations and runs of its graphs."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        torch._dynamo.reset()  # torch limits how often the same code may be compiled
        self.graphs = self.runs = 0
        self.model = torch.compile(model, backend=self._backend, **settings)

    def _backend(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        from torch._dynamo.backends.registry import lookup_backend

        self.graphs += 1
        code = lookup_backend("aot_eager")(graph, inputs)

        def run(*args: Any) -> Any:
            self.runs += 1
            return code(*args)

        return run


@pytest.mark.slow
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("compiled_first", [True, False])
@pytest.mark.parametrize("settings", [{}, {"fullgraph": True}, {"dynamic": True}], ids=["default", "whole", "dynamic"])
def test_compiled_models_step_as_others_and_stay_compiled(
    settings: dict[str, bool], compiled_first: bool, products: str
) -> None:
    eager, x, y = mlp().double(), torch.randn(6, 4).double(), torch.randint(0, 3, (6,))
    compiled = Compiled(copy.deepcopy(eager), **settings)
    plain = usual(eager, lambda: F.cross_entropy(eager(x), y))
    through = usual(compiled.model, lambda: F.cross_entropy(compiled.model(x), y))
    if compiled_first:
        for one in (plain, through):
            for _ in range(2):
                one.closure()
                torch.optim.SGD(one.params, lr=0.1).step()
    graphs, runs = compiled.graphs, compiled.runs
    assert (graphs, runs) == ((1, 2) if compiled_first else (0, 0))
    truth = plain.dense_hessian()
    v = torch.randn_like(truth[0])
    assert_close(hessian(evaluate(through.closure, through.params, products=products)) @ v, truth @ v, products)
    for one in (plain, through):
        optimizer = HessianFree(one.params, products=products, rank=10)
        for _ in range(3):
            optimizer.step(one.closure)
    for p, q in zip(plain.params, through.params, strict=True):
        torch.testing.assert_close(p, q)
    assert (compiled.graphs, compiled.runs) == (graphs, runs)
    through.closure()
    assert (compiled.graphs, compiled.runs) == (1, runs + 1)


@pytest.mark.slow
def test_a_compiled_loss_function_may_mark_its_outputs() -> None:
    model, x, y = mlp().double(), torch.randn(6, 4).double(), torch.randn(6, 3).double()

    def loss() -> Tensor:
        return (mark_outputs(model(x)) - y).square().mean()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    compiled().backward()
    assert_close(
        gauss_newton(evaluate(compiled, model.parameters())).dense(),
        gauss_newton(evaluate(lambda: F.mse_loss(model(x), y), model.parameters())).dense(),
    )


def test_reentrant_checkpoints_are_refused_by_a_step() -> None:
    model, x, y = mlp(), torch.randn(6, 4).requires_grad_(), torch.randn(6, 3)
    setup = usual(model, lambda: F.mse_loss(checkpoint(model, x, use_reentrant=True), y))
    with pytest.raises(RuntimeError, match=r"Call checkpoint\(\.\.\., use_reentrant=False\)"):
        HessianFree(setup.params).step(setup.closure)


@pytest.mark.parametrize("operator", [hessian, gauss_newton])
def test_a_function_without_second_derivative_has_products_by_finite_differences(operator: Any) -> None:
    model, x, y = mlp().double(), torch.randn(6, 4).double(), torch.randn(6, 3).double()
    exact = usual(model, lambda: F.mse_loss(Cube.apply(model(x)), y))
    once = usual(model, lambda: F.mse_loss(OnceDifferentiableCube.apply(model(x)), y))
    truth = operator(evaluate(exact.closure, exact.params))
    v = torch.randn(truth.shape[0]).double()
    with pytest.warns(UserWarning, match="finite differences") as caught:
        A = operator(evaluate(once.closure, once.params, products="auto"))
        assert_close(A @ v, truth @ v, "finite_difference")
    assert len(caught) == 1


def test_a_metric_as_loss_says_how_to_name_the_output() -> None:
    model, x, y = mlp(), torch.randn(6, 4), torch.randn(6, 3)
    setup = usual(model, lambda: log_cosh_error(model(x), y).mean())
    with pytest.raises(RuntimeError, match=r'mark_outputs\(z\).*curvature="hessian"'):
        HessianFree(setup.params).step(setup.closure)


def test_a_dice_term_next_to_a_recognised_loss_asks_for_marks() -> None:
    model, x, y = mlp(), torch.randn(6, 4), torch.randint(0, 3, (6,))

    def loss() -> Tensor:
        z = model(x)
        return F.cross_entropy(z, y) + 1 - (z.softmax(1) * F.one_hot(y, 3)).mean()

    setup = usual(model, loss)
    with pytest.warns(UserWarning, match=r"leaves that part out.*newtonopt\.mark_outputs"):
        gauss_newton(evaluate(setup.closure, setup.params))


@pytest.mark.parametrize("given", ["two dicts", "one dict"])
@pytest.mark.parametrize("closure_holds", ["the model", "its owner"])
def test_buffers_given_to_functional_call_move_once_a_step(given: str, closure_holds: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    owner, x, y = types.SimpleNamespace(model=model), torch.randn(6, 4).double(), torch.randn(6, 3).double()
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    everything: Any = (params, buffers) if given == "two dicts" else {**params, **buffers}
    held = buffers if given == "two dicts" else everything
    own = {name: b.data_ptr() for name, b in model.named_buffers()}

    def loss() -> Tensor:
        for p in params.values():
            p.grad = None
        value = F.mse_loss(functional_call(owner.model, everything, (x,)), y)
        value.backward()
        return value

    def loss_of_cell() -> Tensor:
        assert model is owner.model
        return loss()

    closure = loss_of_cell if closure_holds == "the model" else loss
    before, identities = traces(held, model), {name: id(b) for name, b in held.items()}
    evaluation = evaluate(closure, params.values())
    plain = evaluate(lambda: F.mse_loss(model(x), y), model.parameters())
    assert_close(hessian(evaluation).dense(), hessian(plain).dense())
    assert_same(traces(held, model), before)
    HessianFree(list(params.values())).step(closure)
    assert held["1.num_batches_tracked"] == 1
    assert model[1].num_batches_tracked == 0
    assert {name: id(b) for name, b in held.items()} == identities
    assert {name: b.data_ptr() for name, b in model.named_buffers()} == own


class Counter(nn.Module):
    """A module that counts its calls in a buffer, in place or by assignment, and uses the count."""

    def __init__(self, assigns: bool) -> None:
        super().__init__()
        self.assigns = assigns
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.assigns:
            self.count = self.count + 1
        else:
            self.count += 1
        return x * self.count.clone()


@pytest.mark.parametrize("assigns", [False, True])
@pytest.mark.parametrize("lend", [False, True])
@pytest.mark.parametrize("found", [False, True])
def test_buffers_that_a_module_has_while_it_runs(found: bool, lend: bool, assigns: bool) -> None:
    counter = Counter(assigns)
    hidden, scales = unseen(counter), unseen([])
    own, p = counter.count, torch.ones(2, requires_grad=True)
    lent = {"count": torch.zeros(())}
    held = counter if found else None

    def closure() -> Tensor:
        p.grad = None
        assert held in (hidden(), None)
        scaled = [functional_call(hidden(), lent, (p,)) if lend else hidden()(p) for _ in range(2)]
        scales().append([float((z / p)[0].detach()) for z in scaled])
        loss = scaled[0].square().sum() + scaled[1].square().sum()
        loss.backward()
        return loss

    given = lent["count"] if lend else own
    torch.testing.assert_close(hessian(evaluate(closure, [p])).dense(), 10 * torch.eye(2))
    assert (lent["count"] if lend else counter.count) is given
    assert float(given) == 0.0
    HessianFree([p], curvature="hessian").step(closure)
    assert len(scales()) > 2
    assert all(scale == pytest.approx([1.0, 2.0]) for scale in scales())
    assert float(lent["count"] if lend else counter.count) == 2.0
    assert counter.count is own or not lend


REPORTED: dict[str, MulticlassAccuracy] = {}


@pytest.mark.parametrize("use", ["forward", "update"])
@pytest.mark.parametrize("place", ["cell", "global", "attribute", "helper"])
def test_metrics_in_the_closure_see_each_batch_once(place: str, use: str) -> None:
    model, x, y = mlp(), torch.randn(6, 4), torch.randint(0, 3, (6,))
    metric = REPORTED["accuracy"] = MulticlassAccuracy(3)
    owner = types.SimpleNamespace(metric=metric)

    def measured(found: MulticlassAccuracy) -> Tensor:
        model.zero_grad()
        z = model(x)
        (found if use == "forward" else found.update)(z, y)
        loss = F.cross_entropy(z, y)
        loss.backward()
        return loss

    def helper() -> Tensor:
        return measured(metric)

    closures: dict[str, Callable[[], Tensor]] = {
        "cell": lambda: measured(metric),
        "global": lambda: measured(REPORTED["accuracy"]),
        "attribute": lambda: measured(owner.metric),
        "helper": lambda: helper(),
    }
    evaluate(closures[place], model.parameters())
    assert metric.update_count == 0
    optimizer = HessianFree(model.parameters())
    for _ in range(2):
        optimizer.step(closures[place])
    assert metric.update_count == 2
    assert int((metric.tp + metric.fn).sum()) == 12


def of_loader(generator: torch.Generator) -> Callable[[], Tensor]:
    loader = DataLoader(torch.randn(8, 3), batch_size=4, shuffle=True, generator=generator)
    return lambda: next(iter(loader)).sum()


def of_sampler(generator: torch.Generator) -> Callable[[], Tensor]:
    data = torch.randn(8, 3)
    loader = DataLoader(data, batch_size=4, sampler=RandomSampler(data, generator=generator))
    return lambda: next(iter(loader)).sum()


DRAWS: dict[str, tuple[Any, Callable[[Any], Callable[[], Any]]]] = {
    "torch": (torch.Generator(), lambda g: lambda: torch.randn((), generator=g)),
    "numpy": (np.random.default_rng(0), lambda g: lambda: g.standard_normal()),
    "python": (random.Random(0), lambda g: lambda: g.gauss(0.0, 1.0)),
    "an attribute": (random.Random(1), lambda g: types.SimpleNamespace(draw=lambda: g.random()).draw),
    "loader": (torch.Generator(), of_loader),
    "sampler": (torch.Generator(), of_sampler),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_random_generators_of_the_closure_are_replayed(kind: str) -> None:
    generator, make = DRAWS[kind]
    draw, drawn, p = make(generator), unseen([]), torch.ones(2, requires_grad=True)

    def closure() -> Tensor:
        p.grad = None
        drawn().append(float(draw()))
        loss = (1 + drawn()[-1] ** 2) * p.square().sum()
        loss.backward()
        return loss

    evaluate(closure, [p])
    evaluate(closure, [p])
    assert drawn()[0] == drawn()[1], "the state is put back"
    drawn().clear()
    HessianFree([p], curvature="hessian").step(closure)
    assert len(drawn()) > 1
    assert len(set(drawn())) == 1, "trials draw the same numbers"
    closure()
    assert drawn()[-1] != drawn()[0], "the step leaves the state of one run"


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("found", [True, False])
def test_isolated_runs_of_distributed_models_make_no_collective_call(
    found: bool, one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
    hidden, x, y = unseen(model), torch.randn(6, 4), torch.randn(6, 3)
    calls: list[bool] = []
    monkeypatch.setattr(DistributedDataParallel, "_sync_buffers", lambda self: calls.append(True))

    def closure() -> Tensor:
        hidden().zero_grad()
        loss = F.mse_loss(hidden()(x), y)
        loss.backward()
        return loss

    def holding() -> Tensor:
        assert model is hidden()
        return closure()

    for _ in range(3):
        evaluation = evaluate(holding if found else closure, model.parameters())
        hessian(evaluation) @ evaluation.gradient
    assert not calls
    assert model.require_backward_grad_sync
    assert model.require_forward_param_sync
    closure()
    assert len(calls) == 1


@NEWTON
def test_bfloat16_autocast_inside_the_closure(optimizer: Any) -> None:
    model, x, y = mlp(), torch.randn(30, 4), torch.randint(0, 3, (30,))

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(x), y)

    setup = usual(model, loss)
    newton = optimizer(setup.params)
    losses = [float(newton.step(setup.closure)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert {p.dtype for p in setup.params} == {torch.float32}


@NEWTON
def test_float16_weights_are_refused_with_advice(optimizer: Any) -> None:
    with pytest.raises(ValueError, match=r"torch\.float16.*Keep the weights in float32.*bfloat16 autocast"):
        optimizer(mlp().half().parameters())


def scaled(scale: float = 2.0**16) -> tuple[Setup, torch.amp.GradScaler]:
    model, x, y = mlp(), torch.randn(6, 4), torch.randn(6, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=True)

    def closure() -> Tensor:
        model.zero_grad()
        loss = F.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        return loss

    return Setup(model, closure, lambda: F.mse_loss(model(x), y)), scaler


@NEWTON
def test_torch_refuses_a_closure_given_to_a_gradient_scaler(optimizer: Any) -> None:
    setup, scaler = scaled()
    newton = optimizer(setup.params)
    before = traces(setup.model)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported if GradScaler is enabled"):
        scaler.step(newton, closure=setup.closure)
    scaler.scale(torch.ones(()))
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(newton, setup.closure)
    assert_same(traces(setup.model), before)


@NEWTON
def test_a_gradient_scaler_without_a_closure_is_refused_with_advice(optimizer: Any) -> None:
    setup, scaler = scaled()
    setup.closure()
    with pytest.raises(RuntimeError, match=r"needs a closure.*gradient scaler.*bf16-mixed"):
        scaler.step(optimizer(setup.params))


@NEWTON
@pytest.mark.parametrize("scale", [2.0**16, 2.0**10])
def test_a_loss_scaled_inside_the_closure_is_refused_with_advice(scale: float, optimizer: Any) -> None:
    setup, _ = scaled(scale)
    before = traces(dict(setup.model.named_parameters()))
    with pytest.raises(RuntimeError, match=r"(?s)GradScaler.*bfloat16"):
        optimizer(setup.params).step(setup.closure)
    for p, q in zip(setup.params, before[1:], strict=False):
        assert torch.equal(p, q)


@pytest.mark.parametrize("samples", [2**8, 2**16])
def test_a_loss_returned_per_sample_is_not_taken_for_a_scaled_one(samples: int) -> None:
    model, x, y = mlp(), torch.randn(samples, 4), torch.randn(samples, 3)

    def closure() -> Tensor:
        model.zero_grad()
        loss = F.mse_loss(model(x), y, reduction="sum")
        loss.backward()
        return loss / samples

    optimizer = HessianFree(model.parameters(), damping=float(samples))
    optimizer.step(closure)
    assert optimizer.last_step is not None
    assert optimizer.last_step.accepted


@NEWTON
def test_a_disabled_gradient_scaler_changes_nothing(optimizer: Any) -> None:
    model, x, y = mlp(), torch.randn(6, 4), torch.randn(6, 3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    plain, through = (copy.deepcopy(model) for _ in range(2))
    setups = (
        usual(plain, lambda: F.mse_loss(plain(x), y)),
        usual(through, lambda: scaler.scale(F.mse_loss(through(x), y))),
    )
    optimizer(setups[0].params).step(setups[0].closure)
    scaler.step(optimizer(setups[1].params), setups[1].closure)
    assert all(map(torch.equal, plain.parameters(), through.parameters()))


@pytest.mark.parametrize("kind", [DampedNewton, NewtonCG])
def test_infinity_in_place_of_an_error_refuses_a_trial(kind: Any) -> None:
    theta = torch.tensor([30.0], dtype=torch.float64, requires_grad=True)
    optimizer = kind([theta])

    def closure() -> Tensor:
        theta.grad = None
        try:
            torch.linalg.cholesky(theta.detach()[None])
        except torch.linalg.LinAlgError:
            return torch.tensor(torch.inf, dtype=torch.float64, requires_grad=True)
        loss = (theta - theta.log()).sum()
        loss.backward()
        return loss

    trials = []
    for _ in range(40):
        optimizer.step(closure)
        trials.append(optimizer.last_step.trials)
    assert max(trials) > 1
    assert theta.item() == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("raises", [False, True])
def test_a_loss_of_infinity_refuses_a_trial(raises: bool) -> None:
    """Newton's step on `x - log x` from 3 ends at -3, where the logarithm has no value."""
    theta = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    optimizer = NewtonCG([theta])

    def closure() -> Tensor:
        theta.grad = None
        if raises and theta.item() <= 0:
            raise ValueError("no logarithm")
        loss = (theta - theta.log()).sum() if theta.item() > 0 else theta.sum() + torch.inf
        loss.backward()
        return loss

    if raises:
        with pytest.raises(ValueError, match="no logarithm"):
            optimizer.step(closure)
        assert theta.item() == 3.0
    else:
        for _ in range(8):
            optimizer.step(closure)
        assert theta.item() == pytest.approx(1.0)
