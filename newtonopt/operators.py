"""Curvature matrices known by their products with vectors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from newtonopt._flat import flatten, unflatten
from newtonopt._tap import reaches
from newtonopt.objective import Evaluation

Product = Callable[[Tensor], Tensor]


class LinearOperator:
    """A matrix known by its products, over flat vectors in the order of the parameters.

    Args:
        product: Computes `A v` for `v` of shape `(columns,)`.
        shape: `(rows, columns)`.
        like: A tensor of the operator's dtype and device.
        psd: Whether the matrix is positive semi-definite by construction.
        transpose: Computes `A' u`; None for a symmetric matrix.
    """

    def __init__(
        self,
        product: Product,
        shape: tuple[int, int],
        like: Tensor,
        *,
        psd: bool = False,
        transpose: Product | None = None,
    ) -> None:
        self._product = product
        self._transpose = transpose
        self.shape = shape
        self.dtype = like.dtype
        self.device = like.device
        self.psd = psd
        self._count = [0]

    @property
    def products(self) -> int:
        """How many products were formed, by this operator and by those derived from it."""
        return self._count[0]

    @property
    def T(self) -> LinearOperator:
        """The transpose; a symmetric operator is its own."""
        if self._transpose is None:
            return self
        rows, columns = self.shape
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return self._derived(LinearOperator(self._transpose, (columns, rows), like, transpose=self._product))

    def __matmul__(self, v: Tensor) -> Tensor:
        """`A v` for `v` of shape `(columns,)`, or column by column for `(columns, k)`.

        Raises:
            ValueError: `v` has another length.
        """
        if v.shape[0] != self.shape[1] or v.dim() > 2:
            raise ValueError(
                f"v has shape {tuple(v.shape)}: a vector for this {self.shape[0]} x {self.shape[1]} operator has shape "
                f"({self.shape[1]},)."
            )
        if v.dim() == 2:
            result = torch.empty(self.shape[0], v.shape[1], dtype=self.dtype, device=self.device)
            for i, column in enumerate(v.unbind(1)):
                result[:, i] = self @ column
            return result
        self._count[0] += 1
        return self._product(v.to(self.dtype))

    def shift(self, c: float | Tensor) -> LinearOperator:
        """`A + c I`, or `A + diag(c)` for `c` of shape `(n,)`, sharing this operator's count of products."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        psd = self.psd and bool(torch.as_tensor(c).min() >= 0)
        return self._derived(LinearOperator(lambda v: self._product(v) + c * v, self.shape, like, psd=psd))

    def dense(self) -> Tensor:
        """The whole matrix, for one product a column (a row if there are fewer); symmetric matrices are symmetrised."""
        rows, columns = self.shape
        if self._transpose is not None and rows < columns:
            return self.T.dense().T
        matrix = self @ torch.eye(columns, dtype=self.dtype, device=self.device)
        return matrix if self._transpose is not None else (matrix + matrix.T) / 2

    def _derived(self, other: LinearOperator) -> LinearOperator:
        other._count = self._count
        return other

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"LinearOperator({rows} x {columns}, {self.dtype}, {self.device}, products={self.products})"


def hessian(evaluation: Evaluation) -> LinearOperator:
    """The Hessian of the objective, `(n, n)`: products by a second differentiation of the cached graph.

    Args:
        evaluation: From `evaluate(closure, params)`.

    Returns:
        The operator. A product costs one to two gradients. It holds the graph too: drop it to release the memory.

    Raises:
        TypeError: `evaluation` is no `Evaluation`.
        RuntimeError: The evaluation was freed, or an operation has no second derivative.
    """
    _check(evaluation)
    loss, _ = evaluation.graph
    params = evaluation.params
    gradients = _grad(loss, params, create_graph=True)
    # Entries that are constant in the parameters have no graph, and no second derivative.
    live = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]

    def product(v: Tensor) -> Tensor:
        if not live:
            return torch.zeros_like(v)
        pieces = unflatten(v, params)
        second = _grad([g for _, g in live], params, [pieces[i] for i, _ in live])
        return flatten(second, params)

    return _symmetric(product, evaluation, psd=False)


def gauss_newton(evaluation: Evaluation) -> LinearOperator:
    """The Gauss-Newton matrix `J' H_L J`, `(n, n)`: `J` the outputs' Jacobian, `H_L` the loss's Hessian in the outputs.

    It is positive semi-definite for the convex losses that are recognised, and `psd` says so. Weight decay is added;
    any other term of the loss that does not go through the outputs is left out, with a warning.

    Args:
        evaluation: From `evaluate(closure, params)`.

    Returns:
        The operator. A product costs about one gradient. It holds the graph too: drop it to release the memory.

    Raises:
        TypeError: `evaluation` is no `Evaluation`.
        RuntimeError: No output was recorded, the evaluation was freed, or an operation has no second derivative.
    """
    loss, outputs = _graph_with_outputs(evaluation)
    if evaluation.part_outside_outputs():
        warnings.warn(
            "Part of the loss does not go through the recorded outputs (an explicit penalty on the parameters, or a "
            "term written by hand): the Gauss-Newton matrix leaves that part out. Write an L2 penalty as "
            "weight_decay=..., and mark the outputs of other terms with newtonopt.mark_outputs.",
            stacklevel=2,
        )
    forward, backward = _jacobian_products(outputs, evaluation.params)
    loss_gradients = _grad(loss, outputs, create_graph=True)
    live = [(i, g) for i, g in enumerate(loss_gradients) if g is not None and g.requires_grad]

    def product(v: Tensor) -> Tensor:
        if not live:  # the loss is linear in the outputs
            return torch.zeros_like(v)
        pushed = forward(v)
        curved = _grad([g for _, g in live], outputs, [pushed[i] for i, _ in live])
        return backward([torch.zeros_like(z) if c is None else c for c, z in zip(curved, outputs, strict=True)])

    # Of marked outputs nobody but the user knows that the loss is convex in them.
    return _symmetric(product, evaluation, psd=not evaluation.marked)


def jacobian(evaluation: Evaluation) -> LinearOperator:
    """The Jacobian `d outputs / d parameters`, `(m, n)`: `J @ v`, `J.T @ u`, `J.dense()`.

    The rows are the entries of the recorded outputs, each flattened, in the order in which the closure produced them.

    Args:
        evaluation: From `evaluate(closure, params)`.

    Raises:
        RuntimeError: No output was recorded.
    """
    _, outputs = _graph_with_outputs(evaluation)
    forward, backward = _jacobian_products(outputs, evaluation.params)
    rows = sum(z.numel() for z in outputs)

    def product(v: Tensor) -> Tensor:
        return torch.cat([piece.reshape(-1).to(v.dtype) for piece in forward(v)])

    def transpose(u: Tensor) -> Tensor:
        return backward([piece.to(z.dtype) for piece, z in zip(unflatten(u, outputs), outputs, strict=True)])

    shape = (rows, evaluation.gradient.numel())
    return LinearOperator(product, shape, evaluation.gradient, transpose=transpose)


def _jacobian_products(
    outputs: Sequence[Tensor], params: Sequence[Tensor]
) -> tuple[Callable[[Tensor], list[Tensor]], Callable[[Sequence[Tensor]], Tensor]]:
    """`v -> J v` and `u -> J' u`. `J' u` is linear in a dummy `u`: its derivative by `u` gives `J v`."""
    dummies = [torch.zeros_like(z, requires_grad=True) for z in outputs]
    pulled = _grad(outputs, params, dummies, create_graph=True)
    live = [(i, g) for i, g in enumerate(pulled) if g is not None and g.requires_grad]

    def forward(v: Tensor) -> list[Tensor]:
        pieces = unflatten(v, params)
        pushed = _grad([g for _, g in live], dummies, [pieces[i] for i, _ in live]) if live else [None] * len(dummies)
        return [torch.zeros_like(z) if t is None else t for t, z in zip(pushed, outputs, strict=True)]

    def backward(u: Sequence[Tensor]) -> Tensor:
        return flatten(_grad(outputs, params, u), params)

    return forward, backward


def _check(evaluation: object) -> None:
    if not isinstance(evaluation, Evaluation):
        raise TypeError(
            f"evaluation is a {type(evaluation).__name__}: give an Evaluation, as newtonopt.evaluate(closure, params) "
            "returns it."
        )


def _graph_with_outputs(evaluation: Evaluation) -> tuple[Tensor, tuple[Tensor, ...]]:
    _check(evaluation)
    loss, outputs = evaluation.graph
    if not outputs:
        raise RuntimeError(evaluation.unrecognised_advice)
    return loss, outputs


def _symmetric(product: Product, evaluation: Evaluation, *, psd: bool) -> LinearOperator:
    n = evaluation.gradient.numel()
    operator = LinearOperator(product, (n, n), evaluation.gradient, psd=psd)
    decayed = isinstance(evaluation.decay, Tensor) or evaluation.decay != 0.0
    return operator.shift(evaluation.decay) if decayed else operator


def _grad(
    of: Tensor | Sequence[Tensor],
    by: Sequence[Tensor],
    along: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    try:
        with torch.enable_grad():
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
                of, by, along, retain_graph=True, create_graph=create_graph, allow_unused=True
            )
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "The parameters, or something else that the loss was computed from, changed after this evaluation was "
            "made, as an optimizer's step changes them: its products are no longer defined. Call evaluate again."
        ) from error
    # Autograd leaves such a node out of a second differentiation, so its curvature would be zero without a word.
    if create_graph and reaches([g.grad_fn for g in gradients if g is not None], _is_once_differentiable):
        raise RuntimeError(
            "An operation of the model is marked once_differentiable: it has no second derivative, so there are no "
            "curvature products through it. Write its backward with differentiable operations."
        )
    return gradients


def _is_once_differentiable(node: Node) -> bool:
    return node.name() == "torch::autograd::Error"
