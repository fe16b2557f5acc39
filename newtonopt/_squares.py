"""Squares written by hand: which calls square a tensor, as in `((z - y) ** 2).mean()` or `(z - y).norm() ** 2`.

A square of residuals that enters the loss with a weight defines a Gauss-Newton matrix as `mse_loss` does. The tap asks
here at each call; `_convexity` finds out later which of the squares enter the loss in that way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

from newtonopt._convexity import Label, Output, labelled
from newtonopt._graph import notes
from newtonopt._subclasses import alike, is_wrapper, plain

_Functions = frozenset[Callable[..., Any]]
# The node that computed a root carries a note of it, which lives as long as the graph.
_ROOT = "newtonopt: root of a sum of squares"

# What torch calls the first operand, and the second.
_FIRST = ("input", "self", "a", "x")
_SECOND = ("exponent", "other", "mat2", "tensor", "b", "y")

_UNARY: _Functions = frozenset({torch.square, Tensor.square})
_POWERS: _Functions = frozenset({torch.pow, Tensor.pow, Tensor.__pow__, torch.float_power, Tensor.float_power})
_PRODUCTS: _Functions = frozenset(
    {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply}
)
_INNER_PRODUCTS: _Functions = frozenset({torch.dot, Tensor.dot, torch.inner, Tensor.inner})
# The first operand is conjugated.
_HERMITIAN_PRODUCTS: _Functions = frozenset({torch.vdot, Tensor.vdot, torch.linalg.vecdot})
_MATRIX_PRODUCTS: _Functions = frozenset(
    {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm}
)
_CONTRACTIONS: _Functions = frozenset({torch.einsum, torch.tensordot})
SQUARES = _UNARY | _POWERS | _PRODUCTS | _INNER_PRODUCTS | _HERMITIAN_PRODUCTS | _MATRIX_PRODUCTS | _CONTRACTIONS
"""Functions of which some calls square their first operand."""

_DISTANCES: _Functions = frozenset({torch.dist, Tensor.dist, F.pairwise_distance})
ROOTS: _Functions = frozenset(
    {
        torch.norm,
        Tensor.norm,
        torch.linalg.norm,
        torch.linalg.vector_norm,
        torch.linalg.matrix_norm,
        torch.abs,
        torch.absolute,
        Tensor.abs,
        Tensor.absolute,
        Tensor.__abs__,
        *_DISTANCES,
    }
)
"""Functions of which some calls compute the root of a sum of squares, to be squared again."""


def first_operand(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the tensor that a call of one of `SQUARES` would square."""
    if func is torch.einsum:
        operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
        return operands[0] if operands else None
    return args[0] if args else next((kwargs[name] for name in _FIRST if name in kwargs), None)


@dataclass(frozen=True)
class Root:
    """A tensor that is the root of a sum of squares.

    Attributes:
        number: The number of the tensor that was squared, among all that the closure's run met.
        squared: Returns that tensor.
        dims: The dimensions summed over; None: all of them; empty: none, for an absolute value.
        keep: Whether the result keeps these dimensions.
    """

    number: int
    squared: Callable[[], Tensor]
    dims: tuple[int, ...] | None
    keep: bool


def root(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], number: int) -> Any:
    """Call one of `ROOTS`, and note at the result what it is the root of."""
    result = func(*args, **kwargs)
    node: Any = result.grad_fn if isinstance(result, Tensor) else None
    if node is None or not _may_be_output(plain(result)):
        return result
    kind = node.name().partition("Backward")[0]
    squared = functools.partial(root_operand, func, args, kwargs)
    if kind == "Abs":
        notes(node)[_ROOT] = Root(number, squared, (), False)
    power = getattr(node, "_saved_ord" if kind == "LinalgVectorNorm" else "_saved_p", 2)
    if kind in ("LinalgVectorNorm", "Norm", "Dist") and power in (None, 2):
        dims = tuple(_signed(dim) for dim in getattr(node, "_saved_dim", None) or ()) or None
        notes(node)[_ROOT] = Root(number, squared, dims, bool(getattr(node, "_saved_keepdim", False)))
    return result


def square(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], number: int) -> Any:
    """Call one of `SQUARES`; where it squares its operand, on a view of the operand's own, and label the result."""
    operand = first_operand(func, args, kwargs)
    found = None
    if isinstance(operand, Tensor) and torch.is_grad_enabled() and _may_be_output(plain(operand)):
        found = _squaring(func, args, kwargs, operand)
    if found is None:
        return func(*args, **kwargs)
    call, diagonal = found
    known: Root | None = None if operand.grad_fn is None else notes(operand.grad_fn).get(_ROOT)
    if known is not None:
        result = _square_of_root(known, operand, call)
        if result is not None:
            return result
    view = own_view(operand)
    result = call(alike(torch.view_as_complex(view) if operand.is_complex() else view, operand))
    return labelled(result, Label((Output(view, number),), is_square=True, diagonal=diagonal))


def own_view(z: Tensor) -> Tensor:
    """Return a view of `z` with one consumer, of real numbers: two in a last dimension for a complex one."""
    z = plain(z)
    return torch.view_as_real(z.resolve_conj()) if z.is_complex() else z.view_as(z)


def root_operand(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the tensor whose squares a call of one of `ROOTS` sums up; a distance is the norm of a difference."""
    if func not in _DISTANCES:
        return kwargs["A"] if "A" in kwargs else first_operand(func, args, kwargs)
    names = ("x1", "x2", "p", "eps") if func is F.pairwise_distance else ("input", "other", "p")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    difference = given[names[0]] - given[names[1]]
    return difference + given.get("eps", 1e-6) if func is F.pairwise_distance else difference


def _square_of_root(known: Root, operand: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Return `operand` squared, differentiated as the sum of squares that it is: a norm has no derivative at zero."""
    squared = known.squared()
    view = own_view(squared)
    if not view.requires_grad:
        return None
    squares = view.to(operand.dtype).square()
    if squared.is_complex():
        squares = squares.sum(-1)
    if known.dims != ():
        dims = list(range(squares.dim())) if known.dims is None else list(known.dims)
        squares = squares.sum(dims, keepdim=known.keep)
    if squares.shape != operand.shape:
        return None
    squares.data.copy_(call(operand.detach()))  # the number that the closure computes, to the bit
    result: Tensor = labelled(squares, Label((Output(view, known.number),), is_square=True))
    return result


def _squaring(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], base: Tensor
) -> tuple[Callable[[Tensor], Any], bool] | None:
    """Return the call as a function of its first operand, and whether only the diagonal of the result holds squares.

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
    if func is torch.tensordot and more.get("dims", 2) != base.dim():
        return None
    if not _is_same(base, other):
        return None
    return (lambda v: func(v, v, **more)), func in _INNER_PRODUCTS and base.dim() > 1


def _second_operand(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[1] if len(args) > 1 else next((kwargs[name] for name in _SECOND if name in kwargs), None)


def _further(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a call is given besides its operands; only `tensordot` takes a third one by position."""
    more = {name: value for name, value in kwargs.items() if name not in (*_FIRST, *_SECOND)}
    return {"dims": args[2], **more} if len(args) > 2 else more


def _may_be_output(z: Tensor) -> bool:
    """Whether `z` has a graph, and is neither sparse nor a wrapper nor inside a transform of torch.func."""
    dense = z.requires_grad and z.layout == torch.strided and (z.is_floating_point() or z.is_complex())
    return dense and not is_wrapper(z) and not torch._C._functorch.is_functorch_wrapped_tensor(z)


def _signed(dim: int) -> int:
    return dim - 2**64 if dim >= 2**63 else dim


def _is_two(exponent: Any) -> bool:
    if isinstance(exponent, Tensor):
        return exponent.dim() == 0 and not exponent.requires_grad and float(exponent) == 2.0
    return isinstance(exponent, Real) and float(exponent) == 2.0


def _einsum(args: Sequence[Any]) -> tuple[Callable[[Tensor], Any], bool] | None:
    equation, *operands = args
    operands = list(operands[0]) if isinstance(operands[0], (list, tuple)) else operands
    if not isinstance(equation, str) or len(operands) != 2 or not _is_same(operands[0], operands[1]):
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    one, _, other = inputs.partition(",")
    # Without an arrow the result has no dimension left where both operands have the same letters.
    if one != other or len(set(one)) < len(one) or "." in one or not set(output) <= set(one):
        return None
    return (lambda v: torch.einsum(equation, v, v)), False


def _is_same(a: Tensor, b: Any) -> bool:
    """Whether `b` holds the elements of `a`: the same tensor, another view of it, or its difference computed again."""
    if a is b:
        return True
    if not isinstance(b, Tensor):
        return False
    a, b = plain(a), plain(b)
    if not b.requires_grad or a.dtype != b.dtype or _layout(a) != _layout(b):
        return False
    first, second = _behind_views(a.grad_fn), _behind_views(b.grad_fn)
    if first is second:
        return first is not None and a.data_ptr() == b.data_ptr()
    # Differences from constants, which are equal too. Any other operation may differ elsewhere.
    return _is_repeated(first, second) and torch.equal(a.detach(), b.detach())


def _is_conjugate(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and b.is_conj() != a.is_conj() and _is_same(a, b.conj())


def _layout(z: Tensor) -> tuple[object, ...]:
    """How the entries are read from memory."""
    strides = [stride for stride, size in zip(z.stride(), z.shape, strict=True) if size > 1]
    return z.shape, z.storage_offset(), strides, z.is_conj(), z.is_neg()


def _behind_views(node: Node | None) -> Node | None:
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return node


def _is_repeated(first: Node | None, second: Node | None) -> bool:
    """Whether two nodes are the same sum, difference, absolute value or view of the same."""
    if first is second or first is None or second is None:
        return first is second
    if first.name() != second.name() or first.name() not in _VIEWS | _DIFFERENCES:
        return False
    pairs = zip(first.next_functions, second.next_functions, strict=True)
    return _settings(first) == _settings(second) and all(i == j and _is_repeated(m, n) for (m, i), (n, j) in pairs)


def _settings(node: Node) -> dict[str, Any]:
    saved = {name: getattr(node, name) for name in dir(node) if name.startswith("_saved_")}
    return {name: value for name, value in saved.items() if not isinstance(value, Tensor)}


_DIFFERENCES = frozenset({"SubBackward0", "AddBackward0", "RsubBackward1", "AbsBackward0"})
_VIEWS = frozenset(
    {
        *(
            "AliasBackward0",
            "ConjBackward0",
            "ExpandBackward0",
            "PermuteBackward0",
            "SelectBackward0",
            "SliceBackward0",
        ),
        *("SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2", "TBackward0", "TransposeBackward0"),
        *(
            "UnsafeViewBackward0",
            "UnsqueezeBackward0",
            "ViewAsComplexBackward0",
            "ViewAsRealBackward0",
            "ViewBackward0",
        ),
    }
)
