"""Where the callbacks' values go: every logger, the trainer's metrics, and TensorBoard's custom-scalars page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars

# One category of the page: for each chart its kind, "Margin" (value, lower, upper) or "Multiline", and its tags.
Charts = Mapping[str, tuple[str, list[str]]]


def log_values(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Write values to every logger at the global step, and to `trainer.callback_metrics` for other callbacks.

    `self.log` is no way to do it: it drops what does not fall on the grid of `log_every_n_steps`.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.global_step)
    trainer.callback_metrics.update({name: torch.tensor(value, device="cpu") for name, value in values.items()})


def add_charts(trainer: Trainer, category: str, charts: Charts) -> None:
    """Put a category of charts on TensorBoard's custom-scalars page, next to those that are there.

    A second layout written to a run replaces the first, so the one in the event files (the user's, or that of another
    callback of ours) is read back and written again with ours added.
    """
    for writer in tensorboard_writers(trainer):
        _merge_layout(writer, category, charts)


def tensorboard_writers(trainer: Trainer) -> Iterator[SummaryWriter]:
    """Those of TensorBoard's loggers, on the process that writes."""
    for logger in trainer.loggers:
        if (
            trainer.is_global_zero
            and isinstance(logger, TensorBoardLogger)
            and isinstance(logger.experiment, SummaryWriter)
        ):
            yield logger.experiment


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
    """The last layout in a run's event files; an empty one if there is none."""
    layout = Layout()
    for path in sorted(Path(folder).glob("*tfevents*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == CONFIG_SUMMARY_TAG and value.tensor.string_val:
                    layout = Layout.FromString(value.tensor.string_val[0])
    return layout
