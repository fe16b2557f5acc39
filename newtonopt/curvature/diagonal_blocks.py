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
    """Return the diagonal block of each group of parameters, as an operator: curvature layer by layer.

    A product with a block costs a product with the whole matrix. A block's eigenvalues lie between the extreme ones
    of the whole matrix (Cauchy).

    Args:
        operator: Symmetric operator `(n, n)` over these parameters.
        named_parameters: `model.named_parameters()`, in the order that was given to `evaluate`; parameters that require
            no gradient are skipped.
        patterns: Patterns of names, matched as file names are: `"encoder.*"`, `"*.bias"`. Each makes a group; a
            parameter may be in several groups or in none. None (default): the model's parts, which are the modules at
            the first level that has several.

    Returns:
        The blocks by pattern, or by the name of the part, in order. A block's vectors run over its parameters in the
        order of the whole matrix.

    Raises:
        TypeError: `operator` is no `LinearOperator`, or `named_parameters` holds something other than pairs.
        ValueError: The parameters are not the operator's, `patterns` is no list of patterns, or a pattern fits no name.
        NotImplementedError: The parameters are sharded.

    Example:
        >>> import torch
        >>> from newtonopt import evaluate, hessian
        >>> from newtonopt.curvature import blocks
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
        >>> evaluation = evaluate(lambda: model(torch.ones(4, 3)).square().mean(), model.parameters())
        >>> {name: block.shape for name, block in blocks(hessian(evaluation), model.named_parameters()).items()}
        {'0': (8, 8), '2': (3, 3)}

    See Also:
        - `Layers`: the largest eigenvalue of each block in a training run.
        - `LinearOperator.block()`: one block, by its entries.
        - `extreme_eigenvalues()`: takes a block as it takes the whole matrix.
    """
    check_operator(operator)
    if not (patterns is None or are_patterns(patterns)):
        raise ValueError(
            f"patterns must be a list of patterns of names, or None, got {shown(patterns)}. Write ['encoder.*'], for "
            "example."
        )
    named = _trained(named_parameters)
    if is_sharded([p for _, p in named]):
        raise NotImplementedError(
            "Blocks of sharded parameters are spread over the processes. Measure the whole matrix instead."
        )
    spans: dict[str, tuple[int, int]] = {}
    size = 0
    for name, p in named:
        spans[name] = (size, size + p.numel())
        size += p.numel()
    if operator.shape != (size, size):
        raise ValueError(
            f"named_parameters must be the parameters passed to evaluate, with {operator.shape[0]} entries in total, "
            f"got {size} entries. Write model.named_parameters() if all were passed."
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
            raise ValueError(f"patterns must each match one of {', '.join(spans)}, got {pattern!r}.")
    return {key: operator.block(found) for key, found in groups.items()}


def are_patterns(patterns: object) -> bool:
    """Return whether an argument is a list of patterns of names, one at least."""
    return isinstance(patterns, (list, tuple)) and len(patterns) > 0 and all(isinstance(x, str) for x in patterns)


def is_named(pair: object) -> bool:
    """Return whether an entry is a pair of a name and a tensor."""
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)


def _depth(names: Sequence[str]) -> int:
    """Return how many pieces of a dotted name make a part: one, and more while a single module contains all others."""
    pieces, depth = [name.split(".") for name in names], 1
    while all(len(name) > depth + 1 for name in pieces) and len({tuple(name[:depth]) for name in pieces}) == 1:
        depth += 1
    return depth


def _trained(named_parameters: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Return the parameters that require a gradient, each once, with their first names."""
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
