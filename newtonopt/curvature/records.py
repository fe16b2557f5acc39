"""Measurements as records in TensorBoard's event files: `add_to_tensorboard`, and what the monitor writes with it.

A record is a JSON object that holds all values of one measurement, so that they belong to one step. The "Curvature" tab
and `event_files` read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from newtonopt.checks import check_instance, check_whole
from newtonopt.curvature.measurements.density import Density
from newtonopt.curvature.measurements.measurement import Measured
from newtonopt.curvature.measurements.stability import Stability

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Name of the plugin that draws the "Curvature" tab, and the version of its records.
PLUGIN, VERSION = "newtonopt_curvature", 1
_LAYER = "lambda_max_of/"


def add_to_tensorboard(writer: SummaryWriter, measured: Measured, step: int) -> None:
    """Write a measurement to TensorBoard from any training loop, for the Curvature tab.

    It writes what `CurvatureMonitor` writes in a Lightning run: each value as a scalar, the words as a text, and the
    record that the tab reads. The monitor's histograms, figures and page of custom scalars are left out. With several
    processes call it on the one that writes.

    Args:
        writer: The `torch.utils.tensorboard.SummaryWriter` of the run.
        measured: The return value of `measure`.
        step: Step of training at which it was measured, zero or more.

    Raises:
        ImportError: TensorBoard is not installed.
        TypeError: `writer` is no SummaryWriter, or `measured` is not the return value of `measure`.
        ValueError: `step` is no whole number, or below zero.

    Example:
        >>> import os, tempfile
        >>> import torch
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from newtonopt.curvature import add_to_tensorboard, measure
        >>> w = torch.ones(2, requires_grad=True)
        >>> with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        ...     add_to_tensorboard(writer, measure(lambda: w[0] ** 2 + 3 * w[1] ** 2, [w]), step=0)
        ...     len(os.listdir(folder))
        1

    See Also:
        - `measure()`: takes the measurement.
        - `CurvatureMonitor`: measures and writes by itself in a Lightning run.
        - `plot_history()`: draws the run in one figure, without TensorBoard.
        - `docs/tab.md`: what the tab shows.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "add_to_tensorboard needs TensorBoard, which is not installed: pip install tensorboard."
        ) from error

    what = "a SummaryWriter of torch.utils.tensorboard"
    check_instance("writer", writer, SummaryWriter, what, 'Write SummaryWriter("logs"), for example.')
    check_instance("measured", measured, Measured, "a Measured", "Pass the return value of measure.")
    check_whole("step", step, 0)
    for tag, value in measured.items():
        writer.add_scalar(tag, value, step)
    write_text(writer, measured, "", step)
    write_record(writer, measured.plan.prefix, record_of(measured, ""), step)
    writer.flush()


def write_text(writer: SummaryWriter, measured: Measured, remark: str, step: int) -> None:
    """Write in words what the values mean, a line each, and the remark, if there is one."""
    lines = [*measured.in_words().splitlines(), *([remark] if remark else [])]
    writer.add_text(f"{measured.plan.prefix}/in_words", "  \n".join(lines), step)


def write_record(writer: SummaryWriter, prefix: str, record: Mapping[str, Any], step: int) -> None:
    """Write a record of the measurements under a prefix to a writer that is open."""
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    text = json.dumps(record).encode()
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN), data_class=DATA_CLASS_TENSOR)
    tensor = TensorProto(dtype="DT_STRING", string_val=[text], tensor_shape=TensorShapeProto())
    summary = Summary(value=[Summary.Value(tag=f"{prefix}/record", tensor=tensor, metadata=metadata)])
    file_writer: Any = writer.file_writer  # torch types it as None, which it is only after close()
    file_writer.add_summary(summary, step)


def record_of(measured: Measured, remark: str) -> dict[str, Any]:
    """Return what the tab shows of a measurement.

    Args:
        measured: The measurement.
        remark: Sentence that says which loss was measured; empty if that is not known.
    """
    values = {name: measured.read(name) for name in measured.names()}
    certified = values.get("certified")
    record: dict[str, Any] = {
        "version": VERSION,
        "values": values,
        "words": measured.in_words().splitlines(),
        "certified": None if certified is None else certified == 1.0,
        "state": _state(measured),
        "remark": remark,
    }
    density = measured.of(Density)
    if density is not None:
        (histogram,) = Density().histograms(density).values()
        parts = {"edges": histogram.edges, "heights": histogram.heights}
        record["density"] = {name: [float(f"{x:.6g}") for x in part.tolist()] for name, part in parts.items()}
    if layers := {name.removeprefix(_LAYER): x for name, x in values.items() if name.startswith(_LAYER)}:
        record["layers"] = layers
    return record


def failure_of(words: str) -> dict[str, Any]:
    """Return the record of a measurement that has failed, with the reason in words and no values."""
    return {"version": VERSION, "values": {}, "words": [words], "certified": None, "state": "failed", "remark": ""}


def _state(measured: Measured) -> str | None:
    """Return how training has gone wrong, for all that the loss shows, or where it is with regard to the edge of
    stability.
    """
    stability = measured.of(Stability)
    state, trouble = None if stability is None else stability.state, measured.course.trouble
    if measured.diverged or trouble == "lost":
        return "diverged" if measured.diverged else trouble
    if state in (None, "below"):
        return trouble or ("unstable" if measured.course.was_unstable else state)
    return state
