"""Contributions of single samples to gradients: every operation, against autograd's gradients sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from newtonopt.autodiff import contributions as module
from newtonopt.autodiff.contributions import Contribution, Outer, Spread, Whole, by_sample, contribution_of, dense
from newtonopt.autodiff.graph import kind_of
from newtonopt.autodiff.samples import Samples, Use, uses_of

Grouping = Literal["samples", "entries"]
M = 5


def numbers(*shape: int, shift: float = 0.0) -> Tensor:
    """Return numbers without a pattern, between -1 and 1, the same in each run."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(1, count + 1, dtype=torch.float64) ** 2 + shift).view(shape)


def slope(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient of the sum of a function by its argument, with its graph."""
    y = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(f(y).sum(), y, create_graph=True)
    return g


# An operation of samples `(M, ...)` and parameters of these shapes; the result has the samples in its first dimension.
Operation = tuple[Callable[..., Tensor], tuple[int, ...], tuple[tuple[int, ...], ...]]

INDEX = torch.tensor([[0, 2, 1], [1, 1, 3], [0, 0, 0], [3, 2, 1], [2, 3, 3]])

OPERATIONS: dict[str, Operation] = {
    # Matrix products.
    "linear": (F.linear, (3,), ((4, 3), (4,))),
    "linear of sequences": (F.linear, (6, 3), ((4, 3), (4,))),
    "linear without bias": (F.linear, (6, 3), ((4, 3),)),
    "matmul": (lambda x, w: x @ w, (3,), ((3, 2),)),
    "matmul of sequences": (lambda x, w: x @ w, (4, 3), ((3, 2),)),
    "matmul with the parameter on the left": (lambda x, w: (w @ x.T).T, (3,), ((2, 3),)),
    "matmul of sequences with the parameter on the left": (lambda x, w: w @ x, (3, 4), ((2, 3),)),
    "matmul with a vector": (lambda x, w: x @ w, (3,), ((3,),)),
    "matmul of sequences with a vector": (lambda x, w: x @ w, (4, 3), ((3,),)),
    "vector times samples": (lambda x, w: w @ x.T, (3,), ((3,),)),
    "dot": (lambda x, w: torch.stack([torch.dot(one, w) for one in x]), (3,), ((3,),)),
    "dot with the parameter first": (lambda x, w: torch.stack([torch.dot(w, one) for one in x]), (3,), ((3,),)),
    "mv with a matrix": (lambda x, w: torch.stack([w @ one for one in x]), (3,), ((2, 3),)),
    "einsum": (lambda x, w: torch.einsum("bi,io->bo", x, w), (3,), ((3, 2),)),
    "einsum of sequences": (lambda x, w: torch.einsum("bti,io->bto", x, w), (4, 3), ((3, 2),)),
    "einsum with the parameter first": (lambda x, w: torch.einsum("oi,bi->bo", w, x), (3,), ((2, 3),)),
    "einsum with heads": (lambda x, w: torch.einsum("bhi,hio->bho", x, w), (2, 3), ((2, 3, 4),)),
    "einsum with shared heads": (lambda x, w: torch.einsum("bti,hio->bhto", x, w), (4, 3), ((2, 3, 2),)),
    "einsum that mixes positions": (lambda x, w: torch.einsum("bti,ts->bsi", x, w), (4, 3), ((4, 2),)),
    "einsum of three": (lambda x, u, v: torch.einsum("bi,ir,ro->bo", x, u, v), (3,), ((3, 2), (2, 4))),
    "bilinear form": (lambda x, w: torch.einsum("bi,ij,bj->b", x, w, x), (3,), ((3, 3),)),
    "bilinear layer": (lambda x, w, b: F.bilinear(x, x + 1, w, b), (3,), ((2, 3, 3), (2,))),
    "tensordot": (lambda x, w: torch.tensordot(x, w, 2), (2, 3), ((2, 3, 4),)),
    "bmm with an expanded weight": (lambda x, w: torch.bmm(x, w.expand(M, 3, 2)), (4, 3), ((3, 2),)),
    "bmm with a weight of each head": (
        lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1),
        (2, 3),
        ((2, 3, 4),),
    ),
    "bmm with a weight on the left": (lambda x, w: torch.bmm(w.expand(M, 2, 3), x), (3, 4), ((2, 3),)),
    "bmm of one matrix": (lambda x, w: torch.bmm(x[None], w[None])[0], (3,), ((3, 2),)),
    "baddbmm": (lambda x, b, w: torch.baddbmm(b, x, w.expand(M, 3, 2), beta=0.5, alpha=2.0), (4, 3), ((2,), (3, 2))),
    "addmm": (lambda x, b, w: torch.addmm(b, x, w, beta=0.5, alpha=2.0), (3,), ((2,), (3, 2))),
    "addmm with a number": (lambda x, b, w: torch.addmm(b, x, w), (3,), ((1,), (3, 2))),
    "addmv": (lambda x, b, w: torch.addmv(b, x, w, beta=0.5, alpha=2.0), (3,), ((1,), (3,))),
    "outer": (lambda x, w: torch.outer(x, w), (), ((3,),)),
    "low rank": (lambda x, u, v: x @ (u @ v), (3,), ((3, 2), (2, 4))),
    "masked weight": (lambda x, w: x @ (w * (numbers(3, 4) > 0)), (3,), ((3, 4),)),
    "softplus of a weight": (lambda x, w: x @ F.softplus(w), (3,), ((3, 4),)),
    "transposed weight": (lambda x, w: x @ w.T, (3,), ((4, 3),)),
    "reshaped weight": (lambda x, w: x @ w.view(3, 2), (3,), ((6,),)),
    "permuted weight": (lambda x, w: x.flatten(1) @ w.permute(2, 0, 1).reshape(6, 4), (6,), ((2, 4, 3),)),
    "stacked weights": (lambda x, u, v: x @ torch.cat([u, v], 1), (3,), ((3, 2), (3, 1))),
    "part of a weight": (lambda x, w: x @ w[1:, ::2], (3,), ((4, 4),)),
    "one weight twice": (lambda x, w: (x @ w).tanh() @ w, (3,), ((3, 3),)),
    "one weight and its transpose": (lambda x, w: (x @ w).tanh() @ w.T, (3,), ((3, 4),)),
    # Convolutions.
    "conv1d": (F.conv1d, (2, 6), ((4, 2, 3), (4,))),
    "conv1d stride": (lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1), (2, 6), ((4, 2, 3), (4,))),
    "conv1d same": (lambda x, w, b: F.conv1d(x, w, b, padding="same"), (2, 6), ((3, 2, 3), (3,))),
    "conv2d": (F.conv2d, (2, 4, 5), ((3, 2, 2, 3), (3,))),
    "conv2d without bias": (F.conv2d, (2, 4, 5), ((3, 2, 2, 3),)),
    "conv2d groups": (
        lambda x, w, b: F.conv2d(x, w, b, groups=2, dilation=2, padding=1),
        (4, 4, 5),
        ((4, 2, 2, 2), (4,)),
    ),
    "conv2d depthwise": (lambda x, w: F.conv2d(x, w, groups=4), (4, 4, 4), ((4, 1, 3, 3),)),
    "conv2d of one position": (F.conv2d, (2, 3, 3), ((3, 2, 1, 1), (3,))),
    "conv3d": (lambda x, w, b: F.conv3d(x, w, b, stride=(1, 2, 1)), (2, 3, 4, 3), ((2, 2, 2, 2, 2), (2,))),
    "conv transposed 1d": (lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2), (2, 4), ((2, 3, 3), (3,))),
    "conv transposed 2d": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1, output_padding=1, groups=2),
        (4, 3, 3),
        ((4, 2, 3, 3), (4,)),
    ),
    "conv transposed 3d": (lambda x, w: F.conv_transpose3d(x, w, dilation=2), (2, 2, 2, 2), ((2, 1, 2, 2, 2),)),
    "conv of one sample at a time": (
        lambda x, w, b: torch.stack([F.conv1d(one, w, b) for one in x]),
        (2, 6),
        ((3, 2, 3), (3,)),
    ),
    "conv of a parameter with samples": (
        lambda x, w: F.conv1d(w[None], x.view(M, 2, 3))[0],
        (6,),
        ((2, 7),),
    ),
    # Lookups.
    "embedding": (lambda x, w: F.embedding(INDEX, w) * x[:, None, None], (), ((4, 3),)),
    "embedding with padding": (lambda x, w: F.embedding(INDEX, w, padding_idx=0) * x[:, None, None], (), ((4, 3),)),
    "embedding of one number": (lambda x, w: F.embedding(INDEX[:, 0], w) * x[:, None], (), ((4, 3),)),
    "embedding by frequency": (
        lambda x, w: F.embedding(INDEX, w, scale_grad_by_freq=True) * x[:, None, None],
        (),
        ((4, 3),),
    ),
    "embedding bag": (lambda x, w: F.embedding_bag(INDEX, w, mode="sum") * x[:, None], (), ((4, 3),)),
    "embedding bag mean": (lambda x, w: F.embedding_bag(INDEX, w, mode="mean") * x[:, None], (), ((4, 3),)),
    "embedding bag with padding": (
        lambda x, w: F.embedding_bag(INDEX, w, mode="mean", padding_idx=0) * x[:, None],
        (),
        ((4, 3),),
    ),
    "embedding bag of different lengths": (
        lambda x, w: F.embedding_bag(INDEX.reshape(-1), w, torch.tensor([0, 2, 2, 7, 11]), mode="mean") * x[:, None],
        (),
        ((4, 3),),
    ),
    "embedding bag with its end": (
        lambda x, w: (
            F.embedding_bag(
                INDEX.reshape(-1), w, torch.tensor([0, 2, 2, 7, 11, 15]), mode="sum", include_last_offset=True
            )
            * x[:, None]
        ),
        (),
        ((4, 3),),
    ),
    "embedding bag with weights": (
        lambda x, w: F.embedding_bag(INDEX, w, per_sample_weights=x, mode="sum"),
        (3,),
        ((4, 3),),
    ),
    "embedding bag max": (lambda x, w: F.embedding_bag(INDEX, w, mode="max") * x[:, None], (), ((4, 3),)),
    "embedding of the sample's number": (lambda x, w: F.embedding(torch.arange(M), w) * x, (3,), ((M, 3),)),
    "tied embedding": (lambda x, w: F.linear((F.embedding(INDEX, w) * x[:, None, None]).tanh(), w), (), ((4, 3),)),
    "index": (lambda x, w: w[INDEX] * x[:, None], (), ((4,),)),
    "index of two dimensions": (lambda x, w: w[INDEX, INDEX.flip(1)] * x[:, None], (), ((4, 4),)),
    "index of the last dimension": (lambda x, w: w[:, INDEX].permute(1, 0, 2) * x[:, None, None], (), ((2, 4),)),
    "index by a mask": (lambda x, w: x * w[torch.tensor([True, False, True, True])], (3,), ((4,),)),
    "index_select": (lambda x, w: w.index_select(0, INDEX[:, 0]) * x[:, None], (), ((4, 3),)),
    "gather": (lambda x, w: w.expand(M, 4).gather(1, INDEX) * x[:, None], (), ((4,),)),
    "take": (lambda x, w: w.take(INDEX) * x[:, None], (), ((2, 4),)),
    "slice": (lambda x, w: x + w[1:4], (3,), ((6,),)),
    "narrow and select": (lambda x, w: x * w.narrow(0, 1, 3) + w.select(0, 0), (3,), ((6,),)),
    "unbind": (lambda x, w: x * w.unbind(0)[1] + w.unbind(0)[0], (3,), ((2, 3),)),
    "split": (lambda x, w: x * w.split(3)[1] + w.split(3)[0], (3,), ((6,),)),
    "scatter": (lambda x, w: x.scatter(1, INDEX[:, :1], w.expand(M, 1)), (4,), ((1,),)),
    "scatter_add": (lambda x, w: x.scatter_add(1, INDEX[:, :2], w.expand(M, 2)), (4,), ((2,),)),
    # Pointwise operations with a parameter that is broadcast.
    "bias": (lambda x, b: x + b, (3,), ((3,),)),
    "bias of a number": (lambda x, b: x + b, (3,), ((),)),
    "bias of a channel": (lambda x, b: x + b[:, None], (3, 4), ((3,),)),
    "bias of shape one": (lambda x, b: x + b, (3, 4), ((3, 1),)),
    "bias with a factor": (lambda x, b: torch.add(x, b, alpha=2.0), (3,), ((3,),)),
    "bias first": (lambda x, b: b + x, (3,), ((1, 3),)),
    "subtraction": (lambda x, b: torch.sub(x, b, alpha=3.0), (3,), ((3,),)),
    "subtraction from a parameter": (lambda x, b: b - x, (3,), ((3,),)),
    "scale": (lambda x, w: x * w, (3,), ((3,),)),
    "scale of a number": (lambda x, w: w * x, (3,), ((),)),
    "scale twice": (lambda x, w: x * w * w, (3,), ((3,),)),
    "square of a parameter": (lambda x, w: x * w**2, (3,), ((3,),)),
    "positions": (lambda x, w: x + w[: x.shape[1]], (3, 2), ((6, 2),)),
    "expanded parameter": (lambda x, w: x.sin() * w.expand(M, 3), (3,), ((3,),)),
    "repeated parameter": (lambda x, w: x * w.repeat(M, 1), (3,), ((3,),)),
    "parameter beside the samples": (lambda x, w: torch.cat([x, w.expand(M, 2)], 1), (3,), ((2,),)),
    "parameter stacked with the samples": (lambda x, w: torch.stack([x, w.expand_as(x)], 1), (3,), ((3,),)),
    "division by a parameter": (lambda x, w: x / (2 + w), (3,), ((3,),)),
    "division of a parameter": (lambda x, w: w / (x + 2), (3,), ((3,),)),
    "division straight": (lambda x, w: x / w, (3,), ((3,),)),
    "floored division": (lambda x, w: torch.div(x, w, rounding_mode="floor") * w, (3,), ((3,),)),
    "true division with a sum": (lambda x, w: x / w.sum(), (3,), ((3,),)),
    "power": (lambda x, w: (x + 2) ** w, (3,), ((3,),)),
    "power of a parameter": (lambda x, w: (w + 2) ** x, (3,), ((3,),)),
    "where": (lambda x, w: torch.where(x > 0, w, x), (3,), ((3,),)),
    "where the other": (lambda x, w: torch.where(x > 0, x, w), (3,), ((),)),
    "lerp": (lambda x, w, v: torch.lerp(x, w, v), (3,), ((3,), (3,))),
    "maximum": (lambda x, w: torch.maximum(x, w), (3,), ((3,),)),
    "atan2": (lambda x, w: torch.atan2(x, w), (3,), ((3,),)),
    "hypot": (lambda x, w: torch.hypot(x, w), (3,), ((3,),)),
    "addcmul": (lambda x, w, v: torch.addcmul(x, w, v, value=0.5), (3,), ((3,), (1, 3))),
    "addcmul with samples": (lambda x, w: torch.addcmul(w, x, x + 1, value=0.5), (3,), ((3,),)),
    "addcdiv": (lambda x, w, v: torch.addcdiv(x, w, v + 3, value=0.5), (3,), ((3,), (3,))),
    "clamp": (lambda x, w: torch.clamp(x, min=w - 1, max=w + 0.2), (3,), ((3,),)),
    "remainder": (lambda x, w: torch.remainder(x, w), (3,), ((3,),)),
    "xlogy": (lambda x, w: torch.xlogy(x, w + 2), (3,), ((3,),)),
    "logaddexp": (lambda x, w: torch.logaddexp(x, w), (3,), ((3,),)),
    "copysign": (lambda x, w: torch.copysign(w, x), (3,), ((3,),)),
    "prelu": (F.prelu, (3, 4), ((3,),)),
    "prelu with one number": (F.prelu, (3, 4), ((1,),)),
    "swish": (lambda x, w: x * torch.sigmoid(w * x), (3,), ((1,),)),
    "in place": (lambda x, w: (x * 1).add_(w).mul_(2.0), (3,), ((3,),)),
    "masked_fill": (lambda x, w: (x * w).masked_fill(x > 0, 0.0), (3,), ((3,),)),
    "cumsum of a parameter": (lambda x, w: x * w.cumsum(0), (3,), ((3,),)),
    "softmax of a parameter": (lambda x, w: x @ w.softmax(0), (3,), ((3,),)),
    "distances": (lambda x, w: torch.cdist(x, w), (3,), ((4, 3),)),
    "distances by hand": (lambda x, w: (x[:, None] - w).square().sum(2), (3,), ((4, 3),)),
    "grid_sample": (
        lambda x, w: F.grid_sample(w[None].expand(M, 1, 3, 4), x.view(M, 1, 2, 2), align_corners=True),
        (4,),
        ((1, 3, 4),),
    ),
    "padding": (lambda x, w: F.pad(x * w, (1, 1)), (3,), ((3,),)),
    "roll": (lambda x, w: x * w.roll(1), (3,), ((3,),)),
    "diagonal": (lambda x, w: x @ torch.diag(w), (3,), ((3,),)),
    "outer sum": (lambda x, u, v: x * (u[:, None] + v), (2, 3), ((2,), (3,))),
    "kron": (lambda x, u, v: x @ torch.kron(u, v), (4,), ((2, 1), (2, 3))),
    "matrix exponential": (lambda x, w: x @ torch.matrix_exp(w - w.T), (3,), ((3, 3),)),
    "solve": (lambda x, w: torch.linalg.solve(w + 3 * torch.eye(3, dtype=w.dtype), x.T).T, (3,), ((3, 3),)),
    "solve of several columns": (
        lambda x, w: torch.linalg.solve(w + 3 * torch.eye(3, dtype=w.dtype), x),
        (3, 3),
        ((3, 3),),
    ),
    # Normalisations.
    "layer norm": (lambda x, w, b: F.layer_norm(x, (3,), w, b), (2, 3), ((3,), (3,))),
    "layer norm of two dimensions": (lambda x, w, b: F.layer_norm(x, (2, 3), w, b), (2, 3), ((2, 3), (2, 3))),
    "layer norm without bias": (lambda x, w: F.layer_norm(x, (3,), w), (2, 3), ((3,),)),
    "group norm": (lambda x, w, b: F.group_norm(x, 2, w, b), (4, 3), ((4,), (4,))),
    "group norm of images": (lambda x, w, b: F.group_norm(x, 2, w, b), (4, 2, 3), ((4,), (4,))),
    "instance norm": (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), (2, 5), ((2,), (2,))),
    "RMS norm": (lambda x, w: F.rms_norm(x, (3,), w), (2, 3), ((3,),)),
    "batch norm in eval mode": (
        lambda x, w, b: F.batch_norm(x, numbers(3), numbers(3).abs() + 1, w, b),
        (3,),
        ((3,), (3,)),
    ),
    "batch norm of images in eval mode": (
        lambda x, w, b: F.batch_norm(x, numbers(3), numbers(3).abs() + 1, w, b),
        (3, 2, 2),
        ((3,), (3,)),
    ),
    # Derivatives by the samples, whose own derivatives by the parameters are taken.
    "derivative of a linear layer": (
        lambda x, w, b: slope(lambda y: F.linear(y, w, b).tanh(), x),
        (3,),
        ((4, 3), (4,)),
    ),
    "derivative of a convolution": (
        lambda x, w: slope(lambda y: F.conv2d(y, w, stride=2, groups=2).tanh(), x),
        (4, 4, 5),
        ((4, 2, 2, 2),),
    ),
    "derivative of a transposed convolution": (
        lambda x, w, b: slope(lambda y: F.conv_transpose1d(y, w, b, stride=2).tanh(), x),
        (2, 4),
        ((2, 3, 3), (3,)),
    ),
    "derivative of a layer norm": (
        lambda x, w, b: slope(lambda y: F.layer_norm(y, (3,), w, b).tanh(), x),
        (2, 3),
        ((3,), (3,)),
    ),
    "derivative of a layer norm of two dimensions": (
        lambda x, w: slope(lambda y: F.layer_norm(y, (2, 3), w).tanh(), x),
        (2, 3),
        ((2, 3),),
    ),
    "derivative of a group norm": (
        lambda x, w, b: slope(lambda y: F.group_norm(y, 2, w, b).tanh(), x),
        (4, 3),
        ((4,), (4,)),
    ),
    "derivative of a batch norm in eval mode": (
        lambda x, w, b: slope(lambda y: F.batch_norm(y, numbers(3), numbers(3).abs() + 1, w, b).tanh(), x),
        (3, 2),
        ((3,), (3,)),
    ),
    "derivative of a PReLU": (lambda x, w: slope(lambda y: F.prelu(y, w) ** 2, x), (3, 4), ((3,),)),
    "derivative of an RMS norm": (lambda x, w: slope(lambda y: F.rms_norm(y, (3,), w).tanh(), x), (2, 3), ((3,),)),
    # Complex arithmetic inside.
    "complex scale": (
        lambda x, w: torch.view_as_real(torch.fft.rfft(x) * torch.view_as_complex(w)).flatten(1),
        (4,),
        ((3, 2),),
    ),
    "Fourier layer": (
        lambda x, w: torch.fft.irfft(torch.einsum("bik,iok->bok", torch.fft.rfft(x), torch.view_as_complex(w)), n=4),
        (2, 4),
        ((2, 3, 3, 2),),
    ),
}


def samples_of(z: Tensor, by: Grouping = "samples") -> Samples:
    """Return the first dimension's entries as samples, or each entry as a sample of its own."""
    count = len(z) if by == "samples" else z.numel()
    return Samples((z,), torch.arange(z.numel()).view(count, -1))


def built(name: str) -> tuple[Tensor, list[Tensor]]:
    """Return an operation's result and its parameters; a nonlinear operation follows."""
    operation, shape, shapes = OPERATIONS[name]
    x = numbers(M, *shape, shift=0.5)
    params = [(0.7 * numbers(*own, shift=1.0 + i)).requires_grad_() for i, own in enumerate(shapes)]
    return torch.sin(operation(x, *params) + 0.3), params


def uses_in(z: Tensor, params: Sequence[Tensor], by: Grouping = "samples") -> list[Use]:
    return uses_of(samples_of(z, by), [torch.autograd.graph.get_gradient_edge(p).node for p in params])


def rows_behind(use: Use, contributions: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Return contributions to a use's operand as contributions to the parameters, sample by sample."""
    node, number = use.target
    shape = node._input_metadata[number].shape
    rows = []
    for one in contributions:
        found = torch.autograd.grad(
            [GradientEdge(node, number)],  # type: ignore[list-item]
            params,
            [one.view(shape)],
            retain_graph=True,
            allow_unused=True,
        )
        flat = [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]
        rows.append(torch.cat([g.reshape(-1) for g in flat]))
    return torch.stack(rows)


def worst(found: Tensor, true: Tensor) -> float:
    """Return the largest error of a row, relative to the largest row."""
    return float((found - true).norm(dim=1).max() / true.norm(dim=1).max())


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Build the operations on a device."""
    monkeypatch.setitem(globals(), "INDEX", INDEX.to(request.param))
    with torch.device(request.param):
        yield


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("by", ["samples", "entries"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_contributions_are_each_samples_gradient(name: str, by: Grouping) -> None:
    z, params = built(name)
    samples = samples_of(z, by)
    count = samples.count
    values = numbers(count, samples.columns, shift=2.0)
    found = torch.zeros(count, sum(p.numel() for p in params), dtype=torch.float64)
    for use in uses_in(z, params, by):
        with torch.no_grad():
            contribution = contribution_of(use, samples.gradients(values, use.edges))
            rows = dense(contribution, count)
        found += rows_behind(use, rows, params)
    along = [torch.where(torch.arange(count)[:, None] == i, values, 0).view(z.shape) for i in range(count)]
    gradients = [torch.autograd.grad([z], params, [one], retain_graph=True) for one in along]
    true = torch.stack([torch.cat([g.reshape(-1) for g in one]) for one in gradients])
    assert worst(found, true) <= 1e-12


@pytest.mark.parametrize("kind", ["CudnnBatchNorm", "MiopenBatchNorm", "FusedRmsNorm"])
def test_kernels_that_only_a_gpu_has_contribute_as_the_cpus(kind: str) -> None:
    """A stand-in with the fields that the kernel's node saves."""
    x, mean, variance = numbers(M, 3), numbers(3, shift=1.0), numbers(3, shift=2.0).abs() + 1
    w, b = (numbers(3, shift=shift).requires_grad_() for shift in (3.0, 4.0))
    g, owners = numbers(M, 3, shift=5.0), torch.arange(M)[:, None].expand(M, 3)
    if kind == "FusedRmsNorm":
        z = F.rms_norm(x, (3,), w, eps=1e-2)
        node = SimpleNamespace(_saved_input=x, _saved_result1=(x.square().mean(1, keepdim=True) + 1e-2).rsqrt())
    else:
        z = F.batch_norm(x, mean, variance, w, b, eps=1e-2)
        saved = {"_saved_running_mean": mean, "_saved_running_var": variance, "_saved_epsilon": 1e-2}
        node = SimpleNamespace(_saved_input=x, _saved_training=False, **saved)
        assert type(z.grad_fn).__name__ == "NativeBatchNormBackward0"
    rule = module._RULES[kind]
    for slot, p in ((1, w), (2, b)):
        contribution = rule(node, slot, g, owners, p.shape)
        if kind == "FusedRmsNorm" and slot == 2:
            assert contribution is None
            continue
        assert contribution is not None
        true = torch.stack(
            [torch.autograd.grad(one, p, along, retain_graph=True)[0] for one, along in zip(z, g, strict=True)]
        )
        torch.testing.assert_close(dense(contribution, M), true, rtol=1e-12, atol=1e-12)
    assert rule(node, 0, g, owners, x.shape) is None


@pytest.mark.parametrize("kind", ["CudnnBatchNorm", "MiopenBatchNorm", "FusedRmsNorm", "NativeBatchNorm"])
def test_nodes_of_those_kernels_save_the_fields(kind: str) -> None:
    names = {"FusedRmsNorm": ["input", "result1"], "NativeBatchNorm": ["input", "running_mean", "running_var", "eps"]}
    node = getattr(torch._C._functions, f"{kind}Backward0", None)
    if node is None:
        pytest.skip(f"this torch has no {kind}")
    for name in names.get(kind, ["input", "running_mean", "running_var", "epsilon", "training", "result1", "result2"]):
        assert f"_saved_{name}" in vars(node)


def parts_of(name: str) -> list[tuple[str, Contribution]]:
    """Return the kinds of an operation's uses and their contributions."""
    z, params = built(name)
    ones, samples, uses = torch.ones(M, z.numel() // M, dtype=torch.float64), samples_of(z), uses_in(z, params)
    with torch.no_grad():
        return [
            (
                kind_of(use.node),
                contribution_of(use, samples.gradients(ones, use.edges)),
            )
            for use in uses
        ]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("linear", {"Addmm": [Outer, Whole]}),
        ("linear of sequences", {"Addmm": [Outer, Whole]}),
        ("matmul", {"Mm": [Outer]}),
        ("matmul with the parameter on the left", {"Mm": [Outer]}),
        ("bmm with a weight of each head", {"Bmm": [Whole]}),
        ("mv with a matrix", {"Mv": [Whole] * M}),
        ("dot", {"Dot": [Whole] * M}),
        ("conv2d groups", {"Convolution": [Whole, Whole]}),
        ("conv transposed 2d", {"Convolution": [Whole, Whole]}),
        ("embedding with padding", {"Embedding": [Spread]}),
        ("embedding bag with padding", {"EmbeddingBag": [Spread]}),
        ("index", {"Index": [Spread]}),
        ("bias", {"Add": [Whole]}),
        ("bias of a channel", {"Add": [Spread]}),
        ("subtraction", {"Sub": [Whole]}),
        ("scale", {"Mul": [Whole]}),
        ("scale of a number", {"Mul": [Whole]}),
        ("division straight", {"Div": [Whole]}),
        ("expanded parameter", {"Expand": [Whole]}),
        ("layer norm", {"NativeLayerNorm": [Whole, Whole]}),
        ("group norm of images", {"NativeGroupNorm": [Whole, Whole]}),
        ("batch norm in eval mode", {"NativeBatchNorm": [Whole, Whole]}),
        ("prelu", {"PreluKernel": [Spread]}),
        ("derivative of a convolution", {"ConvolutionBackward": [Whole], "Convolution": [Whole]}),
        ("derivative of a layer norm", {"NativeLayerNormBackward": [Whole, Whole], "NativeLayerNorm": [Whole, Whole]}),
    ],
)
def test_an_operation_with_a_rule_is_not_differentiated_sample_by_sample(
    name: str, kinds: dict[str, Sequence[type]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(module, "_by_node")
    found: dict[str, list[type]] = {}
    for kind, contribution in parts_of(name):
        found.setdefault(kind, []).append(type(contribution))
    assert {kind: sorted(map(str, types)) for kind, types in found.items()} == {
        kind: sorted(map(str, types)) for kind, types in kinds.items()
    }


def test_rows_without_a_gradient_contribute_nothing() -> None:
    left, right = numbers(4, 2), numbers(4, 3, shift=1.0)
    there = torch.tensor([1, -1, 1, 0])
    rows = torch.stack(
        [
            torch.outer(left[3], right[3]).reshape(-1),
            sum(torch.outer(left[i], right[i]).reshape(-1) for i in (0, 2)),  # type: ignore[arg-type]
            torch.zeros(6, dtype=torch.float64),
        ]
    )
    torch.testing.assert_close(dense(Outer(left, right, there), 3), rows)
    torch.testing.assert_close(dense(Whole(left, there), 3), torch.stack([left[3], left[0] + left[2], 0 * left[0]]))
    spread = Spread(torch.tensor([1.0, 2.0, 4.0, 8.0]), there, torch.tensor([1, 0, 1, 0]), 2)
    torch.testing.assert_close(dense(spread, 3), torch.tensor([[8.0, 0.0], [0.0, 5.0], [0.0, 0.0]]))


def test_rows_are_put_beside_each_other_by_sample() -> None:
    left, right = numbers(4, 2), numbers(4, 3, shift=1.0)
    one, other = by_sample(Outer(left, right, torch.tensor([1, 1, -1, 0])), 3)
    assert one.shape == (3, 2, 2) and other.shape == (3, 2, 3)
    torch.testing.assert_close(one[0, 0], left[3])
    assert torch.equal(one[1], left[:2]) and torch.equal(other[1], right[:2])
    assert not bool(one[2].any()) and not bool(other[2].any())
    one, other = by_sample(Outer(left, right, torch.full((4,), -1)), 3)
    assert one.shape == (3, 1, 2) and not bool(one.any()) and not bool(other.any())


def test_a_module_with_a_padding_row_gives_it_nothing() -> None:
    layer = nn.Embedding(4, 3, padding_idx=0, dtype=torch.float64)
    z = torch.sin(layer(INDEX)).flatten(1)
    (use,) = uses_in(z, [layer.weight])
    with torch.no_grad():
        found = contribution_of(
            use,
            samples_of(z).gradients(torch.ones(M, 9, dtype=torch.float64), use.edges),
        )
        rows = dense(found, M).view(M, 4, 3)
    assert not bool(rows[:, 0].any()) and bool(rows[:, 1:].any())
