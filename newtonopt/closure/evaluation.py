"""What is known of an objective at one point."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from newtonopt.autodiff.gradients import CHANGED, Gradients, gradient_of
from newtonopt.autodiff.graph import reaches
from newtonopt.checks import check_choice
from newtonopt.closure.losses import Output
from newtonopt.closure.tap import OnLoss
from newtonopt.vectors.flat import differs, flatten
from newtonopt.vectors.scaling import norm
from newtonopt.vectors.sharded import Sharded, is_sharded

Form = Literal["cached", "streamed", "finite_difference"]
Matrix = Literal["hessian", "gauss_newton", "jacobian"]
Products = Literal["auto", "cached", "streamed", "finite_difference"]


def check_products(products: object) -> None:
    """Refuse an unknown way to form products with a ValueError."""
    check_choice("products", products, get_args(Products))


@dataclass(frozen=True)
class Manner:
    """How products are formed.

    Attributes:
        form: The form.
        length: How far from the parameters finite differences look, `h |v|`; None: as far as their size suggests.
        forward: Whether streamed products with a Jacobian are formed in forward mode.
        curved: Whether differenced Gauss-Newton products take the loss's second derivative by its outputs.
    """

    form: Form
    length: float | None = None
    forward: bool = True
    curved: bool = True


@dataclass(frozen=True)
class Verdict:
    """The verdict of the checks of a matrix's products.

    Attributes:
        manner: How the products are formed.
        doubt: Why the products cannot be vouched for; empty if they can.
        error: Estimated relative error of a product; zero for exact ones.
        cost: Products and gradients that the checks took.
    """

    manner: Manner
    doubt: str
    error: float
    cost: int


class Source(Protocol):
    """What an evaluation was made from and can be made from again: an `Objective`."""

    def visit(self, on_term: OnLoss | None, step: Tensor | None = None, *, numbers: Collection[int] = ()) -> Tensor:
        """Run the closure at the current point, or a step from it, and hand its losses over one by one, with the
        outputs of these numbers.

        Returns:
            Their sum, on this process.
        """
        ...

    def push(self, v: Tensor, numbers: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the closure in forward mode: the sum of its losses, and `J v` for the outputs of these numbers."""
        ...

    def replay(self, evaluation: Evaluation) -> None:
        """See that the closure computes the evaluation's loss and gradient when it runs again."""
        ...

    def add_gradient(self, gradient: Tensor, step: Tensor) -> Tensor:
        """Add this process's gradient at a step from the point to `gradient` in place; returns its loss there."""
        ...

    def mean(self, compute: Callable[[], Tensor], like: Tensor | None = None) -> Tensor:
        """The mean over the processes of what they compute, shaped as `like`, `(n,)` if None."""
        ...


class UnrelatedError(RuntimeError):
    """The loss does not depend on the parameters."""


class Evaluation:
    """What is known of an objective at the current parameters: loss, gradient, and how to form products.

    With cached products it holds the live graph, which takes the memory of one forward pass, and of the double backward
    once products are formed; `free()` releases it.

    Args:
        loss: The objective, a scalar with its graph; a detached one where `gradient` is given.
        params: The parameters to differentiate by.
        outputs: The model outputs from which the loss is computed, for Gauss-Newton products.
        decay: Coefficients, one number or `(n,)`, of a term `sum(decay * theta^2) / 2` to add to the objective.
        gradient: That of the loss, `(n,)`; None: to be computed from the graph.
        source: Where the closure can be run again, for products that are streamed or by finite differences.
        form: How products are formed: "cached", "streamed" or "finite_difference".
        verdicts: Verdicts of earlier checks of these products, at other points of an optimizer or a monitor.
        length: How far finite differences look, `h |v|`; None (default): what products at two lengths suggest.
        parts: Evaluations that this one is the sum of, each with a mask `(n,)`: ones at the parameters that its losses
            count for.
        point: The parameters' values, `(n,)`, which nobody changes; None: to be copied.

    Attributes:
        loss: The objective's value, a detached scalar.
        gradient: Its gradient, `(n,)`, in the order of `params`.
        data_gradient: The gradient without the term of `decay`.
        slope: The same, of its own losses: an optimizer gives other data's gradient to an evaluation for curvature.
        local_gradient: This process's part of it, where the objective is a mean over several.
        replayed: Whether the closure was seen to compute the same loss and gradient when it ran again.
        params: The parameters.
        returned: What the closure returned, detached when it is a tensor.
        clipped: Whether the closure shrank `.grad` after its backward.
        convex: Whether the loss is known to be convex in the recorded outputs: a sum of recognised losses and squares,
            with weights that are not negative. Of marked outputs nobody but the user knows that.
        linear_marks: Whether the loss is linear in a marked output.
        related: The numbers of the parameters that the loss is known to depend on.
        output_sizes: How many entries the recorded outputs have, by their numbers in a run of the closure.
        mask: Ones at the parameters that its losses count for, `(n,)`, where it is a part of another; None: all count.
        holds_constant: Whether the closure holds parts of its loss constant, by `detach` or `no_grad`.
        hooks_gradients: Whether it registers hooks on what it computes.
    """

    def __init__(
        self,
        loss: Tensor,
        params: Iterable[Tensor],
        outputs: Sequence[Output] = (),
        decay: float | Tensor = 0.0,
        *,
        gradient: Tensor | None = None,
        source: Source | None = None,
        form: Form = "cached",
        verdicts: Mapping[Matrix, Verdict] | None = None,
        length: float | None = None,
        parts: Sequence[tuple[Evaluation, Tensor]] = (),
        point: Tensor | None = None,
    ) -> None:
        self.params = tuple(params)
        self.decay = decay
        self.parts = tuple(parts)
        self._form: Form = form
        self.source = source
        self.may_fall_back = False
        self.returned: Any = None
        self.clipped = False
        self.convex = True
        self.linear_marks = False
        self.related: frozenset[int] = frozenset()
        self.unrecognised_advice = ""
        self.output_sizes = {z.number: z.tensor.numel() for z in outputs}
        self.outside: bool | None = None
        self._verdicts: Mapping[Matrix, Verdict] = {} if verdicts is None else verdicts
        self.length = length
        self._checks = 0
        self.mask: Tensor | None = None
        self.holds_constant = self.hooks_gradients = False
        self._graph: tuple[Tensor, tuple[Output, ...]] | None = (loss, tuple(outputs))
        self._alive = True
        self._compared = False
        self.replayed = False
        self._versions = [p._version for p in self.params]
        self._point = flatten(self.params, self.params).detach().clone() if point is None else point
        self.data_gradient = local_gradient(loss, self.params) if gradient is None else gradient
        self.slope = self.data_gradient
        self.gradient, self.loss = self.data_gradient, loss.detach()
        self.local_gradient = self.data_gradient
        if decays(decay):
            point = flatten(self.params, self.params).detach()
            self.gradient = self.data_gradient + decay * point
            self.loss = self.loss + decay_term(decay, point)
        self.local_loss = float(loss.detach())
        # What a loss computed in this precision can tell apart, relative to its size.
        self.eps = torch.finfo(loss.dtype).eps

    def __repr__(self) -> str:
        return f"Evaluation(loss={float(self.loss):.6g}, n={self.gradient.numel()}, form={self.form!r})"

    @property
    def form(self) -> Form:
        """How products are formed."""
        return self.parts[0][0].form if self.parts else self._form

    @property
    def graph(self) -> tuple[Tensor, tuple[Output, ...]]:
        """The live loss and outputs.

        Raises:
            RuntimeError: The graph was freed.
        """
        self.check_alive()
        if self._graph is None:
            raise RuntimeError(_FREED)
        return self._graph

    def check_alive(self) -> None:
        """Refuse products of an evaluation that was freed."""
        if not self._alive:
            raise RuntimeError(_FREED)

    def check_finite(self) -> None:
        """Refuse curvature where there is no loss.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        if not math.isfinite(float(self.loss)):
            raise FloatingPointError(
                f"The loss is {float(self.loss)} at the parameters, so there is no curvature: check the data and the "
                "model."
            )

    def check_unchanged(self) -> None:
        """Refuse products at other parameters than the evaluation's, however they came there.

        Autograd does not see what is done to `p.data`, so that values are compared: not those of sharded parameters,
        and elsewhere than on the CPU, where that waits for the device, only before the first product.
        """
        moved = [p._version for p in self.params] != self._versions
        compares = not self._compared or self._point.device.type == "cpu"
        if not moved and compares and not is_sharded(self.params):
            self._compared = True
            moved = differs(flatten(self.params, self.params).detach(), self._point)
        if moved:
            raise RuntimeError(CHANGED)

    def check_rerun(self) -> None:
        """Refuse products that run the closure again at other parameters, or if it computes something else by then:
        before the first of them its loss and its gradient are compared, for one forward and one backward pass.
        """
        self.check_unchanged()
        if self.source is not None and not self.replayed:
            self.source.replay(self)

    def check_same_function(self, loss: float, tolerance: float) -> None:
        """Refuse a closure that computed another loss at a later call.

        Args:
            loss: Of that call, on this process.
            tolerance: Relative.

        Raises:
            RuntimeError: It differs.
        """
        expected = self.local_loss
        if abs(loss - expected) > tolerance * abs(expected):  # false where one is not finite
            raise RuntimeError(
                f"The closure computed the loss {loss:.9g} where it had computed {expected:.9g} at the same "
                f"parameters. {SAME_FUNCTION}"
            )

    def check_near(self, loss: float, tolerance: float, bend: float, slack: float) -> None:
        """Refuse a loss close by that is not what value, slope and curvature let expect.

        Args:
            loss: There, on this process.
            tolerance: Relative.
            bend: By how much it should differ.
            slack: By how much more it may.

        Raises:
            RuntimeError: It differs by another amount, because the closure computes another function, or because this
                one jumps.
        """
        expected = self.local_loss + bend
        if abs(loss - expected) > tolerance * (abs(self.local_loss) + abs(bend)) + slack:
            if self.source is not None:
                self.source.replay(self)
            raise RuntimeError(
                f"Close to the parameters the loss is {loss:.9g}, where {expected:.9g} was expected from its slope and "
                "curvature, so there are no finite differences: it jumps, as where the model rounds a value (int(), "
                'round(), the diagonal in orthogonal_map="householder"), or changes at a scale far below the size of '
                'the parameters. Use products="cached" or "streamed".'
            )

    def check_same_gradient(self, gradient: Tensor, eps: float) -> None:
        """Refuse a closure that computed another gradient at a later call: batches may differ and their losses not.

        Args:
            gradient: Gradient of that call, on this process, `(n,)`.
            eps: Rounding unit of the coarsest dtype that it was computed in.

        Raises:
            RuntimeError: It differs by more than rounding.
        """
        # Each process compares its own part of sharded vectors, so that one may raise an error alone.
        first, second = _own(self.local_gradient), _own(gradient)
        size, change = norm(first), norm(second - first)
        # Where terms cancel, as at a minimum, the gradient's rounding is that of the terms.
        reach = norm(_own(flatten(self.params, self.params).detach()))
        rounding = 16 * eps * abs(self.local_loss) / reach if reach > 0.0 else 0.0
        if change > min(eps ** (1 / 3), _COARSEST) * size + rounding:  # false where one is not finite
            raise RuntimeError(
                f"The closure computed another gradient at the same parameters, which differs from the first by "
                f"{change / size if size else math.inf:.2g} times its norm. {SAME_FUNCTION}"
            )

    def free(self) -> None:
        """Release the graph; loss and gradient stay."""
        self._graph = None
        self._alive = False
        for part, _ in self.parts:
            part.free()

    def turn_to(self, form: Form) -> None:
        """Form products another way from now on."""
        self.outside = self.part_outside_outputs()
        self._graph = None
        self._form = form

    @property
    def verdicts(self) -> Mapping[Matrix, Verdict]:
        """Verdicts of the checks of products, by matrix; the worst one of several parts."""
        found = dict(self._verdicts)
        for part, _ in self.parts:
            for matrix, verdict in part.verdicts.items():
                if matrix not in found or verdict.doubt:
                    found[matrix] = verdict
        return found

    @property
    def checks(self) -> int:
        """How many products and gradients these checks took."""
        return self._checks + sum(part.checks for part, _ in self.parts)

    def verdict(self, matrix: Matrix) -> Verdict | None:
        """Return the verdict on a matrix's products in the present form; None if they were not checked."""
        found = self.verdicts.get(matrix)
        return found if found is not None and found.manner.form == self.form else None

    def judge(self, matrix: Matrix, verdict: Verdict) -> None:
        """Take note of a verdict."""
        self._verdicts = {**self._verdicts, matrix: verdict}
        self._checks += verdict.cost

    def part_outside_outputs(self) -> bool:
        """Whether the loss depends on the parameters other than through the outputs, as an explicit penalty does."""
        if self.outside is None:
            loss, outputs = self.graph
            self.outside = leaves_outside(loss, [z.tensor for z in outputs], self.params)
        return self.outside


def source_of(evaluation: Evaluation) -> Source:
    """Where an evaluation's closure can be run again.

    Raises:
        RuntimeError: Nowhere.
    """
    if evaluation.source is None:
        raise RuntimeError(
            "This evaluation was made from a loss, and other than cached products run the closure again: make it with "
            "newtonopt.evaluate(closure, params)."
        )
    return evaluation.source


def _own(vector: Tensor) -> Tensor:
    return vector.local if isinstance(vector, Sharded) else vector


SAME_FUNCTION = (
    "Trials and products need the same function each time, so let it use the same data on every call: begin its loader "
    "anew, do not call next() on an iterator from outside, and let no counter or running average that the closure "
    "itself advances enter the loss."
)
# Of a gradient that was computed in part in bfloat16, by kernels that may add in any order.
_COARSEST = 0.05
_FREED = "This evaluation was freed and gives no more products: evaluate the closure again."


def local_gradient(loss: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The flat gradient of a live loss, whose graph stays.

    Raises:
        RuntimeError: A gradient is sparse, or the loss does not depend on the parameters.
    """
    return flatten(local_gradients(loss, params), params)


def local_gradients(loss: Tensor, params: Sequence[Tensor]) -> Gradients:
    """The gradient of a live loss by each parameter, whose graph stays; None where the loss does not depend on it.

    Raises:
        RuntimeError: A gradient is sparse, or the loss does not depend on the parameters.
    """
    gradients = gradient_of(loss, params, keep=True)
    refuse_sparse(gradients)
    if all(g is None for g in gradients):
        raise UnrelatedError(UNRELATED)
    return gradients


def refuse_sparse(gradients: Sequence[Tensor | None]) -> None:
    """Refuse sparse gradients with a RuntimeError."""
    if any(g is not None and g.layout != torch.strided for g in gradients):
        raise RuntimeError(
            "A gradient is sparse, and curvature products need dense ones: build the embedding with sparse=False."
        )


UNRELATED = (
    "The loss does not depend on any of the parameters given: they may be another model's, or those of a copy made "
    "after the optimizer. Give the parameters that the closure's forward pass uses."
)


def leaves_outside(loss: Tensor, outputs: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    """Whether a path leads from the loss to a parameter that passes none of the outputs."""
    leaves = {id(p) for p in params}
    barrier = {z.grad_fn for z in outputs if z.grad_fn is not None}
    # `variable` is what an AccumulateGrad node, the end of a path, accumulates into.
    return reaches(loss.grad_fn, lambda node: id(getattr(node, "variable", None)) in leaves, barrier)


def decays(decay: float | Tensor) -> bool:
    """Whether there is such a term."""
    return isinstance(decay, Tensor) or decay != 0.0


def decay_term(decay: float | Tensor, point: Tensor) -> Tensor:
    """`sum(decay * theta^2) / 2`."""
    return 0.5 * (decay * point.square()).sum()
