"""What one call of `step` evaluates: the loss by the user's closure, and the curvature by the same or by another."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from newtonopt._flat import unflatten
from newtonopt.evaluation import Evaluation, Matrix, Products, Verdict
from newtonopt.objective import RESTLESS, Objective, ParametersMovedError
from newtonopt.optimizers.rates import per_entry
from newtonopt.optimizers.settings import rate_of


class Call:
    """The points that one call passes: at the first one the closure runs for real, later without a trace.

    All evaluations begin with the same random state, so that the same function is minimised throughout.

    Args:
        closure: Of the loss.
        curvature_closure: Of the curvature; None: the same.
        groups: The parameter groups.
        falls_back: Whether products are known to need finite differences.
        verdicts: Verdicts of earlier checks of the products.
        length: How far finite differences look; None: not known yet.
        replayed: Whether the closures were seen to compute the same again when they run again.

    Attributes:
        params: The parameters that are neither frozen nor empty.
        rates: Their learning rate, one number or one for each entry `(n,)`.
        objective: The loss.

    Raises:
        RuntimeError: Every parameter is frozen or empty.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        curvature_closure: Callable[[], Any] | None,
        groups: Sequence[dict[str, Any]],
        *,
        falls_back: bool,
        verdicts: Mapping[Matrix, Verdict],
        length: float | None,
        replayed: bool,
    ) -> None:
        trained = [(group, p) for group in groups for p in group["params"] if p.requires_grad and p.numel()]
        if not trained:
            raise RuntimeError(
                "Every parameter of this optimizer is frozen or empty: none requires a gradient. Unfreeze some by "
                "requires_grad_(), or take no step."
            )
        self.params = [p for _, p in trained]
        self.rates = per_entry([float(rate_of(group)) for group, _ in trained], self.params)
        decay = per_entry([float(group["weight_decay"]) for group, _ in trained], self.params)
        products: Products = "finite_difference" if falls_back else groups[0]["products"]
        curved = closure if curvature_closure is None else curvature_closure
        self._curved = Objective(
            curved, self.params, decay, products, verdicts=verdicts, length=length, replayed=replayed
        )
        # By differences, which the loss alone never needs, no graph of it is kept.
        alone: Products = "finite_difference"
        self.objective = self._curved
        if curvature_closure is not None:
            self.objective = Objective(closure, self.params, decay, alone, replayed=replayed)
        self._start = self.objective.point
        self._began = False
        self._gradient: Tensor | None = None
        self._returned: Any = None

    def evaluate(self) -> tuple[Evaluation, Evaluation]:
        """At the present point: the loss's, and the one whose products are the curvature's."""
        if self._curved is self.objective:
            evaluation = basis = self._evaluated()
        else:
            # First, so that an error finds everything as it was.
            first = self._curvature()
            evaluation = self._evaluated()
            if first is not None and self._curved.point is self.objective.point:
                return evaluation, first
            # The closure has moved the parameters.
            if first is not None:
                first.free()
            again = self._curvature()
            if again is None:
                raise RuntimeError(f"The curvature_closure failed. {RESTLESS}")
            basis = again
        return evaluation, basis

    def _evaluated(self) -> Evaluation:
        if self._gradient is not None:
            return self.objective.evaluate()
        self._began = True
        evaluation = self.objective.record()
        self._gradient = evaluation.data_gradient
        self._returned = evaluation.loss if evaluation.returned is None else evaluation.returned
        return evaluation

    def _curvature(self) -> Evaluation | None:
        """None if the curvature's closure moves the parameters."""
        self._curved.point = self.objective.point
        try:
            return self._curved.evaluate()
        except ParametersMovedError:
            return None
        except RuntimeError as error:
            raise RuntimeError(f"The curvature_closure failed. {error}") from error

    def fall_back(self) -> None:
        """Form products by finite differences from the next point on."""
        self._curved.products = "finite_difference"

    def undo(self) -> None:
        """Put all back to where the call began."""
        if self.objective.point is not self._start:
            self.objective.return_to(self._start)
        if self._began:
            self.objective.rewind()

    def finish(self) -> Any:
        """Leave the first point's gradient in `.grad`; returns what the closure returned there, or the loss."""
        self.objective.settle()
        if self._gradient is not None:
            _put_gradients(self.params, self._gradient)
        return self._returned


def does_nothing(closure: Callable[[], Any]) -> bool:
    """Whether this is what Lightning gives a step that was called without a closure under manual optimization."""
    hosts = (closure.func, *closure.args) if isinstance(closure, functools.partial) else (closure,)
    return any(getattr(host, "__name__", "") == "do_nothing_closure" for host in hosts)


def skips_backward(closure: Callable[[], Any]) -> bool:
    """Whether this is Lightning's closure without a `backward`."""
    hosts = (closure.func, *closure.args) if isinstance(closure, functools.partial) else (closure,)
    return any(
        type(host).__module__.partition(".")[0] in ("lightning", "pytorch_lightning")
        and getattr(host, "_backward_fn", host) is None
        for host in hosts
    )


def refuse_skipped_batches() -> None:
    """Raise a RuntimeError if accelerate, which calls the step, leaves out all closures but every n-th.

    Its optimizer runs no closure while it accumulates gradients, so that a step would see one micro-batch of n.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_WRAPPERS):
        if frame is None:
            return
        if frame.f_globals.get("__name__") == "accelerate.optimizer":
            count = frame.f_locals["self"].gradient_state.num_steps
            if count > 1:
                raise RuntimeError(
                    f"Accelerator(gradient_accumulation_steps={count}) runs the closure of every {count}. batch only, "
                    "so that a step would leave out the others: set it to 1, and loop over the micro-batches inside "
                    "one closure, calling backward for each."
                )
        frame = frame.f_back


# Frames of hooks, decorators and schedulers between a caller of `step` and its body, at most.
_WRAPPERS = 10


def _put_gradients(params: Sequence[Tensor], gradient: Tensor) -> None:
    """Leave the recorded gradient in `.grad`, unclipped; a parameter that the loss does not use keeps None."""
    for p, piece in zip(params, unflatten(gradient, params), strict=True):
        if p.grad is not None:
            p.grad.copy_(piece)
        elif bool(piece.any()):
            p.grad = piece.clone()


def unrounded(vector: Tensor) -> torch.autocast:
    """A step taken inside autocast would have it round the solver's vectors."""
    return torch.autocast(vector.device.type, enabled=False)


def not_finite(loss: float, norm: float, evaluation: Evaluation, basis: Evaluation) -> str:
    """In words, what is not finite; empty if all is."""
    if not math.isfinite(loss):
        return "loss"
    if not math.isfinite(norm):
        finite = math.isfinite(float(evaluation.gradient.abs().max()))
        return "gradient's norm (each entry is: divide the loss by a constant)" if finite else "gradient"
    return "" if basis is evaluation or math.isfinite(float(basis.loss)) else "curvature_closure's loss"
