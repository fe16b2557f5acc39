"""States as they are saved and loaded: of earlier versions, and in the form that `torch.distributed.checkpoint` can
reshard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from newtonopt._flat import flatten, local_pieces
from newtonopt._sharded import Sharded
from newtonopt._shards import as_parameters, is_sharded, layout_of, local_part, taken_back

# Under this name the state of the first parameter lists which of its entries are pieces of vectors.
_VECTORS = "vectors"


# Settings that optimizers have had only since the first states were saved: these load with the defaults.
_ADDED = (
    "tolerance_gradient",
    "tolerance_step",
    "steps_per_call",
    "max_trials",
    "preconditioner",
    "rank",
    "refresh_every",
    "probes",
    "blocks",
    "seed",
)


def completed(state_dict: dict[str, Any], defaults: dict[str, Any], kind: str) -> dict[str, Any]:
    """A state_dict with the settings that an earlier version did not have.

    Raises:
        ValueError: Another setting is missing.
    """
    added = {name: defaults[name] for name in _ADDED if name in defaults}
    groups = [{**added, **group} for group in state_dict["param_groups"]]
    missing = [name for name in defaults if any(name not in group for group in groups)]
    if missing:
        raise ValueError(
            f"This state has no {', '.join(missing)}: it was saved by another kind of optimizer than {kind}. Load it "
            "into one of that kind."
        )
    return {**state_dict, "param_groups": groups}


def check_layout(state_dict: dict[str, Any], params: Sequence[Tensor]) -> None:
    """Refuse the state of another model, whose parameters have other sizes, with a ValueError.

    Parameters that were frozen when it was saved have the size 0 in it.
    """
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    layout = _as_numbers(state_dict["state"].get(keys[0], {}).get("layout")) if keys else None
    if layout is None or len(layout) != len(params):  # torch refuses another number of parameters
        return
    for number, (size, p) in enumerate(zip(layout, params, strict=True)):
        if size not in (0, p.numel()):
            raise ValueError(
                f"This state is another model's: its parameter {number} had {size} entries, and here that has the "
                f"shape {tuple(p.shape)}, {p.numel()} entries (in the state {layout}, here "
                f"{[p.numel() for p in params]}). Load it into an optimizer of the same model."
            )


def spread(
    memory: dict[str, Any], blank: Callable[[Tensor], dict[str, Any]], params: Sequence[Tensor]
) -> dict[int, dict[str, Any]]:
    """Each vector as one DTensor for each trained parameter, shaped and sharded as it is.

    Args:
        memory: The optimizer's state.
        blank: What it may hold besides, made from a flat vector of zeros.
        params: All parameters.

    Returns:
        States by the parameters' numbers; all that is no sharded vector is in the first one's, numbers as tensors:
        under a key that is no string, others are not loaded.
    """
    layout = memory.get("layout", [p.numel() if p.requires_grad else 0 for p in params])
    trained = [number for number, size in enumerate(layout) if size]
    like = [params[number] for number in trained]
    with torch.no_grad():
        whole = {"layout": layout, **blank(flatten([None] * len(like), like)), **memory}
        return _in_pieces(whole, like, trained)


def _in_pieces(memory: dict[str, Any], like: Sequence[Tensor], trained: Sequence[int]) -> dict[int, dict[str, Any]]:
    vectors = {name: value for name, value in memory.items() if isinstance(value, Sharded)}
    rest = {name: _as_tensor(value) for name, value in memory.items() if name not in vectors}
    state: dict[int, dict[str, Any]] = {0: {**rest, _VECTORS: sorted(vectors)}}
    for name, vector in vectors.items():
        parts = [
            piece.reshape(*local_part(p).shape, *piece.shape[1:])
            for piece, p in zip(local_pieces(vector, like), like, strict=True)
        ]
        for number, piece in zip(trained, as_parameters(parts, like), strict=True):
            state.setdefault(number, {})[name] = piece
    return state


def joined(state_dict: dict[str, Any], params: Sequence[Tensor]) -> dict[str, Any]:
    """A state_dict with the vectors that `spread` took apart as they were, for these parameters, sharded or not.

    Vectors of zeros, which stand for none, are left out.
    """
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    state = state_dict["state"]
    if not keys or _VECTORS not in state.get(keys[0], {}):
        return state_dict
    names = state[keys[0]][_VECTORS]
    memory = {name: _as_numbers(value) for name, value in state[keys[0]].items() if name not in (*names, _VECTORS)}
    for name in names:
        pieces, like = [], []
        for key, p in zip(keys, params, strict=True):
            if name in state.get(key, {}):
                piece = taken_back(state[key][name], p)
                pieces.append(piece.reshape(local_part(p).numel(), *piece.shape[p.dim() :]))
                like.append(p)
        vector = torch.cat(pieces)
        if is_sharded(params):
            vector = Sharded(vector, layout_of(like), -vector.dim())
        if bool(vector.any()):
            memory[name] = vector
    return {**state_dict, "state": {keys[0]: memory}}


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
