"""Models that the control bounds, by a ball or a cubic term, and curvature matrices that are held whole.

TrustRegionNewton and CubicNewton share the models. DampedNewton and their exact solvers share the matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

import torch
from torch import Tensor

from newtonopt.checks import check_whole
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.optimizers.model import Proposal, QuadraticModel, Shorter
from newtonopt.optimizers.settings import check_choices
from newtonopt.optimizers.state import S
from newtonopt.solvers.secular import above_rounding
from newtonopt.solvers.solution import Iterate, Solution
from newtonopt.vectors.flat import flat_dtype
from newtonopt.vectors.memory import check_room, fits
from newtonopt.vectors.sharded import is_sharded

LengthAlong = Callable[[float, float, float], float]
"""From slope and curvature along a unit vector, and the control, to how far to go."""


def bounded(
    model: QuadraticModel, state: S, solve: Callable[[float], Solution], length_along: LengthAlong
) -> Proposal[S]:
    """Propose the model's minimiser under the control, with shorter ones for tighter controls that take no products.

    Args:
        model: The model at the point.
        state: The optimizer's state.
        solve: From the control to the minimiser; products only in the first call.
        length_along: How far to go along a direction.
    """
    solution = solve(state.control)
    step = model.scaled(Iterate(solution.step, solution.decrease))
    # The graph goes before the trials.
    bare = QuadraticModel(model.gradient, model.rates, model.loss, model.eps)
    nearer: _Nearer[S] = _Nearer(bare, solution, step, model.curvature.products, solve, length_along)
    return nearer.proposal(state)


@dataclass(frozen=True, eq=False)
class _Nearer(Shorter[S], Generic[S]):
    """Minimisers under tighter controls.

    Attributes:
        model: The model without its curvature.
        solution: The solver's solution.
        step: The step with learning rates applied.
        products: Products spent.
        solve: As for `bounded`.
        length_along: As for `bounded`.
    """

    model: QuadraticModel
    solution: Solution
    step: Iterate
    products: int
    solve: Callable[[float], Solution]
    length_along: LengthAlong

    def at(self, state: S) -> Proposal[S]:
        """Return the minimiser under the state's control, or the same step shortened where learning rates differ."""
        found = Iterate(self.solution.step, self.solution.decrease)
        if not isinstance(self.model.rates, Tensor):
            nearer = self.solve(state.control)
            step = self.model.scaled(Iterate(nearer.step, nearer.decrease))
            return replace(self, solution=nearer, step=step).proposal(state)
        # The model's value elsewhere than along this step would take a product.
        slope, bend = self.model.per_length(found)
        t = min(1.0, self.length_along(slope, bend, state.control) / float(found.step.norm()))
        shorter = self.model.through(found).at(t)
        nearer = Solution(shorter.step, shorter.decrease, self.solution.iterations, self.solution.reason)
        return replace(self, solution=nearer, step=self.model.through(self.step).at(t)).proposal(state)

    def proposal(self, state: S) -> Proposal[S]:
        """Return the step as a proposal."""
        return Proposal(
            [self.step],
            state,
            self.solution.reason,
            self.solution.iterations,
            self.products,
            length=float(self.solution.step.norm()),
            shorter=self,
        )


def check_subproblem(settings: dict[str, Any], *choices: str) -> None:
    """Raise a ValueError if a setting that these optimizers share is out of its range."""
    check_choices(settings, subproblem=choices)
    for name in ("max_trials", "max_iterations"):
        check_whole(name, settings[name], 1)


def refuse_exact(params: Sequence[Tensor], subproblem: str, instead: str) -> None:
    """Raise a ValueError for an exact solve with sharded parameters."""
    if subproblem == "exact" and is_sharded(params):
        raise ValueError(
            'params must be whole tensors for subproblem="exact", which needs the curvature matrix in one place, got '
            f'sharded ones. Write subproblem="{instead}".'
        )


# Matrices that are held whole.

# A matrix, its eigenvectors, and twice as much for LAPACK's divide and conquer to work in (syevd).
_COPIES = 4


def check_decomposition(params: Sequence[Tensor], remedy: str, *, blocks: bool = False) -> None:
    """Raise a MemoryError if a curvature matrix to be decomposed would not fit in the memory that is available.

    Nothing is allocated.

    Args:
        params: The parameters.
        remedy: Sentence of the error that says what to write instead.
        blocks: Whether only the diagonal block of each parameter is held, all of them at once.
    """
    if blocks:
        largest = max(params, key=Tensor.numel)
        what = f"The curvature's blocks, the largest of a parameter of shape {tuple(largest.shape)},"
    else:
        what = f"The curvature matrix of {sum(p.numel() for p in params):,} parameters, with its eigenvectors,"
    check_room(_entries(params, blocks), flat_dtype(params), params[0].device, what, remedy)


def blocks_fit(params: Sequence[Tensor]) -> bool:
    """Return whether `check_decomposition` lets the diagonal blocks of these parameters pass."""
    return fits(_entries(params, blocks=True), flat_dtype(params), params[0].device)


def _entries(params: Sequence[Tensor], blocks: bool) -> int:
    sizes = [p.numel() for p in params] if blocks else [sum(p.numel() for p in params)]
    return sum(size**2 for size in sizes) + (_COPIES - 1) * max(sizes) ** 2


def finite_dense(A: LinearOperator) -> Tensor:
    """Return the whole matrix, or raise a FloatingPointError if it has entries that are not finite."""
    matrix = A.dense()
    if not bool(torch.isfinite(matrix).all()):
        raise FloatingPointError("The curvature matrix has entries that are not finite.")
    return matrix


def spectrum(A: LinearOperator) -> tuple[Tensor, Tensor]:
    """Return eigenvalues above their rounding and eigenvectors of the whole matrix.

    Raises:
        FloatingPointError: The matrix has entries that are not finite.
    """
    matrix = finite_dense(A)
    values, vectors = torch.linalg.eigh(matrix)
    return above_rounding(values, vectors, matrix, torch.finfo(matrix.dtype).eps), vectors
