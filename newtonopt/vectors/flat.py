"""Parameters and gradients as one flat vector, in the order of the parameters.

`flatten` and `unflatten` go there and back, and `place` writes a vector into the parameters. `trained_parameters` and
`check_parameters` say which parameters can be one vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from newtonopt.checks import kind_of, listed
from newtonopt.vectors.sharded import Sharded, as_parameters, check_sharding, is_sharded, layout_of, local_part
from newtonopt.vectors.subclasses import is_wrapper


def flat_dtype(params: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype of flat vectors: float64 if any parameter has it, else float32 (also for bfloat16)."""
    return torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32


def flatten(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """Return one vector `(n,)` of tensors shaped as `like`.

    Args:
        tensors: One for each of `like`; None (the gradient of an unused parameter) counts as zeros.
        like: Parameters. If they are sharded, so is the vector: each process holds the entries of its shards.

    Example:
        >>> import torch
        >>> weight, bias = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([5.0, 6.0])
        >>> flatten([weight, None], like=[weight, bias])
        tensor([1., 2., 3., 4., 0., 0.])
    """
    dtype = flat_dtype(like)
    pieces = [
        (torch.zeros_like(local_part(p)) if t is None else local_part(t)).reshape(-1).to(dtype)
        for t, p in zip(tensors, like, strict=True)
    ]
    return Sharded(torch.cat(pieces), layout_of(like)) if is_sharded(like) else torch.cat(pieces)


def local_pieces(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the pieces of a flat vector, or of columns `(n, k)`, that belong to each of `like`, as views.

    If these are sharded, the pieces are this process's shards.
    """
    whole = vector.local if isinstance(vector, Sharded) else vector
    return list(torch.split(whole, [local_part(p).numel() for p in like]))


def flatten_rows(tensors: Sequence[Tensor | None], like: Sequence[Tensor], count: int) -> Tensor:
    """Return rows `(count, n)` of tensors shaped as `like` after a first dimension of `count`; None counts as zeros."""
    dtype = flat_dtype(like)
    pieces = [
        (p.new_zeros(count, p.numel()) if t is None else t.reshape(count, -1)).to(dtype)
        for t, p in zip(tensors, like, strict=True)
    ]
    return torch.cat(pieces, dim=1)


def unflatten_rows(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return a tensor `(k, *shape)` for each of `like` from rows `(k, n)`."""
    pieces = rows.split([p.numel() for p in like], dim=1)
    return [piece.reshape(len(rows), *p.shape).to(p.dtype) for piece, p in zip(pieces, like, strict=True)]


def add_flat(vector: Tensor, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> None:
    """Add tensors shaped as `like` to the flat `vector` in place; None counts as zeros."""
    for piece, t in zip(local_pieces(vector, like), tensors, strict=True):
        if t is not None:
            piece.add_(local_part(t).reshape(-1))


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return one tensor for each of `like`, of its shape and dtype, and sharded as it is; views if the dtypes agree.

    Example:
        >>> import torch
        >>> unflatten(torch.arange(6.0), like=[torch.zeros(2, 2), torch.zeros(2)])
        [tensor([[0., 1.],
                [2., 3.]]), tensor([4., 5.])]
    """
    parts = [
        piece.view(local_part(p).shape).to(p.dtype) for piece, p in zip(local_pieces(vector, like), like, strict=True)
    ]
    return as_parameters(parts, like) if is_sharded(like) else parts


def place(vector: Tensor, params: Sequence[Tensor]) -> None:
    """Write a flat vector into the parameters, hidden from autograd: graphs over them stay valid."""
    with torch.no_grad():
        for p, piece in zip(params, local_pieces(vector, params), strict=True):
            part = local_part(p).data
            part.copy_(piece.view(part.shape))


def put_back(vector: Tensor, params: Sequence[Tensor]) -> Tensor | None:
    """Write a flat vector into the parameters if they are no longer equal to it.

    Returns:
        The parameters before, `(n,)`; None if they were equal.
    """
    pairs = [(local_part(p).detach(), piece) for p, piece in zip(params, local_pieces(vector, params), strict=True)]
    if not _any_differs([(part, piece.view(part.shape).to(part.dtype)) for part, piece in pairs]):
        return None
    with torch.no_grad():
        left = flatten(params, params).clone()
    place(vector, params)
    return left


def _any_differs(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    # On other devices than the CPU: wait once, not once for each tensor.
    on_cpu = all(a.device.type == "cpu" for a, _ in pairs)
    if not on_cpu and not bool(torch.stack([(a != b).any() for a, b in pairs]).any()):
        return False
    return any(differs(a, b) for a, b in pairs)


def differs(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one shape differ anywhere; NaN equals NaN here."""
    # torch.equal is fast, and finds NaN different from itself.
    return not torch.equal(a, b) and bool(((a != b) & ~(a.isnan() & b.isnan())).any())


def is_rounding(a: Tensor, b: Tensor, params: Sequence[Tensor]) -> bool:
    """Return whether two flat vectors are equal up to rounding, each parameter relative to its own largest entry.

    The tolerance, `eps^(2/3)` of the parameter's dtype, also covers small numbers that guard a division, as in
    `x / (x.norm() + 1e-12)`.
    """
    for p, x, y in zip(params, local_pieces(a, params), local_pieces(b, params), strict=True):
        tolerance = torch.finfo(p.dtype).eps ** (2 / 3)
        if x.numel() and not bool(((x - y).abs() <= tolerance * y.abs().max()).all()):
            return False
    return True


def trained_parameters(params: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Return the parameters that require a gradient, each once, checked.

    Raises:
        TypeError: `params` is no iterable of tensors: a module, say, or a single tensor.
        ValueError: No parameter requires a gradient, or `check_parameters` refuses them.
    """
    given = listed("params", params, "tensors", "model.parameters()")
    for p in given:
        if not isinstance(p, Tensor):
            raise TypeError(f"params must hold tensors only, got {kind_of(p)} in it. Write model.parameters().")
    trained = tuple(dict.fromkeys(p for p in given if p.requires_grad))
    if given and not trained:
        raise ValueError(
            f"params must hold at least one tensor that requires a gradient, got {len(given)} that do not. Unfreeze a "
            "model with model.requires_grad_()."
        )
    check_any(trained)
    check_parameters(trained)
    return trained


def check_any(params: Sequence[Tensor]) -> None:
    """Raise a ValueError if there are no parameters."""
    if not params:
        raise ValueError("params must hold at least one tensor, got none. Write model.parameters().")


def check_parameters(params: Sequence[Tensor]) -> None:
    """Raise an error for parameters that no flat vector can stand for.

    Raises:
        ValueError: A parameter is uninitialized, given twice, shares memory, was made under `torch.inference_mode` or
            has a dtype without curvature; or parameters are on several devices, or sharded by something else than
            `fully_shard`.
    """
    if any(nn.parameter.is_lazy(p) for p in params):
        raise ValueError(
            "params must be initialized, got an uninitialized one from a lazy module that has seen no data. Run the "
            "model once on a batch before passing its parameters."
        )
    if len({id(p) for p in params}) < len(params):
        raise ValueError(
            "params must hold each parameter once, got the same one twice. Write model.parameters(), which yields "
            "tied parameters once."
        )
    if _share_memory(params):
        raise ValueError(
            "params must not share memory, got two parameters that do, or one whose own entries do, as after "
            "decoder.weight.data = encoder.weight.data.t() or expand(): a step would write there twice. Use one "
            "parameter in both places, encoder.weight and encoder.weight.t() in the forward pass."
        )
    if any(p.is_inference() for p in params):
        raise ValueError(
            "params must have derivatives, got one made under torch.inference_mode. Build the model outside "
            "inference_mode, or copy it there with copy.deepcopy(model)."
        )
    devices = {str(p.device) for p in params}
    if len(devices) > 1:
        raise ValueError(
            f"params must be on one device, because curvature couples them all, got {', '.join(sorted(devices))}. Move "
            "the model with model.to(...), or give the parameters to separate optimizers."
        )
    check_sharding(params)
    for p in params:
        if p.is_complex():
            raise ValueError(
                f"params must be real, got {p.dtype}. Keep the real and imaginary parts as one parameter with a last "
                "dimension of 2, torch.view_as_real(p.detach()), and apply torch.view_as_complex to it in the forward "
                "pass."
            )
        if p.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(
                f"params must be float32, float64 or bfloat16, got {p.dtype}. Keep the weights in float32, and use "
                'bfloat16 autocast for speed (precision="bf16-mixed" in Lightning).'
            )


def _share_memory(params: Sequence[Tensor]) -> bool:
    """Return whether two entries of these parameters lie at the same address."""
    plain = [p for p in params if p.device.type != "meta" and p.layout == torch.strided and p.numel()]
    plain = [p for p in plain if not is_wrapper(p)]
    spans = sorted((p.data_ptr(), p.data_ptr() + _extent(p) * p.element_size(), i) for i, p in enumerate(plain))
    groups: list[list[Tensor]] = []
    end = 0
    for first, last, i in spans:
        if first >= end:
            groups.append([])
        groups[-1].append(plain[i])
        end = max(end, last)
    return any(_collide(group) for group in groups if len(group) > 1 or _extent(group[0]) < group[0].numel())


def _extent(p: Tensor) -> int:
    """Return the number of entries from the first to the last one of a tensor in memory."""
    if p.is_contiguous():
        return p.numel()
    return 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))


def _collide(group: Sequence[Tensor]) -> bool:
    """Return whether tensors whose extents overlap share an entry; columns of a matrix only interleave."""
    start = group[0].data_ptr()
    end = max(p.data_ptr() + _extent(p) * p.element_size() for p in group)
    taken = torch.zeros(end - start, dtype=torch.bool, device="cpu")
    for p in group:
        width = p.element_size()
        strides = (*(width * stride for stride in p.stride()), 1)
        own = taken.as_strided((*p.shape, width), strides, p.data_ptr() - start)
        before = int(taken.sum())
        own.fill_(True)
        if int(taken.sum()) - before < own.numel():
            return True
    return False
