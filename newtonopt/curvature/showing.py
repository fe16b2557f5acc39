"""Results as they show themselves: `repr` in a terminal, a table in a notebook, numbers in sentences."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

# Entries of a tensor or a tuple that are shown one by one.
_FEW = 6
# Sizes between which a sentence writes a number without a power of ten, as the Curvature tab does.
_LEAST, _MOST = 1e-4, 1e6
# Size from which digits stand in groups of three, with a space between them at which no line breaks.
_GROUPED, _SPACE = 1e4, "\u00a0"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def written(value: float, digits: int = 4) -> str:
    """Return a number as sentences have it, in the form of the Curvature tab: 0.0123, 38 000, 1.2×10⁻⁷.

    Args:
        value: The number.
        digits: How many significant digits it keeps. Default 4.
    """
    rounded = float(f"{value:.{digits}g}")
    if not math.isfinite(rounded):
        return "NaN" if math.isnan(rounded) else "∞" if rounded > 0.0 else "-∞"
    if abs(rounded) >= _GROUPED and abs(rounded) < _MOST:
        return f"{rounded:,.0f}".replace(",", _SPACE)
    if rounded == 0.0 or _LEAST <= abs(rounded) < _MOST:
        return f"{rounded:.12f}".rstrip("0").rstrip(".")
    mantissa, _, exponent = f"{rounded:.{digits - 1}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    power = f"10{str(int(exponent)).translate(_RAISED)}"
    return f"{mantissa.removesuffix('1')}{power}" if mantissa in ("1", "-1") else f"{mantissa}\u00d7{power}"


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
