"""Diagonal blocks of a curvature matrix, one for each group of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from newtonopt.checks import listed, shown
from newtonopt.operators.linear_operator import LinearOperator, check_operator
from newtonopt.vectors.sharded import is_sharded


def blocks(
    operator: LinearOperator,
    named_parameters: Iterable[tuple[str, Tensor]],
    patterns: Sequence[str] | None = None,
) -> dict[str, LinearOperator]:
    """The diagonal block of each group of parameters, as an operator: curvature layer by layer.

    A product with a block costs one with the whole. A block's eigenvalues lie between the extreme ones of the whole
    (Cauchy).

    Args:
        operator: Symmetric, `(n, n)`, over those parameters.
        named_parameters: `model.named_parameters()`, in the order that was given to `evaluate`; what requires no
            gradient is passed over.
        patterns: Of names, each a group, as file names are matched: `"encoder.*"`, `"*.bias"`. A parameter may be in
            several groups or in none. None (default): the model's parts, the modules at the first level where there are
            several.

    Returns:
        The blocks by pattern, or by the name of the part, in order. A block's vectors run over its parameters in the
        whole's order.

    Raises:
        TypeError: `operator` is no `LinearOperator`, or `named_parameters` no pairs.
        ValueError: The parameters are not the operator's, `patterns` is no list of them, or a pattern fits no name.
        NotImplementedError: The parameters are sharded.
    """
    check_operator(operator)
    if not (patterns is None or are_patterns(patterns)):
        raise ValueError(
            f"patterns must be a list of patterns of names, or None, got {shown(patterns)}. Write ['encoder.*'], for "
            "example."
        )
    named = _trained(named_parameters)
    if is_sharded([p for _, p in named]):
        raise NotImplementedError("blocks of sharded parameters are spread over the processes: measure the whole.")
    spans: dict[str, tuple[int, int]] = {}
    size = 0
    for name, p in named:
        spans[name] = (size, size + p.numel())
        size += p.numel()
    if operator.shape != (size, size):
        raise ValueError(
            f"named_parameters must be those given to evaluate, of {operator.shape[0]} entries together, got {size} "
            "entries. Write model.named_parameters(), if all were given."
        )
    groups: dict[str, list[tuple[int, int]]] = {pattern: [] for pattern in patterns or ()}
    depth = _depth(list(spans))
    for name, span in spans.items():
        part = ".".join(name.split(".")[:depth])
        fitting = [part] if patterns is None else [p for p in groups if fnmatchcase(name, p)]
        for key in fitting:
            groups.setdefault(key, []).append(span)
    for pattern, found in groups.items():
        if not found:
            raise ValueError(f"patterns must each fit a name among {', '.join(spans)}, got {pattern!r}.")
    return {key: operator.block(found) for key, found in groups.items()}


def are_patterns(patterns: object) -> bool:
    """Whether it is a list of patterns of names, one at least."""
    return isinstance(patterns, (list, tuple)) and len(patterns) > 0 and all(isinstance(x, str) for x in patterns)


def is_named(pair: object) -> bool:
    """Whether it is a name with a tensor."""
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)


def _depth(names: Sequence[str]) -> int:
    """How many of a name's pieces tell a part: one, and more while there is one module that holds all others."""
    pieces, depth = [name.split(".") for name in names], 1
    while all(len(name) > depth + 1 for name in pieces) and len({tuple(name[:depth]) for name in pieces}) == 1:
        depth += 1
    return depth


def _trained(named_parameters: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Those that require a gradient, each once."""
    first: dict[int, tuple[str, Tensor]] = {}
    for pair in listed("named_parameters", named_parameters, "pairs", "model.named_parameters()"):
        if not is_named(pair):
            raise TypeError(
                f"named_parameters must hold pairs of a name and a tensor, got {shown(pair)} in it. Write "
                "model.named_parameters()."
            )
        if pair[1].requires_grad:
            first.setdefault(id(pair[1]), pair)
    return list(first.values())
