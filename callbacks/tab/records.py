"""Records of measurements: read from event files, which are untrusted input, and arranged for the page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

Item = TypeVar("Item")

VERSION = 1
# How a run is going. A record without a state, or with another one, says nothing of it.
_STATES = ("diverged", "failed", "lost", "spiked", "stuck", "risen", "jumped", "unstable", "below", "edge", "beyond")
# A record has some kilobytes. Larger ones are foreign, or would make the page slow.
_MAX_BYTES = 1 << 20
_MAX_NAMES, _MAX_NAME, _MAX_WORDS, _MAX_WORD, _MAX_BARS = 2000, 300, 40, 2000, 500
# Most columns of a heat map; a screen shows no more.
_MAX_COLUMNS = 400


class RecordError(ValueError):
    """Raised where a record cannot be read; the message says why."""


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        values: The values by name, without the prefix of their tags.
        words: Sentences that say what the values mean.
        certified: Whether the intervals of the extreme eigenvalues are certified; None if that is not known.
        density: Ends of the bars of a histogram of all eigenvalues, and their heights log10(1 + count); None if the
            density was not measured.
        layers: The largest eigenvalue of each layer.
        state: "diverged" or "failed"; "lost" where the loss is back where it started, "spiked" where it was far above
            that, "stuck" where it has not fallen, "risen" where it is above that, "jumped" where one batch was far
            above it; "unstable" where it was beyond the edge of stability and has not recovered; "below", "edge" or
            "beyond" that edge; None if that is not known.
        remark: A sentence that says which loss was measured; empty if that is not known.
    """

    values: dict[str, float]
    words: list[str]
    certified: bool | None
    density: tuple[list[float], list[float]] | None
    layers: dict[str, float]
    state: str | None = None
    remark: str = ""


def read_record(raw: object) -> Record:
    """Return the record in a tensor's only entry.

    Raises:
        RecordError: It is not a record of this version, or too large.
    """
    if isinstance(raw, str):
        raw = raw.encode()
    if not isinstance(raw, bytes):
        raise RecordError("it is not text")
    if len(raw) > _MAX_BYTES:
        raise RecordError(f"it has more than {_MAX_BYTES} bytes")
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        raise RecordError("it is not JSON") from None
    if not isinstance(found, dict):
        raise RecordError("it is not a JSON object")
    if found.get("version") != VERSION:
        raise RecordError("another version of newtonopt wrote it")
    certified, state, remark = (found.get(name) for name in ("certified", "state", "remark"))
    return Record(
        _numbers(found.get("values", {}), "values"),
        _sentences(found.get("words", [])),
        certified if isinstance(certified, bool) else None,
        _density(found.get("density")),
        _numbers(found.get("layers", {}), "layers"),
        state if isinstance(state, str) and state in _STATES else None,
        remark[:_MAX_WORD] if isinstance(remark, str) else "",
    )


def _number(value: object) -> float:
    """Return a number; a bool, a list and the like are none."""
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecordError("an entry is not a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _numbers(entries: object, what: str) -> dict[str, float]:
    if not isinstance(entries, dict) or len(entries) > _MAX_NAMES:
        raise RecordError(f"its {what} are not an object with at most {_MAX_NAMES} entries")
    if any(len(name) > _MAX_NAME for name in entries):
        raise RecordError(f"a name among its {what} has more than {_MAX_NAME} letters")
    return {name: value if type(value) is float else _number(value) for name, value in entries.items()}


def _sentences(words: object) -> list[str]:
    if not isinstance(words, list):
        raise RecordError("its words are not a list")
    return [word[:_MAX_WORD] for word in words[:_MAX_WORDS] if isinstance(word, str)]


def _density(found: object) -> tuple[list[float], list[float]] | None:
    if found is None:
        return None
    if not isinstance(found, dict) or not all(isinstance(found.get(key), list) for key in ("edges", "heights")):
        raise RecordError("its density has no edges and heights")
    edges, heights = ([_number(value) for value in found[key]] for key in ("edges", "heights"))
    if len(edges) != len(heights) + 1 or not 1 <= len(heights) <= _MAX_BARS:
        raise RecordError("its density has another number of edges than of heights and one")
    if not all(map(math.isfinite, (*edges, *heights))) or any(low > high for low, high in pairwise(edges)):
        raise RecordError("the edges of its density do not ascend")
    return edges, heights


def series(points: Iterable[tuple[int, float, object]]) -> dict[str, Any]:
    """Arrange the records of one monitor in one run for the page, by columns.

    Args:
        points: Step, wall time and raw record of each measurement. Records that cannot be read are counted and left
            out, and so are those that a run wrote before it was resumed from an earlier step.

    Returns:
        A mapping for JSON: `steps`; `values` by name, `null` where there is none; `certified`; `words`, `state` and
        `remark` of the last record; `density` and `layers` at up to 400 steps, each None if no record has it;
        `unread`, how many records were left out, and `why`, the reason for the last of them.
    """
    read: list[tuple[int, float, Record]] = []
    unread, why = 0, ""
    for step, wall_time, raw in points:
        try:
            read.append((int(step), wall_time, read_record(raw)))
        except RecordError as error:
            unread, why = unread + 1, str(error)
    kept = _of_last_branch(read)
    steps, records = [step for step, _ in kept], [record for _, record in kept]
    names = dict.fromkeys(name for record in records for name in record.values if not name.startswith("lambda_max_of/"))
    return {
        "steps": steps,
        "values": {name: [_plain(record.values.get(name)) for record in records] for name in names},
        "certified": [record.certified for record in records],
        "words": records[-1].words if records else [],
        "state": records[-1].state if records else None,
        "remark": records[-1].remark if records else "",
        "density": _densities(steps, records),
        "layers": _layers(steps, records),
        "unread": unread,
        "why": why,
    }


def scalar_series(points: Iterable[tuple[int, float, float]]) -> dict[str, Any]:
    """Arrange steps, wall times and values of a scalar for the page."""
    kept = _of_last_branch(points)
    return {"steps": [step for step, _ in kept], "values": [_plain(value) for _, value in kept]}


def _of_last_branch(points: Iterable[tuple[int, float, Item]]) -> list[tuple[int, Item]]:
    """Return steps and items in ascending order, without those that a run left behind when it was resumed from an
    earlier step. TensorBoard's fast loader does the same, its other one does not.

    Args:
        points: Step, wall time and item.
    """
    kept: list[tuple[int, Item]] = []
    for step, _, item in sorted(points, key=lambda point: point[1]):
        while kept and kept[-1][0] >= step:
            kept.pop()
        kept.append((step, item))
    return kept


def _plain(value: float | None) -> float | str | None:
    """Return what JSON can hold: numbers that are not finite become strings, as JavaScript writes them."""
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _densities(steps: Sequence[int], records: Sequence[Record]) -> dict[str, Any] | None:
    found = _thinned([(step, record.density) for step, record in zip(steps, records, strict=True) if record.density])
    if not found:
        return None
    return {
        "steps": [step for step, _ in found],
        "edges": [density[0] for _, density in found],
        "heights": [density[1] for _, density in found],
    }


def _layers(steps: Sequence[int], records: Sequence[Record]) -> dict[str, Any] | None:
    found = _thinned([(step, record.layers) for step, record in zip(steps, records, strict=True) if record.layers])
    if not found:
        return None
    names = list(dict.fromkeys(name for _, layers in found for name in layers))
    return {
        "steps": [step for step, _ in found],
        "names": names,
        "values": [[_plain(layers.get(name)) for name in names] for _, layers in found],
    }


def _thinned(entries: list[Any]) -> list[Any]:
    """Return at most so many entries as a heat map has columns, evenly spaced, the first and the last among them."""
    if len(entries) <= _MAX_COLUMNS:
        return entries
    return [entries[round(k * (len(entries) - 1) / (_MAX_COLUMNS - 1))] for k in range(_MAX_COLUMNS)]
