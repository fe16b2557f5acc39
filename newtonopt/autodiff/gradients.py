"""Derivatives by autograd, once and twice: with kernels that allow it, and errors that say what to do."""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, Node

from newtonopt.autodiff.graph import reaches
from newtonopt.lightning import fabric_backward
from newtonopt.vectors.flat import unflatten
from newtonopt.vectors.sharded import gradients_by_backward, is_sharded
from newtonopt.vectors.subclasses import plain

Gradients = tuple[Tensor | None, ...]


class NoSecondDerivativeError(RuntimeError):
    """An operation of the model cannot be differentiated twice."""


def grad(
    of: Tensor | Sequence[Tensor],
    by: Sequence[Tensor],
    along: Sequence[Tensor] | None = None,
    *,
    keep: bool,
    batched: bool = False,
) -> Gradients:
    """Return `along' d of / d by`, for sharded parameters its mean over the processes.

    Args:
        of: Differentiated tensors.
        by: Tensors by which they are differentiated.
        along: Vector for each of `of`; None (default): ones, for scalars.
        keep: Whether the graph stays; without it the graph is emptied.
        batched: Whether each of `along` holds several vectors, stacked in a first dimension, as the results then do.
            Default False.

    Raises:
        NoSecondDerivativeError: The graph of a first derivative ends in an operation without a second one.
        RuntimeError: The graph is gone, or something in it was changed in place.
    """
    with _differentiating(of):
        if is_sharded(by):
            return gradients_by_backward(of, by, along, keep=keep)
        found = torch.autograd.grad(of, by, along, retain_graph=keep, allow_unused=True, is_grads_batched=batched)
    return tuple(plain(g) for g in found)


def grad_of_edge(edge: GradientEdge, by: Sequence[Tensor], along: Tensor) -> Gradients:
    """Return `along' d t / d by`, with t the tensor that an edge of a live graph belongs to. The graph stays.

    Raises:
        NoSecondDerivativeError: An operation has no derivative.
    """
    with _differentiating(()):
        found = torch.autograd.grad([edge], by, [along], retain_graph=True, allow_unused=True)
    return tuple(plain(g) for g in found)


def gradient_of(loss: Tensor, params: Sequence[Tensor], *, keep: bool) -> Gradients:
    """Return the gradient of a loss, which training needs too.

    Raises:
        RuntimeError: The graph is gone or was changed in place, or an operation has no derivative at all.
    """
    try:
        return grad(loss, params, keep=keep)
    except NoSecondDerivativeError as error:
        raise RuntimeError(f"The loss has no gradient, so backward fails too: {error.__cause__}") from error


def grad_with_graph(
    of: Tensor | Sequence[Tensor], by: Sequence[Tensor], along: Sequence[Tensor] | None = None
) -> Gradients:
    """Return `along' d of / d by` with a graph of its own, to be differentiated again.

    Raises:
        NoSecondDerivativeError: The result depends on `by` through an operation without a second derivative, which
            autograd would silently leave out of the next differentiation.
    """
    with _differentiating(of):
        found = torch.autograd.grad(of, by, along, create_graph=True, allow_unused=True)
        gradients: Gradients = tuple(plain(g) for g in found)
    if reaches([g.grad_fn for g in gradients if g is not None], _is_dead_end):
        raise NoSecondDerivativeError(
            "An operation of the model has no second derivative (it is marked once_differentiable, or PyTorch has no "
            "formula for it), so exact curvature products are not available."
        )
    return gradients


def _is_dead_end(node: Node) -> bool:
    return node.name() in ("torch::autograd::Error", "torch::autograd::NotImplemented")


def _takes_nested(node: Node) -> bool:
    return any(of.is_nested_tensor for of in node._input_metadata)


@contextmanager
def _differentiating(of: Tensor | Sequence[Tensor]) -> Iterator[None]:
    """Differentiate what follows under `differentiable_kernels`, and translate errors.

    A checkpoint computes its part of the forward pass again, and must meet the kernels that it met the first time.
    """
    try:
        with fabric_backward(), differentiable_kernels(), torch.enable_grad():
            yield
    except RuntimeError as error:  # NotImplementedError is one
        text = str(error)
        if isinstance(error, NotImplementedError) or _WITHOUT.search(text):
            raise NoSecondDerivativeError(
                "An operation of the model has no second derivative, so exact curvature products are not available: "
                f"{text}"
            ) from error
        if "modified by an inplace operation" in text:
            raise RuntimeError(CHANGED) from error
        if reaches([t.grad_fn for t in ([of] if isinstance(of, Tensor) else of)], _takes_nested):
            raise NoSecondDerivativeError(
                f"An operation on nested tensors has no second derivative in PyTorch: {text}"
            ) from error
        if "backward through the graph a second time" in text:
            raise RuntimeError(
                "The graph of the loss was freed before the closure called loss.backward(), either by a backward "
                "outside the closure or by torch.autograd.backward(loss), which newtonopt does not see. Call the "
                "model, the loss function and loss.backward() inside the closure."
            ) from error
        raise


# Words in which torch and its extensions say that there is no derivative.
_WITHOUT = re.compile(
    r"derivative for .* not implemented|differentiate twice|once_differentiable|double.?backward|"
    r"not (twice differentiable|differentiable twice)|no autograd formula was registered",
    re.IGNORECASE | re.DOTALL,
)
CHANGED = (
    "The parameters, or another tensor that the loss was computed from, changed after this evaluation was made, for "
    "example by an optimizer step or by a closure that clamps weights. Its products are no longer defined. Call "
    "evaluate again."
)


@contextmanager
def forward_mode(params: Sequence[Tensor], v: Tensor) -> Iterator[None]:
    """Run what follows in forward mode, with the pieces of `v` as the parameters' tangents."""
    _load_forward_mode()
    with forward_ad.dual_level():
        with torch.no_grad():
            for p, piece in zip(params, unflatten(v, params), strict=True):
                # An operation in place gives the parameter itself a tangent, which ends with the level; its value and
                # its version stay.
                with torch.autograd._unsafe_preserve_version_counter(p):  # type: ignore[attr-defined]
                    p.copy_(forward_ad.make_dual(p.detach().clone(), piece))
        yield


@functools.cache
def _load_forward_mode() -> None:
    """Use forward mode once: torch compiles some of its rules then, which raises a DeprecationWarning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros((), device="cpu"), torch.zeros((), device="cpu"))


# Kernels that can be differentiated twice.


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Run what follows with the kernels that can be differentiated twice.

    The fused attention kernels and graphs compiled by an ahead-of-time backend have no double backward, and the double
    backward of `torch._weight_norm` is wrong. A function mode cannot replace them: `torch.autograd.grad` hides it from
    a checkpoint.
    """
    cuda = torch.backends.cuda
    before = cuda.math_sdp_enabled(), *(enabled() for enabled, _ in _FUSED_ATTENTION)
    # Like `sdpa_kernel(MATH)`, which takes too long for every derivative.
    cuda.enable_math_sdp(True)
    for _, enable in _FUSED_ATTENTION:
        enable(False)
    norms = [(vars(module), vars(module)["_weight_norm"]) for module in _WITH_WEIGHT_NORM]
    for names, _ in norms:
        names["_weight_norm"] = _weight_norm
    try:
        if "torch._dynamo" in sys.modules:  # nothing can be compiled before it is imported, and importing it is slow
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            yield
    finally:
        for names, original in norms:
            names["_weight_norm"] = original
        cuda.enable_math_sdp(before[0])
        for (_, enable), enabled in zip(_FUSED_ATTENTION, before[1:], strict=True):
            enable(enabled)


_FUSED_ATTENTION = (
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)


# The function of this name hides the module.
_WITH_WEIGHT_NORM = (torch, sys.modules["torch.nn.utils.weight_norm"])


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Replace `torch._weight_norm`, whose own double backward takes the norms as constants."""
    return v * (g / torch.norm_except_dim(v, 2, dim))
