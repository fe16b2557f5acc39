"""Operations of `torch.nn.functional`, `torch.linalg` and others inside a model, against differences of gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newtonopt import HessianFree, NewtonCG, evaluate, gauss_newton, hessian, jacobian, mark_outputs

Operation = Callable[[Tensor], Tensor]
N = 12


def constant(*shape: int) -> Tensor:
    """Return numbers without a pattern, the same in each run."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(1, count + 1, dtype=torch.float64) ** 2).view(shape)


def square(p: Tensor) -> Tensor:
    """Return a matrix with distinct singular values."""
    return p[:9].view(3, 3) + torch.diag(torch.tensor([3.0, 5.0, 8.0], dtype=torch.float64))


def symmetric(p: Tensor) -> Tensor:
    return square(p) + square(p).T


def image(p: Tensor) -> Tensor:
    return p.view(1, 1, 3, 4)


def ctc(p: Tensor) -> Tensor:
    log_probabilities = p.view(4, 1, 3).log_softmax(2)
    return F.ctc_loss(log_probabilities, torch.tensor([[1, 2]]), [4], [2], reduction="none")


def projector(p: Tensor) -> Tensor:
    vectors = torch.linalg.eigh(symmetric(p))[1][:, :1]
    return vectors @ vectors.T


def complex_of(p: Tensor) -> Tensor:
    return torch.view_as_complex(p.view(6, 2).contiguous())


OPERATIONS: dict[str, Operation] = {
    "affine_grid": lambda p: F.grid_sample(
        constant(1, 1, 4, 4),
        F.affine_grid(p[:6].view(1, 2, 3) / 3, [1, 1, 3, 3], align_corners=False),
        align_corners=False,
    ),
    "grid_sample": lambda p: F.grid_sample(image(p), constant(1, 3, 3, 2) * 0.9, align_corners=True),
    "grid_sample bicubic": lambda p: F.grid_sample(
        image(p), constant(1, 3, 3, 2) * 0.9, mode="bicubic", align_corners=True
    ),
    "cdist": lambda p: torch.cdist(p.view(4, 3), constant(5, 3)),
    "cdist p=1": lambda p: torch.cdist(p.view(4, 3), constant(5, 3), p=1.0),
    "cdist p=3": lambda p: torch.cdist(p.view(4, 3), constant(5, 3), p=3.0),
    "pdist": lambda p: F.pdist(p.view(4, 3)),
    "ctc_loss": ctc,
    "interpolate bilinear": lambda p: F.interpolate(image(p) ** 2, scale_factor=2, mode="bilinear"),
    "interpolate bicubic": lambda p: F.interpolate(image(p) ** 2, scale_factor=1.5, mode="bicubic"),
    "interpolate area": lambda p: F.interpolate(image(p) ** 2, size=(2, 2), mode="area"),
    "fold": lambda p: F.fold(p.view(1, 4, 3) ** 2, (2, 4), (2, 2)),
    "unfold": lambda p: F.unfold(image(p) ** 2, (2, 2)),
    "pixel_shuffle": lambda p: F.pixel_shuffle(p.view(1, 4, 1, 3) ** 2, 2),
    "adaptive_avg_pool2d": lambda p: F.adaptive_avg_pool2d(image(p) ** 2, (2, 3)),
    "adaptive_max_pool2d": lambda p: F.adaptive_max_pool2d(image(p) ** 2, (2, 3)),
    "lp_pool1d": lambda p: F.lp_pool1d(p.view(1, 1, 12) ** 2, 3.0, 2),
    "avg_pool3d": lambda p: F.avg_pool3d(p.view(1, 1, 2, 2, 3) ** 2, 2),
    "max_unpool1d": lambda p: F.max_unpool1d(*F.max_pool1d(p.view(1, 1, 12) ** 2, 2, return_indices=True), 2),
    "conv_transpose2d": lambda p: F.conv_transpose2d(image(p), p[:4].view(1, 1, 2, 2), stride=2),
    "conv3d": lambda p: F.conv3d(constant(1, 1, 3, 3, 3), p[:8].view(1, 1, 2, 2, 2)) * p[8:].sum(),
    "bilinear": lambda p: F.bilinear(p[:6].view(2, 3), p[6:].view(2, 3), constant(2, 3, 3)),
    "embedding_bag": lambda p: F.embedding_bag(
        torch.tensor([0, 2, 1, 3]), p.view(4, 3), torch.tensor([0, 2]), per_sample_weights=p[:4], mode="sum"
    ),
    "embedding_bag max": lambda p: F.embedding_bag(
        torch.tensor([0, 2, 1, 3]), p.view(4, 3), torch.tensor([0, 2]), mode="max"
    ),
    "local_response_norm": lambda p: F.local_response_norm(p.view(1, 4, 3), 2),
    "instance_norm": lambda p: F.instance_norm(p.view(1, 2, 6)),
    "group_norm": lambda p: F.group_norm(p.view(1, 4, 3), 2),
    "rms_norm": lambda p: F.rms_norm(p.view(3, 4), (4,)),
    "layer_norm": lambda p: F.layer_norm(p.view(3, 4), (4,), p[:4], p[4:8]),
    "glu": lambda p: F.glu(p.view(3, 4)),
    "celu": lambda p: F.celu(p),
    "hardswish": lambda p: F.hardswish(3 * p),
    "mish": lambda p: F.mish(p),
    "gelu tanh": lambda p: F.gelu(p, approximate="tanh"),
    "rrelu": lambda p: F.rrelu(p, training=True) ** 2,
    "gumbel_softmax": lambda p: F.gumbel_softmax(p.view(3, 4)),
    "softmin": lambda p: F.softmin(p.view(3, 4), dim=1),
    "normalize": lambda p: F.normalize(p.view(3, 4)),
    "cosine_similarity": lambda p: F.cosine_similarity(p[:6].view(2, 3), p[6:].view(2, 3)),
    "pairwise_distance": lambda p: F.pairwise_distance(p[:6].view(2, 3), p[6:].view(2, 3)),
    "svdvals": lambda p: torch.linalg.svdvals(square(p)),
    "eigvalsh": lambda p: torch.linalg.eigvalsh(symmetric(p)),
    "eigh": projector,
    "qr": lambda p: torch.linalg.qr(square(p))[1],
    "cholesky": lambda p: torch.linalg.cholesky(square(p) @ square(p).T),
    "inv": lambda p: torch.linalg.inv(square(p)),
    "solve": lambda p: torch.linalg.solve(square(p), p[9:]),
    "solve_triangular": lambda p: torch.linalg.solve_triangular(square(p), p[9:, None], upper=True),
    "lstsq": lambda p: torch.linalg.lstsq(p.view(4, 3) + 3 * torch.eye(4, 3, dtype=p.dtype), constant(4, 1))[0],
    "pinv": lambda p: torch.linalg.pinv(p.view(4, 3) + 3 * torch.eye(4, 3, dtype=p.dtype)),
    "slogdet": lambda p: torch.linalg.slogdet(square(p))[1],
    "det": lambda p: torch.linalg.det(square(p)),
    "matrix_exp": lambda p: torch.linalg.matrix_exp(p[:9].view(3, 3)),
    "matrix_norm nuc": lambda p: torch.linalg.matrix_norm(square(p), "nuc"),
    "cond": lambda p: torch.linalg.cond(square(p)),
    "lu_factor": lambda p: torch.linalg.lu_factor(square(p))[0],
    "householder_product": lambda p: torch.linalg.householder_product(p[:9].view(3, 3), p[9:]),
    "matrix_power": lambda p: torch.linalg.matrix_power(p[:9].view(3, 3), 3),
    "vander": lambda p: torch.linalg.vander(p[:4]),
    "rfft": lambda p: torch.fft.rfft(p).abs(),
    "stft": lambda p: torch.stft(p, 4, window=torch.ones(4, dtype=p.dtype), return_complex=True).abs().square(),
    "complex": lambda p: torch.angle(complex_of(p) + 3),
    "cumprod": lambda p: torch.cumprod(p.view(3, 4), 1),
    "logcumsumexp": lambda p: torch.logcumsumexp(p, 0),
    "cummax": lambda p: torch.cummax(p**2, 0)[0],
    "prod": lambda p: torch.prod(p.view(3, 4), 1),
    "lgamma": lambda p: torch.lgamma(p + 3),
    "digamma": lambda p: torch.digamma(p + 3),
    "igamma": lambda p: torch.igamma(torch.full_like(p, 2.0).detach(), p + 3),
    "i0": lambda p: torch.special.i0(p),
    "ndtri": lambda p: torch.special.ndtri(torch.sigmoid(p)),
    "log_ndtr": lambda p: torch.special.log_ndtr(p),
    "xlog1py": lambda p: torch.special.xlog1py(p, p**2),
    "zeta": lambda p: torch.special.zeta(torch.full_like(p, 2.0).detach(), p + 3),
    "atan2": lambda p: torch.atan2(p[:6] + 2, p[6:] + 3),
    "hypot": lambda p: torch.hypot(p[:6], p[6:] + 3),
    "logaddexp": lambda p: torch.logaddexp(p[:6], p[6:]),
    "scatter_reduce prod": lambda p: torch.zeros(3, dtype=p.dtype).scatter_reduce(
        0, torch.arange(12) % 3, p + 2, "prod", include_self=False
    ),
    "scatter_reduce mean": lambda p: torch.zeros(3, dtype=p.dtype).scatter_reduce(
        0, torch.arange(12) % 3, p**2, "mean"
    ),
    "index_reduce": lambda p: torch.ones(3, dtype=p.dtype).index_reduce(0, torch.arange(12) % 3, p + 2, "mean"),
    "segment_reduce": lambda p: torch.segment_reduce(p**2, "mean", lengths=torch.tensor([5, 7])),
    "sparse mm": lambda p: torch.sparse.mm(constant(3, 4).to_sparse(), p.view(4, 3) ** 2),
    "renorm": lambda p: torch.renorm(p.view(3, 4), 2, 0, 0.5),
    "corrcoef": lambda p: torch.corrcoef(p.view(3, 4)),
    "quantile": lambda p: torch.quantile(p**2, 0.3),
    "median": lambda p: torch.median(p.view(4, 3) ** 2, dim=1)[0],
    "topk": lambda p: torch.topk(p**2, 4)[0],
    "sort": lambda p: torch.sort(p**3)[0],
    "std": lambda p: p.view(3, 4).std(1),
    "logdet": lambda p: torch.logdet(square(p) @ square(p).T),
    "kron": lambda p: torch.kron(p[:6].view(2, 3), p[6:].view(2, 3)),
    "trapezoid": lambda p: torch.trapezoid(p[:6], p[6:].cumsum(0)),
    "multi_head_attention": lambda p: F.scaled_dot_product_attention(*p.view(3, 1, 2, 2).unbind(0)),
}


class Case:
    """The mean square of an operation's result minus a constant, as a function of twelve parameters."""

    def __init__(self, operation: Operation) -> None:
        self.p = nn.Parameter(0.5 * constant(N))
        self.operation = operation
        self.target = torch.cos(torch.arange(self.outputs(self.p.detach()).numel(), dtype=torch.float64))

    def outputs(self, p: Tensor) -> Tensor:
        torch.manual_seed(0)
        return self.operation(p).reshape(-1)

    def closure(self) -> Tensor:
        self.p.grad = None
        loss = F.mse_loss(self.outputs(self.p), self.target)
        loss.backward()
        return loss

    def gradient(self, p: Tensor) -> Tensor:
        p = p.detach().requires_grad_()
        return torch.autograd.grad(F.mse_loss(self.outputs(p), self.target), p)[0]

    def along(self, v: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the derivative along `v` by central differences of fourth order."""
        p, h = self.p.detach(), 1e-3 * v
        near, far = (function(p + k * h).detach() - function(p - k * h).detach() for k in (1, 2))
        return (8 * near - far) / 12e-3

    def pulled(self, u: Tensor) -> Tensor:
        """Return `J' u` by one backward pass."""
        p = self.p.detach().requires_grad_()
        return torch.autograd.grad(self.outputs(p), p, u)[0]


def has_second_derivative(operation: Operation) -> bool:
    p = nn.Parameter(0.5 * constant(N))
    (gradient,) = torch.autograd.grad(operation(p).square().sum(), p, create_graph=True)
    try:
        torch.autograd.grad(gradient.sum(), p)
    except RuntimeError:
        return False
    return True


# These operations fall back under "auto".
WITHOUT = {
    "cdist",
    "cdist p=1",
    "cdist p=3",
    "pdist",
    "ctc_loss",
    "embedding_bag",
    "embedding_bag max",
    "segment_reduce",
}
if not has_second_derivative(OPERATIONS["grid_sample"]):  # no second derivative in torch 2.8 either
    WITHOUT |= {"affine_grid", "grid_sample", "grid_sample bicubic"}


def marks(products: str) -> list[Any]:
    return [] if products == "auto" else [pytest.mark.slow]


FORMS = ("auto", "streamed", "finite_difference")


@pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")
@pytest.mark.parametrize(
    ("name", "products"),
    [pytest.param(name, form, marks=marks(form)) for name in OPERATIONS for form in FORMS],
)
def test_products_are_those_of_differences(name: str, products: Any) -> None:
    case = Case(OPERATIONS[name])
    v = torch.cos(torch.arange(N, dtype=torch.float64))
    pushed = case.along(v, case.outputs)
    with warnings.catch_warnings(record=True) as warned:
        warnings.filterwarnings("always", message="An operation of the model has no second derivative")
        evaluation = evaluate(case.closure, [case.p], products=products)
        if name in WITHOUT and products == "streamed":
            with pytest.raises(RuntimeError, match=r"no second derivative.*finite_difference"):
                hessian(evaluation) @ v
            return
        found = [operator(evaluation) @ v for operator in (hessian, gauss_newton, jacobian)]
        turned = jacobian(evaluation).T @ pushed
    assert len(warned) == (name in WITHOUT and products == "auto")
    wanted = [case.along(v, case.gradient), 2 / len(pushed) * case.pulled(pushed), pushed]
    for one, other in zip([*found, turned], [*wanted, case.pulled(pushed)], strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * (1 + float(other.abs().max()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")
@pytest.mark.filterwarnings("ignore:An operation of the model has no second derivative:UserWarning")
@pytest.mark.parametrize("optimizer", [HessianFree, NewtonCG])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_few_steps_decrease_the_loss(name: str, optimizer: Any) -> None:
    case = Case(OPERATIONS[name])
    trained = optimizer([case.p])
    losses = [float(trained.step(case.closure)) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(losses))


def test_differences_of_a_perfect_fit_on_a_kink_are_not_taken_for_other_data() -> None:
    # The kink lies at half the length of the differences.
    p = nn.Parameter(torch.tensor([1.0, 1.0 - 4e-7], dtype=torch.float64))
    closure = lambda: F.mse_loss(p.max(), torch.ones((), dtype=torch.float64))  # noqa: E731
    A = hessian(evaluate(closure, [p], products="finite_difference"))
    assert (A @ torch.tensor([0.0, 1.0], dtype=torch.float64)).isfinite().all()


class Raising(torch.autograd.Function):
    """`x^3`, whose second derivative raises an error from its second call on."""

    error: Exception
    left = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _RaisingBackward.apply(*ctx.saved_tensors, g)


class _RaisingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, g)
        return 3 * x**2 * g

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, Tensor]:
        if Raising.left == 0:
            raise Raising.error
        Raising.left -= 1
        x, g = ctx.saved_tensors
        return 6 * x * g * u, 3 * x**2 * u


@pytest.mark.parametrize("products_before", [0, 1])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("derivative for aten::_cudnn_rnn_backward is not implemented"),
        RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable"),
        RuntimeError("double backwards on roi_align not supported"),
        RuntimeError("torch.compile with aot_autograd does not currently support double backward"),
        RuntimeError("the operation is not differentiable twice"),
        RuntimeError("Trying to backward through mine.op but no autograd formula was registered."),
        NotImplementedError("this kernel has a forward and a backward"),
    ],
    ids=str,
)
def test_each_wording_of_a_missing_second_derivative_falls_back(error: Exception, products_before: int) -> None:
    checks = 2 if products_before else 0
    Raising.error, Raising.left = error, products_before + checks
    case = Case(Raising.apply)
    v = torch.ones(N, dtype=torch.float64)
    A = hessian(evaluate(case.closure, [case.p]))
    for _ in range(products_before):
        A @ v
    with pytest.warns(UserWarning, match="finite differences instead"):
        found = A @ v
    assert torch.allclose(found, case.along(v, case.gradient), rtol=1e-5, atol=1e-6)
    assert torch.equal(found, A @ v)  # and no second warning


@pytest.mark.filterwarnings("ignore:.*fx_tracing")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_inside_a_model(layout: torch.layout) -> None:
    layer = nn.Linear(2, 3).double()
    x = constant(4, 2)

    def closure() -> Tensor:
        z = layer(x)
        if layout is torch.jagged:
            nested = torch.nested.nested_tensor_from_jagged(z, torch.tensor([0, 1, 4]))
            return ((nested - 1) ** 2).values().mean()
        nested = torch.nested.as_nested_tensor([z[:1], z[1:]])
        return torch.nested.to_padded_tensor(nested * nested, 0.0).mean()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="An operation .* has no second derivative")
        optimizer = HessianFree(layer.parameters(), curvature="hessian")
        losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:.*fx_tracing")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", ["padded", "unbound", "marked"])
@pytest.mark.parametrize("of", [hessian, gauss_newton])
def test_products_through_nested_tensors(case: str, of: Any) -> None:
    """Under "auto" differences stand in for a missing second derivative; any other form raises an error."""
    layout = torch.strided if case == "unbound" else torch.jagged
    torch.manual_seed(0)
    layer, rows = nn.Linear(2, 3).double(), [constant(k, 2) for k in (1, 3)]
    targets = constant(2, 3)

    def closure(nested: bool = True) -> Tensor:
        if not nested:
            parts = [layer(row) for row in rows]
        elif case == "padded":
            z = torch.nested.to_padded_tensor(layer(torch.nested.nested_tensor(rows, layout=layout)), 0.0)
            return F.mse_loss(torch.tanh(z.sum(1)), targets)
        else:
            z = layer(torch.nested.nested_tensor(rows, layout=layout))
            parts = list((mark_outputs(z) if case == "marked" else z).unbind())
        if case == "padded":
            return F.mse_loss(torch.tanh(torch.stack([part.sum(0) for part in parts])), targets)
        return sum((part.square().sum() for part in parts), torch.zeros((), dtype=torch.float64))

    truth = of(evaluate(lambda: closure(nested=False), layer.parameters())).dense()
    with pytest.warns(UserWarning, match=r"nested tensors has no second derivative.*finite differences instead"):
        found = of(evaluate(closure, layer.parameters())).dense()
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"nested tensors has no second derivative.*needs no second"):
        of(evaluate(closure, layer.parameters(), products="cached")).dense()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_that_have_no_shape_or_no_gradient() -> None:
    layer = nn.Linear(2, 3).double()
    rows = [constant(k, 2) for k in (1, 3)]
    with pytest.raises(
        ValueError, match=r"z must have a shape, got a nested tensor of strided layout\. Mark torch\.nested"
    ):
        mark_outputs(torch.nested.nested_tensor(rows, layout=torch.strided))

    def closure() -> Tensor:
        z = torch.tanh(layer(torch.nested.nested_tensor(rows, layout=torch.strided)))
        return torch.nested.to_padded_tensor(z, 0.0).square().sum()

    for products in ("cached", "streamed", "finite_difference"):
        with pytest.raises(RuntimeError, match="The loss has no gradient, so backward fails too: Could not run"):
            evaluate(closure, layer.parameters(), products=products)  # type: ignore[arg-type]
