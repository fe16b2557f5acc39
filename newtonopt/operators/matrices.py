"""The curvature matrices of an evaluation: `hessian`, `gauss_newton`, `jacobian`.

Each says which products belong to the matrix and how they are examined. `Vouched` examines them before the first one,
and `LinearOperator` gives them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from newtonopt.autodiff.gradients import grad
from newtonopt.checks import check_instance, warn
from newtonopt.closure.evaluation import Evaluation, Manner, Matrix, decays
from newtonopt.operators import products
from newtonopt.operators.linear_operator import LinearOperator, Product, Trust
from newtonopt.operators.products import one_by_one
from newtonopt.operators.rows import RowsError, agreed, check_outputs, jacobian_rows, residual_rows
from newtonopt.operators.verification import Finding, Vouched, examine_gauss_newton, examine_hessian, examine_jacobian
from newtonopt.vectors.flat import flatten, local_pieces, unflatten
from newtonopt.vectors.memory import fits
from newtonopt.vectors.sharded import is_sharded

# Builds the products of a manner.
Form = Callable[[Manner], Product]


@torch.inference_mode(False)
def hessian(evaluation: Evaluation) -> LinearOperator:
    """Return the Hessian of the objective, `(n, n)`.

    Args:
        evaluation: Made by `evaluate(closure, params)`, which says how products are formed.

    Returns:
        The operator. A product costs one to two gradients cached, about three streamed, two by finite differences. With
        cached products it holds the graph too: drop it to release the memory.

    Raises:
        TypeError: `evaluation` is no `Evaluation`.
        RuntimeError: The evaluation was freed, or an operation has no second derivative.
        FloatingPointError: The loss is not finite.

    Example:
        >>> import torch
        >>> from newtonopt import evaluate, hessian
        >>> theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> hessian(evaluate(lambda: theta[0] ** 2 * theta[1], [theta])).dense()
        tensor([[4., 2.],
                [2., 0.]], dtype=torch.float64)

    See Also:
        - `gauss_newton()`: a positive semi-definite relative.
        - `extreme_eigenvalues()`, `trace()`, `spectral_density()`: what to measure of it.
        - `evaluate()`: makes the evaluation.
        - `docs/reference/mathematics.md`: how a product is formed without the matrix.
    """
    _check(evaluation)
    return _hessian(evaluation, None)


@torch.inference_mode(False)
def gauss_newton(evaluation: Evaluation) -> LinearOperator:
    """Return the Gauss-Newton matrix `J' H_L J`, `(n, n)`: `J` the outputs' Jacobian, `H_L` the loss's Hessian by them.

    The matrix is positive semi-definite for sums of recognised losses and of squares written by hand, and `psd` says
    so. Weight decay is added; any other term of the loss that does not go through the outputs is left out, with a
    warning.

    Args:
        evaluation: Made by `evaluate(closure, params)`, which says how products are formed.

    Returns:
        The operator. A product costs about one gradient cached, three streamed, two by finite differences (which form
        `J v` alone). With cached products it holds the graph too: drop it to release the memory.

    Raises:
        TypeError: `evaluation` is no `Evaluation`.
        RuntimeError: No output was recorded, the evaluation was freed, or an operation has no second derivative.
        FloatingPointError: The loss is not finite.

    Example:
        >>> import torch
        >>> from newtonopt import evaluate, gauss_newton
        >>> theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> target = torch.zeros(2, dtype=torch.float64)
        >>> G = gauss_newton(evaluate(lambda: torch.nn.functional.mse_loss(theta**2, target), [theta]))
        >>> G.dense(), G.psd
        (tensor([[ 4.,  0.],
                [ 0., 16.]], dtype=torch.float64), True)

    See Also:
        - `hessian()`: the exact matrix, which may be indefinite.
        - `gauss_newton_spectrum()`: all its eigenvalues, from the rows of the Jacobian.
        - `mark_outputs()`: for a loss written by hand.
        - `docs/reference/mathematics.md`: when the matrix is positive semi-definite.
    """
    _check_gauss_newton(evaluation)
    return _gauss_newton(evaluation, None)


def diagonal_blocks(evaluation: Evaluation, curvature: Literal["gauss_newton", "hessian"]) -> Iterator[LinearOperator]:
    """Return the diagonal block of each parameter, `(m, m)` for one of `m` entries, in the order of the parameters.

    Cached products with a block are differentiated towards its parameter alone; others are products with the whole
    matrix, by vectors that are zero outside the block. Each block holds a graph of its own: drop it before the next.

    Args:
        evaluation: Made by `evaluate(closure, params)`, which says how products are formed.
        curvature: The matrix.

    Raises:
        TypeError: `evaluation` is no `Evaluation`.
        RuntimeError: No output was recorded for `"gauss_newton"`, the evaluation was freed, or an operation has no
            second derivative.
        FloatingPointError: The loss is not finite.
    """
    (_check_gauss_newton if curvature == "gauss_newton" else _check)(evaluation)
    block = _gauss_newton if curvature == "gauss_newton" else _hessian
    return (block(evaluation, number) for number in range(len(evaluation.params)))


def _hessian(evaluation: Evaluation, number: int | None) -> LinearOperator:
    """Return the whole matrix, or the block of the parameter of this number."""
    if evaluation.parts:
        return _summed(evaluation, number, _hessian)

    def form(manner: Manner, block: int | None) -> Product:
        if manner.form == "cached":
            return products.cached_hessian(evaluation, block)
        if manner.form == "streamed":
            return products.streamed_hessian(evaluation)
        if not manner.central:
            return products.one_sided_hessian(evaluation)
        return products.differenced_hessian(evaluation, manner.length)

    def examine(manner: Manner, whole: Form) -> Finding:
        return examine_hessian(evaluation, manner, whole)

    return _symmetric(evaluation, "hessian", form, examine, number, psd=False)


def _gauss_newton(evaluation: Evaluation, number: int | None) -> LinearOperator:
    if evaluation.parts:
        return _summed(evaluation, number, _gauss_newton)

    def form(manner: Manner, block: int | None) -> Product:
        if manner.form == "cached":
            return products.cached(evaluation, products.gauss_newton_of, block)
        if not manner.curved:
            return products.differenced_gauss_newton(evaluation, manner.length)
        return products.gauss_newton_from(_push(evaluation, manner), evaluation)

    def examine(manner: Manner, whole: Form) -> Finding:
        push = lambda m: _joined_push(evaluation, m)  # noqa: E731
        return examine_gauss_newton(evaluation, manner, whole, push, _pull(evaluation, manner))

    whole = partial(_from_rows, evaluation) if number is None else None
    return _symmetric(evaluation, "gauss_newton", form, examine, number, psd=evaluation.recording.convex, whole=whole)


def _from_rows(evaluation: Evaluation) -> Tensor | None:
    """Return the Gauss-Newton matrix `R'R`; None where products are cheaper or rows cannot be formed."""
    if evaluation.form != "cached" or is_sharded(evaluation.params):
        return None
    sizes = [(z.tensor.numel(), len(z.tensor) if z.tensor.dim() else 1) for z in evaluation.graph[1]]
    entries, samples = sum(size for size, _ in sizes), sum(count for _, count in sizes)
    like = evaluation.gradient
    pays = entries <= _WIDEST * samples and fits(2 * entries * like.numel(), like.dtype, like.device)
    if not agreed(evaluation.source, pays, like):
        return None
    try:
        return residual_rows(evaluation).parameter_gram()
    except RowsError:
        return None


# Entries of a sample's output from which on products form a Gauss-Newton matrix in less time than rows.
_WIDEST = 16


def _symmetric(
    evaluation: Evaluation,
    matrix: Matrix,
    form: Callable[[Manner, int | None], Product],
    examine: Callable[[Manner, Form], Finding],
    number: int | None,
    *,
    psd: bool,
    whole: Callable[[], Tensor | None] | None = None,
) -> LinearOperator:
    """Return a symmetric matrix of an evaluation, with decay.

    Args:
        evaluation: The evaluation.
        matrix: Which matrix.
        form: Builds the products of a manner, with the whole matrix (None) or with the block of a number.
        examine: Examines products of a manner with the whole matrix.
        number: Number of the parameter whose block to return; None: the whole matrix.
        psd: Whether the matrix is positive semi-definite.
        whole: Forms the whole matrix where that is cheaper than by products; None (default): it never is.
    """
    evaluation.check_finite()
    params, like, decay = evaluation.params, evaluation.gradient, evaluation.decay
    if number is not None:
        n, sizes = like.numel(), [piece.numel() for piece in local_pieces(like, params)]
        start = sum(sizes[:number])
        part = slice(start, start + sizes[number])
        params, like = params[number : number + 1], like[part]
        decay = decay[part] if isinstance(decay, Tensor) else decay

    def block(manner: Manner) -> Product:
        product = form(manner, number)
        return product if manner.form == "cached" else products.restricted(product, part, n)

    latest = _Latest(lambda manner: form(manner, None))
    product = Vouched(evaluation, matrix, latest if number is None else block, lambda m: examine(m, latest))
    rows = product if evaluation.form == "cached" and not is_sharded(params) else None
    shape = (like.numel(), like.numel())
    trust = lambda: product.trust  # noqa: E731
    operator = LinearOperator(product, shape, like, psd=psd, rows=rows, whole=whole, trust=trust)
    return operator.shift(decay) if decays(decay) else operator


class _Latest:
    """Gives the products of a manner, the same ones while the manner stays. It keeps no others: each holds a graph."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._kept: tuple[Manner, Product] | None = None

    def __call__(self, manner: Manner) -> Product:
        if self._kept is None or self._kept[0] != manner:
            self._kept = None  # before the next one is built
            self._kept = manner, self._form(manner)
        return self._kept[1]


def _summed(
    evaluation: Evaluation, number: int | None, make: Callable[[Evaluation, int | None], LinearOperator]
) -> LinearOperator:
    """Return the sum of the matrices of an evaluation's parts, each zero beside the parameters its losses count for."""
    like, decay, span = evaluation.gradient, evaluation.decay, slice(None)
    if number is not None:
        sizes = [piece.numel() for piece in local_pieces(like, evaluation.params)]
        span = slice(sum(sizes[:number]), sum(sizes[: number + 1]))
        decay = decay[span] if isinstance(decay, Tensor) else decay
    parts = [(make(part, number), mask[span]) for part, mask in evaluation.parts]
    product = one_by_one(lambda v: torch.stack([mask * (A @ (mask * v)) for A, mask in parts]).sum(0))
    n = like[span].numel()
    psd = all(A._psd for A, _ in parts)

    def trust() -> Trust:
        found = [A.trust for A, _ in parts]
        return Trust(next((t.doubt for t in found if t.doubt), ""), max(t.error for t in found))

    operator = LinearOperator(product, (n, n), like[span], psd=psd, rows=product, trust=trust)
    return operator.shift(decay) if decays(decay) else operator


def _stacked(evaluation: Evaluation) -> LinearOperator:
    """Return the Jacobians of an evaluation's parts, one below the other."""
    parts = [(jacobian(part), mask) for part, mask in evaluation.parts]
    rows = [J.shape[0] for J, _ in parts]

    def pull(u: Tensor) -> Tensor:
        pieces = zip(parts, u.split(rows), strict=True)
        return torch.stack([mask * (J.T @ piece) for (J, mask), piece in pieces]).sum(0)

    push = lambda v: torch.cat([J @ (mask * v) for J, mask in parts])  # noqa: E731
    return LinearOperator(push, (sum(rows), evaluation.gradient.numel()), evaluation.gradient, transpose=pull)


@torch.inference_mode(False)
def jacobian(evaluation: Evaluation) -> LinearOperator:
    """Return the Jacobian `d outputs / d parameters`, `(m, n)`: `J @ v`, `J.T @ u`, `J.dense()`.

    The rows are the entries of the recorded outputs, each flattened, in the order in which the closure produced them.
    With several processes, they are this process's outputs. Without a mark, the outputs are the inputs of the losses
    that are recognised: they need not be the model's predictions, as with the whitened residuals of a Gaussian process.

    Args:
        evaluation: Made by `evaluate(closure, params)`, which says how products are formed.

    Raises:
        TypeError: `evaluation` is no `Evaluation`.
        RuntimeError: No output was recorded, or the evaluation was freed.
        NotImplementedError: The parameters are sharded.

    Example:
        >>> import torch
        >>> from newtonopt import evaluate, jacobian
        >>> theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> target = torch.zeros(2, dtype=torch.float64)
        >>> jacobian(evaluate(lambda: torch.nn.functional.mse_loss(theta**2, target), [theta])).dense()
        tensor([[2., 0.],
                [0., 4.]], dtype=torch.float64)

    See Also:
        - `neural_tangent_kernel()`: the Jacobian times its transpose, without the Jacobian.
        - `gauss_newton()`: the Jacobian around the Hessian of the loss.
        - `mark_outputs()`: says which tensor is the output.
    """
    _check(evaluation)
    if evaluation.parts:
        return _stacked(evaluation)
    check_outputs(evaluation)
    if is_sharded(evaluation.params):
        raise NotImplementedError(
            "jacobian needs each process's own gradients, but gradients of sharded parameters are averaged over the "
            "processes. Use gauss_newton, or a model that is not sharded."
        )
    push = Vouched(
        evaluation,
        "jacobian",
        lambda manner: _joined_push(evaluation, manner),
        lambda manner: examine_jacobian(
            evaluation, manner, lambda m: _joined_push(evaluation, m), _pull(evaluation, manner)
        ),
    )
    shape = (sum(evaluation.output_sizes.values()), evaluation.gradient.numel())
    pull = lambda u: _pull(evaluation, Manner(evaluation.form))(u)  # noqa: E731

    def whole() -> Tensor | None:
        try:
            return jacobian_rows(evaluation).dense()
        except RowsError:
            return None

    return LinearOperator(push, shape, evaluation.gradient, transpose=pull, whole=whole, trust=lambda: push.trust)


def _push(evaluation: Evaluation, manner: Manner) -> products.Push:
    """Return `v -> J v` by the outputs' numbers, in another manner than cached."""
    if manner.form == "streamed":
        return products.StreamedPush(evaluation, manner.forward)
    return products.differenced_push(evaluation, manner.length)


def _joined_push(evaluation: Evaluation, manner: Manner) -> Product:
    """Return `v -> J v`, `(m,)`."""
    if manner.form == "cached":
        cached = products.push_of([z.tensor for z in evaluation.graph[1]], evaluation.params)
        return lambda v: torch.cat([piece.reshape(-1).to(v.dtype) for piece in cached(v)])
    push = _push(evaluation, manner)

    def joined(v: Tensor) -> Tensor:
        pushed = push(v)
        return torch.cat([pushed[number].reshape(-1).to(v.dtype) for number in evaluation.output_sizes])

    return joined


def _pull(evaluation: Evaluation, manner: Manner) -> Product:
    """Return `u -> J' u`."""
    if manner.form != "cached":
        return products.pull_from(evaluation)
    outputs, params = [z.tensor for z in evaluation.graph[1]], evaluation.params

    def pull(u: Tensor) -> Tensor:
        evaluation.check_unchanged()
        return flatten(grad(outputs, params, unflatten(u, outputs), keep=True), params)

    return pull


def _check(evaluation: Evaluation) -> None:
    check_instance("evaluation", evaluation, Evaluation, "an Evaluation", "Write newtonopt.evaluate(closure, params).")
    evaluation.check_alive()


def _check_gauss_newton(evaluation: Evaluation) -> None:
    _check(evaluation)
    for part, _ in evaluation.parts:
        _check_gauss_newton(part)
    if evaluation.parts:
        return
    check_outputs(evaluation)
    if evaluation.recording.linear_marks:
        raise RuntimeError(
            "The loss is linear in a tensor that was given to newtonopt.mark_outputs (the loss itself, or a penalty), "
            "so the Gauss-Newton matrix of that part is zero. Mark the tensor in which the loss is convex instead, "
            "such as raw predictions or logits. For a critic, whose loss is linear in its output, use "
            'curvature="hessian".'
        )
    if evaluation.leaves_outputs_out():
        warn(
            "Part of the loss does not depend on the parameters through the recorded outputs, such as a penalty that "
            "is not a sum of squares or another term written by hand. The Gauss-Newton matrix leaves that part out. "
            "Mark the outputs of such terms with newtonopt.mark_outputs, write an L2 penalty as weight_decay=... or a "
            'sum of squares, or use curvature="hessian" (HessianFree and others).'
        )
