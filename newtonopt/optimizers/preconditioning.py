"""Preconditioners that are renewed as an optimizer's work goes on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from newtonopt.checks import SEEDS, check_seed, check_whole
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.optimizers.settings import check_choices
from newtonopt.solvers import preconditioners
from newtonopt.solvers.preconditioners import Preconditioner, Sketch
from newtonopt.vectors.flat import flat_dtype
from newtonopt.vectors.memory import check_room
from newtonopt.vectors.sharded import local_part

# Of the running mean of squared gradients.
_FISHER_DECAY = 0.99
# Martens 2010, sec. 4.7.
_FISHER_EXPONENT = 0.75
# Matrices of a sketch's size while it is made: see solvers/preconditioners.py.
_SKETCHING = 2


def prepared(
    A: LinearOperator, gradient: Tensor, settings: dict[str, Any], memory: dict[str, Any]
) -> Callable[[float], Preconditioner | None]:
    """From the damping to the preconditioner; what it is made from is renewed in the state where that is due.

    Args:
        A: The curvature.
        gradient: `(n,)`.
        settings: The optimizer's.
        memory: Its state; `worked` adds to the age that it keeps.
    """
    kind = settings["preconditioner"]
    if kind == "empirical_fisher":
        squares, mean = gradient.square(), memory.get("squared_gradients")
        memory["squared_gradients"] = squares if mean is None else mean.lerp(squares, 1 - _FISHER_DECAY)
        weights = memory["squared_gradients"]
        return functools.partial(preconditioners.diagonal, weights, exponent=_FISHER_EXPONENT)
    if kind == "hutchinson":
        if _is_due("curvature_sizes", settings, memory):
            memory["curvature_sizes"] = preconditioners.estimated_diagonal(
                A, settings["probes"], _generator(settings, memory), gradient
            )
            memory["sketch_age"] = 0
        return functools.partial(preconditioners.diagonal, memory["curvature_sizes"], exponent=1.0)
    if kind == "nystrom":
        if _is_due("sketch_vectors", settings, memory):
            sketch = preconditioners.sketch(A, settings["rank"], _generator(settings, memory), gradient)
            memory.update(sketch_vectors=sketch.vectors, sketch_values=sketch.values, sketch_age=0)
        return Sketch(memory["sketch_vectors"], memory["sketch_values"]).preconditioner
    return lambda damping: None


def worked(memory: dict[str, Any], iterations: int) -> None:
    """Count iterations of conjugate gradients towards the next renewal."""
    memory["sketch_age"] = memory.get("sketch_age", 0) + iterations


def blank(like: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """What the state may hold, with zeros for what is not known yet, made from the flat vector `like`."""
    made: dict[str, Any] = {"sketch_age": 0}
    if settings["preconditioner"] == "empirical_fisher":
        made["squared_gradients"] = torch.zeros_like(like)
    if settings["preconditioner"] == "hutchinson":
        made["curvature_sizes"] = torch.zeros_like(like)
    if settings["preconditioner"] == "nystrom":
        rank = min(settings["rank"], like.numel())
        columns = torch.zeros_like(like.unsqueeze(1).expand(-1, rank), memory_format=torch.contiguous_format)
        made.update(sketch_vectors=columns, sketch_values=torch.zeros(rank, dtype=like.dtype, device=like.device))
    return made


def check_preconditioner(settings: dict[str, Any], *kinds: str | None) -> None:
    """Refuse settings of the preconditioner that are out of their range with a ValueError."""
    check_choices(settings, preconditioner=kinds)
    for name in ("rank", "refresh_every", *(["probes"] if "probes" in settings else [])):
        check_whole(name, settings[name], 1)
    check_seed(settings["seed"])


def check_sketch(params: Sequence[Tensor], settings: dict[str, Any], memory: dict[str, Any]) -> None:
    """Refuse a sketch that is due and would not fit in memory with a MemoryError."""
    if settings["preconditioner"] == "nystrom" and _is_due("sketch_vectors", settings, memory):
        # Only with these is there a number of probes.
        vectors = 'preconditioner="hutchinson" or "empirical_fisher", which take one vector'
        others = vectors if "probes" in settings else "preconditioner=None"
        n, held = sum(p.numel() for p in params), sum(local_part(p).numel() for p in params)
        check_room(
            _SKETCHING * min(settings["rank"], n) * held,
            flat_dtype(params),
            params[0].device,
            f"The preconditioner's sketch of rank={settings['rank']}, for {n} parameters,",
            f"Choose a smaller rank or {others}.",
        )


def _is_due(name: str, settings: dict[str, Any], memory: dict[str, Any]) -> bool:
    return name not in memory or memory["sketch_age"] >= settings["refresh_every"]


def _generator(settings: dict[str, Any], memory: dict[str, Any]) -> torch.Generator:
    """One of its own: the user's random state stays as it is, and a resumed run draws the same numbers."""
    return torch.Generator().manual_seed((settings["seed"] + memory["steps"]) % SEEDS)
