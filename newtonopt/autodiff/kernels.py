"""Kernels that can be differentiated twice."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Run what follows with the kernels that can be differentiated twice.

    The fused attention kernels have no double backward, nor have graphs compiled by an ahead-of-time backend, and that
    of `torch._weight_norm` is wrong. No function mode does it: `torch.autograd.grad` hides those from a checkpoint.
    """
    cuda = torch.backends.cuda
    before = cuda.math_sdp_enabled(), *(enabled() for enabled, _ in _FUSED_ATTENTION)
    # As `sdpa_kernel(MATH)` does it, which takes too long for every derivative.
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


# The module of this name is hidden behind its function.
_WITH_WEIGHT_NORM = (torch, sys.modules["torch.nn.utils.weight_norm"])


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`torch._weight_norm`, whose own double backward takes the norms as constants."""
    return v * (g / torch.norm_except_dim(v, 2, dim))
