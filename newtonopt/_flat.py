"""Parameters and gradients as one flat vector, in the order of the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def flatten(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """One vector of shape `(n,)` from tensors shaped as `like`; None (a parameter that is not used) counts as zeros."""
    pieces = [
        (torch.zeros_like(p) if t is None else t).reshape(-1).to(p.dtype) for t, p in zip(tensors, like, strict=True)
    ]
    return torch.cat(pieces)


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of `vector`, one for each tensor of `like` and of its shape."""
    pieces = torch.split(vector, [p.numel() for p in like])
    return [piece.view(p.shape) for piece, p in zip(pieces, like, strict=True)]


def check_parameters(params: Sequence[Tensor]) -> None:
    """Refuse parameters that no flat vector can hold.

    Raises:
        ValueError: No parameters, or more than one device or dtype among them, or a dtype that curvature cannot be
            computed in.
    """
    if not params:
        raise ValueError(
            "params is empty, or nothing in it requires a gradient: give at least one tensor with requires_grad=True, "
            "such as those of model.parameters()."
        )
    for what, values in (("devices", {str(p.device) for p in params}), ("dtypes", {str(p.dtype) for p in params})):
        if len(values) > 1:
            raise ValueError(
                f"The parameters are on two {what} or more, {', '.join(sorted(values))}: curvature couples all "
                "parameters, so they must share one. Move the model with model.to(...) or give the parameters to "
                "separate optimizers."
            )
    if params[0].dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"The parameters are {params[0].dtype}: newtonopt needs float32 or float64 parameters. Keep the weights in "
            'float32, and for speed use bfloat16 autocast (precision="bf16-mixed" in Lightning).'
        )


def trained_parameters(params: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The parameters that require a gradient, each once, checked.

    Raises:
        TypeError: Something else than an iterable of tensors, such as a module or a single tensor.
        ValueError: As `check_parameters`.
    """
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            f"params is a {type(params).__name__}: give an iterable of tensors, such as model.parameters()."
        )
    given = tuple(params)
    for p in given:
        if not isinstance(p, Tensor):
            raise TypeError(
                f"params holds a {type(p).__name__}: give tensors only, such as those of model.parameters()."
            )
    trained = tuple(dict.fromkeys(p for p in given if p.requires_grad))
    check_parameters(trained)
    return trained
