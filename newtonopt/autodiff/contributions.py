"""Contributions of single samples to the gradient of an operand, from the gradient of an operation's result.

Each rule is the derivative of one operation by one operand, without the sum over samples that autograd takes. There
are three kinds of results:

- `Outer`: matrix products; the contribution of a row is an outer product, which is not formed.
- `Whole`: each row is the contribution itself, such as that to a bias or a convolution's weight.
- `Spread`: each entry of the result contributes to one entry of the operand, as in pointwise operations.

An operation without a rule is differentiated once for each sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from newtonopt.autodiff.graph import kind_of
from newtonopt.autodiff.samples import Use
from newtonopt.vectors.subclasses import plain


@dataclass(frozen=True, eq=False)
class Outer:
    """Row `r` contributes `outer(left[r], right[r])`, `(p, q)`.

    Attributes:
        left: `(rows, p)`.
        right: `(rows, q)`.
        samples: Number of the sample of each row, -1 where the contribution is zero.
    """

    left: Tensor
    right: Tensor
    samples: Tensor


@dataclass(frozen=True, eq=False)
class Whole:
    """Row `r` contributes `values[r]`, `(rows, size)`; `samples` as in `Outer`."""

    values: Tensor
    samples: Tensor


@dataclass(frozen=True, eq=False)
class Spread:
    """Entry `e` contributes `values[e]` to entry `index[e]` of an operand with `size` entries; one dimension each."""

    values: Tensor
    samples: Tensor
    index: Tensor
    size: int


Contribution = Outer | Whole | Spread


def contribution_of(use: Use, gradients: Sequence[Tensor | None]) -> Contribution:
    """Return the samples' contributions to the gradient of a use's operand.

    Args:
        use: The use.
        gradients: Gradients of the operation's results, along any values; None where there is none.
    """
    node: Any = use.node
    operand = use.target[0]._input_metadata[use.target[1]]
    shape = torch.Size(operand.shape)
    g, labels = gradients[0], use.results[0]
    alone = all(other is None for other in gradients[1:])
    if alone and g is not None and labels is not None and not g.is_complex():
        if node is use.target[0]:
            return _spread(g, labels.samples, shape)
        rule = _RULES.get(kind_of(node))
        found = None if rule is None else rule(_Fields(node), use.slot, g, labels.samples, shape)
        if found is not None:
            return found
    samples = [None if one is None else one.samples for one in use.results]
    return _by_node(node, use.slot, gradients, samples, shape, operand.dtype)


@dataclass(frozen=True)
class _Fields:
    """The fields of a node, in which tensors of users' own classes are plain."""

    node: Any

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.node, name)
        if isinstance(value, tuple):
            return tuple(plain(one) if isinstance(one, Tensor) else one for one in value)
        return plain(value) if isinstance(value, Tensor) else value


# Matrix products.


def _matrix_product(
    left: Tensor | None, right: Tensor | None, slot: int, g: Tensor, samples: Tensor
) -> Contribution | None:
    """Return the contributions to the first (slot 0) or second (slot 1) factor of `left @ right`."""
    if slot == 1:
        rows = common(samples)
        return None if rows is None or left is None else Outer(left, g, rows)
    rows = common(samples.mT)
    return None if rows is None or right is None else Outer(g.mT, right.mT, rows)


def _mm(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    return _matrix_product(node._saved_self, node._saved_mat2, slot, g, samples)


def _addmm(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    if slot == 0:
        return _spread(g * node._saved_beta, samples, shape)
    return _matrix_product(node._saved_mat1, node._saved_mat2, slot - 1, g * node._saved_alpha, samples)


def _bmm(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    left, right = node._saved_self, node._saved_mat2
    pairs = [
        _matrix_product(None if left is None else left[i], None if right is None else right[i], slot, g[i], samples[i])
        for i in range(len(g))
    ]
    if len(pairs) == 1:
        return pairs[0]
    count = int(samples.max()) + 1
    wholes = [None if pair is None else dense(pair, count) for pair in pairs]
    if any(whole is None for whole in wholes):
        return None
    values = torch.cat([whole for whole in wholes if whole is not None], 1)
    return Whole(values, torch.arange(count, device=g.device))


def _mv(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    if slot == 0:
        return _spread(g[:, None] * node._saved_vec, samples[:, None].expand(shape), shape)
    return Whole(node._saved_self * g[:, None], samples)


def _dot(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    other = node._saved_tensor if slot == 0 else node._saved_self
    return Whole((other * g)[None], samples.reshape(1))


# Convolutions and lookups.

# Samples whose convolutions are differentiated at once.
_AT_ONCE = 256


def _convolution(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    if slot == 2:
        return _spread(g.movedim(1, -1), samples.movedim(1, -1), shape)
    return _kernel(node, g, node._saved_input, samples) if slot == 1 else None


def _convolution_backward(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    # The gradient by the input is bilinear in that by the result and in the kernel, as the convolution itself is.
    return _kernel(node, node._saved_grad_output, g, samples) if slot == 2 else None


def _kernel(node: Any, out: Tensor, given: Tensor, samples: Tensor) -> Contribution | None:
    """Return the contributions to a kernel, for the gradient `out` of a convolution of `given`."""
    rows = common(samples)
    if rows is None:
        return None
    weight = node._saved_weight
    places = (node._saved_stride, node._saved_padding, node._saved_dilation)
    settings = (*places, node._saved_transposed, node._saved_output_padding, node._saved_groups, (False, True, False))

    def of_one(out: Tensor, given: Tensor) -> Tensor:
        gradient: Tensor = torch.ops.aten.convolution_backward(out[None], given[None], weight, None, *settings)[1]
        return gradient

    values = torch.func.vmap(of_one, chunk_size=_AT_ONCE)(out, given)
    return Whole(values.reshape(len(values), -1), rows)


def _embedding(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    if node._saved_scale_grad_by_freq or node._saved_sparse:
        return None
    rows = node._saved_indices
    padding = node._saved_padding_idx
    index = torch.arange(math.prod(shape), device=g.device).view(shape)[rows]
    values = torch.where((rows == padding)[..., None], 0, g)
    return Spread(values.reshape(-1), samples.reshape(-1), index.reshape(-1), math.prod(shape))


def _embedding_bag(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    is_sum, is_mean = node._saved_mode == 0, node._saved_mode == 1
    counted = node._saved_per_sample_weights is None and not (node._saved_scale_grad_by_freq or node._saved_sparse)
    if slot != 0 or not counted or not (is_sum or is_mean):
        return None
    words, offsets = node._saved_indices.reshape(-1), node._saved_offsets.contiguous()
    bags = torch.searchsorted(offsets, torch.arange(len(words), device=g.device, dtype=offsets.dtype), right=True) - 1
    counts = (words != node._saved_padding_idx).to(g.dtype)
    if is_mean:
        counts = counts / counts.new_zeros(len(offsets)).index_add(0, bags, counts).clamp(min=1)[bags]
    index = torch.arange(math.prod(shape), device=g.device).view(shape)[words]
    values = g[bags] * counts[:, None]
    return Spread(values.reshape(-1), samples[bags].reshape(-1), index.reshape(-1), math.prod(shape))


def _index(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    indices = tuple(slice(None) if i is None else i for i in node._saved_indices)
    index = torch.arange(math.prod(shape), device=g.device).view(shape)[indices]
    return Spread(g.reshape(-1), samples.reshape(-1), index.reshape(-1), math.prod(shape))


# Pointwise operations, whose operands may be broadcast.


def _add(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    return _spread(g if slot == 0 else g * node._saved_alpha, samples, shape)


def _sub(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    return _spread(g if slot == 0 else -g * node._saved_alpha, samples, shape)


def _mul(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    return _spread(g * (node._saved_other if slot == 0 else node._saved_self), samples, shape)


def _div(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    if node.name() not in ("DivBackward0", "DivBackward1"):
        return None  # a rounded quotient, which has another derivative
    inverse = g / node._saved_other
    return _spread(inverse if slot == 0 else -inverse * (node._saved_self / node._saved_other), samples, shape)


def _expand(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    return _spread(g, samples, shape)


def _prelu(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    return _spread(g * node._saved_self.clamp(max=0), samples, shape) if slot == 1 else None


# Affine parts of normalisations.


def _layer_norm(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    if slot == 2:
        return _spread(g, samples, shape)
    normal = (node._saved_input - node._saved_result1) * node._saved_result2
    return _spread(g * normal, samples, shape) if slot == 1 else None


def _layer_norm_backward(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    if slot == 5:
        return _spread(torch.zeros_like(g), samples, shape)  # the input's gradient does not depend on the bias
    dims = tuple(range(-len(node._saved_normalized_shape), 0))
    owners = samples.amax(dims, keepdim=True).expand_as(samples)
    if slot != 4 or bool(((samples != owners) & (samples >= 0)).any()):
        return None
    # With x the normalised input: dx = rstd (w dy - mean(w dy) - x mean(x w dy)), and so the derivative by w along g.
    normal = (node._saved_input - node._saved_mean) * node._saved_rstd
    centred = g - g.mean(dims, keepdim=True) - normal * (g * normal).mean(dims, keepdim=True)
    return _spread(node._saved_grad_out * node._saved_rstd * centred, owners, shape)


def _group_norm(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    if slot == 2:
        return _spread(g.movedim(1, -1), samples.movedim(1, -1), shape)
    if slot == 0:
        return None
    n, groups = node._saved_N, node._saved_group
    grouped = node._saved_input.reshape(n, groups, -1)
    mean, rstd = (t.reshape(n, groups, 1) for t in (node._saved_result1, node._saved_result2))
    normal = ((grouped - mean) * rstd).reshape(g.shape)
    return _spread((g * normal).movedim(1, -1), samples.movedim(1, -1), shape)


def _rms_norm(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    """The kernel on CUDA; elsewhere the norm is computed by pointwise operations."""
    return _spread(g * (node._saved_input * node._saved_result1), samples, shape) if slot == 1 else None


def _native_batch_norm(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    return _batch_norm(node, node._saved_eps, slot, g, samples, shape)


def _vendors_batch_norm(node: Any, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    """The kernels of cuDNN and MIOpen, which take images on a GPU."""
    return _batch_norm(node, node._saved_epsilon, slot, g, samples, shape)


def _batch_norm(node: Any, eps: float, slot: int, g: Tensor, samples: Tensor, shape: torch.Size) -> Contribution | None:
    if slot == 2:
        return _spread(g.movedim(1, -1), samples.movedim(1, -1), shape)
    if slot == 0:
        return None
    if node._saved_training:
        mean, rstd = node._saved_result1, node._saved_result2
    else:
        mean, rstd = node._saved_running_mean, (node._saved_running_var + eps).rsqrt()
    normal = (node._saved_input.movedim(1, -1) - mean) * rstd
    return _spread(g.movedim(1, -1) * normal, samples.movedim(1, -1), shape)


_RULES: dict[str, Callable[[Any, int, Tensor, Tensor, torch.Size], Contribution | None]] = {
    "Mm": _mm,
    "Addmm": _addmm,
    "Bmm": _bmm,
    "Mv": _mv,
    "Dot": _dot,
    "Convolution": _convolution,
    "ConvolutionBackward": _convolution_backward,
    "Embedding": _embedding,
    "EmbeddingBag": _embedding_bag,
    "Index": _index,
    "Add": _add,
    "Sub": _sub,
    "Mul": _mul,
    "Div": _div,
    "Expand": _expand,
    "PreluKernel": _prelu,
    "NativeLayerNorm": _layer_norm,
    "NativeLayerNormBackward": _layer_norm_backward,
    "NativeGroupNorm": _group_norm,
    "NativeBatchNorm": _native_batch_norm,
    "CudnnBatchNorm": _vendors_batch_norm,
    "MiopenBatchNorm": _vendors_batch_norm,
    "FusedRmsNorm": _rms_norm,
}


# Operations without a rule.


def _by_node(
    node: Any,
    slot: int,
    gradients: Sequence[Tensor | None],
    samples: Sequence[Tensor | None],
    shape: torch.Size,
    dtype: torch.dtype,
) -> Contribution:
    """Return the contributions by the operation's own derivative.

    A pointwise operation leaves the sum over the dimensions along which an operand is broadcast to autograd's engine.
    Other operations are differentiated once for each sample, along the gradients of that sample alone.
    """
    given = [(g, s) for g, s in zip(gradients, samples, strict=True) if g is not None and s is not None]
    g, numbers = given[0]
    count = max(int(s.max()) for _, s in given) + 1
    if len(given) == 1 and kind_of(node):
        whole = _derivative(node, slot, gradients)
        if whole is not None and whole.shape == g.shape != shape:
            # Pointwise derivatives of numbers times powers of two are multiplied by the same powers.
            powers = numbers.remainder(_POWERS)
            scaled = _derivative(node, slot, [None if one is None else torch.ldexp(one, powers) for one in gradients])
            if scaled is not None and torch.equal(scaled, torch.ldexp(whole, powers)):
                return _spread(whole, numbers, shape)
    rows = g.new_zeros(count, math.prod(shape), dtype=dtype)
    for number, row in enumerate(rows):
        along = [
            None if one is None or s is None else torch.where(s == number, one, 0)
            for one, s in zip(gradients, samples, strict=True)
        ]
        found = _derivative(node, slot, along)
        if found is not None:
            row.copy_(found.sum_to_size(shape).reshape(-1))
    return Whole(rows, torch.arange(count, device=g.device))


# Powers of two by which samples are told apart: a prime number of them, for samples often come in multiples of two.
_POWERS = 7


def _derivative(node: Any, slot: int, gradients: Sequence[Tensor | None]) -> Tensor | None:
    """Return an operation's own derivative by one of its operands; None where it has none."""
    metadata = node._input_metadata
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        # A Function in Python returns a gradient for each argument, and takes zeros for what has no gradient.
        of = zip(metadata, gradients, strict=True)
        given = [torch.zeros(m.shape, dtype=m.dtype, device=m.device) if g is None else g for m, g in of]
        arguments = [number for number, needed in enumerate(node.needs_input_grad) if needed]
        operands = [number for number, (following, _) in enumerate(node.next_functions) if following is not None]
        found = node.apply(*given)
        slot = arguments[operands.index(slot)]
    else:
        found = node(*gradients)
    one: Tensor | None = found[slot] if isinstance(found, tuple) else found
    return plain(one)


# Rows and entries.


def common(samples: Tensor) -> Tensor | None:
    """Return the sample of each row, `(rows,)`, -1 for a row of zeros; None if a row holds several samples."""
    flat = samples.reshape(len(samples), -1)
    rows = flat.max(1).values if flat.shape[1] else flat.new_full((len(flat),), -1)
    return rows if bool(((flat == rows[:, None]) | (flat < 0)).all()) else None


def _spread(values: Tensor, samples: Tensor, shape: torch.Size) -> Contribution:
    """Return the contributions to an operand of this shape, which is broadcast to that of the values."""
    size = math.prod(shape)
    if shape == values.shape[values.dim() - len(shape) :]:
        rows = common(samples.reshape(-1, size))
        if rows is not None:
            return Whole(values.reshape(-1, size), rows)
    index = torch.arange(size, device=values.device).view(shape).expand(values.shape)
    return Spread(values.reshape(-1), samples.reshape(-1), index.reshape(-1), size)


def dense(contribution: Contribution, count: int) -> Tensor:
    """Return the contributions of so many samples as rows `(count, size)`."""
    if isinstance(contribution, Outer):
        left, right = by_sample(contribution, count)
        return torch.einsum("ntp,ntq->npq", left, right).flatten(1)
    there = contribution.samples >= 0
    if isinstance(contribution, Whole):
        rows = contribution.values.new_zeros(count, contribution.values.shape[1])
        return rows.index_add(0, contribution.samples[there], contribution.values[there])
    flat = contribution.values.new_zeros(count * contribution.size)
    places = contribution.samples * contribution.size + contribution.index
    return flat.index_add(0, places[there], contribution.values[there]).view(count, contribution.size)


def by_sample(outer: Outer, count: int) -> tuple[Tensor, Tensor]:
    """Return both factors as `(count, times, p)` and `(count, times, q)`: each sample's rows, filled up with zeros."""
    samples = outer.samples
    rows = torch.arange(len(samples), device=samples.device)
    if len(samples) == count and torch.equal(samples, rows):
        return outer.left[:, None], outer.right[:, None]
    there = rows[samples >= 0]
    order = there[samples[there].argsort(stable=True)]
    sorted_samples = samples[order]
    counts = torch.bincount(sorted_samples, minlength=count)
    times = int(counts.max()) if len(order) else 1
    first = counts.cumsum(0) - counts
    place = sorted_samples * times + torch.arange(len(order), device=samples.device) - first[sorted_samples]
    factors = []
    for factor in (outer.left, outer.right):
        padded = factor.new_zeros(count * times, factor.shape[1])
        padded[place] = factor[order]
        factors.append(padded.view(count, times, -1))
    return factors[0], factors[1]
