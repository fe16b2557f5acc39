"""The optimizer's state: a frozen dataclass, and its translation to and from torch's state dictionary.

`optimizer.state` keeps it as a dictionary under the first trained parameter, as torch's LBFGS does, with an entry for
each field and the control under its own name, such as "damping". `state_dict` gives it in a form that
`torch.distributed.checkpoint` can reshard. Nothing outside this file knows the names of entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from newtonopt.vectors.flat import flat_dtype, flatten, local_pieces
from newtonopt.vectors.sharded import Sharded, as_parameters, is_sharded, layout_of, local_part, taken_back


@dataclass(frozen=True, eq=False)
class State:
    """Everything that an optimizer remembers from step to step.

    Attributes:
        control: Damping, radius or sigma, which bounds the next step; infinity where a line search does instead.
        agreements: Number of the last steps in a row whose ratio was near one.
        steps: Number of Newton steps.
        failures: Number of the last steps in a row that met a number that is not finite.
        stalls: Number of steps, since the last search for negative curvature, that did not change the loss.
        patience: Stalled steps before the next search.
        settled_loss: Loss where the last search found nothing.
        settled_norm: Norm of the gradient there.
        length: How far finite differences look; zero if they have not been needed yet.
        layout: Number of entries of each parameter, zero if it is frozen; empty before the first step.
    """

    control: float = math.inf
    agreements: int = 0
    steps: int = 0
    failures: int = 0
    stalls: int = 0
    patience: int = 1
    settled_loss: float = math.inf
    settled_norm: float = math.inf
    length: float = 0.0
    layout: tuple[int, ...] = ()


S = TypeVar("S", bound=State)


def tensor(*shape: str, only_with: Callable[[Mapping[str, Any]], bool] = lambda settings: True) -> dict[str, Any]:
    """Return the metadata of a field for a tensor, which is None until it is known.

    Args:
        shape: For each dimension "n", the number of parameters, or the setting that gives its size, at most `n`.
        only_with: Whether the field is ever used under the settings given. Default: it is.
    """
    return {"shape": shape, "only_with": only_with}


def _blank(kind: type[State], settings: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
    """Return zeros for all tensors that a state may hold under these settings, made from the flat vector `like`.

    `torch.distributed.checkpoint` loads a state only into one with the same entries.
    """
    made = {}
    for one in fields(kind):
        if one.metadata and one.metadata["only_with"](settings):
            shape, n = one.metadata["shape"], like.numel()
            first, *sizes = (n if size == "n" else min(settings[size], n) for size in shape)
            # The dimension `n` is shared out among processes as `like` is, and others are not.
            along = like if shape[0] == "n" else torch.empty(first, dtype=like.dtype, device=like.device)
            for size in sizes:
                along = along.unsqueeze(1).expand(-1, size)
            made[one.name] = torch.zeros_like(along, memory_format=torch.contiguous_format)
    return made


# The dictionary in optimizer.state.

# An entry that every optimizer's state has. Torch keeps states by parameter: the one with this entry is ours.
_ALWAYS = "steps"


def home(state: Mapping[Any, Any], keys: Sequence[Any]) -> Any:
    """Return the key, one of the parameters', that the optimizer's state is kept under; None if there is no state."""
    return next((key for key in keys if key in state and _ALWAYS in state[key]), None)


def _names(kind: type[State], control: str | None) -> Iterator[tuple[str, str]]:
    """Yield each field's name with the name of its entry; without a control there is no entry for it."""
    for one in fields(kind):
        if one.name not in ("control", "agreements") or control is not None:
            yield one.name, control if one.name == "control" and control is not None else one.name


def read(kind: type[S], entries: Mapping[str, Any], control: str | None) -> S:
    """Return the state that these entries of `optimizer.state` stand for."""
    known = {name: entries[entry] for name, entry in _names(kind, control) if entry in entries}
    # Resharded states hold a flag as 0 or 1.
    known |= {one.name: bool(known[one.name]) for one in fields(kind) if one.default is False and one.name in known}
    return kind(**{**known, "layout": tuple(known.get("layout", ()))})


def write(state: State, entries: dict[str, Any], control: str | None) -> None:
    """Put a state into its entries of `optimizer.state`; others that a user keeps there stay."""
    for name, entry in _names(type(state), control):
        value = getattr(state, name)
        if value is None:
            entries.pop(entry, None)
        else:
            entries[entry] = list(value) if isinstance(value, tuple) else value


def empty_entries(kind: type[State], settings: Mapping[str, Any], params: Sequence[Tensor]) -> dict[str, Any]:
    """Return entries to load a state into: the layout, and vectors of zeros."""
    trained = [p for p in params if p.requires_grad and p.numel()]
    vectors = _blank(kind, settings, flatten([None] * len(trained), trained)) if trained else {}
    return {"layout": layout_now(params), **vectors}


def layout_now(params: Sequence[Tensor]) -> list[int]:
    """Return the number of entries of each parameter, 0 if it is frozen: which part of a flat vector belongs to it."""
    return [p.numel() if p.requires_grad else 0 for p in params]


def fitted(state: S, params: Sequence[Tensor]) -> S:
    """Return the state for a step of these parameters.

    Vectors are dropped where other parameters are frozen now than when they were made, and before the first step, when
    they are zeros to load into.
    """
    layout = tuple(layout_now(params))
    if state.steps == 0 or state.layout not in ((), layout):
        dropped: dict[str, Any] = {one.name: None for one in fields(state) if one.metadata}
        state = replace(state, settled_loss=math.inf, settled_norm=math.inf, **dropped)
    return followed(replace(state, layout=layout), [p for p in params if p.requires_grad and p.numel()])


def followed(state: S, params: Sequence[Tensor]) -> S:
    """Return the state with its vectors where the parameters are now, and in the precision that is computed in.

    Models move to another device or dtype between steps, and the vectors of bfloat16 parameters are float32.
    """
    dtype, device = flat_dtype(params), local_part(params[0]).device
    moved: dict[str, Any] = {}
    for one in fields(state):
        value = getattr(state, one.name)
        if isinstance(value, Sharded):
            if (value.dtype, value.device) != (dtype, device):
                moved[one.name] = Sharded(value.local.to(device, dtype), value.placement, value.axis)
        elif isinstance(value, Tensor):
            moved[one.name] = value.to(device, dtype)
    return replace(state, **moved)


# The dictionary that is saved.

# Under this name the saved state lists which of its entries are pieces of vectors, one for each trained parameter.
_VECTORS = "vectors"


def keys_of(state_dict: dict[str, Any]) -> list[Any]:
    """Return the keys of all parameters: numbers, or names where `torch.distributed.checkpoint` renamed them."""
    return [key for group in state_dict["param_groups"] for key in group["params"]]


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
                f"This state belongs to another model: its parameter {number} had {size} entries, but here it has the "
                f"shape {tuple(p.shape)}, {p.numel()} entries (in the state {layout}, here "
                f"{[p.numel() for p in params]}). Load it into an optimizer of the same model."
            )


def packed(
    entries: Mapping[str, Any], kind: type[State], settings: Mapping[str, Any], params: Sequence[Tensor]
) -> dict[int, dict[str, Any]]:
    """Return the entries by the parameters' numbers, as they are saved.

    Vectors of plain parameters stay whole. Vectors of sharded ones are given as one DTensor for each trained parameter,
    shaped and sharded as it is, zeros where they are not known yet; numbers are then tensors, because an entry under a
    key that is no string is not loaded otherwise.

    Args:
        entries: Entries of `optimizer.state`.
        kind: Class of the state.
        settings: The optimizer's settings.
        params: All parameters.
    """
    layout = entries["layout"] or layout_now(params)
    trained = [number for number, size in enumerate(layout) if size]
    # torch.distributed.checkpoint loads no state of a frozen parameter, and misses that of a trained one.
    now = [number for number, p in enumerate(params) if p.requires_grad] or [0]
    like = [params[number] for number in trained]
    # torch.distributed.checkpoint flattens no lists, and wants all tensors on one device.
    whole = {**entries, "layout": torch.tensor(layout, device=local_part(params[0]).device)}
    if not is_sharded(params):
        return {**{number: {} for number in now}, now[0]: whole}
    with torch.no_grad():
        return _in_pieces({**_blank(kind, settings, flatten([None] * len(like), like)), **whole}, like, trained, now[0])


def _in_pieces(
    entries: Mapping[str, Any], like: Sequence[Tensor], trained: Sequence[int], first: int
) -> dict[int, dict[str, Any]]:
    vectors = {name: value for name, value in entries.items() if isinstance(value, Sharded)}
    rest = {name: _as_tensor(value) for name, value in entries.items() if name not in vectors}
    state: dict[int, dict[str, Any]] = {first: {**rest, _VECTORS: sorted(vectors)}}
    for name, whole in vectors.items():
        parts = [
            piece.reshape(*local_part(p).shape, *piece.shape[1:])
            for piece, p in zip(local_pieces(whole, like), like, strict=True)
        ]
        for number, piece in zip(trained, as_parameters(parts, like), strict=True):
            state.setdefault(number, {})[name] = piece
    return state


def unpacked(state_dict: dict[str, Any], params: Sequence[Tensor]) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Take a saved state apart: the inverse of `packed`, for these parameters, sharded or not.

    Vectors of zeros, which stand for none, are left out.

    Returns:
        The entries of `optimizer.state`, empty if none were saved, and all else that was kept by parameter or by name.
    """
    keys, state = keys_of(state_dict), dict(state_dict["state"])
    key = home(state, keys)
    entries = {} if key is None else {name: _as_numbers(value) for name, value in state[key].items()}
    names = entries.pop(_VECTORS, [])
    for name in names:
        whole = _joined(name, state, keys, params)
        if bool(whole.any()):
            entries[name] = whole
        else:
            del entries[name]
    state.pop(key, None)
    for other in [other for other in keys if other in state]:
        state[other] = {name: value for name, value in state[other].items() if name not in names}
        if not state[other]:
            del state[other]
    # torch.distributed.checkpoint gives {} for an entry that a flattened state does not have.
    return {name: value for name, value in entries.items() if value is not None and not isinstance(value, dict)}, state


def _joined(name: str, state: Mapping[Any, Any], keys: Sequence[Any], params: Sequence[Tensor]) -> Tensor:
    pieces, like = [], []
    for key, p in zip(keys, params, strict=True):
        if name in state.get(key, {}):
            piece = taken_back(state[key][name], p)
            pieces.append(piece.reshape(local_part(p).numel(), *piece.shape[p.dim() :]))
            like.append(p)
    whole = torch.cat(pieces)
    return Sharded(whole, layout_of(like), -whole.dim()) if is_sharded(params) else whole


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
