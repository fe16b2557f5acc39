"""Checks of curvature products, before anybody sees a number.

Autograd can be wrong at second order without an error: a custom Function whose saved derivative is a constant to a
second differentiation, a formula that does not hold at zero, forward mode that sees through what reverse mode holds
constant. Three checks find that:

- **transpose** (adjoint): `u'(A w) = w'(A u)` for symmetric matrices, `u'(J w) = (J'u)'w` for Jacobians, always;
- **derivative**: `H w` is a central difference of gradients. Where it is not, or the graph has custom Functions, the
  **slope** `g'w` is compared with a central difference of losses: it tells a wrong second derivative from a `backward`
  that does not compute the loss's gradient, and hooks of parameters are left out once to see whether they change it;
- **along eigenvectors**: one-sided differences, which are rough, against exact products (`examine_one_sided`);
- **batch**: a random combination of products formed at once is a single product. `LinearOperator.dense` does that.

Who calls whom: an operator of `matrices` asks `Vouched` for its products. `Vouched` has `examine_hessian`,
`examine_gauss_newton` or `examine_jacobian` look at them before the first one, and leaves a verdict with the evaluation
for the next operator, and for the next step. Wrong products turn "auto" to finite differences, if these pass, and are
an error in a form that was asked for by name. Products that cannot be decided are formed, with one warning, and no
measurement of them is certified.

The directions are random, with a part of the gradient in them, so an error larger than the tolerances is missed with
probability zero: from about `100 eps^(2/3)` of the largest eigenvalue (transpose) and `eps^(1/4)` of a parameter's part
of the product (derivative) on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from newtonopt.autodiff.gradients import NoSecondDerivativeError
from newtonopt.autodiff.graph import Graph, look_through
from newtonopt.checks import warn
from newtonopt.closure.evaluation import Evaluation, Manner, Matrix, Verdict, eps_of, source_of
from newtonopt.closure.tap import LossTerm
from newtonopt.operators.linear_operator import LinearOperator, Product, Trust
from newtonopt.operators.products import displacement, one_sided_hessian
from newtonopt.vectors.flat import flatten, local_pieces
from newtonopt.vectors.random import normals
from newtonopt.vectors.scaling import dot, norm
from newtonopt.vectors.sharded import is_sharded

Result = TypeVar("Result")

# Largest relative difference of products along two routes, in units of eps^(2/3).
_TRANSPOSES = 100.0
# However coarse the precision is, a larger relative difference is no rounding.
_COARSEST = 0.3
# A product is wrong only if it is further from the differences than this many times the part they leave open.
_CLEAR = 10.0
# Differences at two lengths that agree to this part need no shorter ones.
_CLOSE = 0.03
# Where differences at two lengths do not agree to this part at any length, there is no second derivative.
_ROUGHEST = 0.3
# A loss below this may be a saturated softmax's.
_SATURATED = 1e-3
# How many lengths of differences to try: in a plain graph, and where something in it asks for certainty.
_FEW, _MANY = 2, 6


class Vouched:
    """Products with one matrix, examined before the first one.

    Args:
        evaluation: The evaluation. Its verdict on the matrix is taken over if there is one; else a new one is left
            with it.
        matrix: Which matrix.
        form: Builds the products of a manner.
        examine: Examines the products of a manner.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        matrix: Matrix,
        form: Callable[[Manner], Product],
        examine: Callable[[Manner], Finding],
    ) -> None:
        self._evaluation, self._matrix = evaluation, matrix
        self._form, self._examine = form, examine
        self._seen_finite = False
        known = evaluation.verdict(matrix)
        self._manner = Manner(evaluation.form, evaluation.length) if known is None else known.manner
        self._product: Product
        self._tried(lambda: self._use(self._manner))

    def __call__(self, v: Tensor) -> Tensor:
        """Return the product with `v`, or with each of the rows `(k, n)`."""

        def product() -> Tensor:
            self._evaluation.check_unchanged()
            if self._evaluation.verdict(self._matrix) is None:
                self._seen_finite = True  # the check looks at that
            self._settle()
            return self._product(v)

        result = self._tried(product)
        # A second derivative that exists at one point may not exist at the next: a norm has none at zero.
        if self._may_turn and not self._seen_finite and not _are_finite(result):
            self._better(Finding(self._manner, wrong=_NOT_FINITE, finite=False))
            result = self._product(v)
        self._seen_finite = True
        return result

    @property
    def trust(self) -> Trust:
        """Trust in the products."""
        verdict = self._tried(self._settle)
        return Trust(verdict.doubt, verdict.error)

    @property
    def _may_turn(self) -> bool:
        return self._evaluation.may_fall_back and self._manner.form == "cached"

    def _use(self, manner: Manner) -> None:
        self._manner, self._product = manner, self._form(manner)

    def _tried(self, attempt: Callable[[], Result]) -> Result:
        """Return the result of `attempt`; turn to finite differences and try again if there is no second derivative."""
        try:
            return attempt()
        except NoSecondDerivativeError as error:
            if not self._may_turn:
                raise NoSecondDerivativeError(
                    f'{error} Write products="finite_difference", which needs no second derivative.'
                ) from error
            self._turn(str(error))
        return attempt()

    def _settle(self) -> Verdict:
        """Return the verdict on the products, which are examined if there is none."""
        known = self._evaluation.verdict(self._matrix)
        if known is None:
            self._evaluation.check_alive()
            if self._manner.form != self._evaluation.form:  # another matrix's products have turned
                self._use(Manner(self._evaluation.form, self._evaluation.length))
            # Without a finite gradient there is nothing to compare with.
            finite = _are_finite(self._evaluation.data_gradient)
            missing = Finding(self._manner, doubt=_NO_GRADIENT, finite=False)
            finding = self._examine(self._manner) if finite else missing
            return self._better(finding) if finding.wrong else self._keep(finding)
        if known.manner != self._manner:
            self._use(known.manner)
        return known

    def _better(self, wrong: Finding) -> Verdict:
        """Turn from wrong products to finite differences if these pass; raise a RuntimeError if that is not allowed."""
        try:
            other = self._examine(Manner("finite_difference"))
        except (RuntimeError, ValueError):  # there may be no differences, as beyond a bound or at a jump
            return self._keep(replace(wrong, doubt=wrong.wrong, finite=True))
        other = replace(other, cost=wrong.cost + other.cost, warns=False)
        if not other.finite or ((other.doubt or other.empty) and wrong.finite):
            # Differences that are too rough say nothing, and the fault may be rounding, as in a saturated softmax.
            tells = other.error <= _ROUGHEST and not other.empty
            return self._keep(replace(wrong, doubt=wrong.wrong, cost=other.cost, warns=tells))
        if self._may_turn:
            self._turn(wrong.wrong, other.doubt)
            return self._keep(other)
        if wrong.finite:
            raise RuntimeError(f'{wrong.wrong} Write products="finite_difference", which passes the check.')
        return self._keep(replace(wrong, doubt=f"{wrong.wrong} {_NUMBERS}", finite=True))

    def _turn(self, why: str, doubt: str = "") -> None:
        """Form the products by finite differences from now on, and warn of it once."""
        if self._evaluation.form == "cached":
            digits = "which are accurate to about five digits in float64 and two in float32."
            instead = f"as an uncertified estimate: {doubt[:1].lower()}{doubt[1:]}" if doubt else digits
            warn(
                f"{why} The products are formed by finite differences instead, {instead} Write "
                'products="finite_difference" to silence this.'
            )
            self._evaluation.turn_to("finite_difference")
        self._use(Manner("finite_difference"))

    def _keep(self, finding: Finding) -> Verdict:
        """Leave the verdict with the evaluation, and warn of a doubt."""
        if finding.doubt and finding.warns and finding.finite:  # solvers refuse what is not finite
            warn(f"{finding.doubt} No measurement of this curvature is certified.")
        verdict = Verdict(finding.manner, finding.doubt, finding.error, finding.cost)
        self._evaluation.standing.judge(self._matrix, verdict)
        if finding.manner != self._manner:
            self._use(finding.manner)
        return verdict


@dataclass(frozen=True)
class Finding:
    """Result of an examination.

    Attributes:
        manner: How the products are to be formed.
        wrong: Why they are wrong, while the gradient is the loss's; empty if they are not.
        doubt: Why they cannot be vouched for; empty if they can.
        error: Estimated relative error of a product.
        warns: Whether the doubt is worth a warning.
        finite: Whether the products were finite.
        empty: Whether finite differences show nothing, so that they cannot judge other products.
        cost: Number of products and gradients that the examination took.
    """

    manner: Manner
    wrong: str = ""
    doubt: str = ""
    error: float = 0.0
    warns: bool = True
    finite: bool = True
    empty: bool = False
    cost: int = 0


def examine_hessian(evaluation: Evaluation, manner: Manner, form: Callable[[Manner], Product]) -> Finding:
    """Examine products with the Hessian."""
    if manner.form == "finite_difference":
        return _examine_differences(evaluation, manner, form)
    graph, product = _graph_of(evaluation), form(manner)
    u, w, images = _two_products(evaluation, product)
    if not _are_finite(*images):
        return Finding(manner, wrong=_NOT_FINITE, finite=False, cost=2)
    if _is_changed(evaluation):
        return Finding(manner, doubt=_NOT_THE_GRADIENT.format(""), cost=4)
    # Transpose: u'(H w) = w'(H u).
    asymmetry = _asymmetry(u, w, images)
    is_symmetric = asymmetry <= _tolerance(graph.eps)
    # Derivative: H w is a central difference of gradients, and g'w one of losses.
    seen = _compared(evaluation, w, images[1], _MANY if graph.is_foreign or not is_symmetric else _FEW, graph.eps)
    seen = _with_another(evaluation, seen, graph)
    found = Finding(manner, cost=2 + seen.cost)
    not_the_gradient = replace(found, doubt=_NOT_THE_GRADIENT.format(graph.named(", as through ")))
    if seen.follows is False and graph.is_foreign:
        _check_replays(evaluation)
        return not_the_gradient
    # Where parts are held constant, as the padding of an embedding is, reverse mode's derivative is the one meant.
    if is_symmetric and (seen.agrees or seen.follows is False):
        return found
    if is_symmetric and seen.agrees is None:
        undecided = _UNDECIDED.format(graph.named("", "hooks"))
        return replace(found, doubt=undecided, warns=False) if graph.is_foreign else found
    if seen.agrees is not False:
        # Most often this is rounding, as where a softmax has saturated.
        return replace(found, doubt=_ASYMMETRIC.format(f"{asymmetry:.1g}", graph.named(" through ")), warns=False)
    _check_replays(evaluation)
    if graph.has_hooks or (seen.follows is False and not is_symmetric):
        return not_the_gradient
    # The slope by a constant part vanishes now and then, as it does by a spectral norm's vectors.
    if evaluation.recording.holds_constant and is_symmetric and not graph.functions:
        return found
    return replace(found, wrong=_WRONG.format(graph.named("through ", "of this loss") + " "))


def examine_gauss_newton(
    evaluation: Evaluation,
    manner: Manner,
    form: Callable[[Manner], Product],
    push: Callable[[Manner], Product],
    pull: Product,
) -> Finding:
    """Examine products with the Gauss-Newton matrix, and the products `J v` in them (`push`) by `J'u` (`pull`)."""
    graph = _graph_of(evaluation)
    if _is_changed(evaluation):
        return Finding(manner, doubt=_NOT_THE_GRADIENT.format(""), cost=2)
    # Transpose, for the Jacobian in it: u'(J w) = (J'u)'w.
    if is_sharded(evaluation.params):
        found = Finding(manner)  # `J v` is each process's own there, and `J'u` is averaged over all
    else:
        found = _examine_transposes(evaluation, manner, push, pull, graph)
    if found.wrong:
        return found
    if graph.heads and found.manner.form == "finite_difference":
        found = replace(found, manner=replace(found.manner, curved=False))
    u, w, images = _two_products(evaluation, form(found.manner))
    found = replace(found, cost=found.cost + 2)
    if not _are_finite(*images):
        return replace(found, wrong=_NOT_FINITE, finite=False)
    if found.doubt:
        return found
    if found.manner.form == "finite_difference" and is_sharded(evaluation.params):
        at = _length_chosen(evaluation, lambda h: (form(replace(manner, length=h))(w), math.nan), manner.length)
        found = Finding(replace(manner, length=at.length), error=at.error, cost=found.cost + at.cost)
        images = form(found.manner)(u), form(found.manner)(w)
    # Transpose: u'(G w) = w'(G u).
    asymmetry = _asymmetry(u, w, images)
    if asymmetry > _tolerance(graph.eps) + 3 * found.error:
        # Most often this is rounding, as where a softmax has saturated.
        return replace(found, doubt=_ASYMMETRIC.format(f"{asymmetry:.1g}", graph.named(" through ")), warns=False)
    if not graph.is_foreign or is_sharded(evaluation.params):
        return found
    # Slope: g'w is a central difference of losses.
    seen = _with_another(evaluation, _compared(evaluation, w, None, _MANY, graph.eps), graph)
    found = replace(found, cost=found.cost + seen.cost)
    if seen.follows is False:
        _check_replays(evaluation)
        return replace(found, doubt=_NOT_THE_GRADIENT.format(graph.named(", as through ")))
    if graph.heads and found.manner.form != "finite_difference":
        # A Function between the outputs and the loss may hide the loss's second derivative.
        found = replace(found, cost=found.cost + 4)
        if _is_another(evaluation, images[1], lambda length: form(_differenced(length))(w)):
            return replace(found, wrong=_WRONG.format(graph.named("through ") + " "))
    undecided = _UNDECIDED.format(graph.named("", "hooks"))
    return replace(found, doubt=undecided, warns=False) if seen.follows is None else found


def _differenced(length: float) -> Manner:
    return Manner("finite_difference", length, curved=False)


def _is_another(evaluation: Evaluation, image: Tensor, product: Callable[[float], Tensor]) -> bool:
    """Whether differences at two lengths agree with each other and not with a product."""
    try:
        long, short = (product(length) for length in lengths_from(displacement(evaluation.params), 2))
    except (RuntimeError, ValueError):
        _raise_in_group()
        return False
    open_: float = _CLEAR * norm(long - short) + evaluation.coarse_eps**0.25 * norm(short)
    return norm(image - short) > open_  # false where one is not finite


def examine_jacobian(
    evaluation: Evaluation, manner: Manner, push: Callable[[Manner], Product], pull: Product
) -> Finding:
    """Examine products `J w` by products with the transpose, which reverse mode forms, and which are the ones meant."""
    return _examine_transposes(evaluation, manner, push, pull, _graph_of(evaluation))


def _examine_transposes(
    evaluation: Evaluation, manner: Manner, push: Callable[[Manner], Product], pull: Product, graph: Graph
) -> Finding:
    """Examine products `J w` by `y'(J w) = (J'y)'w`, with `y` along `J w` and at random."""
    w = _direction([_inside(evaluation, evaluation.data_gradient), _noise(evaluation, 1)])
    error, cost = 0.0, 2
    if manner.form == "finite_difference":
        at = _length_chosen(evaluation, lambda h: (push(replace(manner, length=h))(w), math.nan), manner.length)
        manner, error, cost = replace(manner, length=at.length), at.error, cost + at.cost

    def gap() -> float:
        pushed = push(manner)(w)
        if manner.length is not None and norm(pushed) * manner.length <= _smallest(evaluation):
            return -1.0  # no Jacobian at all, as far as differences tell
        y = _direction([pushed, normals(pushed, torch.Generator().manual_seed(2))])
        pulled = pull(y)
        return _gap(dot(y, pushed), dot(pulled, w), norm(pushed) + norm(pulled))

    found = _mean(evaluation, gap)
    if not math.isfinite(found):
        return Finding(manner, wrong=_NOT_FINITE, finite=False, cost=cost)
    if found < 0.0:
        return Finding(manner, error=error, empty=True, cost=cost)
    if found <= _tolerance(graph.eps) + 3 * error:
        doubt = _ROUGH.format(f"{error:.0%}") if error > _ROUGHEST else ""
        return Finding(manner, doubt=doubt, error=error, cost=cost)
    if manner.form == "streamed" and manner.forward:
        # Forward mode sees through what reverse mode holds constant, and misses some tangents.
        again = _examine_transposes(evaluation, replace(manner, forward=False), push, pull, graph)
        return replace(again, cost=cost + again.cost)
    if manner.form == "finite_difference":
        return Finding(manner, doubt=_SEEN_THROUGH, error=error, cost=cost)
    if graph.has_hooks:
        return Finding(manner, doubt=_NOT_THE_GRADIENT.format(""), cost=cost)
    return Finding(manner, wrong=_WRONG_JACOBIAN.format(graph.named("through ", "of the outputs") + " "), cost=cost)


def _examine_differences(evaluation: Evaluation, manner: Manner, form: Callable[[Manner], Product]) -> Finding:
    """Examine the Hessian's products by differences: at two lengths, and against their transpose and the slope."""
    _check_replays(evaluation)
    u = _direction([_inside(evaluation, evaluation.data_gradient), _noise(evaluation, 0)], first=True)
    image = _inside(evaluation, form(manner)(u))
    w = _direction([image, _noise(evaluation, 1), u])

    def look(length: float) -> tuple[Tensor, float]:
        along = difference(evaluation, w, length)
        return _inside(evaluation, along.product), along.slope

    at = _length_chosen(evaluation, look, manner.length)
    other, last = difference(evaluation, u, at.length), difference(evaluation, w, at.length)
    images = _inside(evaluation, other.product), _inside(evaluation, last.product)
    found = Finding(replace(manner, length=at.length), error=at.error, cost=at.cost + 6)
    if not _are_finite(*images):
        return replace(found, wrong=_NOT_FINITE, finite=False)
    if max(map(norm, images)) * at.length <= _smallest(evaluation):
        return found  # no curvature at all
    if at.error > _ROUGHEST:
        return replace(found, doubt=_ROUGH.format(f"{at.error:.0%}"))
    longer = [slope for length, slope in at.tried if length > at.length]
    eps = _graph_of(evaluation).eps
    follows = _follows(evaluation, w, last, longer[-1] if longer else None, eps)
    if _asymmetry(u, w, images) > _tolerance(eps) + 3 * at.error or follows is False:
        return replace(found, doubt=_SEEN_THROUGH)
    return found


# Comparisons with differences.


def examine_one_sided(
    evaluation: Evaluation, A: LinearOperator, directions: Sequence[Tensor], tolerance: float
) -> Verdict | None:
    """Return the verdict on one-sided differences of gradients as products with the Hessian A.

    Args:
        evaluation: The evaluation that the Hessian belongs to.
        A: Exact products.
        directions: Directions `(n,)` along which the two are compared.
        tolerance: Relative difference that is allowed.

    Returns:
        The verdict; None where products differ by more than that, or differences cannot be taken.
    """
    if evaluation.parts or evaluation.form != "cached" or A.trust.doubt or is_sharded(evaluation.params):
        return None
    changes = []
    for direction in directions:
        exact = A @ direction
        try:
            rough = one_sided_hessian(evaluation)(direction)
        except (RuntimeError, ValueError):  # there may be no differences, as beyond a bound or at a jump
            return None
        changes.append(_change(exact, rough))
        if not changes[-1] <= tolerance:
            return None
    return Verdict(Manner("finite_difference", central=False), "", max(changes), len(changes))


@dataclass(frozen=True, eq=False)
class Difference:
    """Differences of gradient and loss along a unit vector `w`.

    Attributes:
        product: `(g(theta + h w) - g(theta - h w)) / 2h`, `(n,)`.
        jump: `(g(theta + h w) - 2 g(theta) + g(theta - h w)) / h`, `(n,)`: proportional to `h` where the gradient is
            smooth, and constant where it has a kink at `theta`.
        slope: `(f(theta + h w) - f(theta - h w)) / 2h`; NaN for sharded parameters.
        length: `h`.
    """

    product: Tensor
    jump: Tensor
    slope: float
    length: float


def difference(evaluation: Evaluation, w: Tensor, length: float) -> Difference:
    """Return the differences along `w`, `(n,)`, for two gradients."""
    evaluation.check_unchanged()
    (above, high), (below, low) = (gradient_at(evaluation, sign * length * w) for sign in (1.0, -1.0))
    middle = evaluation.data_gradient
    jump = (above - middle + (below - middle)) / length
    return Difference((above - below) / (2 * length), jump, (high - low) / (2 * length), length)


def gradient_at(evaluation: Evaluation, step: Tensor) -> tuple[Tensor, float]:
    """Return the mean gradient and loss over the processes at a step from the point."""
    source, like = source_of(evaluation), evaluation.data_gradient
    sharded = is_sharded(evaluation.params)

    def compute() -> Tensor:
        gradient = torch.zeros_like(like)
        loss = source.add_gradient(gradient, step)
        return gradient if sharded else torch.cat([gradient, loss.reshape(1).to(gradient)])

    if sharded:
        return source.mean(compute), math.nan
    both = source.mean(compute, like.new_empty(like.numel() + 1))
    return both[:-1], float(both[-1])


@dataclass(frozen=True)
class Comparison:
    """Comparison of a product with differences along the same direction.

    Attributes:
        agrees: Whether they agree; None: it cannot be told.
        follows: Whether the gradient is the loss's; None: it cannot be told.
        cost: Number of gradients that it took.
    """

    agrees: bool | None = None
    follows: bool | None = None
    cost: int = 0


def _compared(evaluation: Evaluation, w: Tensor, image: Tensor | None, lengths: int, eps: float) -> Comparison:
    """Compare a product, and the gradient's slope, with differences at shorter and shorter lengths.

    This ends when they agree, or when two lengths show that they do not.

    Args:
        evaluation: The evaluation.
        w: A unit vector.
        image: The product with it; None: only the slope is compared.
        lengths: How many lengths to try.
        eps: Rounding unit of the coarsest dtype in the graph.
    """
    if evaluation.source is None or any(p.dtype == torch.bfloat16 for p in evaluation.params):
        return Comparison()
    last: Difference | None = None
    agrees = follows = None
    cost = 0
    try:
        for length in lengths_from(_within_reach(evaluation, w), lengths):
            before, last = last, difference(evaluation, w, length)
            cost += 2
            slope = None if before is None else before.slope
            follows = _follows(evaluation, w, last, slope, eps)
            if agrees is None and image is not None:
                agrees = _agrees(evaluation, image, last, before, eps)
            enough = follows is not None if image is None else agrees is not None
            if enough and not (before is None and _is_off(evaluation, w, last, slope, eps)):
                break
    except (RuntimeError, ValueError):
        _raise_in_group()
    return Comparison(agrees, follows, cost)


def _within_reach(evaluation: Evaluation, w: Tensor) -> float:
    """Return the length of the first differences along a unit vector `(n,)`.

    The usual length is in proportion to all parameters. Where a few of them are very large, it is shortened so that no
    other moves far: two lengths that are both much too long for a parameter may agree on a wrong product.
    """
    usual = displacement(evaluation.params)
    if is_sharded(evaluation.params):
        return usual
    most = flatten(evaluation.params, evaluation.params).detach().abs().clamp_min(1.0)
    return min(usual, float(eps_of(evaluation.params) ** 0.4 / (w.abs() / most).max()))


def _raise_in_group() -> None:
    """Raise the error being handled again if there are several processes, all of which would have to know of it.

    A single process goes on without differences: there may be no loss close by, as beyond a bound, or the parameters
    may be too coarse, as in bfloat16.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise


def _with_another(evaluation: Evaluation, seen: Comparison, graph: Graph) -> Comparison:
    """Compare the slope along a random direction too where there are custom Functions.

    A gradient with some parts left out still follows the loss along itself.
    """
    if not graph.is_foreign or seen.follows is False or is_sharded(evaluation.params):
        return seen
    other = _compared(evaluation, _direction([_noise(evaluation, 3)]), None, _MANY, graph.eps)
    follows = False if other.follows is False else seen.follows
    return replace(seen, follows=follows, cost=seen.cost + other.cost)


def _check_replays(evaluation: Evaluation) -> None:
    """Raise a RuntimeError on all processes if the closure computes another gradient at the same point on one."""
    if evaluation.source is None:
        evaluation.check_rerun()
    else:
        evaluation.source.together(evaluation.check_rerun)


def _agrees(
    evaluation: Evaluation, image: Tensor, last: Difference, before: Difference | None, eps: float
) -> bool | None:
    """Whether a product agrees with the last difference, and the one at a longer length; None if it cannot be told."""
    params = evaluation.params
    there = _inside(evaluation, last.product)
    rest = image - there
    size = norm(there)
    of = torch.finfo(there.dtype)
    if size * last.length < of.tiny / of.eps:
        return None  # the gradients have lost digits to underflow
    apart = False
    parts = [local_pieces(vector, params) for vector in (rest, there)]
    distances = [norm(piece) for piece in parts[0]]
    allowed = [eps**0.25 * norm(piece) + 10 * eps**0.5 * size for piece in parts[1]]
    if all(distance <= most for distance, most in zip(distances, allowed, strict=True)):
        return True
    if before is None:
        return None
    ratio = before.length / last.length
    # The part that two lengths leave open, and the jump of a kink at the point itself without the smooth part of both.
    moved = before.product - last.product
    kink = (ratio * last.jump - before.jump) / (ratio - 1)
    # A saturated softmax is rounded like a number of size one.
    grain = 1.0 if abs(evaluation.local_loss) < _SATURATED else 0.0
    rounding = _CLEAR * eps * max(norm(evaluation.data_gradient), grain) / last.length
    for distance, most, change, jump in zip(
        distances, allowed, local_pieces(moved, params), local_pieces(kink, params), strict=True
    ):
        clear = max(_CLEAR * norm(change), 2 * norm(moved), norm(jump), most, rounding)
        apart = apart or distance > clear
    return False if apart else None


def _follows(evaluation: Evaluation, w: Tensor, last: Difference, before: float | None, eps: float) -> bool | None:
    """Whether `g'w` is the loss's slope along `w`; None if it cannot be told.

    Args:
        evaluation: The evaluation.
        w: A unit vector.
        last: The differences along it.
        before: Slope at a longer length; None: there is none.
        eps: Rounding unit of the coarsest dtype in the graph.
    """
    expected = dot(evaluation.data_gradient, w)
    open_, size = _open(evaluation, last, before, eps), max(abs(last.slope), abs(expected))
    if _is_off(evaluation, w, last, before, eps):
        return None if before is None else False
    return True if open_ < 0.2 * size else None  # false where one is not finite


def _is_off(evaluation: Evaluation, w: Tensor, last: Difference, before: float | None, eps: float) -> bool:
    """Whether `g'w` is further from the loss's slope than the differences leave open."""
    expected = dot(evaluation.data_gradient, w)
    size = max(abs(last.slope), abs(expected))
    return abs(last.slope - expected) > float(eps**0.25 * size + _open(evaluation, last, before, eps))


def _open(evaluation: Evaluation, last: Difference, before: float | None, eps: float) -> float:
    """Return the part of the loss's slope that rounding, truncation and kinks leave open."""
    # The logarithm of a saturated softmax is rounded like a number of size one.
    rounding = 20 * eps * max(abs(evaluation.local_loss), 1.0) / last.length
    # Where the gradient has a kink, its values on both sides differ by as much however short the length is.
    kink = 2 * last.length * norm(last.product)
    return rounding + kink if before is None else rounding + kink + 10 * abs(last.slope - before)


# The length of differences.


def lengths_from(start: float, count: int) -> list[float]:
    """Return lengths to try, the longest first, each a quarter of the one before."""
    return [start / 4.0**k for k in range(count)]


@dataclass(frozen=True)
class Chosen:
    """The length of differences at which two lengths agree best.

    Attributes:
        length: The length.
        error: Relative difference of the two, an estimate of the error.
        cost: Number of gradients that choosing it took.
        tried: The lengths tried, in order, each with the loss's slope there.
    """

    length: float
    error: float
    cost: int
    tried: tuple[tuple[float, float], ...]


def _length_chosen(
    evaluation: Evaluation, look: Callable[[float], tuple[Tensor, float]], given: float | None
) -> Chosen:
    """Choose a length: it is shortened until two differences agree no better.

    Truncation falls as the length squared, and rounding grows as it gets shorter.

    Args:
        evaluation: The evaluation.
        look: Returns the product along a vector by differences of a length, and the loss's slope.
        given: A length that was chosen before; None: none was.
    """
    if given is not None:
        return _best_of(evaluation, look, lengths_from(4 * given, 2))
    usual = displacement(evaluation.params)
    found = _best_of(evaluation, look, lengths_from(4 * usual, _MANY))
    absolute = 4 * evaluation.coarse_eps**0.4
    if found.error <= _CLOSE or absolute <= 4 * usual:
        return found
    # The model may not mind how small its parameters are.
    other = _best_of(evaluation, look, lengths_from(absolute, _MANY))
    best = min(found, other, key=lambda chosen: chosen.error)
    return replace(best, cost=found.cost + other.cost, tried=found.tried + other.tried)


def _best_of(evaluation: Evaluation, look: Callable[[float], tuple[Tensor, float]], lengths: Sequence[float]) -> Chosen:
    smallest, least = _smallest(evaluation), evaluation.coarse_eps**0.5
    before, slope = look(lengths[0])
    best, error = lengths[0], math.inf
    tried = [(lengths[0], slope)]
    for length in lengths[1:]:
        after, slope = look(length)
        tried.append((length, slope))
        # A difference of zero is below the rounding, unless all are.
        if _mean(evaluation, partial(norm, after)) * length <= smallest:
            best, error = lengths[0], least  # zero, as far as gradients tell
            break
        gap = _mean(evaluation, partial(_change, before, after))
        if gap < error:
            best, error = length, max(gap, least)
        # Where there are kinks, the difference grows until none of them is in reach.
        if error <= least or error < min(gap, _CLOSE):
            break
        before = after
    return Chosen(best, error, 2 * len(tried), tuple(tried))


def _smallest(evaluation: Evaluation) -> float:
    """Return the smallest difference of gradients that is no rounding."""
    return evaluation.eps * max(norm(evaluation.data_gradient), abs(evaluation.local_loss))


def _two_products(evaluation: Evaluation, product: Product) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return unit vectors `u`, along the gradient, and `w`, with a part of all that matters, and their images."""
    u = _direction([_inside(evaluation, evaluation.data_gradient), _noise(evaluation, 0)], first=True)
    image = _inside(evaluation, product(u))
    w = _direction([image, _noise(evaluation, 1), u])
    return u, w, (image, _inside(evaluation, product(w)))


def _direction(vectors: Sequence[Tensor], *, first: bool = False) -> Tensor:
    """Return a unit vector: a combination of the vectors that are not zero, or with `first` the first of them."""
    units = [unit for unit in map(_unit, vectors) if unit is not None]
    total = units[0]
    # Unequal weights, for in one dimension equal ones may cancel.
    for weight, unit in zip((0.7, 0.5), () if first else units[1:], strict=False):
        total = torch.add(total, unit, alpha=weight)
    return total / norm(total)


def _unit(v: Tensor) -> Tensor | None:
    # Divide by the largest entry first, for the norm may be out of the dtype's range.
    largest = float(v.abs().max()) if v.shape[0] else 0.0
    if not 0.0 < largest < math.inf:
        return None
    scaled = v / largest
    return scaled / norm(scaled)


def _noise(evaluation: Evaluation, number: int) -> Tensor:
    """Return a random vector `(n,)` whose entries are as large as their parameter's."""
    noise = normals(evaluation.data_gradient, torch.Generator().manual_seed(number))
    if not is_sharded(evaluation.params):
        for piece, p in zip(local_pieces(noise, evaluation.params), evaluation.params, strict=True):
            size = norm(p.detach().reshape(-1)) / math.sqrt(max(p.numel(), 1))
            piece.mul_(size or 1.0)
    return _inside(evaluation, noise)


def _inside(evaluation: Evaluation, v: Tensor) -> Tensor:
    """Return the vector `(n,)` with zeros outside the parameters for which the losses count."""
    return v if evaluation.mask is None else evaluation.mask * v


def _gap(one: float, other: float, scale: float) -> float:
    """Return the difference of two numbers, relative to a bound on them."""
    return abs(one - other) / scale if scale else 0.0


def _change(before: Tensor, after: Tensor) -> float:
    """Return the difference of two vectors, relative to the second; zero if both are."""
    change, size = norm(before - after), norm(after)
    return change / size if size else math.inf if change else 0.0


def _asymmetry(u: Tensor, w: Tensor, images: tuple[Tensor, Tensor]) -> float:
    """Return the relative difference of `u'(A w)` and `w'(A u)` for unit vectors."""
    return _gap(dot(w, images[0]), dot(u, images[1]), norm(images[0]) + norm(images[1]))


def _tolerance(eps: float) -> float:
    return min(_COARSEST, float(_TRANSPOSES * eps ** (2 / 3)))


def _mean(evaluation: Evaluation, compute: Callable[[], float]) -> float:
    """Return the mean over the processes of a number."""
    if evaluation.source is None:
        return compute()
    like = evaluation.data_gradient.new_empty(1) if not is_sharded(evaluation.params) else torch.empty(1, device="cpu")
    mean: float = evaluation.source.mean(lambda: like.new_full((1,), compute()), like).item()
    return mean


def _are_finite(*tensors: Tensor) -> bool:
    return all(math.isfinite(float(t.abs().max())) for t in tensors if t.numel())


def _graph_of(evaluation: Evaluation) -> Graph:
    """Look through the graph that is kept, or through those of a run of the closure."""
    eps = evaluation.coarse_eps
    if is_sharded(evaluation.params):
        return Graph((), False, False, eps)
    if evaluation.form == "cached":
        loss, outputs = evaluation.graph
        found = [look_through(loss, [z.tensor for z in outputs], eps)]
    else:
        source = source_of(evaluation)

        def look(term: LossTerm) -> Graph:
            return look_through(term.loss, term.tensors, eps)

        # An error on one process reaches the others.
        found = source.together(lambda: source.visit(look, numbers=evaluation.output_sizes)[1])
    functions = tuple(dict.fromkeys(name for graph in found for name in graph.functions))
    hooked = any(graph.has_hooks for graph in found)
    return Graph(functions, any(graph.heads for graph in found), hooked, max(graph.eps for graph in found))


def _is_changed(evaluation: Evaluation) -> bool:
    """Whether hooks of the closure, or of parameters, change the gradient here."""
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in evaluation.params if p._backward_hooks]
    if evaluation.recording.hooks_gradients or not hooks or is_sharded(evaluation.params):
        return evaluation.recording.hooks_gradients
    if evaluation.source is None:
        return True
    try:
        # Close by, for a hook leaves a gradient of zero as it is.
        step = displacement(evaluation.params) * _direction([_noise(evaluation, 4)])
        hooked = gradient_at(evaluation, step)[0]
    except (RuntimeError, ValueError):
        _raise_in_group()
        step, hooked = torch.zeros_like(evaluation.data_gradient), evaluation.data_gradient
    try:
        for own, _ in hooks:
            own.clear()
        plain = gradient_at(evaluation, step)[0]
    finally:
        for own, before in hooks:
            own.update(before)
    return _change(hooked, plain) > float(evaluation.coarse_eps**0.5)


_NO_GRADIENT = "The gradient is not finite here."
_NOT_FINITE = (
    "A second derivative is not finite, although loss and gradient are. The second derivative of a norm at zero is an "
    "example."
)
_NUMBERS = 'Write products="finite_difference", which is finite there.'
_WRONG = (
    "The second derivative {}is not the derivative of the gradient, as a difference of gradients shows. The cause may "
    "be an autograd.Function that saves a detached derivative, or a PyTorch formula that does not hold at this point."
)
_WRONG_JACOBIAN = (
    "Products J v and J' u {}do not belong to one Jacobian. The backward pass of an autograd.Function or a PyTorch "
    "operation is not differentiable at this point."
)
_NOT_THE_GRADIENT = (
    "The gradient that backward computes is not the gradient of the loss{}: a hook, a straight-through estimator or a "
    "reversed gradient changes it, so it is not the gradient of any function. Remove that change, or write it as part "
    "of the loss."
)
_ASYMMETRIC = (
    "Products with the curvature matrix and with its transpose differ by {} of their size{}, because of rounding or a "
    "wrong formula."
)
_UNDECIDED = (
    "The second derivative through {} could not be checked against differences of gradients, because these are "
    "too inaccurate here."
)
_ROUGH = "Finite differences with two step sizes differ by {} of their size at best, because of kinks or rounding."
_SEEN_THROUGH = (
    "Finite differences do not respect what backward holds constant (detach, no_grad, rounding) or changes (hooks), "
    'so their products are not those of a symmetric matrix. Write products="cached" to hold that constant.'
)
