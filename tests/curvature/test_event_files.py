"""Event files and tables are read for what they are worth: nothing in them is trusted."""

from __future__ import annotations

import json
import os
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from torch.utils.tensorboard import SummaryWriter

from newtonopt.curvature.event_files import count_of_logs, read
from newtonopt.curvature.histories import History

NAME = "events.out.tfevents.1"


def framed(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + b"\0" * 4 + data + b"\0" * 4


def scalar(step: int, tag: str, value: float) -> bytes:
    event = Event(step=step)
    entry = event.summary.value.add()
    entry.tag, entry.simple_value = tag, value
    return framed(event.SerializeToString())


def text(step: int, tag: str, content: bytes, plugin: str = "") -> bytes:
    event = Event(step=step)
    entry = event.summary.value.add()
    entry.tag, entry.tensor.dtype = tag, 7
    entry.tensor.string_val.append(content)
    entry.metadata.plugin_data.plugin_name = plugin
    return framed(event.SerializeToString())


def record(step: int, content: Any) -> bytes:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return text(step, "curvature/record", data, "newtonopt_curvature")


GOOD = b"".join(scalar(step, "curvature/lambda_max", step + 1.0) for step in range(10))


def history_of(folder: Path, data: bytes, name: str = NAME) -> History | None:
    (folder / name).write_bytes(data)
    found = read(folder, "curvature", None)
    return found[0] if found else None


def test_what_a_writer_writes_is_read(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as writer:
        for step in (0, 100):
            writer.add_scalar("curvature/lambda_max", 2.5 + step, step)
            writer.add_scalar("curvature/sharpness", 0.25, step, new_style=True)
            writer.add_scalar("curvature/sharpness_error", 0.5, step, double_precision=True, new_style=True)
            writer.add_scalar("newton/damping", 0.5, step)
            writer.add_scalar("train_loss", 1.5, step)
            writer.add_scalar("val_loss", 9.0, step)
            writer.add_scalar("accuracy", 0.5, step)
            writer.add_text("curvature/in_words", f"At {step}.  \nThe end.", step)
            writer.add_histogram_raw("curvature/eigenvalues_log_count", 0, 2, 1, 1, 1, [1.0, 2.0], [1.0, 0.0], step)
    (history,) = read(tmp_path, "curvature", None)
    values = {"lambda_max": 2.5, "sharpness": 0.25, "sharpness_error": 0.5}
    assert history.measured == {0: values, 100: {**values, "lambda_max": 102.5}}
    assert history.training == {"newton/damping": {0: 0.5, 100: 0.5}, "train_loss": {0: 1.5, 100: 1.5}}
    assert history.loss == "train_loss"
    assert [word.strip() for word in history.words] == ["At 100.", "The end."]
    assert history.densities[100].edges.tolist() == [0.0, 1.0, 2.0]
    assert history.densities[100].counts.tolist() == pytest.approx([9.0, 0.0])


def test_what_a_run_left_behind_when_it_was_resumed_is_left_out(tmp_path: Path) -> None:
    for name, steps in (("1", (0, 10, 20, 30)), ("2", (15, 25))):
        events = b"".join(
            scalar(step, "curvature/lambda_max", float(name))
            + scalar(step, "train_loss", float(name))
            + record(step, {"version": 1, "values": {"sharpness": float(name)}})
            for step in steps
        )
        (tmp_path / f"events.out.tfevents.{name}").write_bytes(events)
    (history,) = read(tmp_path, "curvature", None)
    expected = {0: 1.0, 10: 1.0, 15: 2.0, 25: 2.0}
    assert history.measured == {s: {"lambda_max": v, "sharpness": v} for s, v in expected.items()}
    assert history.training == {"train_loss": expected}


def test_a_record_of_another_version_is_left_out(tmp_path: Path) -> None:
    assert history_of(tmp_path, record(3, {"version": 2, "values": {"lambda_max": 1.0}})) is None


def test_runs_are_the_folders_with_measurements(tmp_path: Path) -> None:
    for name, data in (("a/version_0", GOOD), ("b", GOOD), ("c", scalar(0, "train_loss", 1.0))):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / NAME).write_bytes(data)
    assert [history.name for history in read(tmp_path, "curvature", None)] == ["a/version_0", "b"]
    assert [history.name for history in read(tmp_path / "b", "curvature", None)] == ["b"]
    assert [history.name for history in read(tmp_path / "b" / NAME, "curvature", None)] == ["b"]
    assert count_of_logs(tmp_path) == 3


def test_a_resumed_run_replaces_what_it_measured_again(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1").write_bytes(GOOD)
    (tmp_path / "events.out.tfevents.2").write_bytes(scalar(9, "curvature/lambda_max", -1.0))
    (history,) = read(tmp_path, "curvature", None)
    assert history.series("lambda_max")[1].tolist() == [*range(1, 10), -1.0]


def test_certified_may_stand_in_a_group_of_its_own(tmp_path: Path) -> None:
    history = history_of(tmp_path, GOOD + scalar(3, "curvature-bookkeeping/certified", 1.0))
    assert history is not None and history.measured[3]["certified"] == 1.0


def test_a_record_is_read(tmp_path: Path) -> None:
    content = {
        "version": 1,
        "values": {"lambda_min": -1.0, "trace": float("nan"), "flag": True, "name": "x"},
        "words": ["One.", "Two."],
        "certified": False,
        "density": {"edges": [0, 1, 2], "heights": [1, 0.0]},
        "layers": {"encoder": 3.0},
    }
    history = history_of(tmp_path, record(5, content))
    assert history is not None
    assert history.measured == {5: {"lambda_min": -1.0, "certified": 0.0, "lambda_max_of/encoder": 3.0}}
    assert history.words == ("One.", "Two.")
    assert history.densities[5].counts.tolist() == pytest.approx([9.0, 0.0])
    # The record of another monitor, whose prefix lies below.
    below = text(5, "curvature/gn/record", json.dumps(content).encode(), "newtonopt_curvature")
    history = history_of(tmp_path, GOOD + below)
    assert history is not None and history.words == () and len(history.series("lambda_min")[1]) == 0


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b"{",
        b"\xff",
        b'{"values": {"lambda_max": 1' + b"0" * 5_000 + b"}}",
        {"values": {"lambda_max": 10**400 // 10**390}, "words": 5, "certified": "yes"},
        {"values": [1], "layers": 3, "density": {"edges": [1, 0], "heights": [1]}},
        {"density": {"edges": [0, 1, "a"], "heights": [1, 2]}},
        {"density": {"edges": 1}, "values": {"lambda_max": float("inf")}},
        5,
    ],
)
def test_a_damaged_record_takes_nothing_from_the_rest(tmp_path: Path, content: Any) -> None:
    history = history_of(tmp_path, record(0, content) + GOOD)
    assert history is not None
    assert history.series("lambda_max")[1].tolist() == [*range(1, 11)]
    assert history.densities == {} and history.words == ()


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda data: data[:-7], 9),
        (lambda data: data + struct.pack("<Q", 2**63) + b"x" * 100, 10),
        (lambda data: framed(b"\xff" * 9 + b"curvature") + data, 10),
        (lambda data: b"", 0),
        (lambda data: b"\0" * 1_000_000, 0),
        (lambda data: random.Random(0).randbytes(10_000), 0),
        (lambda data: b"not an event file\n" * 100, 0),
    ],
)
def test_what_is_whole_is_read_up_to_the_damage(tmp_path: Path, damage: Callable[[bytes], bytes], left: int) -> None:
    history = history_of(tmp_path, damage(GOOD))
    assert (0 if history is None else len(history.measured)) == left


def test_an_enormous_record_is_passed_over_unread(tmp_path: Path) -> None:
    path = tmp_path / NAME
    with open(path, "wb") as file:
        file.write(GOOD + struct.pack("<Q", 2**36) + b"\0" * 4)
        file.seek(2**36 + 4, os.SEEK_CUR)  # a sparse file: no byte of it is written
        file.write(scalar(10, "curvature/lambda_max", 11.0))
    (history,) = read(tmp_path, "curvature", None)
    assert len(history.measured) == 11


def test_bytes_changed_at_random_raise_nothing(tmp_path: Path) -> None:
    chance = random.Random(0)
    whole = GOOD + record(3, {"values": {"lambda_min": 1.0}, "density": {"edges": [0, 1], "heights": [1]}})
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 20)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        history_of(tmp_path, bytes(damaged))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NAME)
    (tmp_path / "events.out.tfevents.2").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert read(tmp_path, "curvature", None) == [] and count_of_logs(tmp_path) == 0


def test_a_table_of_csv_logger_is_read_where_there_are_no_events(tmp_path: Path) -> None:
    table = b"epoch,step,curvature/lambda_max,train_loss\n0,0,2.5,\n0,9,,1.5\n1,10,3.5,\n"
    history = history_of(tmp_path, table, "metrics.csv")
    assert history is not None
    assert history.measured == {0: {"lambda_max": 2.5}, 10: {"lambda_max": 3.5}}
    assert history.training == {"train_loss": {9: 1.5}} and history.name == tmp_path.name
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / NAME).write_bytes(GOOD)
    assert [found.name for found in read(tmp_path, "curvature", None)] == ["run"]


@pytest.mark.parametrize(
    "table",
    [
        b"a,b\n1,2\n",
        b"",
        b"\xff\xfe\x00",
        b"step,curvature/lambda_max\nnan,1\n1e300,2\n,3\nx,y,z\n3,x\n",
        b'step,curvature/lambda_max\n"' + b"x" * 5_000_000,
    ],
)
def test_a_damaged_table_gives_nothing(tmp_path: Path, table: bytes) -> None:
    assert history_of(tmp_path, table, "metrics.csv") is None


def test_event_files_without_tensorboard_are_an_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(ImportError, match=r"tensorboard, which is not installed: pip install 'newtonopt\[lightning\]'"):
        history_of(tmp_path, GOOD)
