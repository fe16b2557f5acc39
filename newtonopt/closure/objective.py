"""The user's closure as a function of the parameters.

`evaluate` makes an `Objective` and evaluates it once. An `Objective` runs the closure at any point, without a trace,
and keeps in `Runs` what the next runs need to know. In a run for an evaluation a `Recorder` takes the losses as they
come and makes a `Recording` of them, and the objective makes an `Evaluation` of that.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from newtonopt.autodiff.gradients import Gradients, forward_mode, grad, grad_with_graph, gradient_of
from newtonopt.autodiff.graph import all_behind, coarsest, reaches
from newtonopt.checks import check_closure, check_weight
from newtonopt.closure.accumulation import Group
from newtonopt.closure.evaluation import (
    SAME_FUNCTION,
    UNRELATED,
    Evaluation,
    KeptGraph,
    Known,
    Products,
    Recording,
    Standing,
    UnrelatedError,
    check_products,
    decays,
    eps_of,
    evaluated,
    leaves_outside,
    local_gradients,
    refuse_sparse,
    with_decay,
)
from newtonopt.closure.isolation import Isolation, UnprotectedError
from newtonopt.closure.tap import LossTerm, OutputNumbers, Tap, tapped
from newtonopt.closure.writes import Writes
from newtonopt.progress import progress
from newtonopt.vectors.flat import add_flat, flatten, is_rounding, place, put_back, trained_parameters, unflatten
from newtonopt.vectors.processes import Processes
from newtonopt.vectors.random import normals
from newtonopt.vectors.sharded import (
    accumulate,
    check_equal_weights,
    check_sharding,
    is_sharded,
    resharded,
    supported,
)
from newtonopt.vectors.subclasses import detached

Closure = Callable[[], Any]
Result = TypeVar("Result")


@torch.inference_mode(False)
def evaluate(
    closure: Closure, params: Iterable[Tensor], products: Products = "auto", weight: float | None = None
) -> Evaluation:
    """Evaluate a closure for curvature products, without a trace in parameters, `.grad`, buffers, random state or logs.

    Under `torch.distributed` this, and every product, is a collective call, and the objective is the mean over all
    processes.

    Args:
        closure: A closure for `torch.optim.LBFGS`, or any function of no argument that returns a live scalar loss. The
            function evaluated is the one whose gradient `.grad` would hold at its end.
        params: The parameters, such as `model.parameters()`. Parameters that require no gradient are left out.
        products: How products are formed. "cached" keeps the graph of the evaluation: fastest. "streamed" runs the
            closure again for each product and differentiates at each of its `backward` calls, so that a closure that
            loops over micro-batches takes the memory of one. "finite_difference" takes central differences of
            gradients: needs no second derivatives. "auto" (default) is "cached", with a warning and
            "finite_difference" where an operation has no second derivative; it is "streamed" for a closure that
            computes its loss at other parameters than it leaves, as SAM does.
        weight: Weight of this process in the mean, above zero, such as the size of its batch; None (default): the
            number of entries that its losses are means over, if they are losses of `torch.nn.functional`, and else the
            same for all processes.

    Returns:
        The `Evaluation` to give to `hessian`, `gauss_newton` or `jacobian`.

    Raises:
        TypeError: `closure` cannot be called, or `params` is not an iterable of tensors.
        ValueError: `params` is empty or spread over devices, `products` is unknown, or `weight` is not positive.
        RuntimeError: The closure neither calls `backward` nor returns a live loss, the loss does not depend on
            `params`, no gradient is left in `.grad`, or the processes hold different parameters.

    Example:
        >>> import torch
        >>> from newtonopt import evaluate, hessian
        >>> theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> H = hessian(evaluate(lambda: (theta**3).sum(), [theta]))
        >>> H @ torch.ones(2, dtype=torch.float64)
        tensor([ 6., 12.], dtype=torch.float64)

    See Also:
        - `hessian()`, `gauss_newton()`, `jacobian()`: the matrices at the evaluation.
        - `measure()`: many measurements of a closure in one call.
        - `docs/what_it_costs.md`: the time and memory of each way to form products.
        - `docs/setups.md`: closures, models and libraries that are known to work.
    """
    check_products(products)
    check_closure(closure)
    check_weight(weight)
    return Objective(closure, trained_parameters(params), products=products, weight=weight).evaluate()


class Objective:
    """The closure as a function of a step from the current parameters. Lives for one optimizer step.

    After every evaluation elsewhere, the parameters are put back bit for bit. Only `move` and `return_to` set new ones,
    and `record` where the closure does.

    A closure may clamp or normalise parameters: it is then evaluated where it leaves them, and must leave them there
    when it is called again.

    The function is the one whose gradient `.grad` holds when the closure ends: the sum of the losses that it calls
    `backward` on, without those whose gradients it clears again, and each as a function of the parameters that
    `backward(inputs=...)` names. The other parameters are constants in such a loss: a trial leaves them where they are.

    With several processes of `torch.distributed` the objective is the mean over the processes, weighted by the number
    of entries that their losses are means over if these are losses of `torch.nn.functional`, else equally. All methods
    are then collective calls.

    Args:
        closure: Takes no argument; computes the loss and calls `backward` on it (several times for a sum of losses), or
            returns a live loss.
        params: The parameters.
        decay: Weight decay, one number or one for each parameter entry `(n,)`: adds `sum(decay * theta^2) / 2`. Default
            0.0.
        products: How products are formed, "auto" (default) or as for `evaluate`.
        weight: Weight of this process in the mean, above zero; None (default): found from the losses.
        known: Findings of earlier steps about the closure; None (default): none.
        twice: Whether an evaluation that keeps its graph computes the gradient with a graph too, so that Hessian
            products need no second backward pass. Default False: without such products the graph serves nothing.
        point: The parameters' values, `(n,)`; None (default): copied from the parameters.
        runs: State of the closure's runs for another objective; None (default): there were none.

    Attributes:
        params: The parameters.
        point: Their values, `(n,)`.
        products: How products of the next evaluation are formed.

    Example:
        >>> import torch
        >>> from newtonopt import Objective
        >>> theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> objective = Objective(lambda: (theta**3).sum(), [theta])
        >>> objective.loss_at(torch.tensor([1.0, 0.0], dtype=torch.float64))
        16.0
        >>> theta.tolist()
        [1.0, 2.0]

    See Also:
        - `evaluate()`: the gradient and the matrices at one point, which is enough for most uses.
        - `loss_slice()`: losses along one or two directions.
        - `docs/own_measurement.md`: a measurement of your own, which is given an objective.
    """

    def __init__(
        self,
        closure: Closure,
        params: Iterable[Tensor],
        decay: float | Tensor = 0.0,
        products: Products = "auto",
        weight: float | None = None,
        known: Known | None = None,
        *,
        twice: bool = False,
        point: Tensor | None = None,
        runs: Runs | None = None,
    ) -> None:
        self._closure = closure
        self.params = tuple(params)
        self._decay = decay
        check_sharding(self.params)
        self._sharded = is_sharded(self.params)
        self.products: Products = supported(products) if self._sharded else products
        self._weight = weight
        self._known = Known() if known is None else known
        self._twice = twice
        with torch.no_grad():
            self.point = flatten(self.params, self.params).clone() if point is None else point
        self._processes = Processes(self.point)
        if not self._sharded:
            self._processes.check_same(self.point)
        count = self._processes.count
        self._shares = torch.full((count,), 1 / count, dtype=torch.float64, device="cpu")
        self._runs = Runs(Isolation(closure, self.params), self._known.replayed) if runs is None else runs
        # Losses of all processes and the gradient as last evaluated, until a trial is compared with them.
        self._untried: tuple[Tensor, Tensor] | None = None

    # Evaluations.

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

    def evaluate(self) -> Evaluation:
        """Evaluate the closure at the current point without a trace: `backward` is left out, and all is put back.

        Raises:
            RuntimeError: The closure moves the parameters from where they are.
        """
        if self._processes.count > 1:
            # An error of one process reaches the others, so the closure runs inside the collective call.
            return self._evaluation(lambda: self._released(self._settled_recording))
        recording = None if self._runs.is_divided else self._released(self._settled_recording)
        return self._divided() if self._runs.is_divided else self._evaluation(lambda: recording)

    def loss_at(self, step: Tensor) -> float:
        """Return the objective at `point + step`, `(n,)`: one forward pass, without a trace."""
        return self._value(lambda: self._at_rest(self.point + step))[0]

    def gradient_at(self, step: Tensor) -> tuple[float, Tensor]:
        """Return the objective and its gradient at `point + step`: a forward and a backward pass, without a trace."""
        loss, there = self._value(lambda: self._at_rest(self.point + step, with_gradient=True))
        assert there.gradient is not None
        own = there.gradient
        mean = self.mean(lambda: own)
        return loss, mean + self._decay * there.point if decays(self._decay) else mean

    # The point.

    def move(self, step: Tensor) -> None:
        """Make `point + step` the new point, or where the closure puts it, on all processes the same to the bit."""
        point = self.point + step if self._sharded else self._processes.first(self.point + step)
        self.return_to(self._at_rest(point).point if self._runs.moves else point)

    def return_to(self, point: Tensor) -> None:
        """Make an earlier point, `(n,)`, the new one, to the bit."""
        self.point = point
        with torch.no_grad():
            for p, piece in zip(self.params, unflatten(self.point, self.params), strict=True):
                p.copy_(piece)
        torch.clear_autocast_cache()

    # Traces and repetitions.

    def rewind(self) -> None:
        """Take back what `record` did to the state that the closure can reach."""
        self._runs.isolation.rewind()

    def settle(self) -> None:
        """Take back what hooks on a graph that was kept have done since `record`, or since the first evaluation."""
        self._runs.isolation.settle()

    @property
    def unprotected(self) -> list[str]:
        """Names of everything that runs without a trace have changed and cannot put back."""
        return self._runs.isolation.unprotected

    def check_restored(self) -> None:
        """Raise an UnprotectedError if runs without a trace have changed something that cannot be put back."""
        if self.unprotected:
            raise UnprotectedError(self.unprotected)

    def check_replay(self, evaluation: Evaluation) -> None:
        """Raise a RuntimeError if the closure computes another loss or gradient when it runs again, on any process.

        Costs one forward and one backward pass, without a trace; none if the evaluation was compared before.
        """
        for group, (part, _) in zip(self._runs.groups or (), evaluation.parts, strict=False):
            self._only(group).check_replay(part)
        if not evaluation.parts and not evaluation.standing.replayed:
            self.together(lambda: self.replay(evaluation))

    # Runs for curvature products: see `Source`.

    def replay(self, evaluation: Evaluation) -> None:
        """Raise a RuntimeError if the closure computes another loss or gradient when it runs again, on this process."""
        gradient = torch.zeros_like(self.point)

        def add(term: LossTerm) -> float:
            eps = coarsest([term.loss.grad_fn], evaluation.eps)
            self._add(term, gradient)
            return eps

        loss, eps = self.visit(add)
        evaluation.check_same(float(loss), gradient, evaluation.eps**0.25, max([evaluation.eps, *eps]))
        self._runs.replayed = True

    def visit(
        self, of_term: Callable[[LossTerm], Result], step: Tensor | None = None, *, numbers: Collection[int] = ()
    ) -> tuple[Tensor, list[Result]]:
        """Run the closure at `point + step` without a trace.

        Args:
            of_term: Called with each loss, while its graph is alive.
            step: The step, `(n,)`; None (default): none.
            numbers: Numbers of the outputs that are handed over with the losses.

        Returns:
            The sum of the losses on this process, and the results of `of_term`, one for each loss.

        Raises:
            RuntimeError: The closure moves the parameters from there.
        """
        point = None if step is None else self.point + step
        there = self._pass(of_term, point, numbers)
        if there.left is not None:
            at = self.point if step is None else self.point + step
            if not is_rounding(there.left, at, self.params):
                raise ParametersMovedError(MOVED if step is None else MOVED_BEYOND, there.left)
        return there.loss, there.found

    def push(self, v: Tensor, numbers: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the closure in forward mode along `v`, `(n,)`, without a graph and without a trace.

        Returns:
            The sum of its losses on this process, and `J v` for the outputs of these numbers, by number.

        Raises:
            RuntimeError: The closure differentiates inside or writes to the parameters, which changes their tangents,
                or an operation has no forward mode.
        """
        with (
            self._placed(None),
            self._runs.isolation.isolated() as writes,
            progress(self._runs.terms) as tick,
            forward_mode(self.params, v),
        ):
            tap = self._tap(on_term=lambda term: tick(), wanted=numbers, forward=True, writes=writes)
            versions, unchanged = [p._version for p in self.params], kept_versions(self.params)
            returned = self._call(tap)
            if [p._version for p in self.params] != versions:
                unchanged()
                raise RuntimeError("The closure writes to the parameters, which changes their tangents.")
        return tap.total(returned), tap.outputs.tangents

    def add_gradient(self, gradient: Tensor, step: Tensor) -> Tensor:
        """Add this process's gradient at `point + step` to `gradient` in place; return its loss there."""
        return self.visit(partial(self._add, gradient=gradient), step)[0]

    def mean(self, compute: Callable[[], Tensor], like: Tensor | None = None) -> Tensor:
        """Return the mean over the processes of tensors shaped as `like`, by default `(n,)`: one all-reduce."""
        if self._sharded:  # fully_shard's own hooks average gradients over the processes
            return self.together(compute)
        if self._processes.count == 1:
            return compute()
        share = float(self._shares[self._processes.rank])
        return self._processes.sum(lambda: share * compute(), like)

    def together(self, compute: Callable[[], Result]) -> Result:
        """Return this process's result, once all processes have computed theirs without an error."""
        return self._processes.together(compute)

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        return self._processes.count == 1

    @property
    def share(self) -> float:
        """Weight of this process in the mean over the processes."""
        return 1.0 if self._processes.count == 1 else float(self._shares[self._processes.rank])

    def collect(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, in their order."""
        return self._processes.collect(tensor)

    # Evaluations made of runs.

    def _record(self) -> Evaluation:
        with self._runs.isolation.recorded() as writes:
            run = self._run(writes, backward=True, release=False)
            if run.left is not None and self._runs.is_divided:
                raise RuntimeError(_MOVED)
        if run.left is not None:
            return self._evaluated_at(run.left)
        # A run that finds that some losses do not count has no gradient of the others alone, and neither has a run that
        # kept the graph of a loss at other parameters: run again.
        evaluation = self.evaluate() if run.recording is None else self._evaluation(lambda: run.recording)
        if not run.called_backward:
            return evaluation
        clipped = is_clipped(self.params, self._averages(evaluation), accumulated=run.had_gradients)
        return replace(evaluation, clipped=clipped)

    def _evaluated_at(self, left: Tensor) -> Evaluation:
        """Return the evaluation where the closure has left the parameters, which becomes the point.

        The gradient at hand may mix two points.
        """
        # A projection goes to the same place without gradients; an update by them does not.
        again = self._pass(None, self.point).left
        if again is None or not is_rounding(again, left, self.params):
            raise RuntimeError(restless(self.params))
        self._runs.moves = True
        self.return_to(left)
        try:
            return self.evaluate()
        except ParametersMovedError as error:
            raise RuntimeError(restless(self.params)) from error

    def _settled_recording(self, release: bool) -> Recording | None:
        """Run the closure without a trace, again while a run shows that the next one must be another.

        A run may show that not all losses count, that the closure computes with gradients, or that its graph cannot be
        kept. Returns None if losses count for different parameters.
        """
        while True:
            before = self._kind_of_run
            try:
                recording = self._recording(release)
            except OverwrittenError:
                if self.products != "auto":
                    raise
                self.products = "streamed"
                continue
            except Exception:
                if self._kind_of_run == before:
                    raise
                continue
            if self._kind_of_run == before:
                return recording

    @property
    def _kind_of_run(self) -> tuple[bool, frozenset[int] | None, Products]:
        return self._runs.fills, self._runs.counted, self.products

    def _recording(self, release: bool) -> Recording | None:
        with self._runs.isolation.isolated() as writes:
            run = self._run(writes, backward=False, release=release)
        # A weight that is normalised twice may differ by rounding.
        if run.left is not None and not is_rounding(run.left, self.point, self.params):
            raise ParametersMovedError(MOVED, run.left)
        return run.recording

    def _evaluation(self, run: Callable[[], Recording | None]) -> Evaluation:
        """Return the evaluation of the mean over the processes of what their runs record."""

        def compute() -> tuple[Recording, tuple[Tensor, float]]:
            recording = run()
            assert recording is not None
            return recording, (recording.loss, self._weight or recording.weight)

        recording, table = self._processes.gather(compute)
        losses, weights = table.unbind(1)
        if self._processes.count > 1 and bool((weights > 0).all()):
            self._shares = weights / weights.sum()
            if self._sharded:
                check_equal_weights(weights)
        gradient = self.mean(lambda: recording.gradient)
        self._untried = losses, gradient
        return evaluated(
            recording,
            self.params,
            self._mean_loss(losses, recording.loss.dtype, self.point).to(self.point.device),
            gradient,
            self.point,
            Standing("cached" if self.products == "auto" else self.products, self._known.verdicts, self._runs.replayed),
            self._decay,
            source=self,
            may_fall_back=self.products == "auto",
            length=self._known.length,
        )

    def _divided(self) -> Evaluation:
        """Return the evaluation of losses that count for different parameters: the sum of one for each group."""
        parts, groups = [], []
        for group in self._runs.groups or ():
            try:
                part = self._only(group).evaluate()
            except UnrelatedError:
                continue
            # A parameter that a loss reaches only through a detached tensor is constant in it too.
            related = part.recording.related if group.params is None else part.recording.related & group.params
            group = Group(group.calls, None if len(related) == len(self.params) else related)
            groups.append(group)
            mask = self._mask(group)
            parts.append((replace(part, mask=mask), mask))
        if not parts:
            raise UnrelatedError(UNRELATED)
        self._runs.groups = tuple(groups)
        if not self._runs.is_divided:
            self._runs.counted = groups[0].calls
            return self.evaluate()
        first = parts[0][0]
        gradient = sum((part.gradient * mask for part, mask in parts), torch.zeros_like(self.point))
        loss = sum((part.loss for part, _ in parts), first.loss.new_zeros(()))
        return evaluated(
            Recording(loss, gradient, KeptGraph(), returned=first.returned),
            self.params,
            with_decay(loss, self._decay, self.point),
            gradient,
            self.point,
            Standing("cached"),
            self._decay,
            source=self,
            may_fall_back=first.may_fall_back,
            parts=tuple(parts),
        )

    def _only(self, group: Group) -> Objective:
        """Return the objective of one group's losses, without weight decay, as a function of all parameters."""
        runs = replace(self._runs, groups=None, counted=group.calls)
        return Objective(
            self._closure, self.params, 0.0, self.products, self._weight, self._known, point=self.point, runs=runs
        )

    def _mask(self, group: Group) -> Tensor:
        """Return ones at the entries of the group's parameters and zeros elsewhere, `(n,)`."""
        of = range(len(self.params)) if group.params is None else group.params
        ones = [torch.ones_like(p) if number in of else None for number, p in enumerate(self.params)]
        return flatten(ones, self.params)

    def _averages(self, evaluation: Evaluation) -> list[Tensor]:
        """Return the gradients that `.grad` may hold: the mean, this process's own, or the unweighted mean."""
        averages, own = [evaluation.data_gradient], evaluation.recording.gradient
        if self._processes.count > 1 and not self._sharded:
            averages.append(own)
        if bool((self._shares != self._shares[0]).any()):
            averages.append(self._processes.sum(lambda: own / self._processes.count))
        return averages

    # Trials made of runs.

    def _value(self, compute: Callable[[], Rest]) -> tuple[float, Rest]:
        """Return the objective where this process computes its part of it, and that part."""

        def row() -> tuple[Rest, tuple[Tensor, float]]:
            there = compute()
            return there, (there.loss, 0.0)

        there, table = self._processes.gather(row)
        losses = table[:, 0]
        self._check_varies(losses, there.point)
        return float(self._mean_loss(losses, there.loss.dtype, there.point)), there

    def _mean_loss(self, losses: Tensor, dtype: torch.dtype, point: Tensor) -> Tensor:
        return with_decay((self._shares @ losses).to(dtype), self._decay, point)

    def _check_varies(self, losses: Tensor, point: Tensor) -> None:
        """Raise a RuntimeError if the closure does not run the forward pass, and uses the graph of an earlier run.

        The losses of the first trial and far away are then the evaluation's to the bit, although there is a gradient.
        """
        if self._untried is None:
            return
        (before, gradient), self._untried = self._untried, None
        if not bool((losses == before).any()) or torch.equal(point, self.point) or not bool(gradient.any()):
            return
        # Near a minimum a short step may leave every bit; a random one as long as the parameters does not.
        noise = normals(self.point, torch.Generator().manual_seed(0))
        far = 0.1 * (1 + self.point.abs()) * noise
        began = torch._C._autograd._get_sequence_nr()

        def run_far_away() -> tuple[None, tuple[Tensor, float]]:
            loss, old = self.visit(lambda term: is_older(term.loss, began, self.params), far)
            return None, (loss, float(any(old)))

        try:
            there, stale = self._processes.gather(run_far_away)[1].unbind(1)
        except Exception:
            return  # without a value there, the loss is not the same
        if bool(((losses == before) & (there == before) & (stale > 0)).any()):
            raise RuntimeError(_CONSTANT)

    def _at_rest(self, point: Tensor, *, with_gradient: bool = False) -> Rest:
        """Run the closure at `point`, and again where it leaves the parameters, until it leaves them in place.

        Args:
            point: The parameters' values, `(n,)`.
            with_gradient: Whether to compute the gradient.

        Raises:
            RuntimeError: The closure moves the parameters each time.
        """
        if self._runs.is_divided:
            return self._at_rest_in_groups(point, with_gradient)
        for _ in range(3):
            gradient = torch.zeros_like(point) if with_gradient else None
            there = self._pass(None if gradient is None else partial(self._add, gradient=gradient), point)
            if there.left is None:
                return Rest(there.loss, point, gradient)
            self._runs.moves, before, point = True, point, there.left
        if is_rounding(point, before, self.params):
            return Rest(there.loss, before, gradient)
        raise RuntimeError(RESTLESS)

    def _at_rest_in_groups(self, point: Tensor, with_gradient: bool) -> Rest:
        """Run each group of losses where only its own parameters are moved."""
        losses, gradient = [], torch.zeros_like(point) if with_gradient else None
        for group in self._runs.groups or ():
            mask = self._mask(group)
            at = torch.where(mask > 0, point, self.point)
            there = self._only(group)._at_rest(at, with_gradient=with_gradient)
            if there.point is not at:
                raise RuntimeError(_MOVED)
            losses.append(there.loss)
            if gradient is not None and there.gradient is not None:
                gradient += mask * there.gradient
        return Rest(torch.stack(losses).sum(), point, gradient)

    # One run of the closure.

    def _pass(
        self, of_term: Callable[[LossTerm], Result] | None, point: Tensor | None, numbers: Collection[int] = ()
    ) -> Passed[Result]:
        """Run the closure without a trace at `point`, by default where the parameters are.

        Raises:
            RuntimeError: It left the parameters elsewhere, and there are several processes.
        """
        return self._released(lambda release: self._pass_once(of_term, point, numbers, release))

    def _pass_once(
        self,
        of_term: Callable[[LossTerm], Result] | None,
        point: Tensor | None,
        numbers: Collection[int],
        release: bool,
    ) -> Passed[Result]:
        found: list[Result] = []
        with self._placed(point), self._runs.isolation.isolated() as writes, progress(self._runs.terms) as tick:

            def take(term: LossTerm) -> None:
                self._runs.has_released = release
                if of_term is not None:
                    found.append(of_term(term))
                tick()

            tap = self._tap(on_term=take, release=release, wanted=numbers, writes=writes)
            unchanged = kept_versions(self.params)
            returned = self._call(tap)
            unchanged()
            left = self._left(self.point if point is None else point)
        return Passed(tap.total(returned), left, found)

    def _run(self, writes: Writes, *, backward: bool, release: bool) -> Run:
        """Run the closure once, for an evaluation."""
        cached = self.products in ("auto", "cached")
        recorder = Recorder(
            self.params, cached=cached, accumulates=backward and self._sharded, twice=self._twice and cached
        )
        recording: Recording | None = None
        tap = self._tap(
            backward=backward,
            pulled=self._sharded,
            on_term=recorder.take,
            keep=cached,
            release=release and not cached,
            writes=writes,
            weigh=self._processes.count > 1 and self._weight is None,
        )
        try:
            returned = self._call(tap)
            if backward:
                self._runs.isolation.ended()
            recorder.restore_versions()
            left = self._left(self.point)
            recorder.check_intact(writes)
            counts_all = self._counts_all(tap)
            at_rest = left is None or is_rounding(left, self.point, self.params)
            if at_rest and recorder.is_elsewhere(self.point):
                if self.products == "cached":
                    raise RuntimeError(_ELSEWHERE)
                self.products = "streamed"
            elif counts_all and (left is None or not backward):
                recording = recorder.finish(tap, returned)
        finally:
            # Without `backward`, a closure that reads gradients needs them in another run.
            reads = tap.gradients.reads or (tap.gradients.was_read and sys.exc_info()[0] is not None)
            self._runs.fills = self._runs.fills or reads
            put_back(self.point, self.params)
        self._runs.terms = tap.terms
        return Run(recording, left, tap.called_backward, tap.gradients.had_some)

    def _counts_all(self, tap: Tap) -> bool:
        """Whether all losses that were handed over count. Takes note of which do if the run was to find that out."""
        runs = self._runs
        if runs.counted is not None:
            return True
        runs.groups, runs.calls = tap.gradients.groups(), tap.gradients.calls
        if runs.groups is None:
            return True
        if runs.is_divided and self._processes.count > 1:
            raise RuntimeError(_DIVIDED_IN_A_GROUP)
        if not runs.is_divided:
            runs.counted = runs.groups[0].calls
        return False

    def _tap(self, **settings: Any) -> Tap:
        runs = self._runs
        return Tap(self.params, numbers=runs.numbers, counted=runs.counted, fills=runs.fills, **settings)

    def _call(self, tap: Tap) -> Any:
        """Run the closure under a tap, which takes a live loss that is returned if `backward` was not called."""
        with tapped(tap), resharded(self.params, trace=tap.runs_backward):
            returned = tap.run(self._closure)
            if not tap.called_backward and isinstance(returned, Tensor) and (returned.requires_grad or tap.is_forward):
                tap.take(returned)
        if self._runs.counted is not None and tap.gradients.calls != self._runs.calls:
            raise RuntimeError(
                f"The closure called backward {tap.gradients.calls} times, but {self._runs.calls} times when it was "
                f"first evaluated. {SAME_FUNCTION}"
            )
        return returned

    def _released(self, attempt: Callable[[bool], Result]) -> Result:
        """Return `attempt(release)`: whether each graph is let go at its `backward`, where there may be several."""
        runs = self._runs
        release = runs.may_release and runs.terms != 1
        try:
            return attempt(release)
        except RuntimeError as error:
            # Transforms of torch.func allow no hooks on what graphs save.
            if not release or runs.has_released or "saved tensor hooks" not in str(error):
                raise
            runs.may_release = False
        return attempt(False)

    def _add(self, term: LossTerm, gradient: Tensor) -> None:
        """Add the gradient of a loss to `gradient`, `(n,)`, in place."""
        add_flat(gradient, grad(term.loss, self.params, keep=term.keep), self.params)

    def _left(self, point: Tensor) -> Tensor | None:
        """Return where the closure left the parameters, if not at `point`; put them there."""
        left = put_back(point, self.params)
        if left is not None and self._processes.count > 1:
            raise RuntimeError(MOVED_IN_A_GROUP)
        return left

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


@dataclass(eq=False)
class Runs:
    """State of a closure's runs: each run leaves here what the next ones need to know.

    Attributes:
        isolation: Puts back what a run changes.
        replayed: Whether the closure was seen to compute the same loss and gradient when it ran again.
        numbers: Number of each place in the user's code where an output may be met.
        terms: How many losses a run hands over; None: not known yet.
        calls: How often a run calls `backward`.
        groups: Losses by the parameters that they count for; None: all count for all, or it is not known yet.
        counted: Numbers of the calls of `backward` whose losses count; None: all, or it is not known yet.
        fills: Whether runs must write gradients, because the closure computes with them.
        moves: Whether the closure moves the parameters.
        may_release: Whether graphs can be let go at their `backward`.
        has_released: Whether a graph was let go so.
    """

    isolation: Isolation
    replayed: bool = False
    numbers: OutputNumbers = field(default_factory=OutputNumbers)
    terms: int | None = None
    calls: int = 0
    groups: tuple[Group, ...] | None = None
    counted: frozenset[int] | None = None
    fills: bool = False
    moves: bool = False
    may_release: bool = True
    has_released: bool = False

    @property
    def is_divided(self) -> bool:
        """Whether losses count for some of the parameters only."""
        return self.groups is not None and any(group.params is not None for group in self.groups)


@dataclass(frozen=True, eq=False)
class Run:
    """A run for an evaluation.

    Attributes:
        recording: Recording of the run; None if another run is needed, where all losses count or the parameters rest.
        left: Parameters where the closure left them, `(n,)`; None: in place.
        called_backward: Whether the closure called `backward`.
        had_gradients: Whether there were gradients before its first `backward`.
    """

    recording: Recording | None
    left: Tensor | None
    called_backward: bool
    had_gradients: bool


@dataclass(frozen=True, eq=False)
class Passed(Generic[Result]):
    """A run without a trace.

    Attributes:
        loss: Sum of the losses on this process.
        left: Parameters where the closure left them, `(n,)`; None: in place.
        found: Results of `of_term`, one for each loss.
    """

    loss: Tensor
    left: Tensor | None
    found: list[Result]


@dataclass(frozen=True, eq=False)
class Rest:
    """The closure where it leaves the parameters in place.

    Attributes:
        loss: Loss on this process.
        point: The parameters' values, `(n,)`.
        gradient: Gradient on this process, `(n,)`, if it was asked for.
    """

    loss: Tensor
    point: Tensor
    gradient: Tensor | None


class Recorder:
    """Takes the losses of one run: keeps them with their graphs, or differentiates them and lets them go one by one.

    Args:
        params: The parameters.
        cached: Whether the losses are kept.
        accumulates: Whether their gradients are added to `.grad`, as `backward` does it.
        twice: Whether the gradient of losses that are kept gets a graph of its own. Default False.
    """

    def __init__(
        self, params: Sequence[Tensor], *, cached: bool, accumulates: bool = False, twice: bool = False
    ) -> None:
        self._params = params
        self._cached = cached
        self._accumulates = accumulates
        self._twice = twice
        self._kept: list[Tensor] = []
        self._are_products = True
        self._related: set[int] = set()
        self._sizes: dict[int, int] = {}
        self._outside = False
        self._gradient: Tensor | None = None if cached else flatten([None] * len(params), params)
        self._restore = kept_versions(params)
        self._looked = [p._version for p in params]
        self._places: list[Tensor] = []

    def take(self, term: LossTerm) -> None:
        """Take one of the losses. The tap calls this with each of them."""
        _refuse_reentrant_checkpoints(term.loss)
        self._are_products = self._are_products and _is_product(term.loss)
        if self._gradient is None:
            self._kept.append(term.loss)
            self._note_place()
            self._restore = kept_versions(self._params)
            return
        self._sizes.update({z.number: z.tensor.numel() for z in term.outputs})
        self._outside = self._outside or leaves_outside(term.loss, term.tensors, self._params)
        gradients = gradient_of(term.loss, self._params, keep=term.keep)
        refuse_sparse(gradients)
        self._relate(gradients)
        add_flat(self._gradient, gradients, self._params)
        if self._accumulates:
            accumulate(gradients, self._params)

    def restore_versions(self) -> None:
        """Set the parameters' versions to those at the last loss that was kept, else to those at the start."""
        self._restore()

    def _note_place(self) -> None:
        """Keep the parameters' values at this loss if the closure has moved them, for two different losses at most."""
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
        self._related.update(number for number, g in enumerate(gradients) if g is not None)

    def check_intact(self, writes: Writes) -> None:
        """Raise an OverwrittenError if a graph that was kept holds a tensor to which the closure has written."""
        if any(writes.used_by(loss.grad_fn) for loss in self._kept):
            raise OverwrittenError(
                "The closure writes in place to a tensor that its loss is computed from, so products cannot be "
                'formed from the graph later. Use products="streamed" (or "auto"), which forms them while the '
                "closure runs."
            )

    def finish(self, tap: Tap, returned: Any) -> Recording:
        """Return the recording, once the closure has ended and returned `returned`."""
        value = detached(returned) if isinstance(returned, Tensor) else returned
        loss, gradient = tap.total(returned), self._gradient
        if gradient is None:
            live = self._sum_of_losses()
            bound = self._gradients_with_graph(live)
            gradients = local_gradients(live, self._params) if bound is None else bound
            self._relate(gradients)
            loss, outputs = live.detach(), tap.outputs.of_all(live)
            gradient = flatten([None if g is None else g.detach() for g in gradients], self._params)
            graph, sizes = KeptGraph(live, outputs, gradients=bound), {z.number: z.tensor.numel() for z in outputs}
        else:
            if not self._related:
                raise UnrelatedError(UNRELATED)
            graph, sizes = KeptGraph(outside=self._outside), self._sizes
        sizes = dict(sorted(sizes.items()))
        if self._are_products and isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
            _refuse_gradient_scaler(float(loss), float(value))
        return Recording(
            loss=loss,
            gradient=gradient,
            graph=graph,
            output_sizes=sizes,
            returned=value,
            related=frozenset(self._related),
            convex=not tap.outputs.has_marks and tap.outputs.is_convex(sizes),
            linear_marks=tap.outputs.linear_marks,
            holds_constant=tap.holds_constant or tap.gradients.was_read,
            hooks_gradients=tap.hooks.change,
            weight=tap.outputs.weight(),
            losses=max(1, tap.terms),
            advice=tap.outputs.advice(),
        )

    def _gradients_with_graph(self, live: Tensor) -> Gradients | None:
        """Return the gradient with a graph of its own; None where none is wanted or none can be computed."""
        if not self._twice:
            return None
        try:
            gradients = grad_with_graph(live, self._params)
        except RuntimeError:
            return None  # the ordinary gradient, or its error, says more
        there = [g for g in gradients if g is not None]
        return gradients if there and all(g.layout == torch.strided for g in there) else None

    @torch.enable_grad()
    def _sum_of_losses(self) -> Tensor:
        total = self._kept[0]
        for loss in self._kept[1:]:
            total = total + loss
        return total


class OverwrittenError(RuntimeError):
    """A graph keeps a tensor to which the closure has written."""


class ParametersMovedError(RuntimeError):
    """The closure moved the parameters, which were put back.

    Attributes:
        point: Parameters where the closure left them, `(n,)`.
    """

    def __init__(self, message: str, point: Tensor) -> None:
        super().__init__(message)
        self.point = point


def kept_versions(params: Sequence[Tensor]) -> Callable[[], None]:
    """Return a function that lets autograd take the parameters for unchanged since this call.

    A closure that clamps parameters raises their versions even where it changes no entry.
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
    """Whether `.grad` is one of these gradients, clipped.

    Args:
        params: The parameters.
        gradients: The gradients that `.grad` may be, `(n,)` each.
        accumulated: Whether the closure may have found other gradients at its start.

    Raises:
        RuntimeError: `.grad` is neither one of the gradients nor one of them clipped.
    """
    with torch.no_grad():
        left = flatten([p.grad for p in params], params)
        tolerance = math.sqrt(eps_of(params))
        found = [_shrunk(left, gradient, tolerance) for gradient in gradients]
    if any(shrunk is False for shrunk in found):
        return False
    if any(found):
        return True
    raise RuntimeError(_HOOKED if _has_hooks(params) else _ACCUMULATED if accumulated else _WRITTEN)


def _shrunk(left: Tensor, gradient: Tensor, tolerance: float) -> bool | None:
    """Whether `left` is the gradient made smaller, as clipping does; False if they are equal, None if it is another."""
    scale = float(gradient.abs().max())
    if not math.isfinite(scale):
        return False  # reported as a non-finite gradient
    rounding = tolerance * max(scale, float(left.abs().max()))
    if float((left - gradient).abs().max()) <= rounding:
        return False
    # Clipping leaves no entry zero, as a mask does.
    shrunk = (left * gradient >= -rounding * scale) & (left.abs() <= gradient.abs() + rounding)
    shrunk &= (left != 0) | (gradient.abs() <= rounding)
    return True if bool(shrunk.all()) else None


def restless(params: Sequence[Tensor]) -> str:
    """Return the error message for parameters that the closure changes each time."""
    return _HOOKED if _has_hooks(params) else RESTLESS


def _has_hooks(params: Sequence[Tensor]) -> bool:
    return any(getattr(p, "_post_accumulate_grad_hooks", None) for p in params)


def _refuse_reentrant_checkpoints(loss: Tensor) -> None:
    # The parameters inside are on no path of the graph, so their gradient would silently be missing.
    if reaches(loss.grad_fn, lambda node: node.name() == "CheckpointFunctionBackward"):
        raise RuntimeError(
            "The forward pass uses torch.utils.checkpoint with use_reentrant=True, which hides the parameters inside "
            "it from autograd. Call checkpoint(..., use_reentrant=False)."
        )


def _is_product(loss: Tensor) -> bool:
    node = loss.grad_fn
    while node is not None and node.name() in ("ViewBackward0", "AliasBackward0"):
        node = node.next_functions[0][0]
    return node is not None and node.name() == "MulBackward0"


def _refuse_gradient_scaler(total: float, returned: float) -> None:
    """Raise a RuntimeError for a loss that a GradScaler has scaled: by a large power of two, which does not round."""
    scale = total / returned if returned else 0.0
    if scale >= _SMALL_SCALE and math.log2(scale).is_integer():
        raise RuntimeError(
            f"The closure calls backward on {scale:g} times the loss that it returns, as "
            "scaler.scale(loss).backward() with a GradScaler does. A second-order step would take the scaled loss for "
            "the loss. Call loss.backward() without a scaler, and use bfloat16 autocast, which needs none."
        )


# A GradScaler begins at 2^16 and halves its scale where gradients overflow. Users weight losses by smaller factors.
_SMALL_SCALE = 2.0**8
_CONSTANT = (
    "The loss is bit-for-bit the same wherever the parameters are, so no step can be tried. The closure must run the "
    "forward pass itself, each time it is called. Move the calls of the model and the loss function into the closure, "
    "before loss.backward(), and do not reuse a loss, output or parametrized weight from an earlier call."
)
_MOVED = (
    "The closure changes the parameters, but calls backward for only some of them. A second-order step treats the "
    "others as constants in that loss, so they must stay where they were. Clamp or normalise weights after the step."
)
_ELSEWHERE = (
    "The closure calls backward on a loss at other parameters than those it ends with, as SAM does, but cached "
    'products are valid at one point only. Use products="streamed" or "auto".'
)
_DIVIDED_IN_A_GROUP = (
    "The closure keeps the gradients of some losses for only some of the parameters (by backward(inputs=...) or by "
    "zero_grad() in between), which is not supported with several processes. Give each network its own optimizer and "
    "closure."
)
_ACCUMULATED = (
    "After the closure, .grad is not the gradient of its loss: something else was added, usually the gradient of an "
    "earlier closure. A second-order step needs one objective, so gradients cannot be accumulated across closures. "
    "Call optimizer.zero_grad() first in the closure, and set accumulate_grad_batches=1 in Lightning. To use several "
    "batches, loop over them inside one closure and call backward for each."
)
_WRITTEN = (
    "After the closure, .grad is not the gradient of its loss: the closure, or a hook on a parameter, wrote something "
    "else there, such as noise, the gradient of another task, weight decay or the zeros of a mask. A second-order "
    "step takes the gradient of the loss itself. Put every term of the objective into the loss (or use weight_decay), "
    "give the optimizer only the parameters to be trained, and leave .grad as backward leaves it."
)
_HOOKED = (
    "A hook registered with register_post_accumulate_grad_hook changes .grad or the parameters inside backward, "
    "as optimizers that step in backward do. A second-order step needs the whole gradient and moves the "
    "parameters itself. Remove the hook."
)
MOVED = (
    "The closure changed the parameters. They were put back, because an evaluation must not move them. If the closure "
    "clamps or normalises them, call closure() once first: a further call then leaves them unchanged."
)
MOVED_BEYOND = (
    "The closure changes the parameters at a point nearby, for example by clamping a parameter that lies on its "
    'bound, so finite differences across it are not possible. Use products="cached" or "streamed".'
)
RESTLESS = (
    "The closure changed the parameters, and changed them again when it was called from where it had left them. They "
    "were put back. The closure may clamp or normalise them, because a second call then changes nothing, but it must "
    "not train them. Change them after the step instead."
)
MOVED_IN_A_GROUP = (
    "The closure changed the parameters, and they were put back. With several processes it must not change them, "
    "because each process might set them to different values. Clamp or normalise weights after the step, or inside "
    "the model with torch.nn.utils.parametrize. Do not give an Embedding max_norm."
)
