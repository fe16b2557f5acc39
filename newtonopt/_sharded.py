"""Flat vectors of which each process holds a slice: a tensor that knows which operations have to communicate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Random numbers drawn at a time, a multiple of the 16 in which torch.randn fills a tensor.
_DRAWN = 2**14


@dataclass(frozen=True)
class Layout:
    """Which entries of a whole vector `(size,)` this process holds.

    Attributes:
        size: Of the whole vector.
        spans: The entries held, as ascending ranges `[start, stop)`.
        group: The processes among which the vector is shared out.
    """

    size: int
    spans: tuple[tuple[int, int], ...]
    group: dist.ProcessGroup


class Sharded(Tensor):
    """A vector `(n,)`, rows `(k, n)` or columns `(n, k)`, of which each process holds the entries of its layout.

    Shapes are those of the whole. Products over `n`, norms and other reductions to a scalar are collective calls and
    give plain tensors, the same on all processes; entry by entry operations stay local. An operation that is neither
    raises NotImplementedError.

    Args:
        local: This process's part.
        layout: Where it belongs.
        axis: The dimension that is shared out, counted from the end: -1 or -2.
    """

    local: Tensor
    placement: Layout
    axis: int

    @staticmethod
    def __new__(cls, local: Tensor, layout: Layout, axis: int = -1) -> Sharded:
        """Wraps `local`, which is not copied."""
        shape = list(local.shape)
        shape[axis] = layout.size
        self: Sharded = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        self.local, self.placement, self.axis = local.detach(), layout, axis
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Applies the rule for `func`."""
        name = func._schema.name.removeprefix("aten::")
        rule = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
        if rule is None and torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags:
            rule = _entry_by_entry
        if rule is None:
            raise _refusal(func, "it is not known how it would have to communicate")
        return rule(func, args, kwargs or {})

    def to_local(self) -> Tensor:
        """This process's part."""
        return self.local

    def full_tensor(self) -> Tensor:
        """The whole, on every process: a collective call, for what is known to be small."""
        local = self.local.movedim(self.axis, 0)
        whole = local.new_zeros(self.placement.size, *local.shape[1:])
        done = 0
        for start, stop in self.placement.spans:
            whole[start:stop] = local[done : done + stop - start]
            done += stop - start
        return _summed(whole, self.placement).movedim(0, self.axis)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Sharded({tuple(self.shape)}, {self.dtype}, {self.device}, {self.local.shape[self.axis]} held here)"


Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def _refusal(func: Any, why: str) -> NotImplementedError:
    return NotImplementedError(
        f"{func} is not available for a vector that is shared out among processes: {why}. Compute on what each process "
        "holds, to_local(), or gather a small vector with full_tensor()."
    )


def _local(x: Any) -> Any:
    return x.local if isinstance(x, Sharded) else x


def _summed(x: Tensor, layout: Layout, op: str = "SUM") -> Tensor:
    x = x.contiguous()
    if dist.get_world_size(layout.group) > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, op), layout.group)
    return x


def _layout(func: Any, operands: Sequence[Any]) -> Layout:
    first, *others = (x.placement for x in operands if isinstance(x, Sharded))
    if any(other is not first and other != first for other in others):
        raise _refusal(func, "the operands are shared out in different ways")
    return first


def _entry_by_entry(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    layout = _layout(func, args)
    axes = {x.axis for x in args if isinstance(x, Sharded)}
    axis = axes.pop()
    for x in args:
        whole = isinstance(x, Tensor) and not isinstance(x, Sharded) and x.dim() >= -axis and x.shape[axis] != 1
        if axes or whole or "out" in kwargs:
            raise _refusal(func, "the operands' entries are not on the same processes")
    if func._schema.is_mutable and not isinstance(args[0], Sharded):
        raise _refusal(func, "a whole tensor cannot take in a part")
    result = func(*map(_local, args), **kwargs)
    return args[0] if func._schema.is_mutable else Sharded(result, layout, axis)


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`a @ b`, or `base + a @ b`."""
    layout = _layout(func, args)
    *base, a, b = args
    b_axis = b.axis if isinstance(b, Sharded) else 0
    a_inner = isinstance(a, Sharded) and a.axis == -1
    b_inner = b_axis == -min(b.dim(), 2)
    if a_inner and b_inner and not base:
        return _summed(func(a.local, b.local, **kwargs), layout)
    a_outer = isinstance(a, Sharded) and not a_inner
    b_outer = b_axis != 0 and not b_inner
    axis = -1 if b_outer else -b.dim()
    based = all(isinstance(x, Sharded) and x.axis == axis for x in base)
    if a_inner or b_inner or a_outer == b_outer or not based:
        raise _refusal(func, "its sum runs over entries of which one factor's are all here and the other's are not")
    result = func(*map(_local, args), **kwargs)
    return args[0] if func._schema.is_mutable else Sharded(result, layout, axis)


def _bound(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, those left out by default."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
    defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    return {**defaults, **given, **kwargs}


def _whole(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sharded, dict[str, Any]]:
    """The operand and the other arguments of a reduction of all its entries to one number."""
    given = _bound(func, args, kwargs)
    x, dim = args[0], given.get("dim")
    dims = {d % x.dim() for d in ([dim] if isinstance(dim, int) else dim or range(x.dim()))}
    if given.get("keepdim") or len(dims) < x.dim() or "other" in given:
        raise _refusal(func, "only the reduction of all entries to one number is")
    return x, given


def _norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, given = _whole(func, args, kwargs)
    if given["ord"] != 2:
        raise _refusal(func, "only the Euclidean norm is")
    # The square of a float32 overflows where the norm does not.
    wide = torch.float64 if x.device.type != "mps" else x.dtype
    square = torch.linalg.vector_norm(x.local).to(wide).square()
    return _summed(square, x.placement).sqrt().to(given["dtype"] or x.dtype)


def _sum(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, given = _whole(func, args, kwargs)
    return _summed(x.local.sum(dtype=given["dtype"]), x.placement)


def _extremum(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, _ = _whole(func, args, kwargs)
    largest = "max" in func._schema.name
    # A process may hold no entry.
    bound = torch.full((1,), -math.inf if largest else math.inf, dtype=x.dtype, device=x.device)
    entries = x.local if x.local.numel() else bound
    value = entries.max() if largest else entries.min()
    # The reduction among processes may lose what is not a number.
    lost = _summed(value.isnan().to(torch.uint8), x.placement, "MAX")
    value = _summed(value, x.placement, "MAX" if largest else "MIN")
    return torch.where(lost.bool(), math.nan, value)


def _truth(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, _ = _whole(func, args, kwargs)
    op = "MAX" if func._schema.name == "aten::any" else "MIN"
    return _summed(func(x.local).to(torch.uint8), x.placement, op).bool()


def _equal(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool((args[0] == args[1]).all())


def _joined(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sharded:
    """`cat` and `stack`."""
    parts, layout = args[0], _layout(func, args[0])
    axes = {x.axis if isinstance(x, Sharded) else 0 for x in parts}
    if len(axes) > 1:
        raise _refusal(func, "the operands' entries are not on the same processes")
    result = func([x.local for x in parts], *args[1:], **kwargs)
    return _placed(func, args, kwargs, parts[0], [result], layout)[0]


def _viewed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Views and selections along the other dimension."""
    x = args[0]
    result = func(x.local, *args[1:], **kwargs)
    several = isinstance(result, (list, tuple))
    placed = _placed(func, args, kwargs, x, result if several else [result], x.placement)
    return placed if several else placed[0]


def _placed(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Sharded, results: Sequence[Tensor], layout: Layout
) -> list[Sharded]:
    name, before, place = func._schema.name.removeprefix("aten::"), x.dim(), x.dim() + x.axis
    after = results[0].dim() if results else before - 1
    if name in ("t", "transpose"):
        place = before - 1 - place
    elif name == "permute":
        place = [dim % before for dim in args[1]].index(place)
    else:
        given = _bound(func, args, kwargs)
        dim = int(given["dim"]) % max(before, after)
        if dim == place and after <= before and not (name == "slice" and _is_everything(given, x.shape[place])):
            raise _refusal(func, "it selects or joins entries that other processes hold")
        place += (dim <= place) * (after - before)
    return [Sharded(y, layout, place - after) for y in results]


def _is_everything(given: dict[str, Any], length: int) -> bool:
    """Whether a slice is `[:]`, which older versions of torch call for in `columns[:, index]`."""
    return not given["start"] and given["step"] == 1 and (given["end"] is None or given["end"] >= length)


def _expand(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sharded:
    x, sizes = args[0], list(args[1])
    sizes[x.axis] = x.local.shape[x.axis]
    return Sharded(func(x.local, sizes, **kwargs), x.placement, x.axis)


def _index(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sharded:
    x, indices = args
    given = [(i, index) for i, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][0] == x.dim() + x.axis or given[0][1].dim() != 1 or given[0][1].dtype == torch.bool:
        raise _refusal(func, "it selects entries that other processes hold")
    return Sharded(func(x.local, indices), x.placement, x.axis)


def _new(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sharded:
    """`x.new_zeros(n)` and `x.new_zeros(k, n)` are shared out as `x` is."""
    x, size, *rest = args
    if not size or size[-1] != x.placement.size:
        raise _refusal(func, f"new ones have {x.placement.size} entries or rows of as many, not {tuple(size)}")
    return Sharded(func(x.local, [*size[:-1], x.local.shape[x.axis]], *rest, **kwargs), x.placement)


def _normal(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sharded:
    """The numbers that a whole contiguous tensor on one process would get, drawn piece by piece on every process."""
    x: Sharded = args[0]
    moments = args[1:]
    if x.axis != -x.dim() or not x.local.is_contiguous():
        raise _refusal(func, "only vectors and contiguous columns can be filled")
    width = x.numel() // x.placement.size
    mine = x.local.view(-1)
    wanted = [(start * width, stop * width) for start, stop in x.placement.spans]
    at, done, end = 0, 0, x.numel()
    while at < end:
        # Fewer than 16 numbers at the end would be drawn in another way.
        to = end if end - at - _DRAWN < 16 else at + _DRAWN
        drawn = func(mine.new_empty(to - at), *moments, **kwargs)
        for start, stop in wanted:
            low, high = max(start, at), min(stop, to)
            if low < high:
                mine[done : done + high - low] = drawn[low - at : high - at]
                done += high - low
        at = to
    return x


def _qr(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sharded, Tensor]:
    """Of columns, by factors of the parts and a factor of those, which is as stable as that of the whole (Demmel,
    Grigori, Hoemmen & Langou 2012).
    """
    x = args[0]
    if x.axis != -2 or _bound(func, args, kwargs)["mode"] != "reduced":
        raise _refusal(func, "only the reduced factorisation of columns is")
    q, r = torch.linalg.qr(x.local)
    rank, count = dist.get_rank(x.placement.group), dist.get_world_size(x.placement.group)
    k, height = x.shape[1], r.shape[0]
    factors = r.new_zeros(count, k, k)
    factors[rank, :height] = r
    turn, triangle = torch.linalg.qr(_summed(factors, x.placement).reshape(count * k, k))
    return Sharded(q @ turn[rank * k : rank * k + height], x.placement, -2), triangle


def _svd(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sharded, Tensor, Tensor]:
    x, given = args[0], _bound(func, args, kwargs)
    if x.axis != -2 or given["full_matrices"] or not given["compute_uv"]:
        raise _refusal(func, "only the reduced decomposition of columns is")
    q, r = torch.linalg.qr(x)
    u, values, v = torch.linalg.svd(r, full_matrices=False)
    return Sharded(q.local @ u, x.placement, -2), values, v


def _solve_triangular(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sharded:
    triangle, x = args
    if isinstance(triangle, Sharded) or x.axis != (-1 if kwargs.get("left", True) else -2):
        raise _refusal(func, "only the right-hand sides may be shared out")
    return Sharded(func(triangle, x.local, **kwargs), x.placement, x.axis)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("alias", "clone", "copy", "_to_copy", "detach", "zero", "fill", "lerp"), _entry_by_entry),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like"), _entry_by_entry),
    **dict.fromkeys(("mm", "mv", "dot", "addmm", "addmv"), _product),
    **dict.fromkeys(("max", "min", "amax", "amin"), _extremum),
    **dict.fromkeys(("all", "any"), _truth),
    **dict.fromkeys(("stack", "cat"), _joined),
    **dict.fromkeys(("t", "transpose", "permute", "unsqueeze", "select", "slice", "unbind"), _viewed),
    **dict.fromkeys(("new_empty", "new_zeros", "new_ones", "new_full"), _new),
    "equal": _equal,
    "expand": _expand,
    "index": _index,
    "linalg_vector_norm": _norm,
    "sum": _sum,
    "normal_": _normal,
    "linalg_qr": _qr,
    "_linalg_svd": _svd,
    "linalg_solve_triangular": _solve_triangular,
}
