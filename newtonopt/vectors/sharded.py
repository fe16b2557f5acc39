"""Models sharded by `torch.distributed.fsdp.fully_shard` (FSDP2): their parameters, gradients and flat vectors.

Each process holds a shard of every parameter, a DTensor, and a slice of every flat vector, a `Sharded`. Four things are
different from a model that each process holds whole:

1. A whole flat vector may not fit on one process. A `Sharded` knows its slice, and which operations must communicate.
2. Hooks gather the parameters and scatter the gradients. Hooks have no derivative, so there is no double backward:
   products are central differences of gradients (`supported`).
3. The hooks run in a `backward` and not in `torch.autograd.grad`. Gradients are read from `.grad` after a backward, and
   come averaged over the processes (`gradients_by_backward`).
4. A module keeps the parameters that it gathered in a forward pass until a backward. A trial needs no backward, so they
   are released by hand (`resharded`).

First come parameters, then gradients, then vectors.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from newtonopt.vectors.subclasses import plain

Gradients = tuple[Tensor | None, ...]

# Random numbers drawn at a time, a multiple of the 16 in which torch.randn fills a tensor.
_DRAWN = 2**14


def is_sharded(params: Sequence[Tensor]) -> bool:
    """Return whether `fully_shard` has sharded these parameters."""
    kind = _dtensor()
    return kind is not None and bool(params) and isinstance(params[0], kind)


def local_part(t: Tensor) -> Tensor:
    """Return this process's shard of `t`, as an alias without a graph, or `t` itself if it is not sharded."""
    kind = _dtensor()
    if kind is None or not isinstance(t, kind):
        return plain(t)
    with torch.no_grad():
        part: Tensor = t.to_local()
    return part


def check_sharding(params: Sequence[Tensor]) -> None:
    """Raise an error if parameters are sharded in a way that is not supported.

    Raises:
        ValueError: DeepSpeed, FullyShardedDataParallel or tensor parallelism has sharded parameters, or `fully_shard`
            only some of them.
    """
    for p in params:
        if getattr(p, "ds_id", None) is not None:
            raise ValueError(
                "params must be plain or sharded by fully_shard, got one partitioned by DeepSpeed, whose engine runs "
                "backward and steps itself. Shard the model with torch.distributed.fsdp.fully_shard instead."
            )
        if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
            raise ValueError(
                "params must be plain or sharded by fully_shard, got one of FullyShardedDataParallel (FSDP1), which "
                "does not expose the shards of single parameters. Shard the model with "
                "torch.distributed.fsdp.fully_shard (FSDP2) instead."
            )
    kind = _dtensor()
    if kind is None:
        return
    sharded: list[Any] = [p for p in params if isinstance(p, kind)]
    if sharded and len(sharded) < len(params):
        raise ValueError(
            f"params must be all sharded or all plain, got {len(sharded)} sharded and {len(params) - len(sharded)} "
            "plain ones. Call fully_shard on the whole model too, without ignored_params, to shard the remaining "
            "parameters."
        )
    for p in sharded:
        names = [type(placement).__name__ for placement in p.placements]
        if names != ["Shard"] or p.placements[0].dim != 0 or p.device_mesh.size() != dist.get_world_size():
            raise ValueError(
                "params must be sharded by fully_shard in dimension 0 over all processes (a mesh of one dimension), "
                "without tensor parallelism or replication, got one of shape "
                f"{tuple(p.shape)} placed as {p.placements} on {p.device_mesh}."
            )


def check_equal_weights(weights: Tensor) -> None:
    """Raise a RuntimeError if the processes' weights in the mean, `(count,)`, differ: `fully_shard` ignores them."""
    shares = weights / weights.sum()
    if float(shares.max() - shares.min()) > 1e-6:
        raise RuntimeError(
            f"The processes' batches have the weights {', '.join(f'{w:g}' for w in weights.tolist())}, but fully_shard "
            "averages gradients over processes with equal weights. Give every process the same amount of data "
            "(drop_last=True in its loader)."
        )


def layout_of(params: Sequence[Tensor]) -> Layout:
    """Return the entries that this process's shards are of the flat vector of all parameters."""
    shards: list[Any] = list(params)
    mesh = shards[0].device_mesh
    return _layout_from(tuple(tuple(p.shape) for p in shards), mesh.get_group(), mesh.get_local_rank(), mesh.size())


@functools.lru_cache(maxsize=16)
def _layout_from(shapes: tuple[tuple[int, ...], ...], group: dist.ProcessGroup, rank: int, count: int) -> Layout:
    spans, offset = [], 0
    for rows, *rest in shapes:
        row = torch.Size(rest).numel()
        # fully_shard splits rows as torch.chunk does.
        height = -(-rows // count)
        start, stop = (min(r * height, rows) for r in (rank, rank + 1))
        spans.append((offset + start * row, offset + stop * row))
        offset += rows * row
    return Layout(offset, tuple(spans), group)


def as_parameters(parts: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Return this process's shards as DTensors, sharded in the first dimension as the parameters are.

    Args:
        parts: Shards, each of the shape of its parameter's shard, or with one dimension more.
        like: Parameters.
    """
    return [_as_dtensor(part, p) for part, p in zip(parts, like, strict=True)]


def _as_dtensor(part: Tensor, like: Any) -> Tensor:
    shape = torch.Size([*like.shape, *part.shape[like.dim() :]])
    stride = torch.empty(shape, device="meta").stride()
    made: Tensor = type(like.data).from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )
    return made


def taken_back(t: Tensor, like: Any) -> Tensor:
    """Return this process's shard of `t`, a DTensor or whole, when `t` is sharded as the parameter `like`."""
    kind = _dtensor()
    given: Any = t
    if kind is not None and isinstance(t, kind):
        if not isinstance(like, kind):
            whole: Tensor = given.full_tensor()
            return whole
        if given.device_mesh == like.device_mesh and given.placements == like.placements:
            return local_part(t)
        given = given.full_tensor()
    if not isinstance(like, kind or ()):
        return t
    rows, rank, count = like.shape[0], like.device_mesh.get_local_rank(), like.device_mesh.size()
    height = -(-rows // count)
    part: Tensor = given[min(rank * height, rows) : min((rank + 1) * height, rows)]
    return part


def gradients_by_backward(
    of: Tensor | Sequence[Tensor], params: Sequence[Tensor], along: Sequence[Tensor] | None, *, keep: bool
) -> Gradients:
    """Return the gradients `along' d of / d params`, averaged over the processes, by a backward.

    Args:
        of: Tensors to differentiate.
        params: Sharded parameters; their `.grad` is put back.
        along: Cotangents of the tensors; None for a scalar.
        keep: Whether the graph stays for a further backward.

    Returns:
        One sharded gradient for each parameter; None where the tensors do not depend on it.

    Raises:
        RuntimeError: No gradient arrived.
    """
    before = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        torch.autograd.backward(of, along, retain_graph=keep)
        gradients = tuple(p.grad for p in params)
    finally:
        for p, gradient in zip(params, before, strict=True):
            p.grad = gradient
    if all(g is None for g in gradients):
        raise RuntimeError(
            "The sharded parameters received no gradient. Either the loss does not depend on them, or "
            "set_requires_gradient_sync(False) holds gradients back, or the loss is computed inside a module that was "
            "passed to fully_shard only as a whole. Leave gradient synchronisation on, and compute the loss outside "
            "that module."
        )
    return gradients


def accumulate(gradients: Gradients, params: Sequence[Tensor]) -> None:
    """Add gradients to `.grad`, as `backward` does."""
    for p, gradient in zip(params, gradients, strict=True):
        if gradient is not None:
            p.grad = gradient if p.grad is None else p.grad + gradient


@contextmanager
def resharded(params: Sequence[Tensor], *, trace: bool) -> Iterator[None]:
    """Return a context to run a closure in, after which modules release the parameters that they gathered.

    A module keeps the parameters that it gathered in a forward pass until a backward. Without a backward the next
    forward pass would use these copies, though the parameters have moved.

    Args:
        params: Parameters; the context does nothing if they are not sharded.
        trace: Whether other parameters of the same modules keep the gradients that they get in the context.

    Raises:
        RuntimeError: The modules compute in bfloat16 or float16.
    """
    if not is_sharded(params):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    ours = {id(p) for p in params}
    gradients: dict[int, tuple[Tensor, Tensor | None]] = {}
    met: dict[int, Any] = {}

    def before(module: nn.Module, _: Any) -> None:
        if not isinstance(module, FSDPModule) or id(module) in met:
            return
        _check_precision(module)
        met.update((id(part), part) for part in module.modules() if isinstance(part, FSDPModule))
        # Hidden from the tap, which watches what the closure does with gradients.
        with torch._C.DisableTorchFunction():
            for p in module.parameters() if not trace else ():
                if id(p) not in ours and id(p) not in gradients:
                    gradients[id(p)] = p, p.grad
                    p.grad = None

    handle = register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
        for module in met.values():
            module.reshard()
        with torch._C.DisableTorchFunction():
            for p, gradient in gradients.values():
                p.grad = gradient


def _check_precision(module: Any) -> None:
    policy = getattr(module._get_fsdp_state(), "_mp_policy", None)
    dtype = getattr(policy, "param_dtype", None)
    if dtype in (torch.bfloat16, torch.float16):
        raise RuntimeError(
            f"fully_shard gathers the parameters as {dtype}, which is too coarse for finite differences, the only "
            "products of sharded parameters. Do not give it an mp_policy with a param_dtype below float32."
        )


def supported(products: str) -> Literal["finite_difference"]:
    """Return how products with sharded parameters are formed: by differences, because hooks have no derivative.

    Raises:
        ValueError: `products` asks for another form.
    """
    if products not in ("auto", "finite_difference"):
        raise ValueError(
            "products must be 'auto' or 'finite_difference' for modules sharded by fully_shard, which cannot be "
            f"differentiated twice, got {products!r}."
        )
    return "finite_difference"


def _dtensor() -> Any:
    # Importing it takes a while, and no DTensor exists before it is imported.
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


@dataclass(frozen=True)
class Layout:
    """The entries of a whole vector `(size,)` that this process holds.

    Attributes:
        size: Number of entries of the whole vector.
        spans: Entries held here, as ascending ranges `[start, stop)`.
        group: Processes that hold the vector together.
    """

    size: int
    spans: tuple[tuple[int, int], ...]
    group: dist.ProcessGroup


class Sharded(Tensor):
    """A vector `(n,)`, rows `(k, n)` or columns `(n, k)`, of which each process holds a slice.

    Its shape is that of the whole. Products over `n`, norms and other reductions to a scalar are collective calls, and
    return plain tensors, equal on all processes. Entry by entry operations stay local. Any other operation raises
    NotImplementedError.

    Args:
        local: This process's slice.
        layout: Entries of the whole that the slice holds.
        axis: Dimension of length `n`, counted from the end: -1 or -2.
    """

    local: Tensor
    placement: Layout
    axis: int

    @staticmethod
    def __new__(cls, local: Tensor, layout: Layout, axis: int = -1) -> Sharded:
        """Wrap `local` without a copy."""
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
        """Apply the rule for `func`."""
        name = func._schema.name.removeprefix("aten::")
        rule = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
        if rule is None and torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags:
            rule = _entry_by_entry
        if rule is None:
            raise _refusal(func, "there is no rule for how it communicates")
        return rule(func, args, kwargs or {})

    def to_local(self) -> Tensor:
        """Return this process's slice."""
        return self.local

    def full_tensor(self) -> Tensor:
        """Return the whole on every process; a collective call, for small tensors."""
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
        f"{func} is not available for a vector that is sharded over processes: {why}. Compute on each process's "
        "slice, to_local(), or gather a small vector with full_tensor()."
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
        raise _refusal(func, "the operands are sharded in different ways")
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
        raise _refusal(func, "a whole tensor cannot hold a sharded one")
    result = func(*map(_local, args), **kwargs)
    return args[0] if func._schema.is_mutable else Sharded(result, layout, axis)


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute `a @ b`, or `base + a @ b`."""
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
        raise _refusal(func, "it sums over a dimension that is sharded in one factor only")
    result = func(*map(_local, args), **kwargs)
    return args[0] if func._schema.is_mutable else Sharded(result, layout, axis)


def _bound(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments by name, with defaults for those left out."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
    defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    return {**defaults, **given, **kwargs}


def _whole(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sharded, dict[str, Any]]:
    """Return the operand and all arguments of a reduction of all entries to one number."""
    given = _bound(func, args, kwargs)
    x, dim = args[0], given.get("dim")
    dims = {d % x.dim() for d in ([dim] if isinstance(dim, int) else dim or range(x.dim()))}
    if given.get("keepdim") or len(dims) < x.dim() or "other" in given:
        raise _refusal(func, "only reductions over all entries are available")
    return x, given


def _norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, given = _whole(func, args, kwargs)
    if given["ord"] != 2:
        raise _refusal(func, "only the Euclidean norm is available")
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
    # The reduction among processes may lose NaN.
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
    """Compute `cat` and `stack`."""
    parts, layout = args[0], _layout(func, args[0])
    axes = {x.axis if isinstance(x, Sharded) else 0 for x in parts}
    if len(axes) > 1:
        raise _refusal(func, "the operands' entries are not on the same processes")
    result = func([x.local for x in parts], *args[1:], **kwargs)
    return _placed(func, args, kwargs, parts[0], [result], layout)[0]


def _viewed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute views, and selections along the other dimension."""
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
    """Return whether a slice is `[:]`, which older versions of torch take in `columns[:, index]`."""
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
    """Compute `x.new_zeros(n)` and `x.new_zeros(k, n)`, sharded as `x` is."""
    x, size, *rest = args
    if not size or size[-1] != x.placement.size:
        raise _refusal(func, f"new tensors have {x.placement.size} entries, or rows of as many, not {tuple(size)}")
    return Sharded(func(x.local, [*size[:-1], x.local.shape[x.axis]], *rest, **kwargs), x.placement)


def _normal(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sharded:
    """Fill with the random numbers that one process would draw for the whole.

    Every process draws all of them, piece by piece, and keeps those of its slice.
    """
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
    """Compute the QR factorisation of columns `(n, k)` (TSQR: Demmel, Grigori, Hoemmen & Langou 2012).

    Each process factors its slice, `A_i = Q_i R_i`; all factor the stacked `R_i`, `[R_1; R_2; ...] = W R`; then
    `Q = [Q_1 W_1; Q_2 W_2; ...]`. This is as stable as the factorisation of the whole.
    """
    x = args[0]
    if x.axis != -2 or _bound(func, args, kwargs)["mode"] != "reduced":
        raise _refusal(func, "only the reduced factorisation of columns is available")
    q, r = torch.linalg.qr(x.local)
    rank, count = dist.get_rank(x.placement.group), dist.get_world_size(x.placement.group)
    k, height = x.shape[1], r.shape[0]
    factors = r.new_zeros(count, k, k)
    factors[rank, :height] = r
    turn, triangle = torch.linalg.qr(_summed(factors, x.placement).reshape(count * k, k))
    return Sharded(q @ turn[rank * k : rank * k + height], x.placement, -2), triangle


def _svd(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sharded, Tensor, Tensor]:
    """Compute the singular value decomposition of columns `(n, k)` by that of their factor `R`."""
    x, given = args[0], _bound(func, args, kwargs)
    if x.axis != -2 or given["full_matrices"] or not given["compute_uv"]:
        raise _refusal(func, "only the reduced decomposition of columns is available")
    q, r = torch.linalg.qr(x)
    u, values, v = torch.linalg.svd(r, full_matrices=False)
    return Sharded(q.local @ u, x.placement, -2), values, v


def _solve_triangular(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sharded:
    triangle, x = args
    if isinstance(triangle, Sharded) or x.axis != (-1 if kwargs.get("left", True) else -2):
        raise _refusal(func, "only the right-hand sides may be sharded")
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
