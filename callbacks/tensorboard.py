"""Charts, words, figures and histograms of the callbacks' values in TensorBoard."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars

from newtonopt.curvature import Histogram, Measured

# One category of the custom-scalars page: for each chart its kind, "Margin" (value, lower, upper) or "Multiline", and
# its tags.
Charts = Mapping[str, tuple[str, list[str]]]


def charts_of(measured: Measured) -> dict[str, Charts]:
    """Return by category the charts whose values were measured.

    TensorBoard shows a category's margin charts after the others.
    """
    prefix, names = measured.plan.prefix, measured.names()
    title = prefix.capitalize()
    page: dict[str, dict[str, tuple[str, list[str]]]] = {title: {}, f"{title}: more": {}}
    for chart in measured.charts():
        category = page[f"{title}: more" if chart.more else title]
        tags = [f"{prefix}/{name}" for name in chart.names(names)]
        if chart.margin and tags:
            category.setdefault(chart.title, ("Margin", tags))
        elif tags:
            # The tags of a multi-line chart are regular expressions, matched from the start.
            category.setdefault(chart.title, ("Multiline", [f"{re.escape(tag)}$" for tag in tags]))
    return dict(page)


def add_charts(trainer: Trainer, category: str, charts: Charts) -> None:
    """Put a category of charts on TensorBoard's custom-scalars page, next to the categories that are there.

    A second layout written to a run replaces the first, so the one in the event files (the user's, or that of another
    callback of ours) is read back and written again with ours added.
    """
    for writer in _writers(trainer):
        _merge_layout(writer, category, charts)


def add_text(trainer: Trainer, measured: Measured, remark: str) -> None:
    """Write in words what the values mean, a line each."""
    lines = [*measured.in_words().splitlines(), remark]
    for writer in _writers(trainer):
        writer.add_text(f"{measured.plan.prefix}/in_words", "  \n".join(lines), trainer.global_step)


def add_words(trainer: Trainer, tag: str, words: str) -> None:
    """Write a text."""
    for writer in _writers(trainer):
        writer.add_text(tag, words, trainer.global_step)


def add_figures(trainer: Trainer, measured: Measured) -> None:
    """Write the histograms and figures of all measurements.

    Raises:
        ImportError: matplotlib is missing.
    """
    prefix, step = measured.plan.prefix, trainer.global_step
    for writer in _writers(trainer):
        for measurement, result in measured.results():
            for name, histogram in measurement.histograms(result).items():
                _add_histogram(writer, f"{prefix}/{name}", histogram, step)
            for name, figure in measurement.figures(result).items():
                writer.add_figure(f"{prefix}/{name}", figure, step)


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


def _merge_layout(writer: SummaryWriter, category: str, charts: Charts) -> None:
    writer.flush()
    summary = custom_scalars({category: charts})
    value = summary.value[0].tensor
    ours = Layout.FromString(value.string_val[0])
    layout = _written_layout(str(writer.log_dir))
    kept = [other for other in layout.category if other.title != category]
    del layout.category[:]
    layout.category.extend([*kept, *ours.category])
    value.string_val[0] = layout.SerializeToString()
    file_writer: Any = writer.file_writer  # torch types it as None, which it is only after close()
    file_writer.add_summary(summary)
    writer.flush()


def _written_layout(folder: str) -> Layout:
    """Return the last layout in a run's event files; an empty one if there is none."""
    layout = Layout()
    for path in sorted(Path(folder).glob("*tfevents*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == CONFIG_SUMMARY_TAG and value.tensor.string_val:
                    layout = Layout.FromString(value.tensor.string_val[0])
    return layout
