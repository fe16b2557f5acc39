"""A small classifier with everything that a second run of `training_step` could disturb, and quiet trainers."""

from __future__ import annotations

import csv
import dataclasses
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from problems import Unseen
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar.layout_pb2 import Chart, Layout
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

from newtonopt import CubicNewton, DampedNewton, HessianFree, LevenbergMarquardt, NewtonCG, TrustRegionNewton
from newtonopt.callbacks import Budget, CurvatureMonitor, Probe

BATCHES = 3
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "HessianFree": lambda params: HessianFree(params, rank=10),
    "DampedNewton": lambda params: DampedNewton(params),
    "LevenbergMarquardt": lambda params: LevenbergMarquardt(params),
    "NewtonCG": lambda params: NewtonCG(params),
    "TrustRegionNewton": lambda params: TrustRegionNewton(params),
    "CubicNewton": lambda params: CubicNewton(params),
}


def points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(22, 4, generator=generator)
    return x, (x @ torch.randn(4, 3, generator=generator)).argmax(1)


def loader(batch_size: int = 8, *, shuffle: bool = False, dtype: torch.dtype = torch.float32) -> DataLoader:
    """Three batches, the last of them smaller."""
    x, y = points()
    return DataLoader(TensorDataset(x.to(dtype), y), batch_size=batch_size, shuffle=shuffle)


@dataclass
class Calls:
    """A record of each call of `training_step`, kept where isolation does not find it."""

    batches: list[tuple[int, int]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)

    def recorded(self) -> list[int]:
        """Return the indices of the first call on each batch: a Newton step records first and tries afterwards."""
        return [i for i, batch in enumerate(self.batches) if batch not in self.batches[:i]]


class Classifier(L.LightningModule):
    """BatchNorm, Dropout, numbers from three random generators, metrics and every way to log."""

    calls = Unseen(Calls)

    def __init__(self, optimizer: Callable[..., Any] | str = "HessianFree", dropout: float = 0.2) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3))
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.updated = MulticlassAccuracy(3, average="micro")
        self.several = MetricCollection({"precision": MulticlassPrecision(3), "recall": MulticlassRecall(3)})
        self.make_optimizer = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        scores = self.layers(x * (1 + 0.01 * random.random() + 0.01 * np.random.rand()))
        loss = F.cross_entropy(scores, y)
        self.calls.batches.append((self.current_epoch, batch_idx))
        self.calls.losses.append(loss.detach().clone())
        self.calls.scores.append(scores.detach())
        self.calls.labels.append(y)
        self.accuracy(scores, y)
        self.updated.update(scores, y)
        self.several(scores, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict(self.several, on_step=False, on_epoch=True)
        self.log_dict({"twice": 2 * loss, "square": loss**2}, on_step=False, on_epoch=True)
        if self.logger is not None:
            self.loggers[0].experiment.add_scalar("raw", loss.detach(), self.global_step)
        return {"loss": loss, "scores": scores.detach()}

    def on_train_epoch_end(self) -> None:
        self.log("updated", self.updated.compute())
        self.updated.reset()

    def on_after_backward(self) -> None:
        self.calls.gradients.append([p.grad.clone() for p in self.parameters()])


class Recorder(L.Callback):
    """Keeps what `on_train_batch_end` receives, and `.grad` at that time."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []
        self.gradients: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs)
        self.gradients.append([p.grad.clone() for p in pl_module.parameters()])


def quiet_trainer(**settings: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "log_every_n_steps": 1, **quiet}
    return L.Trainer(**{**defaults, **settings})


def monitor_of(settings: dict[str, Any]) -> CurvatureMonitor:
    """A monitor by its arguments and those of its probe and its budget, which have other names."""
    parts: dict[str, Any] = {}
    for name, kind in (("probe", Probe), ("budget", Budget)):
        fields = {f.name for f in dataclasses.fields(kind)} & settings.keys()
        if fields:
            parts[name] = kind(**{field: settings[field] for field in fields})
            settings = {key: value for key, value in settings.items() if key not in fields}
    return CurvatureMonitor(**settings, **parts)


def both_loggers(folder: Path) -> list[Any]:
    return [TensorBoardLogger(folder, name="", version="tb"), CSVLogger(folder, name="", version="csv")]


def from_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return each tag's steps and values, read back from TensorBoard's event files."""
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def all_tags(folder: Path) -> list[str]:
    """Return the tags of scalars, texts, figures and histograms in TensorBoard's event files."""
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    kinds = events.Tags()
    return [tag for kind in ("scalars", "tensors", "images", "histograms") for tag in kinds[kind]]


def from_csv(folder: Path) -> dict[str, list[tuple[int, float]]]:
    table: dict[str, list[tuple[int, float]]] = {}
    with (folder / "csv" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for tag, value in row.items():
                if value and tag not in ("step", "epoch"):
                    table.setdefault(tag, []).append((int(row["step"]), float(value)))
    return table


def layout(folder: Path) -> dict[str, dict[str, Chart]]:
    """Return the charts of each category on TensorBoard's custom-scalars page, from the last layout written."""
    written = [
        Layout.FromString(value.tensor.string_val[0])
        for path in sorted((folder / "tb").glob("*tfevents*"))
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag == CONFIG_SUMMARY_TAG
    ]
    return {category.title: {chart.title: chart for chart in category.chart} for category in written[-1].category}


def chart_tags(chart: Chart, written: Iterable[str]) -> list[list[str]]:
    """Return which tags a chart shows: for a margin chart value, lower and upper; otherwise those of each pattern."""
    if chart.HasField("margin"):
        [series] = chart.margin.series
        return [[tag for tag in written if tag == end] for end in (series.value, series.lower, series.upper)]
    return [sorted(tag for tag in written if re.match(pattern, tag)) for pattern in chart.multiline.tag]
