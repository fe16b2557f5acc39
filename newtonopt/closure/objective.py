"""What one run of the closure gives for an evaluation."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from newtonopt.autodiff.gradients import forward_mode, grad, gradient_of
from newtonopt.autodiff.graph import all_behind, coarsest, reaches
from newtonopt.checks import check_closure, check_weight
from newtonopt.closure.accumulation import Group
from newtonopt.closure.evaluation import (
    SAME_FUNCTION,
    UNRELATED,
    Evaluation,
    Matrix,
    Products,
    UnrelatedError,
    Verdict,
    check_products,
    decay_term,
    decays,
    leaves_outside,
    local_gradients,
    refuse_sparse,
)
from newtonopt.closure.isolation import Isolation, UnprotectedError
from newtonopt.closure.losses import Output, unrecognised
from newtonopt.closure.tap import OnTerm, Tap, Term, Writes, mark_outputs, tapped
from newtonopt.progress import progress
from newtonopt.vectors.flat import add_flat, flatten, is_rounding, place, put_back, trained_parameters, unflatten
from newtonopt.vectors.processes import Ranks
from newtonopt.vectors.random import normals
from newtonopt.vectors.sharded import accumulate, check_sharding, is_sharded, resharded, supported
from newtonopt.vectors.subclasses import detached


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


# The user's closure as a function of the parameters.


__all__ = [
    "RESTLESS",
    "Closure",
    "Evaluation",
    "Objective",
    "ParametersMovedError",
    "Products",
    "evaluate",
    "mark_outputs",
]

Closure = Callable[[], Any]
_CONSTANT = (
    "The loss is the same to the last bit wherever the parameters are, so no step can be tried: the closure must run "
    "the forward pass itself, each time it is called. Move the call of the model and of the loss function into the "
    "closure, before loss.backward(), and keep no loss, output or parametrized weight from an earlier call."
)
_MOVED = (
    "The closure changes the parameters, and calls backward for some of them only: a second-order step takes the "
    "others for constants in that loss, and must find them where they were. Clamp or normalise weights after the step."
)
_ELSEWHERE = (
    "The closure calls backward on a loss at other parameters than those that it leaves, as SAM does, and cached "
    'products are those of one point: use products="streamed" or "auto".'
)
_DIVIDED_IN_A_GROUP = (
    "The closure leaves the gradients of some losses by some of the parameters only (by backward(inputs=...) or "
    "zero_grad() in between), which has no steps with several processes: give each network an optimizer and a closure "
    "of its own."
)
Result = TypeVar("Result")


class Objective:
    """The closure as a function of a step from the current parameters. Lives for one optimizer step.

    Whatever is evaluated elsewhere, the parameters are put back bit for bit; only `move` sets new ones, and `record`
    where the closure does.

    A closure may clamp or normalise parameters: it is then evaluated where it leaves them, and must leave them there
    when it is called again.

    The function is the one whose gradient `.grad` holds when the closure ends: the sum of the losses that it calls
    `backward` on, but for those whose gradients it clears again, each by the parameters that `backward(inputs=...)`
    names. The other parameters are constants in such a loss: a trial leaves them where they are.

    With several processes of `torch.distributed` the objective is the mean of theirs, weighted by what their losses are
    means over where these are losses of `torch.nn.functional`, else equally. All methods are then collective calls.

    Args:
        closure: Takes no argument; computes the loss and calls `backward` on it (several times for a sum of losses), or
            returns a live loss.
        params: The parameters.
        decay: Weight decay, one number or one for each parameter entry `(n,)`: adds `sum(decay * theta^2) / 2`.
        products: How products are formed, as for `evaluate`.
        weight: Of this process in the mean, above zero; None (default): found from the losses.
        verdicts: Verdicts of earlier checks of its products; None (default): they are checked anew.
        length: How far finite differences look, as for an `Evaluation`.
        replayed: Whether such a closure was seen before to compute the same loss and gradient when it runs again, so
            that products need not see to it.

    Attributes:
        params: The parameters.
        point: Their values, `(n,)`.
        products: How those of the next evaluation are formed.
    """

    def __init__(
        self,
        closure: Closure,
        params: Iterable[Tensor],
        decay: float | Tensor = 0.0,
        products: Products = "auto",
        weight: float | None = None,
        verdicts: Mapping[Matrix, Verdict] | None = None,
        length: float | None = None,
        *,
        replayed: bool = False,
    ) -> None:
        self._closure = closure
        self._verdicts, self._length = verdicts, length
        self.params = tuple(params)
        self._decay = decay
        check_sharding(self.params)
        # The hooks of sharded modules have no derivative, and average gradients over the processes themselves.
        self._sharded = is_sharded(self.params)
        self.products: Products = supported(products) if self._sharded else products
        self._weight = weight
        self._isolation = Isolation(closure, self.params)
        with torch.no_grad():
            self.point = flatten(self.params, self.params).clone()
        self._moves = False
        self._evaluated: tuple[Tensor, Tensor] | None = None
        # This process's gradient, as last evaluated.
        self._own = self.point
        self._terms: int | None = None
        # Which losses count; None: all, or not known yet.
        self._groups: tuple[Group, ...] | None = None
        self._counted: frozenset[int] | None = None
        self._calls = 0
        self._fills = False
        self._numbers: dict[object, int] = {}
        self._may_release, self._has_released = True, False
        self._replayed = replayed
        self._ranks = Ranks(self.point)
        if not self._sharded:
            self._ranks.check_same(self.point)
        self._shares = torch.full((self._ranks.count,), 1 / self._ranks.count, dtype=torch.float64, device="cpu")

    def record(self) -> Evaluation:
        """Run the closure for real, once: its `backward` runs, its traces stay.

        If it moves the parameters, they stay there, and the evaluation is the one at that point.

        Raises:
            RuntimeError: The closure gives no loss, `.grad` holds more than this closure's gradient, or the closure
                moves the parameters each time.
        """
        try:
            return self._record()
        except OverwrittenError:
            if self.products != "auto":
                raise
            self.products = "streamed"
            return self._record()

    def _record(self) -> Evaluation:
        with self._isolation.recorded() as writes:
            recording, tap, left = self._run(writes, backward=True, release=False)
            if left is not None and self._is_divided:
                raise RuntimeError(_MOVED)
        if left is not None:
            # A projection goes to the same place without gradients; an update by them does not.
            _, again = self._pass(None, self.point)
            if again is None or not is_rounding(again, left, self.params):
                raise RuntimeError(restless(self.params))
            # What was differentiated may mix two points.
            self._moves = True
            self.return_to(left)
            try:
                return self.evaluate()
            except ParametersMovedError as error:
                raise RuntimeError(restless(self.params)) from error
        # A run that finds that some losses do not count has no gradient of the others alone, nor has one that kept the
        # graph of a loss at other parameters.
        complete = recording.is_complete
        evaluation = self._evaluation(lambda: (recording, tap)) if complete else self.evaluate()
        if tap.called_backward:
            averages = self._averages(evaluation, evaluation.data_gradient if self._is_divided else self._own)
            evaluation.clipped = is_clipped(self.params, averages, accumulated=tap.gradients.had_some)
        return evaluation

    def rewind(self) -> None:
        """Take back what `record` did to the state that the closure can reach."""
        self._isolation.rewind()

    def settle(self) -> None:
        """Take back what hooks on a graph that was kept have done since `record`, or since the first evaluation."""
        self._isolation.settle()

    def evaluate(self) -> Evaluation:
        """The same without a trace: `backward` is left out, and all is put back.

        Raises:
            ParametersMovedError: The closure moves the parameters from where they are.
        """

        def attempt(release: bool) -> tuple[Recording, Tap]:
            with self._isolation.isolated() as writes:
                recording, tap, left = self._run(writes, backward=False, release=release)
            # A weight that is normalised twice may differ by rounding.
            if left is not None and not is_rounding(left, self.point, self.params):
                raise ParametersMovedError(MOVED, left)
            return recording, tap

        def settled(release: bool) -> tuple[Recording, Tap]:
            """Run again where the run has shown that not all losses count, or that gradients are read."""
            while True:
                before = self._fills, self._counted, self.products
                try:
                    found = attempt(release)
                except OverwrittenError:
                    if self.products != "auto":
                        raise
                    self.products = "streamed"
                    continue
                except Exception:
                    if (self._fills, self._counted, self.products) == before:
                        raise
                    continue
                if (self._fills, self._counted, self.products) == before:
                    return found

        if self._ranks.count > 1:
            return self._evaluation(lambda: self._released(settled))
        if not self._is_divided:
            first = self._released(settled)
        return self._divided() if self._is_divided else self._evaluation(lambda: first)

    @property
    def _is_divided(self) -> bool:
        """Whether losses count for some of the parameters only."""
        return self._groups is not None and any(group.params is not None for group in self._groups)

    def _divided(self) -> Evaluation:
        """The evaluation of losses that count for different parameters: the sum of one for each group of them."""
        parts, groups = [], []
        for group in self._groups or ():
            try:
                part = self._only(group).evaluate()
            except UnrelatedError:
                continue
            # What a loss reaches only through a detached tensor is constant in it too.
            related = part.related if group.params is None else part.related & group.params
            group = Group(group.calls, None if len(related) == len(self.params) else related)
            groups.append(group)
            part.mask = self._mask(group)
            parts.append((part, part.mask))
        if not parts:
            raise UnrelatedError(UNRELATED)
        self._groups = tuple(groups)
        if not self._is_divided:
            self._counted = groups[0].calls
            return self.evaluate()
        gradient = sum((part.gradient * mask for part, mask in parts), torch.zeros_like(self.point))
        loss = sum((part.loss for part, _ in parts), parts[0][0].loss.new_zeros(()))
        evaluation = Evaluation(loss, self.params, decay=self._decay, gradient=gradient, source=self, parts=parts)
        evaluation.returned, evaluation.may_fall_back = parts[0][0].returned, parts[0][0].may_fall_back
        return evaluation

    def _only(self, group: Group) -> Objective:
        """The losses of a group alone, without weight decay, as a function of all parameters."""
        one = copy.copy(self)
        one._decay, one._groups, one._counted, one._evaluated = 0.0, None, group.calls, None
        return one

    def _mask(self, group: Group) -> Tensor:
        """Ones where the entries of the group's parameters are, zeros elsewhere, `(n,)`."""
        of = range(len(self.params)) if group.params is None else group.params
        ones = [torch.ones_like(p) if number in of else None for number, p in enumerate(self.params)]
        return flatten(ones, self.params)

    def loss_at(self, step: Tensor) -> float:
        """The objective at `point + step`, `(n,)`: one forward pass, without a trace."""
        return self._value(lambda: self._at_rest(self.point + step))

    def check_replay(self, evaluation: Evaluation) -> None:
        """See on all processes that the closure computes the same loss and gradient when it runs again, unless that was
        seen before: one forward and one backward pass, without a trace.

        Raises:
            RuntimeError: It does not.
        """
        for group, (part, _) in zip(self._groups or (), evaluation.parts, strict=False):
            self._only(group).check_replay(part)
        if not evaluation.parts and not evaluation.replayed:
            self._ranks.each(lambda: self.replay(evaluation))

    def replay(self, evaluation: Evaluation) -> None:
        """The same on this process."""
        gradient, eps = torch.zeros_like(self.point), evaluation.eps
        add = self._adding_to(gradient)

        def take(term: Term) -> None:
            nonlocal eps
            eps = coarsest([term.loss.grad_fn], eps)
            add(term)

        evaluation.check_same_function(float(self.visit(take)), evaluation.eps**0.25)
        evaluation.check_same_gradient(gradient, eps)
        evaluation.replayed = self._replayed = True

    @property
    def unprotected(self) -> list[str]:
        """Names of what runs without a trace have changed and cannot put back."""
        return self._isolation.unprotected

    def check_restored(self) -> None:
        """Raise an UnprotectedError if runs without a trace have changed something that cannot be put back."""
        if self.unprotected:
            raise UnprotectedError(self.unprotected)

    def gradient_at(self, step: Tensor) -> tuple[float, Tensor]:
        """The objective and its gradient at `point + step`: one forward and one backward pass, without a trace."""
        gradient = torch.zeros_like(self.point)
        found: list[Tensor] = []

        def compute() -> tuple[Tensor, Tensor]:
            loss, point = self._at_rest(self.point + step, gradient)
            found.append(point)
            return loss, point

        loss = self._value(compute)
        mean = self.mean(lambda: gradient)
        return loss, mean + self._decay * found[0] if decays(self._decay) else mean

    def visit(self, on_term: OnTerm | None, step: Tensor | None = None, *, numbers: Collection[int] = ()) -> Tensor:
        """Run the closure at `point + step` without a trace, and hand its losses over one by one.

        Args:
            on_term: Called with each loss; None if only their sum is wanted.
            step: `(n,)`; None: no step.
            numbers: The numbers of the outputs that are handed over with the losses.

        Returns:
            Their sum, on this process.

        Raises:
            ParametersMovedError: The closure moves the parameters from there.
        """
        loss, left = self._pass(on_term, None if step is None else self.point + step, numbers)
        if left is not None and not is_rounding(left, self.point if step is None else self.point + step, self.params):
            raise ParametersMovedError(MOVED if step is None else MOVED_BEYOND, left)
        return loss

    def _at_rest(self, point: Tensor, gradient: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the closure at `point`, and again where it leaves the parameters, until it leaves them in place.

        Args:
            point: The parameters' values, `(n,)`.
            gradient: Where to write this process's gradient; None: nowhere.

        Returns:
            The loss on this process, and the parameters' values there.

        Raises:
            RuntimeError: The closure moves the parameters each time.
        """
        if self._is_divided:
            return self._at_rest_in_groups(point, gradient), point
        for _ in range(3):
            if gradient is not None:
                gradient.zero_()
            loss, left = self._pass(None if gradient is None else self._adding_to(gradient), point)
            if left is None:
                return loss, point
            self._moves, before, point = True, point, left
        if is_rounding(point, before, self.params):
            return loss, before
        raise RuntimeError(RESTLESS)

    def _at_rest_in_groups(self, point: Tensor, gradient: Tensor | None) -> Tensor:
        """The same where losses count for some of the parameters only: those alone are moved, group by group."""
        losses, slopes = [], torch.zeros_like(point)
        for group in self._groups or ():
            mask = self._mask(group)
            at, slope = torch.where(mask > 0, point, self.point), torch.zeros_like(point)
            loss, left = self._only(group)._at_rest(at, None if gradient is None else slope)
            if left is not at:
                raise RuntimeError(_MOVED)
            losses.append(loss)
            slopes += mask * slope
        if gradient is not None:
            gradient.copy_(slopes)
        return torch.stack(losses).sum()

    def _pass(
        self, on_term: OnTerm | None, point: Tensor | None, numbers: Collection[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Run the closure at `point`, where the parameters are if None; the loss, and where it left them if elsewhere.

        Raises:
            RuntimeError: It left them elsewhere, and there are several processes.
        """
        at = self.point if point is None else point

        def attempt(release: bool) -> tuple[Tensor, Tensor | None]:
            with self._placed(point), self._isolation.isolated() as writes, progress(self._terms) as tick:

                def take(term: Term) -> None:
                    self._has_released = release
                    if on_term is not None:
                        on_term(term)
                    tick()

                tap = self._tap(on_term=take, release=release, wanted=numbers, writes=writes)
                unchanged = kept_versions(self.params)
                returned = self._call(tap)
                unchanged()
                left = self._left(at)
            return tap.total(returned), left

        return self._released(attempt)

    def _left(self, point: Tensor) -> Tensor | None:
        """Where the closure left the parameters, if that is not `point`; puts them there."""
        left = put_back(point, self.params)
        if left is not None and self._ranks.count > 1:
            raise RuntimeError(MOVED_IN_A_GROUP)
        return left

    def push(self, v: Tensor, numbers: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the closure in forward mode along `v`, `(n,)`, without a graph and without a trace.

        Returns:
            The sum of its losses on this process, and `J v` for the outputs of these numbers, by number.

        Raises:
            RuntimeError: The closure differentiates inside or writes to the parameters, which changes their tangents,
                or an operation has no forward mode.
        """
        tangents: dict[int, Tensor] = {}
        with (
            self._placed(None),
            self._isolation.isolated() as writes,
            progress(self._terms) as tick,
            forward_mode(self.params, v),
        ):
            tap = self._tap(on_term=lambda term: tick(), wanted=numbers, tangents=tangents, writes=writes)
            versions, unchanged = [p._version for p in self.params], kept_versions(self.params)
            returned = self._call(tap)
            if [p._version for p in self.params] != versions:
                unchanged()
                raise RuntimeError("The closure writes to the parameters, and so changes their tangents.")
        return tap.total(returned), tangents

    def add_gradient(self, gradient: Tensor, step: Tensor) -> Tensor:
        """Add this process's gradient at `point + step` to `gradient` in place; returns its loss there."""
        return self.visit(self._adding_to(gradient), step)

    def _adding_to(self, gradient: Tensor) -> OnTerm:
        return lambda term: add_flat(gradient, grad(term.loss, self.params, keep=term.keep), self.params)

    def mean(self, compute: Callable[[], Tensor], like: Tensor | None = None) -> Tensor:
        """The mean over the processes of what they compute, shaped as `like`, `(n,)` if None: one all-reduce."""
        if self._sharded:
            return self._ranks.each(compute)
        if self._ranks.count == 1:
            return compute()
        share = float(self._shares[self._ranks.rank])
        return self._ranks.sum(lambda: share * compute(), like)

    def move(self, step: Tensor) -> None:
        """Make `point + step` the new point, or where the closure puts it, on all processes the same to the bit."""
        point = self.point + step if self._sharded else self._ranks.first(self.point + step)
        self.return_to(self._at_rest(point)[1] if self._moves else point)

    def return_to(self, point: Tensor) -> None:
        """Make an earlier point, `(n,)`, the new one, to the bit."""
        self.point = point
        with torch.no_grad():
            for p, piece in zip(self.params, unflatten(self.point, self.params), strict=True):
                p.copy_(piece)
        torch.clear_autocast_cache()

    def _released(self, attempt: Callable[[bool], Result]) -> Result:
        """`attempt(release)`, with release of each graph at its `backward` where there may be several of them."""
        release = self._may_release and self._terms != 1
        try:
            return attempt(release)
        except RuntimeError as error:
            # Transforms of torch.func allow no hooks on what graphs save.
            if not release or self._has_released or "saved tensor hooks" not in str(error):
                raise
            self._may_release = False
        return attempt(False)

    @contextmanager
    def _placed(self, point: Tensor | None) -> Iterator[None]:
        if point is not None:
            self._place(point)
        try:
            yield
        finally:
            if point is not None:
                self._place(self.point)
            else:
                put_back(self.point, self.params)

    def _place(self, point: Tensor) -> None:
        # Autograd does not see the change, which is taken back: an evaluation made before stays usable.
        place(point, self.params)
        # Inside an autocast block of the caller's, the casts of the old values would be used again.
        torch.clear_autocast_cache()

    def _tap(self, **settings: Any) -> Tap:
        return Tap(self.params, numbers=self._numbers, counted=self._counted, fills=self._fills, **settings)

    def _call(self, tap: Tap) -> Any:
        """Run the closure under a tap, which takes a live loss that is returned if `backward` was not called."""
        with tapped(tap), resharded(self.params, trace=tap.runs_backward):
            returned = tap.run(self._closure)
            if not tap.called_backward and isinstance(returned, Tensor) and (returned.requires_grad or tap.is_forward):
                tap.take(returned)
        if self._counted is not None and tap.gradients.calls != self._calls:
            raise RuntimeError(
                f"The closure called backward {tap.gradients.calls} times where it had called it {self._calls} times. "
                f"{SAME_FUNCTION}"
            )
        return returned

    def _run(self, writes: Writes, *, backward: bool, release: bool) -> tuple[Recording, Tap, Tensor | None]:
        """The closure once, with what an evaluation needs of it, and where it left the parameters if elsewhere."""
        cached = self.products in ("auto", "cached")
        recording = Recording(self.params, cached=cached, accumulates=backward and self._sharded)
        tap = self._tap(
            backward=backward,
            pulled=self._sharded,
            on_term=recording.take,
            keep=cached,
            release=release and not cached,
            writes=writes,
            weigh=self._ranks.count > 1 and self._weight is None,
        )
        try:
            returned = self._call(tap)
            if backward:
                self._isolation.ended()
            recording.versions()
            left = self._left(self.point)
            recording.check_intact(writes)
            counts_all, at_rest = self._counts_all(tap), left is None or is_rounding(left, self.point, self.params)
            if at_rest and recording.is_elsewhere(self.point):
                if self.products == "cached":
                    raise RuntimeError(_ELSEWHERE)
                self.products = "streamed"
            elif counts_all and (left is None or not backward):
                recording.finish(tap, returned)
        finally:
            # Without `backward` a closure that reads gradients needs them in another run.
            self._fills = (
                self._fills or tap.gradients.reads or (tap.gradients.was_read and sys.exc_info()[0] is not None)
            )
            put_back(self.point, self.params)
        self._terms = tap.terms
        return recording, tap, left

    def _counts_all(self, tap: Tap) -> bool:
        """Whether all losses that were handed over count; notes which do if this was to be found out."""
        if self._counted is not None:
            return True
        self._groups, self._calls = tap.gradients.groups(), tap.gradients.calls
        if self._groups is None:
            return True
        if self._is_divided and self._ranks.count > 1:
            raise RuntimeError(_DIVIDED_IN_A_GROUP)
        if not self._is_divided:
            self._counted = self._groups[0].calls
        return False

    def _evaluation(self, run: Callable[[], tuple[Recording, Tap]]) -> Evaluation:
        done: list[tuple[Recording, Tap]] = []

        def loss_and_weight() -> tuple[Tensor, float]:
            done.append(run())
            recording, tap = done[0]
            return recording.loss, self._weight or tap.weight()

        losses, weights = self._ranks.gather(loss_and_weight).unbind(1)
        if self._ranks.count > 1 and bool((weights > 0).all()):
            self._shares = weights / weights.sum()
            if self._sharded and float(self._shares.max() - self._shares.min()) > 1e-6:
                raise RuntimeError(
                    f"The processes' batches weigh {', '.join(f'{w:g}' for w in weights.tolist())}, and fully_shard "
                    "averages gradients over processes with equal weights: give every process as much data "
                    "(drop_last=True in its loader)."
                )
        recording, tap = done[0]
        self._own = recording.gradient
        evaluation = Evaluation(
            recording.loss,
            self.params,
            recording.outputs,
            self._decay,
            gradient=self.mean(lambda: recording.gradient),
            source=self,
            form="cached" if self.products == "auto" else self.products,
            verdicts=self._verdicts,
            length=self._length,
            point=self.point,
        )
        self._evaluated = losses, evaluation.data_gradient
        if self._ranks.count > 1:
            evaluation.loss = self._mean_loss(losses, recording.loss.dtype, self.point).to(self.point.device)
        evaluation.returned = recording.returned
        evaluation.local_gradient, evaluation.replayed = recording.gradient, self._replayed
        evaluation.may_fall_back = self.products == "auto"
        evaluation.unrecognised_advice = unrecognised(tap.losses_seen, tap.ends, tap.wrappers)
        evaluation.output_sizes, evaluation.outside = recording.output_sizes, recording.outside
        evaluation.holds_constant = tap.holds_constant or tap.gradients.was_read
        evaluation.hooks_gradients = tap.hooks.change
        evaluation.linear_marks = tap.linear_marks
        evaluation.related = frozenset(recording.related)
        evaluation.convex = not tap.has_marks and tap.is_convex(recording.output_sizes)
        return evaluation

    def _value(self, compute: Callable[[], tuple[Tensor, Tensor]]) -> float:
        """The objective from this process's loss and the point where it was computed."""
        found: list[tuple[torch.dtype, Tensor]] = []

        def loss() -> tuple[Tensor, float]:
            value, point = compute()
            found.append((value.dtype, point))
            return value, 0.0

        losses = self._ranks.gather(loss)[:, 0]
        self._check_varies(losses, found[0][1])
        return float(self._mean_loss(losses, *found[0]))

    def _check_varies(self, losses: Tensor, point: Tensor) -> None:
        """Raise a RuntimeError if the closure does not run the forward pass: the losses of a first trial and of one far
        away are those of the evaluation to the bit, where there is a gradient, and come from a graph of an earlier run.
        """
        if self._evaluated is None:
            return
        (before, gradient), self._evaluated = self._evaluated, None
        if not bool((losses == before).any()) or torch.equal(point, self.point) or not bool(gradient.any()):
            return
        # Near a minimum a short step may leave every bit; a random one as long as the parameters does not.
        far = 0.1 * (1 + self.point.abs()) * normals(self.point, torch.Generator().manual_seed(0))
        older = False
        began = torch._C._autograd._get_sequence_nr()

        def look(term: Term) -> None:
            nonlocal older
            older = older or is_older(term.loss, began, self.params)

        try:
            there, stale = self._ranks.gather(lambda: (self.visit(look, far), float(older))).unbind(1)
        except Exception:
            return  # without a value there, the loss is not the same
        if bool(((losses == before) & (there == before) & (stale > 0)).any()):
            raise RuntimeError(_CONSTANT)

    def _mean_loss(self, losses: Tensor, dtype: torch.dtype, point: Tensor) -> Tensor:
        mean = (self._shares @ losses).to(dtype)
        return mean + decay_term(self._decay, point) if decays(self._decay) else mean

    def _averages(self, evaluation: Evaluation, gradient: Tensor) -> list[Tensor]:
        """What `.grad` may hold: the mean, or one of those that others make, this process's or the unweighted mean."""
        averages = [evaluation.data_gradient]
        if self._ranks.count > 1 and not self._sharded:
            averages.append(gradient)
        if bool((self._shares != self._shares[0]).any()):
            averages.append(self._ranks.sum(lambda: gradient / self._ranks.count))
        return averages


@torch.inference_mode(False)
def evaluate(
    closure: Closure, params: Iterable[Tensor], products: Products = "auto", weight: float | None = None
) -> Evaluation:
    """Evaluate a closure for curvature products, without a trace in parameters, `.grad`, buffers, random state or logs.

    Under `torch.distributed` this, and every product, is a collective call, and the objective is the mean over all
    processes.

    Args:
        closure: The one that `torch.optim.LBFGS` takes, or any function of no argument that returns a live scalar loss.
            The function evaluated is the one whose gradient `.grad` would hold at its end.
        params: The parameters, such as `model.parameters()`; those that do not require a gradient are left out.
        products: How products are formed. "cached" keeps the graph of the evaluation: fastest. "streamed" runs the
            closure again for each product and differentiates at each of its `backward` calls, so that a closure that
            loops over micro-batches takes the memory of one. "finite_difference" takes central differences of
            gradients: needs no second derivatives. "auto" (default) is "cached", with a warning and
            "finite_difference" where an operation has no second derivative; it is "streamed" for a loss at other
            parameters than the closure leaves, as SAM's.
        weight: Of this process in the mean, above zero, such as the size of its batch; None (default): what its losses
            are means over, where these are losses of `torch.nn.functional`, and the same for all if not.

    Returns:
        The `Evaluation` to give to `hessian`, `gauss_newton` or `jacobian`.

    Raises:
        TypeError: `closure` cannot be called, or `params` is not an iterable of tensors.
        ValueError: `params` is empty or spread over devices, `products` is unknown, or `weight` is not positive.
        RuntimeError: The closure neither calls `backward` nor returns a live loss, the loss does not depend on
            `params`, no gradient is left in `.grad`, or the processes hold different parameters.
    """
    check_products(products)
    check_closure(closure)
    check_weight(weight)
    return Objective(closure, trained_parameters(params), products=products, weight=weight).evaluate()
