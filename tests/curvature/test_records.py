"""A plain loop writes to TensorBoard what the Curvature tab and `plot_history` read."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from newtonopt.curvature import Density, Layers, Measured, add_to_tensorboard, measure
from newtonopt.curvature.event_files import read
from newtonopt.curvature.measurements.course import Course
from newtonopt.curvature.measurements.measurement import Losses
from newtonopt.curvature.records import PLUGIN, VERSION, failure_of, record_of
from newtonopt_tensorboard import plugin, records


def measured(**settings: Any) -> Measured:
    """Curvature 2 and 6 along the axes, and a threshold of 20."""
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1)
    return measure(lambda: w[0] ** 2 + 3 * w[1] ** 2, [("w", w)], optimizer, sharpness=None, **settings)


def written(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()


def test_the_tabs_reader_reads_what_was_measured(tmp_path: Path) -> None:
    found = measured(measurements=[Density(), Layers()])
    with SummaryWriter(tmp_path) as writer:
        add_to_tensorboard(writer, found, 7)
    events = written(tmp_path)
    (event,) = events.Tensors("curvature/record")
    record = records.read_record(event.tensor_proto.string_val[0])
    assert event.step == 7
    assert record.values == {name: found.read(name) for name in found.names()}
    assert record.words == found.in_words().splitlines()
    assert (record.certified, record.state, record.remark) == (True, "below", "")
    assert record.layers == {"w": pytest.approx(6.0)}
    assert record.density is not None
    assert [(event.step, event.value) for event in events.Scalars("curvature/lambda_max")] == [(7, pytest.approx(6.0))]
    assert {*events.Tags()["scalars"]} == {*found}
    (text,) = events.Tensors("curvature/in_words/text_summary")
    assert text.tensor_proto.string_val[0].decode().split("  \n") == record.words


def test_a_figure_of_the_run_reads_it_too(tmp_path: Path) -> None:
    found = measured(prefix="generator/curvature")
    with SummaryWriter(tmp_path) as writer:
        for step in (0, 10):
            add_to_tensorboard(writer, found, step)
    (history,) = read(tmp_path, "generator/curvature", None)
    assert {step: values["lambda_max"] for step, values in history.measured.items()} == {
        step: pytest.approx(6.0) for step in (0, 10)
    }
    assert history.words == tuple(found.in_words().splitlines())


def test_the_record_can_be_seen_before_the_writer_is_closed_and_after(tmp_path: Path) -> None:
    writer = SummaryWriter(tmp_path)
    add_to_tensorboard(writer, measured(), 0)
    assert [event.step for event in written(tmp_path).Tensors("curvature/record")] == [0]
    writer.close()
    add_to_tensorboard(writer, measured(), 1)  # a closed writer opens a file of its own
    writer.close()
    assert sum(PLUGIN.encode() in path.read_bytes() for path in tmp_path.iterdir()) == 2


def test_tab_and_records_have_one_name_and_version() -> None:
    assert (PLUGIN, VERSION) == (plugin.NAME, records.VERSION)


@pytest.mark.parametrize(("loss", "state"), [(1.0, "below"), (2.0, "below"), (math.inf, "diverged")])
def test_a_state_below_the_edge_gives_way_to_a_loss_that_is_not_finite(loss: float, state: str) -> None:
    found = replace(measured(), losses=Losses(1.0, 1.0, loss))
    assert records.read_record(json.dumps(record_of(found, ""))).state == state


@pytest.mark.parametrize(
    ("losses", "lr", "state"),
    [
        ([2.3] * 5 + [1.0] * 20 + [2.3] * 50, 0.1, "lost"),
        ([2.3] * 5 + [1.0] * 20 + [2.3] * 50, 3.0, "lost"),
        ([2.3] * 5 + [40.0] * 5 + [1.0] * 20, 0.1, "spiked"),
        ([2.3] * 5 + [40.0] * 5 + [1.0] * 20, 3.0, "beyond"),
        ([2.3] * 60, 0.1, "stuck"),
        ([2.3] * 5 + [3.0] * 20, 0.1, "risen"),
        ([2.3] * 5 + [2.0] * 20 + [40.0] + [2.0] * 9, 0.1, "jumped"),
        ([2.3] * 60, 1.0, "edge"),
    ],
)
def test_a_state_below_the_edge_gives_way_to_trouble_with_the_loss(losses: list[float], lr: float, state: str) -> None:
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    found = measure(lambda: w.square().sum(), [w], torch.optim.SGD([w], lr=lr), sharpness=None)
    record = record_of(replace(found, course=Course().then(losses)), "")
    assert records.read_record(json.dumps(record)).state == state


def test_a_ratio_that_was_high_is_kept_in_the_state_until_the_loss_has_fallen() -> None:
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    found = measure(lambda: w.square().sum(), [w], torch.optim.SGD([w], lr=0.1), sharpness=None)
    course = Course().then([2.3] * 9).with_ratio(3.0, 9)
    for losses, state in (([2.3] * 9, "unstable"), ([1.0] * 9, "below")):
        record = record_of(replace(found, course=course.then(losses)), "")
        assert records.read_record(json.dumps(record)).state == state


def test_a_failure_is_read_as_one() -> None:
    record = records.read_record(json.dumps(failure_of("The loss is not finite.")))
    assert (record.state, record.words, record.values) == ("failed", ["The loss is not finite."], {})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"writer": "logs"}, TypeError, r"writer must be a SummaryWriter .*, got 'logs'\. Write SummaryWriter\("),
        ({"measured": {}}, TypeError, r"measured must be a Measured, got \{\}\. Pass the return value of measure\."),
        ({"step": -1}, ValueError, "step must be a whole number and at least 0, got -1"),
        ({"step": None}, ValueError, "step must be a whole number and at least 0, got None"),
    ],
)
def test_wrong_arguments_write_nothing(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with SummaryWriter(tmp_path) as writer:
        before = written(tmp_path).Tags()
        with pytest.raises(error, match=message):
            add_to_tensorboard(**{"writer": writer, "measured": measured(), "step": 0, **changes})
    assert written(tmp_path).Tags() == before


def test_without_tensorboard_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    writer: Any = None
    with pytest.raises(ImportError, match=r"add_to_tensorboard needs TensorBoard, .*: pip install tensorboard"):
        add_to_tensorboard(writer, measured(), 0)
