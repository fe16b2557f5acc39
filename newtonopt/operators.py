"""The curvature matrices of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from newtonopt import products
from newtonopt._autograd import grad
from newtonopt._checks import check_instance, warn
from newtonopt._flat import flatten, local_pieces, unflatten
from newtonopt._shards import is_sharded
from newtonopt.evaluation import Evaluation, Form, decays
from newtonopt.linear_operator import LinearOperator, Product

__all__ = ["LinearOperator", "gauss_newton", "hessian", "jacobian"]


@torch.inference_mode(False)
def hessian(evaluation: Evaluation) -> LinearOperator:
    """The Hessian of the objective, `(n, n)`.

    Args:
        evaluation: From `evaluate(closure, params)`, which says how products are formed.

    Returns:
        The operator. A product costs one to two gradients cached, about three streamed, two by finite differences. With
        cached products it holds the graph too: drop it to release the memory.

    Raises:
        TypeError: `evaluation` is no `Evaluation`.
        RuntimeError: The evaluation was freed, or an operation has no second derivative.
        FloatingPointError: The loss is not finite.
    """
    _check(evaluation)
    return _hessian(evaluation, None)


@torch.inference_mode(False)
def gauss_newton(evaluation: Evaluation) -> LinearOperator:
    """The Gauss-Newton matrix `J' H_L J`, `(n, n)`: `J` the outputs' Jacobian, `H_L` the loss's Hessian in the outputs.

    It is positive semi-definite for sums of recognised losses and of squares written by hand, and `psd` says so. Weight
    decay is added; any other term of the loss that does not go through the outputs is left out, with a warning.

    Args:
        evaluation: From `evaluate(closure, params)`, which says how products are formed.

    Returns:
        The operator. A product costs about one gradient cached, three streamed, two by finite differences (which form
        `J v` alone). With cached products it holds the graph too: drop it to release the memory.

    Raises:
        TypeError: `evaluation` is no `Evaluation`.
        RuntimeError: No output was recorded, the evaluation was freed, or an operation has no second derivative.
        FloatingPointError: The loss is not finite.
    """
    _check_gauss_newton(evaluation)
    return _gauss_newton(evaluation, None)


def diagonal_blocks(evaluation: Evaluation, curvature: Literal["gauss_newton", "hessian"]) -> Iterator[LinearOperator]:
    """The diagonal block of each parameter, `(m, m)` for one of `m` entries, in the order of the parameters.

    Cached products with a block are differentiated towards its parameter alone; others are products with the whole
    matrix, by vectors that are zero outside the block. Each block holds a graph of its own: drop it before the next.

    Args:
        evaluation: From `evaluate(closure, params)`, which says how products are formed.
        curvature: Of which matrix.

    Raises:
        TypeError: `evaluation` is no `Evaluation`.
        RuntimeError: As `hessian` and `gauss_newton` do.
        FloatingPointError: The loss is not finite.
    """
    (_check_gauss_newton if curvature == "gauss_newton" else _check)(evaluation)
    block = _gauss_newton if curvature == "gauss_newton" else _hessian
    return (block(evaluation, number) for number in range(len(evaluation.params)))


def _hessian(evaluation: Evaluation, number: int | None) -> LinearOperator:
    """The whole matrix, or the block of the parameter of this number."""
    ways: dict[Form, Callable[[], Product]] = {
        "streamed": lambda: products.streamed_hessian(evaluation),
        "finite_difference": lambda: products.differenced_hessian(evaluation),
    }
    return _symmetric(evaluation, products.hessian_of, ways, number, psd=False)


def _gauss_newton(evaluation: Evaluation, number: int | None) -> LinearOperator:
    ways: dict[Form, Callable[[], Product]] = {
        "streamed": lambda: products.gauss_newton_from(products.streamed_push(evaluation), evaluation),
        "finite_difference": lambda: products.gauss_newton_from(products.differenced_push(evaluation), evaluation),
    }
    return _symmetric(evaluation, products.gauss_newton_of, ways, number, psd=evaluation.convex)


def _symmetric(
    evaluation: Evaluation,
    build: products.Build,
    ways: Mapping[Form, Callable[[], Product]],
    number: int | None,
    *,
    psd: bool,
) -> LinearOperator:
    """From how cached products are built, and how others with the whole matrix are formed."""
    evaluation.check_finite()
    params, like, decay = evaluation.params, evaluation.gradient, evaluation.decay
    if number is not None:
        n, sizes = like.numel(), [piece.numel() for piece in local_pieces(like, params)]
        start = sum(sizes[:number])
        part = slice(start, start + sizes[number])
        params, like = params[number : number + 1], like[part]
        decay = decay[part] if isinstance(decay, Tensor) else decay
        ways = {form: _inside(way, part, n) for form, way in ways.items()}
    product = products.formed(evaluation, {"cached": lambda: products.cached(evaluation, build, params), **ways})
    rows = None if is_sharded(params) else product
    operator = LinearOperator(product, (like.numel(), like.numel()), like, psd=psd, rows=rows)
    return operator.shift(decay) if decays(decay) else operator


def _inside(way: Callable[[], Product], part: slice, n: int) -> Callable[[], Product]:
    return lambda: products.restricted(way(), part, n)


@torch.inference_mode(False)
def jacobian(evaluation: Evaluation) -> LinearOperator:
    """The Jacobian `d outputs / d parameters`, `(m, n)`: `J @ v`, `J.T @ u`, `J.dense()`.

    The rows are the entries of the recorded outputs, each flattened, in the order in which the closure produced them;
    with several processes, of this one's.

    Args:
        evaluation: From `evaluate(closure, params)`, which says how products are formed.

    Raises:
        TypeError: `evaluation` is no `Evaluation`.
        RuntimeError: No output was recorded, or the evaluation was freed.
        NotImplementedError: The parameters are sharded.
    """
    _check_outputs(evaluation)
    if is_sharded(evaluation.params):
        raise NotImplementedError(
            "jacobian needs the gradients of each process alone, and those of sharded parameters are averaged over the "
            "processes: use gauss_newton, or a model that is not sharded."
        )
    push = products.formed(
        evaluation,
        {
            "cached": lambda: _cached_push(evaluation),
            "streamed": lambda: _joined_push(products.streamed_push(evaluation), evaluation),
            "finite_difference": lambda: _joined_push(products.differenced_push(evaluation), evaluation),
        },
    )
    pull = _cached_pull(evaluation) if evaluation.form == "cached" else products.pull_from(evaluation)
    shape = (sum(evaluation.output_sizes.values()), evaluation.gradient.numel())
    return LinearOperator(push, shape, evaluation.gradient, transpose=pull)


def _cached_push(evaluation: Evaluation) -> Product:
    push = products.push_of([z.tensor for z in evaluation.graph[1]], evaluation.params)
    return lambda v: torch.cat([piece.reshape(-1).to(v.dtype) for piece in push(v)])


def _joined_push(push: products.Push, evaluation: Evaluation) -> Product:
    def joined(v: Tensor) -> Tensor:
        pushed = push(v)
        return torch.cat([pushed[number].reshape(-1).to(v.dtype) for number in evaluation.output_sizes])

    return joined


def _cached_pull(evaluation: Evaluation) -> Product:
    outputs, params = [z.tensor for z in evaluation.graph[1]], evaluation.params
    return lambda u: flatten(grad(outputs, params, unflatten(u, outputs), keep=True), params)


def _check(evaluation: Evaluation) -> None:
    check_instance("evaluation", evaluation, Evaluation, "an Evaluation", "Write newtonopt.evaluate(closure, params).")
    evaluation.check_alive()


def _check_outputs(evaluation: Evaluation) -> None:
    _check(evaluation)
    if not evaluation.output_sizes:
        raise RuntimeError(evaluation.unrecognised_advice)


def _check_gauss_newton(evaluation: Evaluation) -> None:
    _check_outputs(evaluation)
    if evaluation.part_outside_outputs():
        warn(
            "Part of the loss does not go through the recorded outputs (such as a penalty that is no sum of squares, "
            "or another term written by hand): the Gauss-Newton matrix leaves that part out. Mark the outputs of such "
            "terms with newtonopt.mark_outputs, write an L2 penalty as weight_decay=... or a sum of squares, or use "
            'curvature="hessian".'
        )
