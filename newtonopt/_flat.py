"""Parameters and gradients as one flat vector, in the order of the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from newtonopt._sharded import Sharded
from newtonopt._shards import as_parameters, check_sharding, is_sharded, layout_of, local_part


def flat_dtype(params: Sequence[Tensor]) -> torch.dtype:
    """That of the flat vectors: float64 if any parameter is, else float32 (also for bfloat16 parameters)."""
    return torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32


def flatten(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """One vector of shape `(n,)` from tensors shaped as `like`; None (a parameter that is not used) counts as zeros.

    Of sharded parameters each process holds in it what it holds of them.
    """
    dtype = flat_dtype(like)
    pieces = [
        (torch.zeros_like(local_part(p)) if t is None else local_part(t)).reshape(-1).to(dtype)
        for t, p in zip(tensors, like, strict=True)
    ]
    return Sharded(torch.cat(pieces), layout_of(like)) if is_sharded(like) else torch.cat(pieces)


def local_pieces(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of what this process holds of a flat vector, or of columns `(n, k)`: one for each of `like`."""
    whole = vector.local if isinstance(vector, Sharded) else vector
    return list(torch.split(whole, [local_part(p).numel() for p in like]))


def flatten_rows(tensors: Sequence[Tensor | None], like: Sequence[Tensor], count: int) -> Tensor:
    """Rows `(count, n)` from tensors shaped as `like` after a first dimension of `count`; None counts as zeros."""
    dtype = flat_dtype(like)
    pieces = [
        (p.new_zeros(count, p.numel()) if t is None else t.reshape(count, -1)).to(dtype)
        for t, p in zip(tensors, like, strict=True)
    ]
    return torch.cat(pieces, dim=1)


def unflatten_rows(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """For each of `like` a tensor of its shape after a first dimension, that of the rows `(k, n)`."""
    pieces = rows.split([p.numel() for p in like], dim=1)
    return [piece.reshape(len(rows), *p.shape).to(p.dtype) for piece, p in zip(pieces, like, strict=True)]


def add_flat(vector: Tensor, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> None:
    """Add tensors shaped as `like` to the flat `vector` in place; None counts as zeros."""
    for piece, t in zip(local_pieces(vector, like), tensors, strict=True):
        if t is not None:
            piece.add_(local_part(t).reshape(-1))


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """One tensor for each of `like`, of its shape and dtype, sharded as it is: views where the dtypes agree."""
    parts = [
        piece.view(local_part(p).shape).to(p.dtype) for piece, p in zip(local_pieces(vector, like), like, strict=True)
    ]
    return as_parameters(parts, like) if is_sharded(like) else parts


def place(vector: Tensor, params: Sequence[Tensor]) -> None:
    """Write a flat vector into the parameters, unseen by autograd, which takes them for unchanged."""
    with torch.no_grad():
        for p, piece in zip(params, local_pieces(vector, params), strict=True):
            part = local_part(p).data
            part.copy_(piece.view(part.shape))


def put_back(vector: Tensor, params: Sequence[Tensor]) -> bool:
    """Write a flat vector into the parameters where they are no longer equal to it; returns whether that was so."""
    pairs = [(local_part(p).detach(), piece) for p, piece in zip(params, local_pieces(vector, params), strict=True)]
    changed = any(_differs(part, piece.view(part.shape).to(part.dtype)) for part, piece in pairs)
    if changed:
        place(vector, params)
    return changed


def _differs(a: Tensor, b: Tensor) -> bool:
    # The first is quick, and does not take NaN for equal to itself.
    return not torch.equal(a, b) and bool(((a != b) & ~(a.isnan() & b.isnan())).any())


def check_parameters(params: Sequence[Tensor]) -> None:
    """Refuse parameters that no flat vector can hold.

    Raises:
        ValueError: No parameters, one given twice or made under `torch.inference_mode`, several devices,
            a dtype that curvature cannot be computed in, or parameters shared out among processes other than by
            `fully_shard`.
    """
    if not params:
        raise ValueError(
            "params is empty, or nothing in it requires a gradient: give at least one tensor with requires_grad=True, "
            "such as those of model.parameters()."
        )
    if any(nn.parameter.is_lazy(p) for p in params):
        raise ValueError(
            "A parameter is uninitialized, as a lazy module's are until it has seen data: run the model once on a "
            "batch, and then give its parameters."
        )
    if len({id(p) for p in params}) < len(params):
        raise ValueError(
            "A parameter is given twice, and the step would count it as two: give each one once, as model.parameters() "
            "gives tied ones."
        )
    if any(p.is_inference() for p in params):
        raise ValueError(
            "A parameter was made under torch.inference_mode, and has no derivatives: make the model outside of it, or "
            "copy it outside with copy.deepcopy(model)."
        )
    devices = {str(p.device) for p in params}
    if len(devices) > 1:
        raise ValueError(
            f"The parameters are on several devices, {', '.join(sorted(devices))}: curvature couples all parameters, "
            "so they must share one. Move the model with model.to(...) or give the parameters to separate optimizers."
        )
    check_sharding(params)
    for p in params:
        if p.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(
                f"A parameter is {p.dtype}: newtonopt needs float32, float64 or bfloat16 parameters. Keep the weights "
                'in float32, and for speed use bfloat16 autocast (precision="bf16-mixed" in Lightning).'
            )


def listed(name: str, items: Any, such_as: str) -> list[Any]:
    """All of an iterable; a single tensor is none.

    Raises:
        TypeError: Something else.
    """
    if isinstance(items, Tensor) or not isinstance(items, Iterable):
        raise TypeError(f"{name} is a {type(items).__name__}: give an iterable, such as {such_as}.")
    return list(items)


def trained_parameters(params: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The parameters that require a gradient, each once, checked.

    Raises:
        TypeError: Something else than an iterable of tensors, such as a module or a single tensor.
        ValueError: As `check_parameters`.
    """
    given = listed("params", params, "model.parameters()")
    for p in given:
        if not isinstance(p, Tensor):
            raise TypeError(
                f"params holds a {type(p).__name__}: give tensors only, such as those of model.parameters()."
            )
    trained = tuple(dict.fromkeys(p for p in given if p.requires_grad))
    check_parameters(trained)
    return trained
