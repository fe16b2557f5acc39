"""Results as they show themselves: `repr` in a terminal, a table in a notebook."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

# Entries of a tensor or a tuple that are shown one by one.
_FEW = 6


def as_text(result: Any, more: Mapping[str, Any] | None = None) -> str:
    """Return a result on one line: its class, and its fields with four digits each.

    Args:
        result: A dataclass; fields that it hides from its `repr` are left out.
        more: Further values by name; None (default): none.
    """
    return f"{type(result).__name__}({', '.join(f'{name}={text}' for name, text in _rows(result, more))})"


def as_table(result: Any, more: Mapping[str, Any] | None = None, sentences: Sequence[str] = ()) -> str:
    """Return the same as a table in HTML, a row for each value, with sentences below."""
    rows = [(name.replace("_", " "), text, "") for name, text in _rows(result, more)]
    return html_table(type(result).__name__, rows, sentences)


def html_table(title: str, rows: Iterable[tuple[str, str, str]], sentences: Sequence[str] = ()) -> str:
    """Return a table in HTML: names, values and units, and sentences below. All text is escaped.

    Args:
        title: Caption of the table.
        rows: Names, values and units.
        sentences: Sentences, each a paragraph. Default: none.
    """
    left, right = 'style="text-align: left"', 'style="text-align: right"'
    body = "".join(
        f"<tr><td {left}>{html.escape(name)}</td><td {right}>{html.escape(value)}</td>"
        f"<td {left}>{html.escape(unit)}</td></tr>"
        for name, value, unit in rows
    )
    words = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)
    return f"<table><caption>{html.escape(title)}</caption>{body}</table>{words}"


def text_table(title: str, rows: Sequence[tuple[str, str, str]], sentences: Sequence[str] = ()) -> str:
    """Return the same table for a terminal, in aligned columns."""
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
    lines = [f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {unit}".rstrip() for name, value, unit in rows]
    return "\n".join([title, *lines, *sentences])


def _rows(result: Any, more: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    own = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.repr}
    return [(name, shown(value)) for name, value in {**(more or {}), **own}.items()]


def shown(value: Any) -> str:
    """Return a value with four digits; large tensors by their shape."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        return f"({', '.join([*map(shown, value[:_FEW]), *(['...'] if len(value) > _FEW else [])])})"
    if isinstance(value, Tensor):
        few = value.numel() <= _FEW
        return shown(tuple(value.reshape(-1).tolist())) if few else f"a tensor of shape {tuple(value.shape)}"
    return str(value) if isinstance(value, str) else repr(value)
