"""Squares written by hand: which calls square a tensor, as in `((z - y) ** 2).mean()` or `(z - y).norm() ** 2`.

A square of residuals that enters the loss with a weight that is not negative defines a Gauss-Newton matrix, as
`mse_loss` does. The tap hands each call of `SQUARES` to `square` and each call of `ROOTS` to `root`. They call the
function and, if it does square, return a note for the graph. `losses.decompose` reads the notes, and finds which of the
squares enter the loss in that way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.weak import TensorWeakRef

from newtonopt.autodiff.graph import kind_of
from newtonopt.closure.losses import ConvexNote, Output, RootNote, own_view
from newtonopt.vectors.subclasses import alike, is_wrapper, plain

_Functions = frozenset[Callable[..., Any]]

# The functions, by how they square.

_UNARY: _Functions = frozenset({torch.square, Tensor.square})
_POWERS: _Functions = frozenset({torch.pow, Tensor.pow, Tensor.__pow__, torch.float_power, Tensor.float_power})
_PRODUCTS: _Functions = frozenset(
    {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply}
)
_INNER_PRODUCTS: _Functions = frozenset({torch.dot, Tensor.dot, torch.inner, Tensor.inner})
# Inner products that conjugate their first operand.
_HERMITIAN_PRODUCTS: _Functions = frozenset({torch.vdot, Tensor.vdot, torch.linalg.vecdot})
_MATRIX_PRODUCTS: _Functions = frozenset(
    {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm}
)
_CONTRACTIONS: _Functions = frozenset({torch.einsum, torch.tensordot})
SQUARES = _UNARY | _POWERS | _PRODUCTS | _INNER_PRODUCTS | _HERMITIAN_PRODUCTS | _MATRIX_PRODUCTS | _CONTRACTIONS
"""Functions of which some calls square their first operand."""

_NORMS: _Functions = frozenset(
    {torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm, torch.linalg.matrix_norm}
)
_MODULI: _Functions = frozenset({torch.abs, torch.absolute, Tensor.abs, Tensor.absolute, Tensor.__abs__})
_DISTANCES: _Functions = frozenset({torch.dist, Tensor.dist, F.pairwise_distance})
ROOTS = _NORMS | _MODULI | _DISTANCES
"""Functions of which some calls compute the root of a sum of squares, which the closure may square again."""

# The names that torch gives to the first and to the second operand.
_FIRST = ("input", "self", "a", "x")
_SECOND = ("exponent", "other", "mat2", "tensor", "b", "y")


# The functions that the tap calls.


def square(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], number: int
) -> tuple[Any, ConvexNote | None]:
    """Call one of `SQUARES`; if it squares its first operand, call it on a view that nothing else uses.

    Returns:
        The result, and a note for its node, with the operand as the output of this number; None if the call is no
        square.
    """
    operand = first_operand(func, args, kwargs)
    if not _may_be_output(operand):
        return func(*args, **kwargs), None
    found = _squaring(func, args, kwargs, operand)
    if found is None:
        return func(*args, **kwargs), None
    call, diagonal = found
    view = own_view(operand)
    result = call(_as_given(view, operand))
    return result, ConvexNote((Output(view, number),), is_square=True, diagonal=diagonal)


def root(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], number: int
) -> tuple[Any, RootNote | None]:
    """Call one of `ROOTS`; if it computes the root of a sum of squares, call it on a view that nothing else uses.

    Returns:
        The result, and a note for its node, with the operand as the output of this number; None if the call is no such
        root.
    """
    if not _may_be_output(first_operand(func, args, kwargs)) or not _may_be_output(
        operand := root_operand(func, args, kwargs)
    ):
        return func(*args, **kwargs), None
    view = own_view(operand)
    given = _as_given(view, operand)
    if func in _DISTANCES:
        result, distance = _norm_as_distance(func, args, kwargs, given), func(*args, **kwargs)
        if result is None or not torch.equal(result, distance):
            return distance, None
    elif args:
        result = func(given, *args[1:], **kwargs)
    else:
        result = func(**{name: given if value is operand else value for name, value in kwargs.items()})
    # The node knows which norm it is, whatever the arguments were called.
    node: Any = plain(result).grad_fn
    kind = kind_of(node)
    power = getattr(node, "_saved_ord", getattr(node, "_saved_p", 2))
    dims: tuple[int, ...] | None = ()
    if kind in ("LinalgVectorNorm", "Norm") and power in (None, 2):
        dims = tuple(_signed(dim) for dim in getattr(node, "_saved_dim", None) or ()) or None
    elif kind != "Abs":
        return result, None
    keeps = kind != "Abs" and bool(getattr(node, "_saved_keepdim", False))
    return result, RootNote(Output(view, number), dims, keeps, TensorWeakRef(result), result._version)


def first_operand(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the tensor that a call of one of `SQUARES` would square."""
    if func is torch.einsum:
        operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
        return operands[0] if operands else None
    return args[0] if args else next((kwargs[name] for name in _FIRST if name in kwargs), None)


def root_operand(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the tensor whose squares a call of one of `ROOTS` sums up; for a distance, the difference."""
    if func not in _DISTANCES:
        return kwargs["A"] if "A" in kwargs else first_operand(func, args, kwargs)
    given = _given_to_distance(func, args, kwargs)
    if func is F.pairwise_distance:
        return given["x1"] - given["x2"] + given.get("eps", 1e-6)
    return given["input"] - given["other"]


# Whether a call squares, and its result as a function of the operand.


def _squaring(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], base: Tensor
) -> tuple[Callable[[Tensor], Any], bool] | None:
    """Return the call as a function of its first operand, and whether only the diagonal of the result holds squares;
    None if the call does not square its first operand.
    """
    if func is torch.einsum:
        return _einsum(args) if not base.is_complex() else None
    if func in _UNARY:
        return (func, False) if not base.is_complex() else None
    other, more = _second_operand(args, kwargs), _further(args, kwargs)
    if func in _POWERS:
        return ((lambda v: func(v, other, **more)), False) if _is_two(other) and not base.is_complex() else None
    if not isinstance(other, Tensor):
        return None
    if base.is_complex() and func not in _HERMITIAN_PRODUCTS:
        squares_modulus = func in _PRODUCTS and _is_conjugate(base, other)
        return ((lambda v: func(v, v.conj(), **more)), False) if squares_modulus else None
    if func in _MATRIX_PRODUCTS and base.dim() > 1:
        return ((lambda v: func(v, v.mT, **more)), True) if other.dim() > 1 and _is_same(base, other.mT) else None
    if func in _INNER_PRODUCTS and base.dim() > 2:
        return None
    if func is torch.tensordot and more.get("dims", 2) != base.dim():
        return None
    if not _is_same(base, other):
        return None
    return (lambda v: func(v, v, **more)), func in _INNER_PRODUCTS and base.dim() > 1


def _second_operand(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[1] if len(args) > 1 else next((kwargs[name] for name in _SECOND if name in kwargs), None)


def _further(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call besides its operands; only `tensordot` takes one of these by position."""
    more = {name: value for name, value in kwargs.items() if name not in (*_FIRST, *_SECOND)}
    return {"dims": args[2], **more} if len(args) > 2 else more


def _is_two(exponent: Any) -> bool:
    if isinstance(exponent, Tensor):
        plain_number = exponent.dim() == 0 and not torch._C._functorch.is_functorch_wrapped_tensor(exponent)
        return plain_number and not exponent.requires_grad and float(exponent) == 2.0
    return isinstance(exponent, Real) and float(exponent) == 2.0


def _einsum(args: Sequence[Any]) -> tuple[Callable[[Tensor], Any], bool] | None:
    equation, *operands = args
    operands = list(operands[0]) if isinstance(operands[0], (list, tuple)) else operands
    if not isinstance(equation, str) or len(operands) != 2 or not _is_same(operands[0], operands[1]):
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    one, _, other = inputs.partition(",")
    letters = one.replace(".", "")
    # Without an arrow the result has no dimension left where both operands have the same letters.
    if one != other or len(set(letters)) < len(letters) or not set(output) <= set(one):
        return None
    return (lambda v: torch.einsum(equation, v, v)), False


def _norm_as_distance(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], difference: Tensor
) -> Tensor | None:
    """Return a distance computed as the norm of a difference; None if the norm is not the Euclidean one."""
    given = _given_to_distance(func, args, kwargs)
    if given.get("p", 2) != 2:
        return None
    of_rows = func is F.pairwise_distance
    norm: Tensor = torch.linalg.vector_norm(
        difference, dim=-1 if of_rows else None, keepdim=bool(given.get("keepdim", False))
    )
    return norm


def _given_to_distance(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = ("x1", "x2", "p", "eps", "keepdim") if func is F.pairwise_distance else ("input", "other", "p")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _may_be_output(z: Any) -> bool:
    """Whether `z` is a dense tensor of numbers with a graph, no wrapper, and not inside a transform of torch.func."""
    if not isinstance(z, Tensor) or not torch.is_grad_enabled():
        return False
    z = plain(z)
    dense = z.requires_grad and z.layout == torch.strided and not z.is_nested
    numbers = z.is_floating_point() or z.is_complex()
    return dense and numbers and not is_wrapper(z) and not torch._C._functorch.is_functorch_wrapped_tensor(z)


def _as_given(view: Tensor, operand: Tensor) -> Tensor:
    """Return an own view of `operand` as a tensor of the operand's kind."""
    return alike(torch.view_as_complex(view) if operand.is_complex() else view, operand)


def _signed(dim: int) -> int:
    return dim - 2**64 if dim >= 2**63 else dim


# Whether two operands are the same tensor.


def _is_same(a: Tensor, b: Any) -> bool:
    """Whether `b` has the elements of `a`: the same tensor, another view of it, or the same difference again."""
    if a is b:
        return True
    if not isinstance(b, Tensor):
        return False
    a, b = plain(a), plain(b)
    if not b.requires_grad or a.dtype != b.dtype or _layout(a) != _layout(b):
        return False
    first, second = _behind_views(a.grad_fn, a.output_nr), _behind_views(b.grad_fn, b.output_nr)
    if first == second:
        return first[0] is not None and a.data_ptr() == b.data_ptr()
    # Differences from constants that are equal here are equal everywhere; results of other operations may not be.
    return _is_repeated(first, second) and torch.equal(a.detach(), b.detach())


def _is_conjugate(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and b.is_conj() != a.is_conj() and _is_same(a, b.conj())


def _layout(z: Tensor) -> tuple[object, ...]:
    """Return how the entries are read from memory."""
    strides = [stride for stride, size in zip(z.stride(), z.shape, strict=True) if size > 1]
    return z.shape, z.storage_offset(), strides, z.is_conj(), z.is_neg()


def _behind_views(node: Node | None, number: int) -> tuple[Node | None, int]:
    """Return the node that a view goes back to, and the number of its result."""
    while node is not None and node.name() in _VIEWS:
        node, number = node.next_functions[0]
    return node, number


def _is_repeated(first: tuple[Node | None, int], second: tuple[Node | None, int]) -> bool:
    """Whether two results are the same sum, difference, norm, absolute value or view of the same operands."""
    waiting = [(first, second)]
    while waiting:
        (m, i), (n, j) = waiting.pop()
        if m is n and i == j:
            continue
        if m is None or n is None or i != j or m.name() != n.name() or m.name() not in _VIEWS | _REPEATABLE:
            return False
        if _settings(m) != _settings(n):
            return False
        waiting.extend(zip(m.next_functions, n.next_functions, strict=True))
    return True


def _settings(node: Node) -> dict[str, Any]:
    """Return the settings that the node of an operation has saved, without its tensors."""
    tensors = ("_saved_self", "_saved_other", "_saved_result")
    names = (name for name in dir(node) if name.startswith("_saved_") and name not in tensors)
    return {name: getattr(node, name) for name in names}


# Operations that give the same result when they are computed again from the same operands, and views.
_REPEATABLE = frozenset({"SubBackward0", "AddBackward0", "RsubBackward1", "AbsBackward0", "LinalgVectorNormBackward0"})
_VIEWS = frozenset(
    {
        *("AliasBackward0", "ConjBackward0", "ExpandBackward0", "PermuteBackward0", "SelectBackward0"),
        *("SliceBackward0", "SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2", "TBackward0"),
        *("TransposeBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewAsComplexBackward0"),
        *("ViewAsRealBackward0", "ViewBackward0"),
    }
)
