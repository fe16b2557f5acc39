"""The optimizer's state as it is saved and loaded, in a form that `torch.distributed.checkpoint` can reshard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from newtonopt.vectors.flat import flat_dtype, flatten, local_pieces
from newtonopt.vectors.sharded import Sharded, as_parameters, is_sharded, layout_of, local_part, taken_back

# An entry that every optimizer's state has. Torch keeps states by parameter: the one with this entry is ours.
_ALWAYS = "steps"
# Under this name the saved state lists which of its entries are pieces of vectors, one for each trained parameter.
_VECTORS = "vectors"


def home(state: Mapping[Any, Any], keys: Sequence[Any]) -> Any:
    """Return the key, one of the parameters', that the optimizer's state is kept under; None if there is no state."""
    return next((key for key in keys if key in state and _ALWAYS in state[key]), None)


def keys_of(state_dict: dict[str, Any]) -> list[Any]:
    """Return the keys of all parameters: numbers, or names where `torch.distributed.checkpoint` renamed them."""
    return [key for group in state_dict["param_groups"] for key in group["params"]]


def layout_now(params: Sequence[Tensor]) -> list[int]:
    """Return the number of entries of each parameter, 0 if it is frozen: which part of a flat vector belongs to it."""
    return [p.numel() if p.requires_grad else 0 for p in params]


def check_kind(state_dict: dict[str, Any], names: Sequence[str], kind: str) -> None:
    """Raise a ValueError if a setting of these names is missing: the state is of another kind of optimizer."""
    missing = [name for name in names if any(name not in group for group in state_dict["param_groups"])]
    if missing:
        raise ValueError(
            f"This state has no {', '.join(missing)}: it was saved by another kind of optimizer than {kind}. Load it "
            "into one of that kind."
        )


def check_layout(state_dict: dict[str, Any], params: Sequence[Tensor]) -> None:
    """Raise a ValueError if the state is of another model, whose parameters have other sizes.

    Parameters that were frozen when it was saved have the size 0 in it.
    """
    keys, state = keys_of(state_dict), state_dict["state"]
    layout = _as_numbers(state.get(home(state, keys), {}).get("layout"))
    if layout is None or len(layout) != len(params):  # torch refuses another number of parameters
        return
    for number, (size, p) in enumerate(zip(layout, params, strict=True)):
        if size not in (0, p.numel()):
            raise ValueError(
                f"This state is another model's: its parameter {number} had {size} entries, and here that has the "
                f"shape {tuple(p.shape)}, {p.numel()} entries (in the state {layout}, here "
                f"{[p.numel() for p in params]}). Load it into an optimizer of the same model."
            )


def packed(
    memory: dict[str, Any], blank: Callable[[Tensor], dict[str, Any]], params: Sequence[Tensor]
) -> dict[int, dict[str, Any]]:
    """Return the state by the parameters' numbers, as it is saved.

    Vectors of plain parameters stay whole. Vectors of sharded ones are given as one DTensor for each trained parameter,
    shaped and sharded as it is, and numbers as tensors: under a key that is no string, others are not loaded.

    Args:
        memory: The optimizer's state.
        blank: Makes all that the state may hold besides from a flat vector of zeros: a state can be loaded into another
            one by torch.distributed.checkpoint only where both have the same entries.
        params: All parameters.
    """
    layout = memory.get("layout") or layout_now(params)
    trained = [number for number, size in enumerate(layout) if size]
    # torch.distributed.checkpoint loads no state of a frozen parameter, and misses that of a trained one.
    now = [number for number, p in enumerate(params) if p.requires_grad] or [0]
    like = [params[number] for number in trained]
    # torch.distributed.checkpoint flattens no lists, and wants all tensors on one device.
    whole = {**memory, "layout": torch.tensor(layout, device=local_part(params[0]).device)}
    if not is_sharded(params):
        empty = blank(torch.empty(sum(layout), dtype=flat_dtype(params), device="meta"))
        numbers = {name: value for name, value in empty.items() if not isinstance(value, Tensor)}
        return {**{number: {} for number in now}, now[0]: {**numbers, **whole}}
    with torch.no_grad():
        return _in_pieces({**blank(flatten([None] * len(like), like)), **whole}, like, trained, now[0])


def _in_pieces(
    memory: dict[str, Any], like: Sequence[Tensor], trained: Sequence[int], first: int
) -> dict[int, dict[str, Any]]:
    vectors = {name: value for name, value in memory.items() if isinstance(value, Sharded)}
    rest = {name: _as_tensor(value) for name, value in memory.items() if name not in vectors}
    state: dict[int, dict[str, Any]] = {first: {**rest, _VECTORS: sorted(vectors)}}
    for name, vector in vectors.items():
        parts = [
            piece.reshape(*local_part(p).shape, *piece.shape[1:])
            for piece, p in zip(local_pieces(vector, like), like, strict=True)
        ]
        for number, piece in zip(trained, as_parameters(parts, like), strict=True):
            state.setdefault(number, {})[name] = piece
    return state


def unpacked(state_dict: dict[str, Any], params: Sequence[Tensor]) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Take a saved state apart: the inverse of `packed`, for these parameters, sharded or not.

    Vectors of zeros, which stand for none, are left out.

    Returns:
        The optimizer's state, empty if none was saved, and all else that was kept by parameter or by name.
    """
    keys, state = keys_of(state_dict), dict(state_dict["state"])
    key = home(state, keys)
    memory = {} if key is None else {name: _as_numbers(value) for name, value in state[key].items()}
    names = memory.pop(_VECTORS, [])
    for name in names:
        vector = _joined(name, state, keys, params)
        if bool(vector.any()):
            memory[name] = vector
        else:
            del memory[name]
    state.pop(key, None)
    for other in [other for other in keys if other in state]:
        state[other] = {name: value for name, value in state[other].items() if name not in names}
        if not state[other]:
            del state[other]
    # torch.distributed.checkpoint gives {} for an entry that a flattened state does not have.
    return {name: value for name, value in memory.items() if value is not None and not isinstance(value, dict)}, state


def _joined(name: str, state: Mapping[Any, Any], keys: Sequence[Any], params: Sequence[Tensor]) -> Tensor:
    pieces, like = [], []
    for key, p in zip(keys, params, strict=True):
        if name in state.get(key, {}):
            piece = taken_back(state[key][name], p)
            pieces.append(piece.reshape(local_part(p).numel(), *piece.shape[p.dim() :]))
            like.append(p)
    vector = torch.cat(pieces)
    return Sharded(vector, layout_of(like), -vector.dim()) if is_sharded(params) else vector


def follow(memory: dict[str, Any], params: Sequence[Tensor]) -> None:
    """Bring vectors of earlier steps to where the parameters are now, and to the precision that is computed in.

    The one place that does so, after a state was loaded and before each step: models move to another device or dtype
    between steps, and the vectors of bfloat16 parameters are float32.
    """
    dtype, device = flat_dtype(params), local_part(params[0]).device
    for name, value in memory.items():
        if isinstance(value, Sharded):
            if (value.dtype, value.device) != (dtype, device):
                memory[name] = Sharded(value.local.to(device, dtype), value.placement, value.axis)
        elif isinstance(value, Tensor) and value.is_floating_point():
            memory[name] = value.to(device, dtype)


def _as_tensor(value: Any) -> Tensor:
    real = isinstance(value, float)
    return (
        value
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=torch.float64 if real else torch.int64, device="cpu")
    )


def _as_numbers(value: Any) -> Any:
    if isinstance(value, Tensor) and (value.dim() == 0 or value.dtype == torch.int64):
        return value.tolist()
    return value
