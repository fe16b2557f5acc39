"""Curvature products, formed in three ways: cached, streamed, and by finite differences; and several at once.

- Cached: a second differentiation of the graph that the evaluation keeps.
- Streamed: the closure runs again for each product; each of its losses is differentiated twice and let go.
- By differences: central differences of the closure's gradient, or of its outputs; one-sided ones of its gradient.
- Batches: several cached products by one differentiation, as many as memory allows.

Notation: `theta` the parameters, `z` the recorded outputs, `L` the loss as a function of them, `J = dz/dtheta`, `H_L`
the loss's Hessian by the outputs, `H` the loss's Hessian by the parameters, `G = J' H_L J` the Gauss-Newton matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from newtonopt.autodiff.gradients import Gradients, differentiable_kernels, grad, grad_with_graph
from newtonopt.autodiff.graph import behind, bytes_handed_on, coarsest, kind_of
from newtonopt.closure.evaluation import SAME_FUNCTION, Evaluation, Source, eps_of, source_of
from newtonopt.closure.losses import Output, Root
from newtonopt.closure.objective import ParametersMovedError
from newtonopt.closure.tap import LossTerm
from newtonopt.operators.linear_operator import Product
from newtonopt.vectors.flat import add_flat, flatten, flatten_rows, unflatten, unflatten_rows

Result = TypeVar("Result")
# `v -> J v`, by the outputs' numbers.
Push = Callable[[Tensor], dict[int, Tensor]]
# Maps a loss, its outputs, the parameters, and whether the graph must outlive the products, to `v -> A v` in pieces.
# Rows `(k, n)` give pieces with a first dimension of `k`.
Build = Callable[[Tensor, Sequence[Output], Sequence[Tensor], bool], Callable[[Tensor], Gradients]]


# Cached products.


def cached(evaluation: Evaluation, build: Build, number: int | None = None) -> Product:
    """Return products on the graph that the evaluation keeps.

    Args:
        evaluation: The evaluation.
        build: `hessian_of` or `gauss_newton_of`.
        number: Number of the parameter whose diagonal block is meant, for which nothing is differentiated towards the
            others; None (default): the whole matrix.
    """
    loss, outputs = evaluation.graph
    params = evaluation.params if number is None else evaluation.params[number : number + 1]
    product = build(loss, outputs, params, True)
    # Twice, for the second differentiation goes back through both passes.
    rows = Batches(product, params, 2 * bytes_handed_on([loss.grad_fn]))
    return _averaged(evaluation.source, lambda v: rows(v) if v.dim() == 2 else flatten(product(v), params))


def hessian_of(
    loss: Tensor, _: Sequence[Output], params: Sequence[Tensor], keep: bool
) -> Callable[[Tensor], Gradients]:
    """Return `v -> H v` for one loss, by a second differentiation."""
    return _derivative(grad_with_graph(loss, params), params, keep)


def cached_hessian(evaluation: Evaluation, number: int | None = None) -> Product:
    """Return `v -> H v` on the graph that the evaluation keeps, from its gradient's own graph if it has one."""
    bound = evaluation.recording.graph.gradients
    if bound is None or number is not None:
        return cached(evaluation, hessian_of, number)
    return cached(evaluation, lambda loss, outputs, params, keep: _derivative(bound, params, keep))


def _derivative(gradients: Gradients, params: Sequence[Tensor], keep: bool) -> Callable[[Tensor], Gradients]:
    """Return `v -> H v` from gradients with their graph: `H v` is the derivative of `g'v`."""
    # Entries that are constant in the parameters have no graph, and no second derivative.
    live = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]

    def product(v: Tensor) -> Gradients:
        if not live:
            return (None,) * len(params)
        pieces = _pieces(v, params)
        along = [pieces[i] for i, _ in live]
        return grad([g for _, g in live], params, along, keep=keep, batched=v.dim() == 2)

    return product


def gauss_newton_of(
    loss: Tensor, outputs: Sequence[Output], params: Sequence[Tensor], keep: bool
) -> Callable[[Tensor], Gradients]:
    """Return `v -> J' H_L J v` for one loss."""
    tensors = [z.tensor for z in outputs]
    push, curve = push_of(tensors, params), curve_of(loss, outputs)
    return lambda v: grad(tensors, params, curve(push(v)), keep=keep, batched=v.dim() == 2)


def push_of(outputs: Sequence[Tensor], params: Sequence[Tensor]) -> Callable[[Tensor], list[Tensor]]:
    """Return `v -> J v` by two backward passes: `J'u` is linear in `u`; its derivative by `u` along `v` is `J v`."""
    dummies = [_generic(z) for z in outputs]
    pulled = grad_with_graph(outputs, params, dummies)
    live = [(i, g) for i, g in enumerate(pulled) if g is not None and g.requires_grad]

    def push(v: Tensor) -> list[Tensor]:
        pieces = _pieces(v, params)
        along, batched = [pieces[i] for i, _ in live], v.dim() == 2
        pushed = (
            grad([g for _, g in live], dummies, along, keep=True, batched=batched) if live else (None,) * len(dummies)
        )
        return _filled(pushed, outputs, v.shape[:-1])

    return push


def _generic(z: Tensor) -> Tensor:
    """Return a tensor like `z` with entries between 1/2 and 3/2: some formulas of PyTorch do not hold at zero."""
    # The multiples of the golden section are spread evenly over the unit interval.
    spread = torch.arange(z.numel(), device=z.device, dtype=torch.float32).mul_(_GOLDEN).frac_().add_(0.5)
    return spread.view(z.shape).to(z.dtype).requires_grad_()


_GOLDEN = 0.6180339887


def curve_of(loss: Tensor, outputs: Sequence[Output]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Return `t -> H_L t` for one loss, in the outputs."""
    scales, softmaxes = _squared_roots(loss, outputs), _softmaxes(loss, outputs)
    others = [i for i, z in enumerate(outputs) if z.root is None and i not in softmaxes]
    tensors = [outputs[i].tensor for i in others]
    gradients = grad_with_graph(loss, tensors) if tensors else ()
    live = [(i, g) for i, g in zip(others, gradients, strict=True) if g is not None and g.requires_grad]

    def curve(pushed: Sequence[Tensor]) -> list[Tensor]:
        along = [pushed[i] for i, _ in live]
        before = pushed[0].shape[: pushed[0].dim() - outputs[0].tensor.dim()]
        curved: list[Tensor | None] = [scale * pushed[i] for i, scale in scales.items()]
        curved += [softmax.curved(pushed[i]) for i, softmax in softmaxes.items()]
        # If there is none, the loss is linear in the outputs.
        if live:
            curved += grad([g for _, g in live], tensors, along, keep=True, batched=len(before) == 1)
        else:
            curved += [None] * len(tensors)
        found = dict(zip([*scales, *softmaxes, *others], curved, strict=True))
        return _filled(tuple(found[i] for i in range(len(outputs))), [z.tensor for z in outputs], before)

    return curve


def _squared_roots(loss: Tensor, outputs: Sequence[Output]) -> dict[int, Tensor]:
    """Return the diagonal of `H_L` for each output, by its place, whose root the loss takes and squares again.

    The loss is quadratic in such a root, whose own derivative does not exist at zero.
    """
    roots = {i: z.root for i, z in enumerate(outputs) if z.root is not None}
    if not roots:
        return {}
    edges: Any = [GradientEdge(root.node, 0) for root in roots.values()]
    slopes = grad_with_graph(loss, edges)
    with torch.enable_grad():
        total = sum((slope.sum() for slope in slopes if slope is not None), loss.new_zeros(()))
    bends = grad(total, edges, keep=True) if total.requires_grad else (None,) * len(edges)
    scales = {}
    for (i, root), bend in zip(roots.items(), bends, strict=True):
        z = outputs[i].tensor
        scales[i] = z.new_zeros(()) if bend is None else _spread(bend.to(z.dtype), root, z)
    return scales


def _spread(bend: Tensor, root: Root, z: Tensor) -> Tensor:
    """Return a value for each entry of `z`, from one for each root of several entries."""
    if root.dims is not None and not root.keep:
        count = bend.dim() + len(root.dims)
        for dim in sorted(d % count for d in root.dims):
            bend = bend.unsqueeze(dim)
    elif root.dims is None:
        bend = bend.reshape(())
    # A complex entry has two real ones, in a last dimension.
    return bend.unsqueeze(-1) if bend.dim() and bend.dim() < z.dim() else bend


@dataclass(frozen=True, eq=False)
class _Softmax:
    """The Hessian `diag(w) (diag(p) - p p')` by logits, of a loss that is linear in their log-softmax.

    Formed so, a product takes a third of the passes over the logits of differentiating the log-softmax twice, whose
    vocabulary may be large.

    Attributes:
        node: The log-softmax's node, which keeps the log-probabilities.
        weight: `w`, with one entry in the dimension of the classes.
        dim: Dimension of the classes, counted from the last one.
    """

    node: Node
    weight: Tensor
    dim: int

    def curved(self, t: Tensor) -> Tensor:
        p = _log_probabilities(self.node).exp()
        curved = p * t
        return curved.addcmul_(p, curved.sum(self.dim, keepdim=True), value=-1).mul_(self.weight)


def _softmaxes(loss: Tensor, outputs: Sequence[Output]) -> dict[int, _Softmax]:
    """Return the softmax of each output, by its place, that enters the loss through a log-softmax alone, in which the
    loss is linear.
    """
    places = {(z.tensor.grad_fn, z.tensor.output_nr): i for i, z in enumerate(outputs) if z.root is None}
    consumers: dict[int, list[Node]] = {}
    for node in behind(loss.grad_fn, {z.tensor.grad_fn for z in outputs if z.tensor.grad_fn is not None}):
        for operand in node.next_functions:
            if operand in places:
                consumers.setdefault(places[operand], []).append(node)
    alone = {i: met[0] for i, met in consumers.items() if len(met) == 1 and kind_of(met[0]) == "LogSoftmax"}
    alone = {i: n for i, n in alone.items() if _log_probabilities(n).dtype == outputs[i].tensor.dtype}
    if not alone:
        return {}
    edges: Any = [GradientEdge(node, 0) for node in alone.values()]
    slopes = grad_with_graph(loss, edges)
    live = [slope for slope in slopes if slope is not None and slope.requires_grad]
    # The loss's second derivatives by the log-probabilities times a generic vector: zero where the loss is linear.
    bends = grad(live, edges, [_generic(slope).detach() for slope in live], keep=True) if live else [None] * len(edges)
    softmaxes = {}
    for (i, node), slope, bend in zip(alone.items(), slopes, bends, strict=True):
        if slope is not None and (bend is None or not bool(bend.any())):
            # The graph's node gives its dimension as an unsigned number.
            dim = (node._saved_dim + 2**63) % 2**64 - 2**63  # type: ignore[attr-defined]
            dim = dim if dim < 0 else dim - slope.dim()
            # The log-probabilities' second derivatives are `p p' - diag(p)`, the same for each.
            softmaxes[i] = _Softmax(node, -slope.detach().sum(dim, keepdim=True), dim)
    return softmaxes


def _log_probabilities(node: Any) -> Tensor:
    with differentiable_kernels():  # for checkpoints, which compute again what a node has saved
        kept: Tensor = node._saved_result
    return kept.detach()


def _pieces(v: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    return unflatten_rows(v, params) if v.dim() == 2 else unflatten(v, params)


def _filled(tensors: Gradients, like: Sequence[Tensor], before: torch.Size) -> list[Tensor]:
    """Return the tensors with zeros for those that are None."""
    return [z.new_zeros((*before, *z.shape)) if t is None else t for t, z in zip(tensors, like, strict=True)]


# Streamed products.


def streamed_hessian(evaluation: Evaluation) -> Product:
    """Return `v -> H v`: the closure runs again, and each loss is differentiated twice at its `backward` and let go.

    Each product computes the gradient too, which is compared with the evaluation's.
    """
    source, params = source_of(evaluation), evaluation.params

    def product(v: Tensor) -> Tensor:
        result, gradient = torch.zeros_like(v), torch.zeros_like(v)
        known = evaluation.standing.graph_eps

        def add(term: LossTerm) -> float:
            eps = coarsest([term.loss.grad_fn], evaluation.eps) if known is None else known
            gradients = grad_with_graph(term.loss, params)
            add_flat(gradient, [None if g is None else g.detach() for g in gradients], params)
            add_flat(result, _derivative(gradients, params, term.keep)(v), params)
            return eps

        evaluation.check_unchanged()
        loss, eps = source.visit(add)
        evaluation.check_same(float(loss), gradient, math.sqrt(evaluation.eps), max([evaluation.eps, *eps]))
        return result

    return one_by_one(_averaged(source, product))


def gauss_newton_from(push: Push, evaluation: Evaluation) -> Product:
    """Return `v -> J' H_L J v` from `push: v -> J v`: for the rest the closure runs again, with one backward pass."""
    params = evaluation.params

    def product(v: Tensor) -> Tensor:
        pushed = push(v)
        result = torch.zeros_like(v)

        def add(term: LossTerm) -> None:
            along = curve_of(term.loss, term.outputs)([pushed[z.number] for z in term.outputs])
            add_flat(result, grad(term.tensors, params, along, keep=term.keep), params)

        _visit_with_outputs(evaluation, add)
        return result

    return one_by_one(_averaged(source_of(evaluation), product))


def pull_from(evaluation: Evaluation) -> Product:
    """Return `u -> J' u`: the closure runs again."""
    params, sizes = evaluation.params, evaluation.output_sizes

    def pull(u: Tensor) -> Tensor:
        result = torch.zeros_like(evaluation.gradient)
        pieces = dict(zip(sizes, u.split(list(sizes.values())), strict=True))

        def add(term: LossTerm) -> None:
            # Several losses may be computed from one output, which the first of them pulls.
            first = [z.tensor for z in term.outputs if z.number in pieces]
            along = [pieces.pop(z.number) for z in term.outputs if z.number in pieces]
            if first:
                shaped = [piece.view(z.shape).to(z.dtype) for piece, z in zip(along, first, strict=True)]
                add_flat(result, grad(first, params, shaped, keep=term.keep), params)

        _visit_with_outputs(evaluation, add)
        return result

    return pull


class StreamedPush:
    """`v -> J v` by a run of the closure in forward mode, which keeps no graph.

    Where an operation has no forward mode, or the closure differentiates inside, forward mode is tried once, and `J v`
    is formed by two backward passes from then on.

    Args:
        evaluation: The evaluation.
        forward: Whether to try forward mode. Default True.
    """

    def __init__(self, evaluation: Evaluation, forward: bool = True) -> None:
        self._evaluation, self._forward = evaluation, forward

    def __call__(self, v: Tensor) -> dict[int, Tensor]:
        """Return `J v`, by the outputs' numbers."""
        if self._forward:
            self._evaluation.check_rerun()
            try:
                return self._forwards(v)
            except RuntimeError:  # an error that has nothing to do with forward mode comes again
                self._forward = False
        return self._backwards(v)

    def _forwards(self, v: Tensor) -> dict[int, Tensor]:
        evaluation = self._evaluation
        loss, pushed = source_of(evaluation).push(v, evaluation.output_sizes)
        evaluation.check_same_loss(float(loss), math.sqrt(evaluation.eps))
        _check_met(evaluation, pushed)
        return pushed

    def _backwards(self, v: Tensor) -> dict[int, Tensor]:
        def push(term: LossTerm) -> dict[int, Tensor]:
            pushed = push_of(term.tensors, self._evaluation.params)(v)
            return dict(zip([z.number for z in term.outputs], pushed, strict=True))

        return _joined(_visit_with_outputs(self._evaluation, push))


# Products by differences.

# Length of one-sided differences over the root of eps, in the same units as that of central ones. On a GPT of 0.8
# million parameters, float32, a product along the top eigenvectors was 0.1 % off, and 0.6 % off at four times this.
_ONE_SIDED = 0.1


def displacement(params: Sequence[Tensor]) -> float:
    """Return the distance `h |v|` from the parameters at which central differences are taken at first.

    Truncation grows as `h^2` and rounding as `eps / h`, so `h` belongs near `eps^(1/3)` (Nocedal & Wright 2006, sec.
    8.1), in proportion to the size of the parameters. On some hundred small and large networks, the shorter `eps^0.4`
    with the root of the parameters' norm was as good on smooth networks and better where there are kinks: a step in
    proportion to the norm, which grows with the number of parameters, is 10 to 100 times too long on large ones. Where
    the norm is below one, or the parameters' root mean square above one, the length is in proportion to it.

    Raises:
        RuntimeError: The parameters are bfloat16.
    """
    if any(p.dtype == torch.bfloat16 for p in params):
        raise RuntimeError(
            "bfloat16 parameters are too coarse for finite differences. Keep the weights in float32, or write "
            'products="cached" or "streamed".'
        )
    return float(eps_of(params) ** 0.4) * _usual(params)


def _usual(params: Sequence[Tensor]) -> float:
    """Return the size of the parameters, in proportion to which differences are taken."""
    point = flatten(params, params).detach()
    norm = float(point.norm()) or 1.0
    return norm if norm < 1.0 else math.sqrt(norm * max(1.0, norm / math.sqrt(point.numel())))


def differenced_hessian(evaluation: Evaluation, length: float | None = None) -> Product:
    """Return `v -> (g(theta + h v) - g(theta - h v)) / 2h`.

    Args:
        evaluation: The evaluation.
        length: Distance `h |v|`; None (default): the one that the parameters' size suggests.
    """
    source = source_of(evaluation)
    length = displacement(evaluation.params) if length is None else length

    def product(v: Tensor) -> Tensor:
        result, norm = torch.zeros_like(v), float(v.norm())
        if norm == 0.0:
            return result
        h = length / norm
        evaluation.check_rerun()
        below = source.add_gradient(result, -h * v)
        steepest = float(result.norm())
        above = source.add_gradient(result.neg_(), h * v)
        # The mean of the two losses exceeds the one between them by h^2/2 v'Hv.
        bend = 0.25 * h * float(result @ v)
        # The loss can change by so much over that length, where a kink lies between and at losses near zero.
        slack = length * (2 * steepest + float(result.norm()))
        evaluation.check_near(0.5 * (float(below) + float(above)), evaluation.eps**0.25, bend, slack)
        return result.div_(2 * h)

    return one_by_one(_averaged(source, product))


def one_sided_hessian(evaluation: Evaluation) -> Product:
    """Return `v -> (g(theta + h v) - g(theta)) / h`: one gradient a product, for the one at theta is known.

    Truncation grows as `h`, and not as `h^2`, so `h |v|` is shorter than for central differences.
    """
    source, known = source_of(evaluation), evaluation.recording.gradient
    length = _ONE_SIDED * math.sqrt(eps_of(evaluation.params)) * _usual(evaluation.params)

    def product(v: Tensor) -> Tensor:
        result, norm = -known, float(v.norm())
        if norm == 0.0:
            return torch.zeros_like(v)
        h = length / norm
        evaluation.check_rerun()
        loss = source.add_gradient(result, h * v)
        # The loss changes by h g'v + h^2/2 v'Hv. Where a kink lies between, its change is of that size.
        rise = h * (float(known @ v) + 0.5 * float(result @ v))
        slack = length * (2 * float(known.norm()) + float(result.norm()))
        evaluation.check_near(float(loss), evaluation.eps**0.25, rise, slack)
        return result.div_(h)

    return one_by_one(_averaged(source, product))


def differenced_push(evaluation: Evaluation, length: float | None = None) -> Push:
    """Return `v -> (z(theta + h v) - z(theta - h v)) / 2h`, by the outputs' numbers; `length` as for the Hessian."""
    source = source_of(evaluation)
    length = displacement(evaluation.params) if length is None else length

    def outputs_at(step: Tensor) -> dict[int, Tensor]:
        def copied(term: LossTerm) -> dict[int, Tensor]:
            return {z.number: z.tensor.detach().clone() for z in term.outputs}

        found = _joined(source.visit(copied, step, numbers=evaluation.output_sizes)[1])
        _check_met(evaluation, found)
        return found

    def push(v: Tensor) -> dict[int, Tensor]:
        # Any step will do for the zero vector.
        h = length / (float(v.norm()) or 1.0)
        evaluation.check_rerun()
        above, below = outputs_at(h * v), outputs_at(-h * v)
        if {n: z.shape for n, z in above.items()} != {n: z.shape for n, z in below.items()}:
            raise RuntimeError(f"The closure computed outputs of different shapes in two calls. {SAME_FUNCTION}")
        return {number: (z - below[number]) / (2 * h) for number, z in above.items()}

    return push


def displaced_outputs(evaluation: Evaluation) -> Callable[[Tensor], dict[int, Tensor] | None]:
    """Return `s -> z(theta + s) - z(theta)`, by the outputs' numbers: one forward pass, also after `free`.

    It returns None where the closure moves the parameters, takes another code path or computes outputs of another shape
    at `theta + s`.
    """
    source = source_of(evaluation)
    here = {z.number: z.tensor.detach().clone() for z in evaluation.graph[1]}

    def change(step: Tensor) -> dict[int, Tensor] | None:
        def copied(term: LossTerm) -> dict[int, Tensor]:
            return {z.number: z.tensor.detach().clone() for z in term.outputs}

        def visit() -> dict[int, Tensor] | None:
            try:
                there = _joined(source.visit(copied, step, numbers=evaluation.output_sizes)[1])
            except ParametersMovedError:
                return None
            same = {n: z.shape for n, z in here.items()} == {n: z.shape for n, z in there.items()}
            return {n: there[n] - z for n, z in here.items()} if same else None

        return source.together(visit)

    return change


def differenced_gauss_newton(evaluation: Evaluation, length: float | None = None) -> Product:
    """Return `v -> J' (L'(theta + h v) - L'(theta - h v)) / 2h`, `L'` the loss's gradient by its outputs.

    No second derivative is taken, not even the loss's by its outputs.
    """
    source, pull = source_of(evaluation), pull_from(evaluation)
    length = displacement(evaluation.params) if length is None else length

    def slopes_of(term: LossTerm) -> list[tuple[int, Tensor]]:
        if not term.outputs:
            return []
        slopes = zip(term.outputs, grad(term.loss, term.tensors, keep=True), strict=True)
        return [(z.number, slope.detach().reshape(-1)) for z, slope in slopes if slope is not None]

    def slopes_at(step: Tensor) -> Tensor:
        total = {number: step.new_zeros(size) for number, size in evaluation.output_sizes.items()}
        for slopes in source.visit(slopes_of, step, numbers=evaluation.output_sizes)[1]:
            for number, slope in slopes:
                total[number] += slope.to(step.dtype)
        return torch.cat(list(total.values()))

    def product(v: Tensor) -> Tensor:
        h = length / (float(v.norm()) or 1.0)
        return pull((slopes_at(h * v) - slopes_at(-h * v)) / (2 * h))

    return one_by_one(_averaged(source, product))


# Several products at once.


class Batches:
    """Products with rows `(k, n)`, as many at once as memory allows; one by one if an operation allows no batches.

    Args:
        product: `v -> A v`, in pieces.
        params: The parameters.
        size: Bytes that one product takes.
    """

    def __init__(
        self, product: Callable[[Tensor], Sequence[Tensor | None]], params: Sequence[Tensor], size: int
    ) -> None:
        self._product, self._params = product, params
        self._at_once = max(1, min(_MOST_ROWS, _BATCH_BYTES // max(1, size)))

    def __call__(self, V: Tensor) -> Tensor:
        """Return the products with the rows, `(k, n)`."""
        found = []
        for part in V.split(self._at_once):
            if self._at_once > 1:
                try:
                    found.append(flatten_rows(self._product(part), self._params, len(part)))
                    continue
                except Exception:  # an error that has nothing to do with batches comes again
                    self._at_once = 1
            found.extend(flatten(self._product(v), self._params)[None] for v in part.unbind(0))
        return torch.cat(found)


# More rows were no faster on networks of 700 and 2,200 parameters with 64 and 512 rows of data.
_MOST_ROWS, _BATCH_BYTES = 128, 2**27


def one_by_one(product: Product) -> Product:
    """Return the product with rows `(k, n)` too, one by one."""
    return lambda v: torch.stack([product(row) for row in v.unbind(0)]) if v.dim() == 2 else product(v)


def restricted(product: Product, part: slice, n: int) -> Product:
    """Return products with a diagonal block, by products with the whole matrix, `(n, n)`."""

    def inside(v: Tensor) -> Tensor:
        whole = v.new_zeros(n)
        whole[part] = v
        return product(whole)[part]

    return one_by_one(inside)


# Runs of the closure for products.


def _visit_with_outputs(evaluation: Evaluation, of_term: Callable[[LossTerm], Result]) -> list[Result]:
    """Run the closure again; return the results of `of_term`, one for each loss with recorded outputs.

    Raises:
        RuntimeError: The closure computes another function by now, or one of the outputs was not met.
    """

    def take(term: LossTerm) -> tuple[list[int], list[Result]]:
        return [z.number for z in term.outputs], [of_term(term)] if term.outputs else []

    evaluation.check_rerun()
    loss, found = source_of(evaluation).visit(take, numbers=evaluation.output_sizes)
    evaluation.check_same_loss(float(loss), math.sqrt(evaluation.eps))
    _check_met(evaluation, [number for numbers, _ in found for number in numbers])
    return [result for _, results in found for result in results]


def _check_met(evaluation: Evaluation, numbers: Collection[int]) -> None:
    if not set(evaluation.output_sizes).issubset(numbers):
        raise RuntimeError(
            "The closure computed its loss by a different code path than when it was recorded, so newtonopt cannot "
            "tell which outputs the loss takes. Make the closure run the same code in each call, or use "
            'products="cached".'
        )


def _joined(found: Sequence[dict[int, Tensor]]) -> dict[int, Tensor]:
    return {number: z for part in found for number, z in part.items()}


def _averaged(source: Source | None, product: Product) -> Product:
    """Return the mean of the product over the processes."""
    return product if source is None else lambda v: source.mean(lambda: product(v), v)
