"""An `Evaluation`: everything known about an objective at one point.

The numbers are complete when it is constructed. Two things change afterwards, each in an object of its own: the graph
can be freed (`KeptGraph`), and forming products shows how far they can be trusted (`Standing`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from newtonopt.autodiff.gradients import CHANGED, Gradients, gradient_of
from newtonopt.autodiff.graph import reaches
from newtonopt.checks import check_choice
from newtonopt.closure.losses import Output
from newtonopt.closure.tap import LossTerm
from newtonopt.vectors.flat import differs, flatten
from newtonopt.vectors.scaling import norm
from newtonopt.vectors.sharded import Sharded, is_sharded

Form = Literal["cached", "streamed", "finite_difference"]
Matrix = Literal["hessian", "gauss_newton", "jacobian", "rows"]
Products = Literal["auto", "cached", "streamed", "finite_difference"]
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """Everything known about an objective at the current parameters, and how curvature products are formed there.

    `evaluate(closure, params)` makes one. With cached products it holds the live graph, which takes the memory of one
    forward pass, and of the double backward once products are formed; `free()` releases it.

    Attributes:
        loss: Value of the objective, a detached scalar.
        gradient: Gradient of the objective, `(n,)`, in the order of `params`.
        data_gradient: Gradient without the term of `decay`, `(n,)`.
        params: The parameters.
        recording: Recording of the run of the closure, on this process.
        local_loss: Loss of that run: this process's part of the mean, without the term of `decay`.
        place: The parameters' values at the evaluation.
        standing: Findings about the products, made while they are formed.
        decay: Coefficients, one number or `(n,)`, of the term `sum(decay * theta^2) / 2`. Default 0.0.
        source: Runs the closure again, for products that are streamed or by finite differences; None (default): there
            is no closure.
        may_fall_back: Whether products may turn to finite differences where cached ones fail. Default False.
        length: Distance `h |v|` from the parameters at which finite differences are taken; None (default): to be chosen
            by comparing two of them.
        clipped: Whether the closure shrank `.grad` after its backward. Default False.
        parts: Evaluations whose sum this one is, each with a mask `(n,)` that is one at the parameters for which its
            losses count.
        mask: For such a part its mask, `(n,)`; None (default): the losses count for all parameters.

    Example:
        >>> import torch
        >>> from newtonopt import evaluate
        >>> theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> evaluation = evaluate(lambda: (theta**3).sum(), [theta])
        >>> evaluation
        Evaluation(loss=9, n=2, form='cached')
        >>> evaluation.gradient
        tensor([ 3., 12.], dtype=torch.float64)

    See Also:
        - `evaluate()`: makes one.
        - `hessian()`, `gauss_newton()`, `jacobian()`: the matrices at the evaluation.
        - `docs/what_it_costs.md`: the memory that the graph takes.
    """

    loss: Tensor
    gradient: Tensor
    data_gradient: Tensor
    params: tuple[Tensor, ...]
    recording: Recording
    local_loss: float
    place: Place
    standing: Standing
    decay: float | Tensor = 0.0
    source: Source | None = None
    may_fall_back: bool = False
    length: float | None = None
    clipped: bool = False
    parts: tuple[tuple[Evaluation, Tensor], ...] = ()
    mask: Tensor | None = None

    @classmethod
    def from_loss(cls, loss: Tensor, params: Sequence[Tensor], decay: float | Tensor = 0.0) -> Evaluation:
        """Return the evaluation of a live loss, whose products are cached: there is no closure to run again.

        Args:
            loss: A scalar with its graph.
            params: The parameters.
            decay: Coefficients, one number or `(n,)`, of the term `sum(decay * theta^2) / 2`. Default 0.0.

        Raises:
            RuntimeError: A gradient is sparse, or the loss does not depend on the parameters.
        """
        params = tuple(params)
        gradient = flatten(local_gradients(loss, params), params)
        point = flatten(params, params).detach().clone()
        recording = Recording(loss.detach(), gradient, KeptGraph(loss), advice=_BARE_LOSS)
        value = with_decay(loss.detach(), decay, point)
        return evaluated(recording, params, value, gradient, point, Standing("cached"), decay)

    def __repr__(self) -> str:
        return f"Evaluation(loss={float(self.loss):.6g}, n={self.gradient.numel()}, form={self.form!r})"

    @property
    def returned(self) -> Any:
        """Return value of the closure, detached if it is a tensor."""
        return self.recording.returned

    @property
    def output_sizes(self) -> Mapping[int, int]:
        """Number of entries of each recorded output, by the output's number in a run of the closure."""
        return self.recording.output_sizes

    @property
    def eps(self) -> float:
        """Rounding unit of the loss's dtype; losses that differ by less, relative to their size, are equal."""
        return torch.finfo(self.recording.loss.dtype).eps

    @property
    def coarse_eps(self) -> float:
        """Rounding unit of the loss's dtype or of the parameters', whichever is coarser."""
        return max(self.eps, eps_of(self.params))

    @property
    def form(self) -> Form:
        """Form of the products."""
        return self.parts[0][0].form if self.parts else self.standing.form

    @property
    def verdicts(self) -> Mapping[Matrix, Verdict]:
        """Verdicts of the checks of products, by matrix; the worst one of several parts."""
        found = dict(self.standing.verdicts)
        for part, _ in self.parts:
            for matrix, verdict in part.verdicts.items():
                if matrix not in found or verdict.doubt:
                    found[matrix] = verdict
        return found

    @property
    def checks(self) -> int:
        """Number of products and gradients that the checks took."""
        return self.standing.checks + sum(part.checks for part, _ in self.parts)

    def verdict(self, matrix: Matrix) -> Verdict | None:
        """Return the verdict on a matrix's products in the present form; None if they were not checked."""
        found = self.verdicts.get(matrix)
        return found if found is not None and found.manner.form == self.form else None

    @property
    def graph(self) -> tuple[Tensor, tuple[Output, ...]]:
        """The live loss and outputs.

        Raises:
            RuntimeError: The graph was freed.
        """
        return self.recording.graph.live

    def free(self) -> None:
        """Release the graph; loss and gradient stay."""
        self.recording.graph.free()
        for part, _ in self.parts:
            part.free()

    def turn_to(self, form: Form) -> None:
        """Form products another way from now on, without the graph."""
        self.recording.graph.drop(self.params)
        self.standing.turn_to(form)

    def leaves_outputs_out(self) -> bool:
        """Whether the loss depends on the parameters other than through the outputs, as an explicit penalty does."""
        return self.recording.graph.leaves_outputs_out(self.params)

    def check_alive(self) -> None:
        """Raise a RuntimeError if the evaluation was freed."""
        self.recording.graph.check_alive()

    def check_finite(self) -> None:
        """Raise a FloatingPointError if the loss is not finite, so that there is no curvature."""
        if not math.isfinite(float(self.loss)):
            raise FloatingPointError(
                f"The loss is {float(self.loss)} at the parameters, so it has no curvature there. Check the data and "
                "the model."
            )

    def check_unchanged(self) -> None:
        """Raise a RuntimeError if the parameters have changed since the evaluation."""
        self.place.check(self.params)

    def check_rerun(self) -> None:
        """Raise a RuntimeError if products that run the closure again would be another function's.

        The parameters must be unchanged. Before the first such product, the closure's loss and gradient are computed
        again and compared, for one forward and one backward pass.
        """
        self.check_unchanged()
        if self.source is not None and not self.standing.replayed:
            self.source.replay(self)

    def check_same(self, loss: float, gradient: Tensor, tolerance: float, eps: float) -> None:
        """Raise a RuntimeError if a later run of the closure gave another loss or gradient; else take note of that.

        Args:
            loss: Loss of that run, on this process.
            gradient: Gradient of that run, on this process, `(n,)`.
            tolerance: Relative difference of losses that is rounding.
            eps: Rounding unit of the coarsest dtype in the loss's graph.
        """
        self.check_same_loss(loss, tolerance)
        self._check_same_gradient(gradient, eps)
        self.standing.note_replay(eps)

    def check_same_loss(self, loss: float, tolerance: float) -> None:
        """Raise a RuntimeError if a later run of the closure gave another loss.

        Args:
            loss: Loss of that run, on this process.
            tolerance: Relative difference that is rounding.
        """
        expected = self.local_loss
        if abs(loss - expected) > tolerance * abs(expected):  # false where one is not finite
            raise RuntimeError(
                f"The closure computed the loss {loss:.9g} at the same parameters where it first computed "
                f"{expected:.9g}. {SAME_FUNCTION}"
            )

    def _check_same_gradient(self, gradient: Tensor, eps: float) -> None:
        """Raise a RuntimeError if gradients differ by more than rounding: other data may have the same loss."""
        # Each process compares its own slice of sharded vectors, so that one may raise an error alone.
        first, second = _own(self.recording.gradient), _own(gradient)
        size, change = norm(first), norm(second - first)
        # Where terms cancel, as at a minimum, the gradient is rounded like the terms: about eps |loss| / |theta|.
        reach = norm(_own(flatten(self.params, self.params).detach()))
        rounding = 16 * eps * abs(self.local_loss) / reach if reach > 0.0 else 0.0
        if change > min(eps ** (1 / 3), _COARSEST) * size + rounding:  # false where one is not finite
            raise RuntimeError(
                "The closure computed another gradient at the same parameters: it differs from the first by "
                f"{change / size if size else math.inf:.2g} times its norm. {SAME_FUNCTION}"
            )

    def check_near(self, loss: float, tolerance: float, bend: float, slack: float) -> None:
        """Raise a RuntimeError if a loss close by is not the one that value, slope and curvature predict.

        Either the closure computes another function by now, or this one jumps.

        Args:
            loss: Loss close by, on this process.
            tolerance: Relative difference that is rounding.
            bend: Difference that the curvature predicts.
            slack: Further difference that is allowed.
        """
        expected = self.local_loss + bend
        if abs(loss - expected) > tolerance * (abs(self.local_loss) + abs(bend)) + slack:
            if self.source is not None:
                self.source.replay(self)
            raise RuntimeError(
                f"Close to the parameters the loss is {loss:.9g}, but its slope and curvature predict "
                f"{expected:.9g}, so finite differences are not possible. The loss may jump, for example where the "
                'model rounds a value (int(), round(), the diagonal in orthogonal_map="householder"), or change '
                'at a scale far below the size of the parameters. Use products="cached" or "streamed".'
            )


def evaluated(
    recording: Recording,
    params: tuple[Tensor, ...],
    loss: Tensor,
    gradient: Tensor,
    point: Tensor,
    standing: Standing,
    decay: float | Tensor = 0.0,
    **more: Any,
) -> Evaluation:
    """Return the evaluation of an objective.

    Args:
        recording: Recording of the run of the closure.
        params: The parameters.
        loss: Value of the objective, decay included.
        gradient: Gradient of the objective without decay, `(n,)`.
        point: The parameters' values, `(n,)`, which nobody changes.
        standing: Findings about the products.
        decay: Coefficients of the decay.
        more: Further fields of the evaluation.
    """
    whole = gradient + decay * point if decays(decay) else gradient
    value, place = float(recording.loss), Place(params, point)
    return Evaluation(loss, whole, gradient, params, recording, value, place, standing, decay, **more)


@dataclass(frozen=True, eq=False)
class Recording:
    """Recording of one run of the closure, on this process.

    Attributes:
        loss: Sum of its losses, detached.
        gradient: Gradient of that sum, `(n,)`.
        graph: The losses' graph, if it was kept.
        output_sizes: Number of entries of each recorded output, by its number in a run of the closure.
        returned: Return value of the closure, detached if it is a tensor.
        related: Numbers of the parameters that the losses depend on.
        convex: Whether the loss is known to be convex in the recorded outputs: a sum of recognised losses and squares
            with weights that are not negative. For marked outputs only the user can know that.
        linear_marks: Whether the loss is linear in a marked output.
        holds_constant: Whether the closure holds parts of its loss constant, by `detach` or `no_grad`.
        hooks_gradients: Whether hooks that it registers change gradients.
        weight: Number of entries that its losses are means over; zero: not known.
        losses: Number of its losses: of the calls of `backward` that count.
        advice: Error message for a closure without recorded outputs, which says what to write.
    """

    loss: Tensor
    gradient: Tensor
    graph: KeptGraph
    output_sizes: Mapping[int, int] = field(default_factory=dict)
    returned: Any = None
    related: frozenset[int] = frozenset()
    convex: bool = True
    linear_marks: bool = False
    holds_constant: bool = False
    hooks_gradients: bool = False
    weight: float = 0.0
    losses: int = 1
    advice: str = ""


class KeptGraph:
    """The live loss of a run, and the outputs that it is computed from.

    It changes, because the graph takes the memory of a forward pass and must be let go before its evaluation is.

    Args:
        loss: The live loss; None: no graph is kept, for products are not cached.
        outputs: The recorded outputs.
        outside: Whether the loss depends on the parameters other than through the outputs; None: to be found out from
            the graph if somebody asks.
        gradients: The loss's gradient by each parameter with its own graph, for Hessian products; None: it has none.
    """

    def __init__(
        self,
        loss: Tensor | None = None,
        outputs: Sequence[Output] = (),
        outside: bool | None = None,
        gradients: Gradients | None = None,
    ) -> None:
        self._live = None if loss is None else (loss, tuple(outputs))
        self._outside = outside
        self._gradients = gradients
        self._is_freed = False

    @property
    def live(self) -> tuple[Tensor, tuple[Output, ...]]:
        """The live loss and outputs.

        Raises:
            RuntimeError: They were let go.
        """
        if self._live is None:
            raise RuntimeError(_FREED)
        return self._live

    @property
    def gradients(self) -> Gradients | None:
        """The gradient by each parameter with its own graph; None if the gradient was computed without one."""
        return self._gradients

    def leaves_outputs_out(self, params: Sequence[Tensor]) -> bool:
        """Whether the loss depends on the parameters other than through the outputs."""
        if self._outside is None:
            loss, outputs = self.live
            self._outside = leaves_outside(loss, [z.tensor for z in outputs], params)
        return self._outside

    def drop(self, params: Sequence[Tensor]) -> None:
        """Let the graph go, after a look at whether the loss leaves outputs out."""
        self.leaves_outputs_out(params)
        self._live = self._gradients = None

    def free(self) -> None:
        """Let the graph go, and refuse all products."""
        self._live = self._gradients = None
        self._is_freed = True

    def check_alive(self) -> None:
        """Raise a RuntimeError after `free`."""
        if self._is_freed:
            raise RuntimeError(_FREED)


@dataclass(eq=False)
class Standing:
    """Findings about an evaluation's products, made while they are formed.

    It changes, because products are formed after the evaluation, and often never: whether an operation has a second
    derivative, whether products pass their checks, and whether the closure computes the same when it runs again.

    Attributes:
        form: Form of the products.
        verdicts: Verdicts of the checks of products, by matrix, earlier steps' included.
        replayed: Whether the closure was seen to compute the same loss and gradient when it ran again.
        checks: Number of products and gradients that the checks took at this evaluation.
        graph_eps: Rounding unit of the coarsest dtype in the graphs that the closure builds; None: not known yet.
    """

    form: Form
    verdicts: Mapping[Matrix, Verdict] = field(default_factory=dict)
    replayed: bool = False
    checks: int = 0
    graph_eps: float | None = None

    def turn_to(self, form: Form) -> None:
        """Form products another way from now on."""
        self.form = form

    def judge(self, matrix: Matrix, verdict: Verdict) -> None:
        """Take note of a verdict."""
        self.verdicts = {**self.verdicts, matrix: verdict}
        self.checks += verdict.cost

    def note_replay(self, graph_eps: float) -> None:
        """Take note that the closure computed the same loss and gradient again."""
        self.replayed, self.graph_eps = True, graph_eps


class Place:
    """The parameters' values at an evaluation.

    Args:
        params: The parameters.
        point: Their values, `(n,)`, which nobody changes.
    """

    def __init__(self, params: Sequence[Tensor], point: Tensor) -> None:
        self._point = point
        self._versions = [p._version for p in params]
        self._compared = False

    def check(self, params: Sequence[Tensor]) -> None:
        """Raise a RuntimeError if the parameters are elsewhere by now, however they came there.

        Autograd does not see what is done to `p.data`, so values are compared. Exceptions: sharded parameters are not
        compared, and elsewhere than on the CPU, where comparing waits for the device, only once.
        """
        moved = [p._version for p in params] != self._versions
        compares = not self._compared or self._point.device.type == "cpu"
        if not moved and compares and not is_sharded(params):
            self._compared = True
            moved = differs(flatten(params, params).detach(), self._point)
        if moved:
            raise RuntimeError(CHANGED)


@dataclass(frozen=True)
class Manner:
    """A manner of forming products.

    Attributes:
        form: The form.
        length: Distance `h |v|` from the parameters at which finite differences are taken; None: the one that the
            parameters' size suggests.
        forward: Whether streamed products with a Jacobian are formed in forward mode.
        curved: Whether Gauss-Newton products by differences take the loss's second derivative by its outputs.
        central: Whether Hessian products by differences are central; False: one-sided, for one gradient.
    """

    form: Form
    length: float | None = None
    forward: bool = True
    curved: bool = True
    central: bool = True


@dataclass(frozen=True)
class Verdict:
    """Verdict of the checks of a matrix's products.

    Attributes:
        manner: How the products are formed.
        doubt: Why the products cannot be vouched for; empty if they can.
        error: Estimated relative error of a product; zero for exact ones.
        cost: Number of products and gradients that the checks took.
    """

    manner: Manner
    doubt: str
    error: float
    cost: int


@dataclass(frozen=True)
class Known:
    """Findings of an optimizer's or a monitor's earlier steps about a closure, which the next one need not repeat.

    Attributes:
        verdicts: Verdicts of the checks of products, by matrix.
        length: Distance `h |v|` at which finite differences are taken; None (default): not chosen yet.
        replayed: Whether the closure was seen to compute the same loss and gradient when it ran again.
    """

    verdicts: Mapping[Matrix, Verdict] = field(default_factory=dict)
    length: float | None = None
    replayed: bool = False


class Source(Protocol):
    """Runs the closure of an evaluation again: an `Objective`."""

    def visit(
        self, of_term: Callable[[LossTerm], Result], step: Tensor | None = None, *, numbers: Collection[int] = ()
    ) -> tuple[Tensor, list[Result]]:
        """Run the closure at a step from the point, and call `of_term` with each loss and its outputs of these numbers.

        Returns the sum of the losses, and the results of `of_term`.
        """
        ...

    def push(self, v: Tensor, numbers: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the closure in forward mode; return the sum of its losses, and `J v` for the outputs of these numbers."""
        ...

    def replay(self, evaluation: Evaluation) -> None:
        """Raise a RuntimeError if the closure computes another loss or gradient when it runs again."""
        ...

    def add_gradient(self, gradient: Tensor, step: Tensor) -> Tensor:
        """Add this process's gradient at a step from the point to `gradient` in place; return its loss there."""
        ...

    def mean(self, compute: Callable[[], Tensor], like: Tensor | None = None) -> Tensor:
        """Return the mean over the processes of tensors shaped as `like`, by default `(n,)`."""
        ...

    def together(self, compute: Callable[[], Result]) -> Result:
        """Return this process's result, once all processes have computed theirs without an error."""
        ...

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        ...

    @property
    def share(self) -> float:
        """Weight of this process in the mean over the processes."""
        ...

    def collect(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, in their order."""
        ...


def source_of(evaluation: Evaluation) -> Source:
    """Return the source that runs the evaluation's closure again.

    Raises:
        RuntimeError: There is no closure.
    """
    if evaluation.source is None:
        raise RuntimeError(
            "This evaluation was made from a loss, so only cached products are available: the other ones run the "
            "closure again. Call newtonopt.evaluate(closure, params) instead."
        )
    return evaluation.source


class UnrelatedError(RuntimeError):
    """The loss does not depend on the parameters."""


def check_products(products: object) -> None:
    """Raise a ValueError for an unknown way to form products."""
    check_choice("products", products, get_args(Products))


def local_gradients(loss: Tensor, params: Sequence[Tensor]) -> Gradients:
    """Return the gradient of a live loss by each parameter, None where it does not depend on it. The graph stays.

    Raises:
        RuntimeError: A gradient is sparse, or the loss does not depend on the parameters.
    """
    gradients = gradient_of(loss, params, keep=True)
    refuse_sparse(gradients)
    if all(g is None for g in gradients):
        raise UnrelatedError(UNRELATED)
    return gradients


def refuse_sparse(gradients: Sequence[Tensor | None]) -> None:
    """Raise a RuntimeError if a gradient is sparse."""
    if any(g is not None and g.layout != torch.strided for g in gradients):
        raise RuntimeError(
            "A gradient is sparse, but curvature products need dense gradients. Build the embedding with sparse=False."
        )


def leaves_outside(loss: Tensor, outputs: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    """Whether a path leads from the loss to a parameter without passing an output."""
    leaves = {id(p) for p in params}
    barrier = {z.grad_fn for z in outputs if z.grad_fn is not None}
    # An AccumulateGrad node, the end of a path, accumulates into its `variable`.
    return reaches(loss.grad_fn, lambda node: id(getattr(node, "variable", None)) in leaves, barrier)


def eps_of(params: Sequence[Tensor]) -> float:
    """Return the rounding unit of the parameters' coarsest dtype."""
    return max(torch.finfo(p.dtype).eps for p in params)


def decays(decay: float | Tensor) -> bool:
    """Whether there is a term of decay."""
    return isinstance(decay, Tensor) or decay != 0.0


def with_decay(loss: Tensor, decay: float | Tensor, point: Tensor) -> Tensor:
    """Return `loss + sum(decay * theta^2) / 2`."""
    return loss + 0.5 * (decay * point.square()).sum() if decays(decay) else loss


def _own(vector: Tensor) -> Tensor:
    """This process's slice of a vector."""
    return vector.local if isinstance(vector, Sharded) else vector


SAME_FUNCTION = (
    "Trials and products need the same function each time, so the closure must use the same data on every call. Start "
    "its data loader from the beginning each time, and do not call next() on an iterator made outside. The loss must "
    "not depend on a counter or running average that the closure itself updates."
)
UNRELATED = (
    "The loss does not depend on any of the given parameters. They may belong to another model, or the closure may "
    "use a copy of the model made after the optimizer. Give the parameters that the closure's forward pass uses."
)
# Relative difference of two gradients computed in part in bfloat16, by kernels that may add in any order.
_COARSEST = 0.05
_FREED = "This evaluation was freed and can form no more products. Evaluate the closure again."
_BARE_LOSS = (
    "This evaluation was made from a loss, so no outputs were recorded for it. Call newtonopt.evaluate(closure, "
    "params) instead."
)
