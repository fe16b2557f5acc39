"""Parameters and gradients as one flat vector, in the order of the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from newtonopt.vectors.sharded import Sharded, as_parameters, check_sharding, is_sharded, layout_of, local_part
from newtonopt.vectors.subclasses import is_wrapper


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


def put_back(vector: Tensor, params: Sequence[Tensor]) -> Tensor | None:
    """Write a flat vector into the parameters where they are no longer equal to it.

    Returns:
        Where they were, `(n,)`; None if nothing had changed.
    """
    pairs = [(local_part(p).detach(), piece) for p, piece in zip(params, local_pieces(vector, params), strict=True)]
    if not _any_differs([(part, piece.view(part.shape).to(part.dtype)) for part, piece in pairs]):
        return None
    with torch.no_grad():
        left = flatten(params, params).clone()
    place(vector, params)
    return left


def _any_differs(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    # Elsewhere than on the CPU: one wait for the device in place of one for each tensor.
    on_cpu = all(a.device.type == "cpu" for a, _ in pairs)
    if not on_cpu and not bool(torch.stack([(a != b).any() for a, b in pairs]).any()):
        return False
    return any(differs(a, b) for a, b in pairs)


def differs(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape differ anywhere; NaN is equal to itself here."""
    # The first is quick, and does not take NaN for that.
    return not torch.equal(a, b) and bool(((a != b) & ~(a.isnan() & b.isnan())).any())


def is_rounding(a: Tensor, b: Tensor, params: Sequence[Tensor]) -> bool:
    """Whether two flat vectors are equal up to the rounding of the parameters' dtypes, each parameter on its own, and
    what a small number does that guards a division, as in `x / (x.norm() + 1e-12)`.
    """
    for p, x, y in zip(params, local_pieces(a, params), local_pieces(b, params), strict=True):
        tolerance = torch.finfo(p.dtype).eps ** (2 / 3)
        if x.numel() and not bool(((x - y).abs() <= tolerance * y.abs().max()).all()):
            return False
    return True


def check_any(params: Sequence[Tensor]) -> None:
    """Raise a ValueError if there are no parameters."""
    if not params:
        raise ValueError("params must hold one tensor at least, got none. Write model.parameters().")


def check_parameters(params: Sequence[Tensor]) -> None:
    """Refuse parameters that no flat vector can hold.

    Raises:
        ValueError: One given twice or made under `torch.inference_mode`, several devices, a dtype that curvature cannot
            be computed in, or parameters shared out among processes other than by `fully_shard`.
    """
    if any(nn.parameter.is_lazy(p) for p in params):
        raise ValueError(
            "params must be initialized, got an uninitialized one, as a lazy module's are until it has seen data. Run "
            "the model once on a batch, and then give its parameters."
        )
    if len({id(p) for p in params}) < len(params):
        raise ValueError(
            "params must hold each parameter once, got one that is given twice, which the step would count as two. "
            "Write model.parameters(), which gives tied ones once."
        )
    if _share_memory(params):
        raise ValueError(
            "params must not share memory, got two that do, or one with entries that do, as weights tied by "
            "decoder.weight.data = encoder.weight.data.t() and tensors made by expand() have: a step would write to it "
            "twice. Use one parameter in both places, encoder.weight and encoder.weight.t() in the forward pass."
        )
    if any(p.is_inference() for p in params):
        raise ValueError(
            "params must have derivatives, got one made under torch.inference_mode. Make the model outside of it, or "
            "copy it outside with copy.deepcopy(model)."
        )
    devices = {str(p.device) for p in params}
    if len(devices) > 1:
        raise ValueError(
            "params must be on one device, for curvature couples them all, got several devices, "
            f"{', '.join(sorted(devices))}. Move the model with model.to(...), or give the parameters to separate "
            "optimizers."
        )
    check_sharding(params)
    for p in params:
        if p.is_complex():
            raise ValueError(
                f"params must be real, got {p.dtype}. Keep the real and imaginary parts as one "
                "parameter with a last dimension of 2, torch.view_as_real(p.detach()), and use "
                "torch.view_as_complex of it in the forward pass."
            )
        if p.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(
                f"params must be float32, float64 or bfloat16, got {p.dtype}. Keep the weights in float32, and for "
                'speed use bfloat16 autocast (precision="bf16-mixed" in Lightning).'
            )


def _share_memory(params: Sequence[Tensor]) -> bool:
    """Whether two entries of these parameters lie at the same address."""
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
    """Whether tensors whose extents overlap do more than interleave, as the columns of a matrix do."""
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


def listed(name: str, items: Any, holds: str, such_as: str) -> list[Any]:
    """Return all entries of an iterable.

    Args:
        name: The name of the argument.
        items: The value given for the argument.
        holds: A description of its entries.
        such_as: An expression that a user would write for it.

    Raises:
        TypeError: It is no iterable, or one of another kind: a tensor, a module, a mapping, a string, a set.
        ValueError: It is an iterator that gave nothing.
    """
    if not isinstance(items, Iterable) or isinstance(items, (Tensor, nn.Module, Mapping, str, set, frozenset)):
        remedies = {Tensor: "a list for a single one", Mapping: f"{such_as}, or a list of what the mapping holds"}
        remedies[set] = "a list, which has an order"
        remedy = next((words for kind, words in remedies.items() if isinstance(items, kind)), such_as)
        raise TypeError(f"{name} must be an iterable of {holds}, got {_kind(items)}. Write {remedy}.")
    given = list(items)
    if not given and isinstance(items, Iterator):
        raise ValueError(
            f"{name} must hold one entry at least, got {_kind(items)} that gave none: it ends after one pass, and was "
            f"gone through before, or has nothing to give. Write {such_as} anew, or keep a list of it."
        )
    return given


def _kind(value: object) -> str:
    name = type(value).__name__
    if value is None:
        return "None"
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def trained_parameters(params: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The parameters that require a gradient, each once, checked.

    Raises:
        TypeError: Something else than an iterable of tensors, such as a module or a single tensor.
        ValueError: As `check_parameters`.
    """
    given = listed("params", params, "tensors", "model.parameters()")
    for p in given:
        if not isinstance(p, Tensor):
            raise TypeError(f"params must hold tensors only, got {_kind(p)} in it. Write model.parameters().")
    trained = tuple(dict.fromkeys(p for p in given if p.requires_grad))
    if given and not trained:
        raise ValueError(
            "params must hold one tensor at least that requires a gradient, got none among its "
            f"{len(given)}. Unfreeze a model with model.requires_grad_()."
        )
    check_any(trained)
    check_parameters(trained)
    return trained


def listed_groups(params: Any) -> list[Any]:
    """Return what an optimizer is given as a list of parameter groups.

    Raises:
        TypeError: It is neither an iterable of tensors, or of pairs of a name and a tensor, nor one of groups.
        ValueError: It is empty.
    """
    given = listed("params", params, "tensors or of parameter groups", "model.parameters()")
    if not given:
        raise ValueError(f"params must hold one tensor at least, got {params!r}. Write model.parameters().")
    return given if isinstance(given[0], dict) else [{"params": given}]


def listed_group(group: Any) -> dict[str, Any]:
    """Return a copy of a parameter group with its parameters as a list.

    Raises:
        TypeError: It is no group, or its parameters are of another kind.
    """
    if not isinstance(group, dict) or "params" not in group:
        what = f"one with {', '.join(map(str, group)) or 'nothing'}" if isinstance(group, dict) else _kind(group)
        raise TypeError(
            f"A parameter group must be a dict with an entry 'params', got {what}. Write "
            "{'params': model.parameters(), 'lr': 0.5}."
        )
    one = isinstance(group["params"], Tensor)
    given = [group["params"]] if one else listed("params", group["params"], "tensors", "model.parameters()")
    for entry in given:
        p = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry  # a name and a tensor
        if not isinstance(p, Tensor):
            raise TypeError(f"params must hold tensors only, got {_kind(p)} in it. Write model.parameters().")
    return {**group, "params": given}
