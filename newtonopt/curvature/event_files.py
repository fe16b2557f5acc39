"""Histories read from a folder of event files, or of CSVLogger's tables, whose content is not trusted.

Files come from anywhere: they may be damaged, cut short, foreign, enormous, or not files at all. Whatever cannot be
read is passed over. No length that a file claims is allocated before the file is seen to be that long.
"""

from __future__ import annotations

import csv
import json
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from newtonopt.curvature.histories import DENSITY, History, Log, may_be_loss
from newtonopt.curvature.measurements.measurement import GROUPS
from newtonopt.curvature.records import PLUGIN, VERSION

# Longer records are images or foreign and passed over unread; of one file no more than these bytes are read.
_LONGEST_RECORD, _MOST_BYTES = 2**20, 2**30
_LONGEST_LINE, _MOST_LINES = 2**20, 2**22
_NEWTON = "newton/"
_MISSING = "Event files are read by tensorboard, which is not installed: pip install 'newtonopt[lightning]'"
_EVENTS, _TABLE = "tfevents", "metrics.csv"


def read(source: Path, prefix: str, loss: str | None) -> list[History]:
    """Return the histories of all runs in a folder and below it that hold measurements.

    A run is a folder with event files. Where no run holds any, folders with a `metrics.csv` are looked at.

    Args:
        source: The folder, or one file.
        prefix: Prefix of the measurements' tags.
        loss: Tag of the training loss; None: the likeliest one.

    Raises:
        ImportError: There are event files, and tensorboard is missing.
    """
    for of_kind, enter in ((_is_event_file, _enter_events), (_is_table, _enter_table)):
        found = []
        for folder, paths in _runs(source, of_kind):
            log = Log()
            for path in paths:
                try:
                    enter(log, path, prefix, loss)
                except OSError:  # no permission, or gone
                    continue
            history = log.history(folder, loss)
            if history.measured:
                found.append(history)
        if found:
            return found
    return []


def count_of_logs(source: Path) -> int:
    """Return how many event files and tables there are in a folder and below it."""
    return sum(len(paths) for kind in (_is_event_file, _is_table) for _, paths in _runs(source, kind))


def _is_event_file(name: str) -> bool:
    return _EVENTS in name


def _is_table(name: str) -> bool:
    return name == _TABLE or name.endswith(".csv")


def _runs(source: Path, of_kind: Any) -> list[tuple[str, list[Path]]]:
    """Return the files of a kind by their folder's name, relative to the source; only regular files."""
    if source.is_file():
        return [(source.parent.name, [source])] if of_kind(source.name) else []
    found = []
    for folder, folders, names in os.walk(source):
        folders.sort()
        # A table of another name is read only if it is given by itself.
        chosen = [Path(folder, name) for name in sorted(names) if of_kind(name) and (_EVENTS in name or name == _TABLE)]
        paths = [path for path in chosen if _is_regular(path)]
        if paths:
            found.append((os.path.relpath(folder, source), paths))
    return [(source.resolve().name if name == "." else name, paths) for name, paths in found]


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _enter_events(log: Log, path: Path, prefix: str, loss: str | None) -> None:
    """Enter the values of one event file."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
    except ImportError as error:
        raise ImportError(_MISSING) from error
    marks = [f"{prefix}".encode(), _NEWTON.encode(), b"oss" if loss is None else loss.encode()]
    for record in _records(path):
        # Most records are of other tags, and looking for a word is faster than decoding.
        if not any(mark in record for mark in marks):
            continue
        try:
            event = Event.FromString(record)
        except Exception:  # protobuf's own error, of a record that is damaged
            continue
        for value in event.summary.value:
            _enter_value(log, event.step, value, prefix, loss)


def _records(path: Path) -> Iterator[bytes]:
    """Yield the records of a file: each has 8 bytes of its length, 4 of that one's checksum, itself, and 4 of its own.

    Checksums are not compared: in Python that takes longer than all else.
    """
    with open(path, "rb", buffering=2**20) as file:
        left = os.fstat(file.fileno()).st_size
        taken = 0
        while len(header := file.read(12)) == 12 and taken < _MOST_BYTES:
            (length,) = struct.unpack("<Q", header[:8])
            left -= 12 + length + 4
            if length == 0 or left < 0:  # damaged, or still being written
                return
            if length > _LONGEST_RECORD:
                file.seek(length + 4, os.SEEK_CUR)
                continue
            record = file.read(length + 4)
            taken += length
            yield record[:length]


def _enter_value(log: Log, step: int, value: Any, prefix: str, loss: str | None) -> None:
    """Enter one value of an event, if it is one of ours or the loss."""
    tag: str = value.tag
    name = tag.removeprefix(f"{prefix}/")
    ours = name != tag
    kind = value.WhichOneof("value")
    if kind == "histo" and ours and name == DENSITY:
        log.add_density(step, [value.histo.min, *value.histo.bucket_limit], value.histo.bucket)
    elif kind == "tensor" and len(value.tensor.string_val) == 1:
        text: bytes = value.tensor.string_val[0]
        # Another monitor in the run may have a prefix below this one's: its record is "<prefix>/gn/record", say.
        if name == "record" and ours and value.metadata.plugin_data.plugin_name == PLUGIN:
            log.rewind(step)
            _enter_record(log, step, text)
        elif ours and name == "in_words/text_summary":
            log.add_words(text.decode(errors="replace").splitlines())
    else:
        number = value.simple_value if kind == "simple_value" else _number(value.tensor) if kind == "tensor" else None
        if number is not None:
            _enter_number(log, step, tag, number, prefix, loss)


def _enter_number(log: Log, step: int, tag: str, number: float, prefix: str, loss: str | None) -> None:
    ours = re.fullmatch(rf"{re.escape(prefix)}(-({'|'.join(GROUPS)}))?/(.+)", tag)
    if ours is not None:
        log.add_value(step, ours[3], number)
    elif tag.startswith(_NEWTON) or tag == loss or (loss is None and may_be_loss(tag)):
        log.add_training(step, tag, number)


def _number(tensor: Any) -> float | None:
    """Return the number that a tensor of one float holds, whatever shape it claims to have; None for others."""
    for numbers in (tensor.float_val, tensor.double_val):
        if len(numbers) == 1:
            return float(numbers[0])
    form = {4: "<f", 8: "<d"}.get(len(tensor.tensor_content))
    return None if form is None else float(struct.unpack(form, tensor.tensor_content)[0])


def _enter_record(log: Log, step: int, text: bytes) -> None:
    """Enter the monitor's own record of a measurement, as far as it is whole."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return
    if not isinstance(record, dict) or record.get("version") != VERSION:
        return
    for name, value in _dict(record, "values").items():
        if _is_number(value):
            log.add_value(step, str(name), value)
    if isinstance(record.get("certified"), bool):
        log.add_value(step, "certified", float(record["certified"]))
    for name, value in _dict(record, "layers").items():
        if _is_number(value):
            log.add_value(step, f"lambda_max_of/{name}", value)
    words = record.get("words")
    if isinstance(words, list):
        log.add_words(str(word) for word in words)
    density = _dict(record, "density")
    edges, heights = density.get("edges"), density.get("heights")
    if isinstance(edges, list) and isinstance(heights, list) and all(map(_is_number, [*edges, *heights])):
        log.add_density(step, edges, heights)


def _dict(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**53)


def _enter_table(log: Log, path: Path, prefix: str, loss: str | None) -> None:
    """Enter the values of a table of CSVLogger's: a column for each tag, and one for the step."""
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        lines = _lines(file)
        try:
            columns: Sequence[str] = next(csv.reader(lines), [])
            if "step" not in columns:
                return
            for row in csv.reader(lines):
                found = dict(zip(columns, row, strict=False))
                step = _float(found.pop("step", ""))
                for tag, text in found.items() if step is not None and abs(step) < 2**53 else ():
                    number = _float(text)
                    if number is not None:
                        _enter_number(log, int(step or 0), tag, number, prefix, loss)
        except csv.Error:  # damaged from here on
            return


def _lines(file: Any) -> Iterator[str]:
    for _ in range(_MOST_LINES):
        line = file.readline(_LONGEST_LINE)
        if not line:
            return
        yield line


def _float(text: str) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
