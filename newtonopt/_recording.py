"""What one run of the closure gives for an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from newtonopt._autograd import gradient_of
from newtonopt._convexity import Output
from newtonopt._flat import add_flat, flatten, is_rounding
from newtonopt._graph import all_behind, reaches
from newtonopt._shards import accumulate
from newtonopt._subclasses import detached
from newtonopt._tap import Tap, Term
from newtonopt._writes import Writes
from newtonopt.evaluation import UNRELATED, UnrelatedError, leaves_outside, local_gradients, refuse_sparse


class Recording:
    """The losses of one run: kept with their graphs, or differentiated and let go one by one.

    Args:
        params: The parameters.
        cached: Whether the losses are kept.
        accumulates: Whether their gradients are added to `.grad`, as `backward` does it.

    Attributes:
        loss: Their sum, live if they were kept.
        gradient: Its gradient on this process, `(n,)`.
        outputs: The recorded outputs, if the losses were kept.
        output_sizes: How many entries the recorded outputs have, by their numbers, in the order of these.
        outside: Whether the loss depends on the parameters other than through the outputs; None: not known.
        related: The numbers of the parameters that the losses depend on.
        returned: What the closure returned, detached when it is a tensor.
        is_complete: Whether the closure was run to its end, and all of its losses count.
        versions: Sets the parameters' versions to those of the last loss kept, else to those at the start.
    """

    loss: Tensor
    gradient: Tensor
    outputs: tuple[Output, ...] = ()
    outside: bool | None = None
    returned: Any = None
    is_complete = False

    def __init__(self, params: Sequence[Tensor], *, cached: bool, accumulates: bool = False) -> None:
        self._params = params
        self._cached = cached
        self._accumulates = accumulates
        self._kept: list[Tensor] = []
        self.related: set[int] = set()
        self._sizes: dict[int, int] = {}
        self._products = True
        self.versions = kept_versions(params)
        self._looked = [p._version for p in params]
        self._places: list[Tensor] = []
        if not cached:
            self.outside = False
            self.gradient = flatten([None] * len(params), params)

    @property
    def output_sizes(self) -> dict[int, int]:
        """See the class."""
        return dict(sorted(self._sizes.items()))

    def take(self, term: Term) -> None:
        """Called by the tap with each loss."""
        _refuse_reentrant_checkpoints(term.loss)
        self._products = self._products and _is_product(term.loss)
        if self._cached:
            self._kept.append(term.loss)
            self._note_place()
            self.versions = kept_versions(self._params)
            return
        self._sizes.update({z.number: z.tensor.numel() for z in term.outputs})
        self.outside = self.outside or leaves_outside(term.loss, term.tensors, self._params)
        gradients = gradient_of(term.loss, self._params, keep=term.keep)
        refuse_sparse(gradients)
        self._relate(gradients)
        add_flat(self.gradient, gradients, self._params)
        if self._accumulates:
            accumulate(gradients, self._params)

    def _note_place(self) -> None:
        """Where the closure has moved the parameters to, in two different losses at most."""
        versions = [p._version for p in self._params]
        if versions != self._looked and len(self._places) < 2:
            self._looked = versions
            with torch.no_grad():
                place = flatten(self._params, self._params).clone()
            if not self._places or not torch.equal(place, self._places[-1]):
                self._places.append(place)

    def is_elsewhere(self, point: Tensor) -> bool:
        """Whether a loss that was kept was computed with other parameters than at `point`, as SAM's is."""
        return any(not is_rounding(place, point, self._params) for place in self._places)

    def _relate(self, gradients: Sequence[Tensor | None]) -> None:
        self.related.update(number for number, g in enumerate(gradients) if g is not None)

    def check_intact(self, writes: Writes) -> None:
        """Refuse graphs that keep a tensor to which the closure has written.

        Raises:
            OverwrittenError: One of the losses kept has such a graph.
        """
        if any(writes.used_by(loss.grad_fn) for loss in self._kept):
            raise OverwrittenError(
                "The closure writes in place to a tensor that its loss is computed from, so products cannot be formed "
                'later from the graph: use products="streamed" (or "auto"), which forms them as the closure runs.'
            )

    def finish(self, tap: Tap, returned: Any) -> None:
        """Called after the closure, with what it returned."""
        self.is_complete = True
        self.returned = detached(returned) if isinstance(returned, Tensor) else returned
        if self._products and isinstance(returned, Tensor) and returned.numel() == 1:
            _refuse_gradient_scaler(float(tap.total(returned)), float(self.returned))
        if not self._cached:
            self.loss = tap.total(returned)
            if not self.related:
                raise UnrelatedError(UNRELATED)
            return
        tap.total(returned)
        with torch.enable_grad():
            self.loss = self._kept[0]
            for loss in self._kept[1:]:
                self.loss = self.loss + loss
        gradients = local_gradients(self.loss, self._params)
        self._relate(gradients)
        self.gradient = flatten(gradients, self._params)
        self.outputs = tap.outputs_of(self.loss)
        self._sizes = {z.number: z.tensor.numel() for z in self.outputs}


class OverwrittenError(RuntimeError):
    """A graph keeps a tensor to which the closure has written."""


class ParametersMovedError(RuntimeError):
    """The closure moved the parameters, which were put back.

    Attributes:
        point: Where it left them, `(n,)`.
    """

    def __init__(self, message: str, point: Tensor) -> None:
        super().__init__(message)
        self.point = point


def kept_versions(params: Sequence[Tensor]) -> Callable[[], None]:
    """Return a function that lets autograd take the parameters for unchanged since this call.

    A closure that clamps them counts them up even where it changes no entry.
    """
    kept = [torch.autograd._unsafe_preserve_version_counter(p) for p in params]  # type: ignore[attr-defined]

    def restore() -> None:
        for version in kept:
            version.__exit__(None, None, None)

    return restore


def is_older(loss: Tensor, sequence: int, params: Sequence[Tensor]) -> bool:
    """Whether a node of the graph that depends on the parameters was made before the node of this number."""
    leaves = {id(p) for p in params}
    older = [node for node in all_behind([loss.grad_fn]) if node._sequence_nr() < sequence]
    return bool(older) and reaches(older, lambda node: id(getattr(node, "variable", None)) in leaves)


def is_clipped(params: Sequence[Tensor], gradients: Sequence[Tensor], *, accumulated: bool) -> bool:
    """Whether `.grad` is one of these gradients, clipped; anything but this or one of them itself is an error.

    Args:
        params: The parameters.
        gradients: The gradients that `.grad` may be.
        accumulated: Whether the closure may have found other gradients at its start.
    """
    with torch.no_grad():
        left = flatten([p.grad for p in params], params)
        eps = max(torch.finfo(p.dtype).eps for p in params)
        verdicts = {_compared(left, gradient, math.sqrt(eps)) for gradient in gradients}
    if "same" in verdicts:
        return False
    if "clipped" in verdicts:
        return True
    raise RuntimeError(_HOOKED if _has_hooks(params) else _ACCUMULATED if accumulated else _WRITTEN)


def restless(params: Sequence[Tensor]) -> str:
    """Return what to say of parameters that the closure changes each time."""
    return _HOOKED if _has_hooks(params) else RESTLESS


def _has_hooks(params: Sequence[Tensor]) -> bool:
    return any(getattr(p, "_post_accumulate_grad_hooks", None) for p in params)


def _compared(left: Tensor, gradient: Tensor, tolerance: float) -> str:
    scale = float(gradient.abs().max())
    if not math.isfinite(scale):
        return "same"  # reported as a non-finite gradient
    rounding = tolerance * max(scale, float(left.abs().max()))
    if float((left - gradient).abs().max()) <= rounding:
        return "same"
    # Clipping leaves no entry zero, as a mask does.
    shrunk = (left * gradient >= -rounding * scale) & (left.abs() <= gradient.abs() + rounding)
    shrunk &= (left != 0) | (gradient.abs() <= rounding)
    return "clipped" if bool(shrunk.all()) else "other"


def _refuse_reentrant_checkpoints(loss: Tensor) -> None:
    # Its parameters hang on no path of the graph, so that their gradient would silently be missing.
    if reaches(loss.grad_fn, lambda node: node.name() == "CheckpointFunctionBackward"):
        raise RuntimeError(
            "The forward pass uses torch.utils.checkpoint with use_reentrant=True, which hides the parameters inside "
            "from differentiation. Call checkpoint(..., use_reentrant=False)."
        )


def _is_product(loss: Tensor) -> bool:
    node = loss.grad_fn
    while node is not None and node.name() in ("ViewBackward0", "AliasBackward0"):
        node = node.next_functions[0][0]
    return node is not None and node.name() == "MulBackward0"


def _refuse_gradient_scaler(total: float, returned: float) -> None:
    # A scale is a power of two, and large; multiplying by it does not round.
    if returned == 0.0 or not math.isfinite(total / returned):
        return
    mantissa, exponent = math.frexp(total / returned)
    if mantissa == 0.5 and exponent > 8:
        raise RuntimeError(
            f"The closure calls backward on {total / returned:g} times the loss that it returns, as it does with "
            "scaler.scale(loss).backward() of a GradScaler, and a second-order step would take that for the loss. Call "
            "loss.backward(), without a scaler, and use bfloat16 autocast, which needs none."
        )


_ACCUMULATED = (
    "After the closure, .grad is not the gradient of its loss: something else was added, usually an earlier closure's "
    "gradient. A second-order step needs one objective, so gradients cannot be accumulated across closures: call "
    "optimizer.zero_grad() first in the closure, set accumulate_grad_batches=1 in Lightning, and to use several "
    "batches loop over them inside one closure, calling backward for each."
)
_WRITTEN = (
    "After the closure, .grad is not the gradient of its loss: the closure, or a hook on a parameter, wrote something "
    "else there, such as noise, another task's gradient, a decay or the zeros of a mask. A second-order step takes the "
    "gradient of the loss itself: put into the loss what belongs to the objective (or use weight_decay), give the "
    "optimizer only what is to be trained, and leave .grad as backward leaves it."
)
_HOOKED = (
    "A hook that was registered by register_post_accumulate_grad_hook changes .grad or the parameters inside backward, "
    "as optimizers that step in backward do. A second-order step needs the whole gradient, and takes the step itself: "
    "remove the hook."
)
MOVED = (
    "The closure changed the parameters, and they were put back, because an evaluation leaves them where they are. If "
    "it clamps or normalises them, call closure() once first: that puts them where it wants them."
)
MOVED_BEYOND = (
    "The closure changes the parameters at a point close by, as one that clamps them does where one lies on a bound, "
    'so there are no finite differences across it: use products="cached" or "streamed".'
)
RESTLESS = (
    "The closure changed the parameters, and changed them again when it was called from where it had left them; they "
    "were put back. It may clamp or normalise them, so that a second call finds nothing to do, but not train them: do "
    "that after the step."
)
MOVED_IN_A_GROUP = (
    "The closure changed the parameters, and they were put back: with several processes it must not, for each of them "
    "might put its own elsewhere. Clamp or normalise weights after the step, or inside the model by "
    "torch.nn.utils.parametrize; an Embedding takes no max_norm."
)
