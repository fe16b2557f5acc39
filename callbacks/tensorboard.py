"""Charts, words, figures and histograms of the callbacks' values in TensorBoard."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Layout, MarginChartContent, MultilineChartContent
from tensorboard.plugins.custom_scalar.layout_pb2 import Chart as Card
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars

from newtonopt.curvature import Chart, Density, Histogram, Measured, Stability
from newtonopt.curvature.measurements.measurement import Plan

from .images import add_image, takes_images

# The category of StepMonitor, which stands after those of CurvatureMonitor.
STEPS = "Newton steps"

# Name of the plugin that draws the "Curvature" tab, and the version of its records.
_PLUGIN, _VERSION = "newtonopt_curvature", 1
_LAYER = "lambda_max_of/"


def page_of(plan: Plan, charts: Iterable[Chart], names: Collection[str]) -> list[Category]:
    """Return the categories of the custom-scalars page.

    TensorBoard merges the pages of all runs in a folder: categories by their titles, charts that are equal to the byte.
    So a chart names its tags by regular expressions that are the same in every run, and is left out of a run that has
    none of its values, for TensorBoard would show an empty card.

    Args:
        plan: The measurements, whose prefix is the first category's title.
        charts: Charts in their order.
        names: Names of the values that the run has.
    """
    title = plan.prefix.capitalize()
    page = [Category(title=title), Category(title=f"{title}: more", closed=True)]
    for chart in charts:
        if chart.names(names):
            page[chart.more].chart.append(_card(plan, chart, names))
    return [category for category in page if category.chart]


def _card(plan: Plan, chart: Chart, names: Collection[str]) -> Card:
    if chart.margin:
        value, lower, upper = map(plan.tag_of, chart.patterns)
        series = MarginChartContent.Series(value=value, lower=lower, upper=upper)
        return Card(title=chart.title, margin=MarginChartContent(series=[series]))
    return multiline(chart.title, [_pattern(plan, pattern, names) for pattern in chart.patterns])


def _pattern(plan: Plan, pattern: str, names: Collection[str]) -> str:
    """Return the pattern of names as one of tags; all names that it matches are of one group."""
    name = next(name for name in names if re.fullmatch(pattern, name))
    return f"{re.escape(plan.tag_of(name).removesuffix(name))}({pattern})$"


def multiline(title: str, patterns: Iterable[str]) -> Card:
    """Return a card with a line for each tag that one of the patterns, regular expressions, matches from its start."""
    return Card(title=title, multiline=MultilineChartContent(tag=patterns))


def add_page(trainer: Trainer, page: Sequence[Category]) -> None:
    """Put categories on TensorBoard's custom-scalars page, next to those that are there and before `STEPS`.

    A second layout written to a run replaces the first, so the one in the event files (the user's, or that of another
    callback of ours) is read back and written again with ours added.
    """
    for writer in _writers(trainer):
        _merge_layout(writer, page)


def add_record(trainer: Trainer, measured: Measured, remark: str) -> None:
    """Write a measurement as one record for the "Curvature" tab, so that all of its values belong to one step.

    Args:
        trainer: The trainer.
        measured: The measurement.
        remark: Sentence that says which loss was measured.
    """
    _write_record(trainer, measured.plan.prefix, _record(measured, remark))


def add_failure(trainer: Trainer, prefix: str, words: str) -> None:
    """Write a record of a measurement that has failed, with the reason in words and no values."""
    _write_record(
        trainer,
        prefix,
        {"version": _VERSION, "values": {}, "words": [words], "certified": None, "state": "failed", "remark": ""},
    )


def _write_record(trainer: Trainer, prefix: str, content: Mapping[str, Any]) -> None:
    record = json.dumps(content).encode()
    metadata = SummaryMetadata(
        plugin_data=SummaryMetadata.PluginData(plugin_name=_PLUGIN), data_class=DATA_CLASS_TENSOR
    )
    tensor = TensorProto(dtype="DT_STRING", string_val=[record], tensor_shape=TensorShapeProto())
    summary = Summary(value=[Summary.Value(tag=f"{prefix}/record", tensor=tensor, metadata=metadata)])
    for writer in _writers(trainer):
        file_writer: Any = writer.file_writer  # torch types it as None, which it is only after close()
        file_writer.add_summary(summary, trainer.global_step)


def add_text(trainer: Trainer, measured: Measured, remark: str) -> None:
    """Write in words what the values mean, a line each."""
    lines = [*measured.in_words().splitlines(), remark]
    add_words(trainer, f"{measured.plan.prefix}/in_words", "  \n".join(lines))


def add_words(trainer: Trainer, tag: str, words: str) -> None:
    """Write a text."""
    for writer in _writers(trainer):
        writer.add_text(tag, words, trainer.global_step)


def add_figures(trainer: Trainer, measured: Measured) -> None:
    """Write the histograms of all measurements to TensorBoard, and their figures to every logger that takes images.

    Raises:
        ImportError: matplotlib is missing.
    """
    prefix, step = measured.plan.prefix, trainer.global_step
    for measurement, result in measured.results():
        for name, histogram in measurement.histograms(result).items():
            for writer in _writers(trainer):
                _add_histogram(writer, f"{prefix}/{name}", histogram, step)
        if takes_images(trainer):
            for name, figure in measurement.figures(result).items():
                add_image(trainer, f"{prefix}/{name}", figure)


def _record(measured: Measured, remark: str) -> dict[str, Any]:
    """Return what the tab shows of a measurement; newtonopt_tensorboard reads it."""
    values = {name: measured.read(name) for name in measured.names()}
    certified = values.get("certified")
    record: dict[str, Any] = {
        "version": _VERSION,
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


def _state(measured: Measured) -> str | None:
    """Return how training has gone wrong, for all that the loss shows, or where it is with regard to the edge of
    stability.
    """
    stability = measured.of(Stability)
    state, trouble = None if stability is None else stability.state, measured.course.trouble
    if measured.diverged or trouble == "lost":
        return "diverged" if measured.diverged else trouble
    if state in (None, "below"):
        risen = measured.losses is not None and measured.losses.risen
        return trouble or ("risen" if risen else state)
    return state


def _writers(trainer: Trainer) -> Iterator[SummaryWriter]:
    """Yield the writers of TensorBoard's loggers, on the process that writes."""
    for logger in trainer.loggers:
        if (
            trainer.is_global_zero
            and isinstance(logger, TensorBoardLogger)
            and isinstance(logger.experiment, SummaryWriter)
        ):
            yield logger.experiment


def _add_histogram(writer: SummaryWriter, tag: str, histogram: Histogram, step: int) -> None:
    edges, heights = histogram.edges, histogram.heights
    middles = 0.5 * (edges[1:] + edges[:-1])
    total, first, second = (float((heights * middles**power).sum()) for power in (0, 1, 2))
    low, high = histogram.low, histogram.high
    writer.add_histogram_raw(tag, low, high, total, first, second, edges[1:].tolist(), heights.tolist(), step)


def _merge_layout(writer: SummaryWriter, page: Sequence[Category]) -> None:
    writer.flush()
    titles = [category.title for category in page]
    kept = [other for other in _written_layout(str(writer.log_dir)).category if other.title not in titles]
    before = [other for other in kept if other.title != STEPS]
    after = [other for other in kept if other.title == STEPS]
    layout = Layout(category=[*before, *page, *after])
    summary = custom_scalars({})
    summary.value[0].tensor.string_val[0] = layout.SerializeToString()
    file_writer: Any = writer.file_writer  # torch types it as None, which it is only after close()
    file_writer.add_summary(summary)
    writer.flush()


def _written_layout(folder: str) -> Layout:
    """Return the last layout in a run's event files; an empty one if there is none."""
    layout = Layout()
    for path in sorted(Path(folder).glob("*tfevents*")):
        for record in RawEventFileLoader(str(path)).Load():
            if CONFIG_SUMMARY_TAG.encode() not in record:  # parsing every event of a long run would take seconds
                continue
            for value in Event.FromString(record).summary.value:
                if value.tag == CONFIG_SUMMARY_TAG and value.tensor.string_val:
                    layout = Layout.FromString(value.tensor.string_val[0])
    return layout
