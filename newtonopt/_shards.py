"""Parameters of which each process holds a shard: those of `torch.distributed.fsdp.fully_shard`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from newtonopt._sharded import Layout
from newtonopt._subclasses import plain

Gradients = tuple[Tensor | None, ...]


def is_sharded(params: Sequence[Tensor]) -> bool:
    """Whether these are parameters of `fully_shard`."""
    kind = _dtensor()
    return kind is not None and bool(params) and isinstance(params[0], kind)


def local_part(t: Tensor) -> Tensor:
    """This process's shard of a DTensor, as an alias outside of autograd; any other tensor itself."""
    kind = _dtensor()
    if kind is None or not isinstance(t, kind):
        return plain(t)
    with torch.no_grad():
        part: Tensor = t.to_local()
    return part


def check_sharding(params: Sequence[Tensor]) -> None:
    """Refuse parameters that are shared out among processes in a way that is not supported.

    Raises:
        ValueError: Parameters of DeepSpeed, FullyShardedDataParallel or tensor parallelism, or only some of
            `fully_shard`.
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
                "shows no shards of single parameters. Shard the model with torch.distributed.fsdp.fully_shard (FSDP2) "
                "instead."
            )
    kind = _dtensor()
    if kind is None:
        return
    sharded: list[Any] = [p for p in params if isinstance(p, kind)]
    if sharded and len(sharded) < len(params):
        raise ValueError(
            f"params must be all sharded or all plain, got {len(sharded)} sharded and {len(params) - len(sharded)} "
            "plain ones. Call fully_shard on the whole model too, which shards what is left, without ignored_params."
        )
    for p in sharded:
        names = [type(placement).__name__ for placement in p.placements]
        if names != ["Shard"] or p.placements[0].dim != 0 or p.device_mesh.size() != dist.get_world_size():
            raise ValueError(
                "params must be sharded by fully_shard in dimension 0 over all processes (a mesh of one dimension), "
                "without tensor parallelism or replication, got one of shape "
                f"{tuple(p.shape)} placed as {p.placements} on {p.device_mesh}."
            )


def layout_of(params: Sequence[Tensor]) -> Layout:
    """Where this process's shards belong in the flat vector of all parameters."""
    shards: list[Any] = list(params)
    mesh = shards[0].device_mesh
    return _layout(tuple(tuple(p.shape) for p in shards), mesh.get_group(), mesh.get_local_rank(), mesh.size())


@functools.lru_cache(maxsize=16)
def _layout(shapes: tuple[tuple[int, ...], ...], group: dist.ProcessGroup, rank: int, count: int) -> Layout:
    spans, offset = [], 0
    for rows, *rest in shapes:
        row = torch.Size(rest).numel()
        # As torch.chunk does it.
        height = -(-rows // count)
        start, stop = (min(r * height, rows) for r in (rank, rank + 1))
        spans.append((offset + start * row, offset + stop * row))
        offset += rows * row
    return Layout(offset, tuple(spans), group)


def as_parameters(parts: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """What this process holds of tensors as DTensors, placed as `like` in the first dimension.

    Args:
        parts: Each of the shape of the local part of its parameter, or with one dimension more.
        like: The parameters.
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
    """What this process holds of a tensor that is a DTensor or whole, placed as the parameter `like`."""
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


def pulled(
    of: Tensor | Sequence[Tensor], params: Sequence[Tensor], along: Sequence[Tensor] | None, *, keep: bool
) -> Gradients:
    """`along' d of / d params`, averaged over the processes: by a backward, whose hooks gather and scatter.

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
            "No gradient arrived at the sharded parameters: the loss does not depend on them, or gradients are held "
            "back by set_requires_gradient_sync(False), or the loss is computed inside a module of which no part but "
            "the whole was given to fully_shard. Leave gradients synchronised, and compute the loss outside."
        )
    return gradients


def accumulate(gradients: Gradients, params: Sequence[Tensor]) -> None:
    """Add gradients to `.grad`, as `backward` does it."""
    for p, gradient in zip(params, gradients, strict=True):
        if gradient is not None:
            p.grad = gradient if p.grad is None else p.grad + gradient


@contextmanager
def resharded(params: Sequence[Tensor], *, trace: bool) -> Iterator[None]:
    """Run a closure on sharded parameters, and let go what was gathered for it.

    A module keeps what it gathered in a forward pass for a backward. Without one the next forward pass would take it
    for the parameters, which have moved.

    Args:
        params: The parameters.
        trace: Whether other parameters of the same modules keep the gradients that they are given.

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
        # Unseen by the tap, which looks after what the closure does with gradients.
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
            f"fully_shard gathers the parameters as {dtype}, which is too coarse for the finite differences by which "
            "products with sharded parameters are formed: give it no mp_policy with a param_dtype below float32."
        )


def supported(products: str) -> Literal["finite_difference"]:
    """How products with sharded parameters are formed: hooks that gather and scatter have no derivative.

    Raises:
        ValueError: Another way was asked for.
    """
    if products not in ("auto", "finite_difference"):
        raise ValueError(
            "products must be 'auto' or 'finite_difference' for modules sharded by fully_shard, which cannot be "
            f"differentiated twice, got {products!r}."
        )
    return "finite_difference"


def _dtensor() -> Any:
    # Importing it takes a while, and nobody can have one before it is imported.
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)
