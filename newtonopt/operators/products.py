"""Several products at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from newtonopt.autodiff.gradients import Gradients, grad, grad_with_graph
from newtonopt.autodiff.graph import bytes_handed_on, coarsest
from newtonopt.closure.evaluation import SAME_FUNCTION, Evaluation, Source, source_of
from newtonopt.closure.losses import Output, Root
from newtonopt.closure.tap import LossTerm, OnLoss
from newtonopt.operators.linear_operator import Product
from newtonopt.vectors.flat import add_flat, flatten, flatten_rows, unflatten, unflatten_rows
from newtonopt.vectors.sharded import is_sharded

# Measured on networks of 700 and 2,200 parameters, 64 and 512 rows of data: as fast as more.
_MOST_ROWS, _BATCH_BYTES = 128, 2**27


def batches(product: Callable[[Tensor], Sequence[Tensor | None]], params: Sequence[Tensor], size: int) -> Product:
    """Products with rows `(k, n)`, as many at once as memory allows; one by one if an operation allows no batches.

    Args:
        product: `v -> A v`, in pieces.
        params: The parameters.
        size: Bytes that one product takes.
    """
    at_once = max(1, min(_MOST_ROWS, _BATCH_BYTES // max(1, size)))

    def all_rows(V: Tensor) -> Tensor:
        nonlocal at_once
        found = []
        for part in V.split(at_once):
            if at_once > 1:
                try:
                    found.append(flatten_rows(product(part), params, len(part)))
                    continue
                except Exception:  # one that has nothing to do with batches comes again
                    at_once = 1
            found.extend(flatten(product(v), params)[None] for v in part.unbind(0))
        return torch.cat(found)

    return all_rows


def one_by_one(product: Product) -> Product:
    """The same product, with rows one by one."""
    return lambda v: torch.stack([product(row) for row in v.unbind(0)]) if v.dim() == 2 else product(v)


# Central differences of a closure's gradient along one direction, and how far they look.


@dataclass(frozen=True)
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


def displacement(params: Sequence[Tensor]) -> float:
    """Return how far from the parameters central differences look at first: `h |v|`.

    Truncation grows as `h^2` and rounding as `eps / h`, so that `h` belongs near `eps^(1/3)` (Nocedal & Wright 2006,
    sec. 8.1), in proportion to the size of the parameters. Measured on some hundred small and large networks, the
    shorter `eps^0.4` with the root of their norm is as good on smooth ones and better where there are kinks: a step in
    proportion to the norm, which grows with the number of parameters, is 10 to 100 times too long on large ones.
    Where the norm, or the parameters' root mean square, is on the other side of one, in proportion to it.

    Raises:
        RuntimeError: The parameters are bfloat16.
    """
    if any(p.dtype == torch.bfloat16 for p in params):
        raise RuntimeError(
            "bfloat16 parameters are too coarse for finite differences: keep the weights in float32, or choose "
            'products="cached" or "streamed".'
        )
    point = flatten(params, params).detach()
    norm = float(point.norm()) or 1.0
    eps: float = max(torch.finfo(p.dtype).eps for p in params)
    usual = norm if norm < 1.0 else math.sqrt(norm * max(1.0, norm / math.sqrt(point.numel())))
    return float(eps**0.4) * usual


def lengths_from(start: float, count: int) -> list[float]:
    """Return lengths to try, the longest first, each a quarter of the one before."""
    return [start / 4.0**k for k in range(count)]


def difference(evaluation: Evaluation, w: Tensor, length: float) -> Difference:
    """Return the differences along `w`, `(n,)`, for two gradients."""
    evaluation.check_unchanged()
    (above, high), (below, low) = (gradient_at(evaluation, sign * length * w) for sign in (1.0, -1.0))
    middle = evaluation.slope
    jump = (above - middle + (below - middle)) / length
    return Difference((above - below) / (2 * length), jump, (high - low) / (2 * length), length)


def gradient_at(evaluation: Evaluation, step: Tensor) -> tuple[Tensor, float]:
    """Return the mean gradient and loss over the processes at a step from the point."""
    source, like = source_of(evaluation), evaluation.slope
    sharded = is_sharded(evaluation.params)

    def compute() -> Tensor:
        gradient = torch.zeros_like(like)
        loss = source.add_gradient(gradient, step)
        return gradient if sharded else torch.cat([gradient, loss.reshape(1).to(gradient)])

    if sharded:
        return source.mean(compute), math.nan
    both = source.mean(compute, like.new_empty(like.numel() + 1))
    return both[:-1], float(both[-1])


# Curvature products: with one loss, and with an objective that is a sum of losses, formed in three ways.


# `v -> J v`, by the outputs' numbers.
Push = Callable[[Tensor], dict[int, Tensor]]
# From a loss, its outputs, the parameters, and whether the graph must outlive the products, to `v -> A v` in pieces.
# Rows `(k, n)` give pieces with a first dimension of `k`.
Build = Callable[[Tensor, Sequence[Output], Sequence[Tensor], bool], Callable[[Tensor], Gradients]]


def hessian_of(
    loss: Tensor, _: Sequence[Output], params: Sequence[Tensor], keep: bool
) -> Callable[[Tensor], Gradients]:
    """`v -> H v` with a loss's Hessian, by a second differentiation."""
    return _derivative(grad_with_graph(loss, params), params, keep)


def _derivative(gradients: Gradients, params: Sequence[Tensor], keep: bool) -> Callable[[Tensor], Gradients]:
    """`v -> H v` from gradients with their graph."""
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
    """`v -> J' H_L J v`: `J` the outputs' Jacobian, `H_L` the loss's Hessian in the outputs."""
    tensors = [z.tensor for z in outputs]
    push, curve = push_of(tensors, params), curve_of(loss, outputs)
    return lambda v: grad(tensors, params, curve(push(v)), keep=keep, batched=v.dim() == 2)


def push_of(outputs: Sequence[Tensor], params: Sequence[Tensor]) -> Callable[[Tensor], list[Tensor]]:
    """`v -> J v`. `J' u` is linear in a dummy `u`: its derivative by `u` gives `J v`.

    Some formulas of PyTorch have no derivative at a zero `u`: its entries lie between 1/2 and 3/2.
    """
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
    # The multiples of the golden section are spread evenly over the unit interval.
    spread = torch.arange(z.numel(), device=z.device, dtype=torch.float32).mul_(_GOLDEN).frac_().add_(0.5)
    return spread.view(z.shape).to(z.dtype).requires_grad_()


_GOLDEN = 0.6180339887


def curve_of(loss: Tensor, outputs: Sequence[Output]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """`t -> H_L t`, in the outputs."""
    scales = _squared_roots(loss, outputs)
    others = [i for i, z in enumerate(outputs) if z.root is None]
    tensors = [outputs[i].tensor for i in others]
    gradients = grad_with_graph(loss, tensors) if tensors else ()
    live = [(i, g) for i, g in zip(others, gradients, strict=True) if g is not None and g.requires_grad]

    def curve(pushed: Sequence[Tensor]) -> list[Tensor]:
        along = [pushed[i] for i, _ in live]
        before = pushed[0].shape[: pushed[0].dim() - outputs[0].tensor.dim()]
        curved: list[Tensor | None] = [scale * pushed[i] for i, scale in scales.items()]
        # Without any, the loss is linear in the outputs.
        if live:
            curved += grad([g for _, g in live], tensors, along, keep=True, batched=len(before) == 1)
        else:
            curved += [None] * len(tensors)
        found = dict(zip([*scales, *others], curved, strict=True))
        return _filled(tuple(found[i] for i in range(len(outputs))), [z.tensor for z in outputs], before)

    return curve


def _squared_roots(loss: Tensor, outputs: Sequence[Output]) -> dict[int, Tensor]:
    """By its place, for each output that the loss takes the root of and squares again, the diagonal of `H_L`.

    The loss is quadratic in such a root, whose own derivative does not exist at zero.
    """
    roots = {i: z.root for i, z in enumerate(outputs) if z.root is not None}
    if not roots:
        return {}
    edges: Any = [GradientEdge(root.node, 0) for root in roots.values()]
    slopes = grad_with_graph(loss, edges)
    total = sum((slope.sum() for slope in slopes if slope is not None), torch.zeros((), dtype=loss.dtype))
    bends = grad(total, edges, keep=True) if total.requires_grad else (None,) * len(edges)
    scales = {}
    for (i, root), bend in zip(roots.items(), bends, strict=True):
        z = outputs[i].tensor
        scales[i] = z.new_zeros(()) if bend is None else _spread(bend.to(z.dtype), root, z)
    return scales


def _spread(bend: Tensor, root: Root, z: Tensor) -> Tensor:
    """A value for each root, for each of the entries of `z` that the root is of."""
    if root.dims is not None and not root.keep:
        count = bend.dim() + len(root.dims)
        for dim in sorted(d % count for d in root.dims):
            bend = bend.unsqueeze(dim)
    elif root.dims is None:
        bend = bend.reshape(())
    # A complex entry has two real ones, in a last dimension.
    return bend.unsqueeze(-1) if bend.dim() and bend.dim() < z.dim() else bend


def _pieces(v: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    return unflatten_rows(v, params) if v.dim() == 2 else unflatten(v, params)


def _filled(tensors: Gradients, like: Sequence[Tensor], before: torch.Size) -> list[Tensor]:
    return [z.new_zeros((*before, *z.shape)) if t is None else t for t, z in zip(tensors, like, strict=True)]


def cached(evaluation: Evaluation, build: Build, number: int | None = None) -> Product:
    """Products on the graph that the evaluation keeps, with the whole matrix or the diagonal block of one parameter.

    Those with a block are differentiated towards its parameter only.
    """
    loss, outputs = evaluation.graph
    params = evaluation.params if number is None else evaluation.params[number : number + 1]
    product = build(loss, outputs, params, True)
    # Twice, for the second differentiation goes back through both passes.
    rows = batches(product, params, 2 * bytes_handed_on([loss.grad_fn]))

    one = lambda v: rows(v) if v.dim() == 2 else flatten(product(v), params)  # noqa: E731
    return _averaged(evaluation.source, one)


def restricted(product: Product, part: slice, n: int) -> Product:
    """Products with a diagonal block, by those with the whole matrix, `(n, n)`."""

    def inside(v: Tensor) -> Tensor:
        whole = v.new_zeros(n)
        whole[part] = v
        return product(whole)[part]

    return one_by_one(inside)


def streamed_hessian(evaluation: Evaluation) -> Product:
    """Products that run the closure again, each of its losses differentiated twice at its `backward` and let go.

    Each of them sees the gradient too, which is compared with the evaluation's.
    """
    source, params = source_of(evaluation), evaluation.params
    eps: float | None = None

    def product(v: Tensor) -> Tensor:
        nonlocal eps
        result, seen, coarse = torch.zeros_like(v), torch.zeros_like(v), eps or evaluation.eps

        def add(term: LossTerm) -> None:
            nonlocal coarse
            coarse = coarsest([term.loss.grad_fn], coarse) if eps is None else coarse
            gradients = grad_with_graph(term.loss, params)
            add_flat(seen, [None if g is None else g.detach() for g in gradients], params)
            add_flat(result, _derivative(gradients, params, term.keep)(v), params)

        evaluation.check_unchanged()
        evaluation.check_same_function(float(source.visit(add)), math.sqrt(evaluation.eps))
        evaluation.check_same_gradient(seen, coarse)
        evaluation.replayed, eps = True, coarse
        return result

    return one_by_one(_averaged(source, product))


def gauss_newton_from(push: Push, evaluation: Evaluation) -> Product:
    """Products `J' H_L J v` from `push: v -> J v`: for the rest the closure runs again, with one backward pass."""
    source, params = source_of(evaluation), evaluation.params

    def product(v: Tensor) -> Tensor:
        pushed = push(v)
        result = torch.zeros_like(v)

        def add(term: LossTerm) -> None:
            if term.outputs:
                along = curve_of(term.loss, term.outputs)([pushed[z.number] for z in term.outputs])
                add_flat(result, grad(term.tensors, params, along, keep=term.keep), params)

        _visit_with_outputs(evaluation, add)
        return result

    return one_by_one(_averaged(source, product))


def pull_from(evaluation: Evaluation) -> Product:
    """`u -> J' u` by a run of the closure."""
    params, sizes = evaluation.params, evaluation.output_sizes

    def pull(u: Tensor) -> Tensor:
        result = torch.zeros_like(evaluation.gradient)
        pieces = dict(zip(sizes, u.split(list(sizes.values())), strict=True))

        def add(term: LossTerm) -> None:
            # Several losses may be computed from one output.
            first = [z.tensor for z in term.outputs if z.number in pieces]
            along = [pieces.pop(z.number) for z in term.outputs if z.number in pieces]
            if first:
                shaped = [piece.view(z.shape).to(z.dtype) for piece, z in zip(along, first, strict=True)]
                add_flat(result, grad(first, params, shaped, keep=term.keep), params)

        _visit_with_outputs(evaluation, add)
        return result

    return pull


def streamed_push(evaluation: Evaluation, forward: bool = True) -> Push:
    """`v -> J v` by a run of the closure in forward mode, which keeps no graph.

    Where an operation has no forward mode, or the closure differentiates inside, by two backward passes; and without
    `forward`.
    """
    source, params = source_of(evaluation), evaluation.params
    has_forward_mode = forward

    def forwards(v: Tensor) -> dict[int, Tensor]:
        loss, pushed = source.push(v, evaluation.output_sizes)
        evaluation.check_same_function(float(loss), math.sqrt(evaluation.eps))
        _check_met(evaluation, pushed)
        return pushed

    def backwards(v: Tensor) -> dict[int, Tensor]:
        pushed: dict[int, Tensor] = {}

        def add(term: LossTerm) -> None:
            if term.outputs:
                numbers = [z.number for z in term.outputs]
                pushed.update(zip(numbers, push_of(term.tensors, params)(v), strict=True))

        _visit_with_outputs(evaluation, add)
        return pushed

    def push(v: Tensor) -> dict[int, Tensor]:
        nonlocal has_forward_mode
        if has_forward_mode:
            evaluation.check_rerun()
            try:
                return forwards(v)
            except RuntimeError:  # an error that has nothing to do with forward mode comes again
                has_forward_mode = False
        return backwards(v)

    return push


def differenced_hessian(evaluation: Evaluation, length: float | None = None) -> Product:
    """`(g(theta + h v) - g(theta - h v)) / 2h`, with `h |v| = length`; None: as the parameters suggest."""
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
        # h^2/2 v'Hv, by which the mean of the two losses exceeds the one between them.
        bend = 0.25 * h * float(result @ v)
        # By how much the loss can change over that length, where a kink lies between and at losses near zero.
        slack = length * (2 * steepest + float(result.norm()))
        evaluation.check_near(0.5 * (float(below) + float(above)), evaluation.eps**0.25, bend, slack)
        return result.div_(2 * h)

    return one_by_one(_averaged(source, product))


def differenced_push(evaluation: Evaluation, length: float | None = None) -> Push:
    """`v -> (z(theta + h v) - z(theta - h v)) / 2h`, for the outputs `z` by number; `length` as for the Hessian."""
    source = source_of(evaluation)
    length = displacement(evaluation.params) if length is None else length

    def outputs_at(step: Tensor) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}

        def take(term: LossTerm) -> None:
            found.update({z.number: z.tensor.detach().clone() for z in term.outputs})

        source.visit(take, step, numbers=evaluation.output_sizes)
        _check_met(evaluation, found)
        return found

    def push(v: Tensor) -> dict[int, Tensor]:
        # Any step will do for the zero vector.
        h = length / (float(v.norm()) or 1.0)
        evaluation.check_rerun()
        above, below = outputs_at(h * v), outputs_at(-h * v)
        if {n: z.shape for n, z in above.items()} != {n: z.shape for n, z in below.items()}:
            raise RuntimeError(f"The closure computed outputs of other shapes at the second call. {SAME_FUNCTION}")
        return {number: (z - below[number]) / (2 * h) for number, z in above.items()}

    return push


def differenced_gauss_newton(evaluation: Evaluation, length: float | None = None) -> Product:
    """`J' (L'(theta + h v) - L'(theta - h v)) / 2h`, with `L'` the loss's gradient by its outputs.

    No second derivative is taken, not even the loss's in its outputs.
    """
    source, pull = source_of(evaluation), pull_from(evaluation)
    length = displacement(evaluation.params) if length is None else length

    def slopes_at(step: Tensor) -> Tensor:
        found = {number: step.new_zeros(size) for number, size in evaluation.output_sizes.items()}

        def add(term: LossTerm) -> None:
            if term.outputs:
                for z, slope in zip(term.outputs, grad(term.loss, term.tensors, keep=True), strict=True):
                    found[z.number] += 0 if slope is None else slope.detach().reshape(-1).to(step.dtype)

        source.visit(add, step, numbers=evaluation.output_sizes)
        return torch.cat(list(found.values()))

    def product(v: Tensor) -> Tensor:
        h = length / (float(v.norm()) or 1.0)
        return pull((slopes_at(h * v) - slopes_at(-h * v)) / (2 * h))

    return one_by_one(_averaged(source, product))


def _visit_with_outputs(evaluation: Evaluation, on_term: OnLoss) -> None:
    """Run the closure and hand its losses over with the outputs that were recorded.

    Raises:
        RuntimeError: One of the outputs was not met.
    """
    met: set[int] = set()

    def take(term: LossTerm) -> None:
        met.update(z.number for z in term.outputs)
        on_term(term)

    _visit(evaluation, take, evaluation.output_sizes)
    _check_met(evaluation, met)


def _check_met(evaluation: Evaluation, numbers: Collection[int]) -> None:
    if not set(evaluation.output_sizes).issubset(numbers):
        raise RuntimeError(
            "The closure came to its loss by other lines of code than when it was recorded, so that the loss's outputs "
            'cannot be told: let it take the same way in each call, or use products="cached".'
        )


def _visit(evaluation: Evaluation, on_term: OnLoss, numbers: Collection[int] = ()) -> None:
    evaluation.check_rerun()
    loss = float(source_of(evaluation).visit(on_term, numbers=numbers))
    evaluation.check_same_function(loss, math.sqrt(evaluation.eps))


def _averaged(source: Source | None, product: Product) -> Product:
    return product if source is None else lambda v: source.mean(lambda: product(v), v)
