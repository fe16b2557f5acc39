"""Preconditioners that are renewed as an optimizer's work goes on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from newtonopt.checks import SEEDS, check_seed, check_whole
from newtonopt.optimizers.model import QuadraticModel
from newtonopt.optimizers.settings import check_choices
from newtonopt.optimizers.state import State, tensor
from newtonopt.solvers import preconditioners
from newtonopt.solvers.preconditioners import Preconditioner, Sketch
from newtonopt.vectors.flat import flat_dtype
from newtonopt.vectors.memory import check_room
from newtonopt.vectors.sharded import local_part

# Weight of the past in the running mean of squared gradients.
_FISHER_DECAY = 0.99
# Martens 2010, sec. 4.7.
_FISHER_EXPONENT = 0.75
# Matrices of a sketch's size while it is made: see solvers/preconditioners.py.
_SKETCHING = 2


def _is(name: str) -> Callable[[Mapping[str, Any]], bool]:
    """Return whether settings ask for this preconditioner, as a function of them."""
    return lambda settings: bool(settings["preconditioner"] == name)


@dataclass(frozen=True, eq=False)
class PreconditionedState(State):
    """The state with what a preconditioner is made from.

    Attributes:
        sketch_vectors: `U` of the sketch `U diag(l) U'` of the curvature, `(n, rank)`.
        sketch_values: `l`, `(rank,)`.
        sketch_age: Iterations of conjugate gradients since the sketch was made.
        squared_gradients: Running mean of the gradients' squares, `(n,)`.
    """

    sketch_vectors: Tensor | None = field(default=None, metadata=tensor("n", "rank", only_with=_is("nystrom")))
    sketch_values: Tensor | None = field(default=None, metadata=tensor("rank", only_with=_is("nystrom")))
    sketch_age: int = 0
    squared_gradients: Tensor | None = field(default=None, metadata=tensor("n", only_with=_is("empirical_fisher")))


P = TypeVar("P", bound=PreconditionedState)
Precondition = Callable[[float], Preconditioner | None]
"""From the damping to the preconditioner."""


def prepared(model: QuadraticModel, state: P, settings: dict[str, Any]) -> tuple[Precondition, P]:
    """Return the preconditioner as a function of the damping, and the state; what it is made from is renewed if due."""
    if settings["preconditioner"] == "empirical_fisher":
        squares, mean = model.gradient.square(), state.squared_gradients
        mean = squares if mean is None else mean.lerp(squares, 1 - _FISHER_DECAY)
        diagonal = functools.partial(preconditioners.diagonal, mean, exponent=_FISHER_EXPONENT)
        return diagonal, replace(state, squared_gradients=mean)
    if settings["preconditioner"] == "nystrom":
        vectors, values = state.sketch_vectors, state.sketch_values
        if vectors is None or values is None or _is_due(state, settings):
            # A generator of its own: the user's random state stays, and a resumed run draws the same numbers.
            generator = torch.Generator().manual_seed((settings["seed"] + state.steps) % SEEDS)
            sketch = preconditioners.sketch(model.curvature, settings["rank"], generator, model.gradient)
            vectors, values = sketch.vectors, sketch.values
            state = replace(state, sketch_vectors=vectors, sketch_values=values, sketch_age=0)
        return Sketch(vectors, values).preconditioner, state
    return lambda damping: None, state


def _is_due(state: PreconditionedState, settings: dict[str, Any]) -> bool:
    return state.sketch_vectors is None or bool(state.sketch_age >= settings["refresh_every"])


def check_preconditioner(settings: dict[str, Any], *kinds: str | None) -> None:
    """Raise a ValueError if a setting of the preconditioner is out of its range."""
    check_choices(settings, preconditioner=kinds)
    for name in ("rank", "refresh_every"):
        check_whole(name, settings[name], 1)
    check_seed(settings["seed"])


def check_sketch(params: Sequence[Tensor], settings: dict[str, Any], state: PreconditionedState, less: str) -> None:
    """Raise a MemoryError if a sketch is due and would not fit in memory.

    Args:
        params: The trained parameters.
        settings: The optimizer's settings.
        state: Its state.
        less: A preconditioner that takes less memory, for the message.
    """
    if settings["preconditioner"] == "nystrom" and _is_due(state, settings):
        n, held = sum(p.numel() for p in params), sum(local_part(p).numel() for p in params)
        check_room(
            _SKETCHING * min(settings["rank"], n) * held,
            flat_dtype(params),
            params[0].device,
            f"The preconditioner's sketch of rank={settings['rank']}, for {n} parameters,",
            f"Choose a smaller rank or {less}.",
        )
