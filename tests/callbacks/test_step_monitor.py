"""StepMonitor writes the numbers that the optimizer reports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_problems import (
    BATCHES,
    Classifier,
    both_loggers,
    chart_tags,
    from_csv,
    from_events,
    layout,
    loader,
    quiet_trainer,
)

from newtonopt import StepReport
from newtonopt.callbacks import StepMonitor

TAGS = ("ratio", "first_ratio", "iterations", "products", "accepted", "gradient_norm", "step_norm")


class Reports(L.Callback):
    def __init__(self) -> None:
        self.seen: list[StepReport] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].last_step)


@pytest.mark.parametrize(
    ("optimizer", "control"),
    [
        ("HessianFree", ["damping"]),
        ("DampedNewton", ["damping"]),
        ("LevenbergMarquardt", ["damping"]),
        ("NewtonCG", []),
        ("TrustRegionNewton", ["radius"]),
        ("CubicNewton", ["sigma"]),
    ],
)
@pytest.mark.parametrize("every", [1, 2])
def test_every_logger_gets_the_last_step(optimizer: str, control: list[str], every: int, tmp_path: Path) -> None:
    tags = [*control, *TAGS]
    reports = Reports()
    trainer = quiet_trainer(callbacks=[reports, StepMonitor(every)], logger=both_loggers(tmp_path))
    trainer.fit(Classifier(optimizer), loader())
    steps = [step for step in range(1, 2 * BATCHES + 1) if step % every == 0]
    table, events = from_csv(tmp_path), from_events(tmp_path)
    assert {tag for tag in table if tag.startswith("newton/")} == {f"newton/{name}" for name in tags}
    for name in tags:
        values = [float(getattr(reports.seen[step - 1], name)) for step in steps]
        assert table[f"newton/{name}"] == list(zip(steps, values, strict=True))
        assert [step for step, _ in events[f"newton/{name}"]] == steps
        assert [value for _, value in events[f"newton/{name}"]] == pytest.approx(values)
        assert float(trainer.callback_metrics[f"newton/{name}"]) == pytest.approx(values[-1])


@pytest.mark.parametrize(
    ("optimizer", "control"),
    [("HessianFree", ["damping"]), ("NewtonCG", []), ("TrustRegionNewton", ["radius"]), ("CubicNewton", ["sigma"])],
)
def test_its_charts_name_tags_that_were_written(optimizer: str, control: list[str], tmp_path: Path) -> None:
    quiet_trainer(callbacks=[StepMonitor()], logger=both_loggers(tmp_path)).fit(Classifier(optimizer), loader())
    page = layout(tmp_path)
    assert list(page) == ["Newton steps"]
    written = from_events(tmp_path)
    tags = [tags for chart in page["Newton steps"].values() for tags in chart_tags(chart, written)]
    names = [*([control] if control else []), ["first_ratio", "ratio"], ["iterations"]]
    assert tags == [[f"newton/{name}" for name in group] for group in names]


class NotFinite(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step([batch[0] * math.nan, batch[1]] if batch_idx == 1 else batch, batch_idx)


def test_a_step_without_a_ratio_writes_none(tmp_path: Path) -> None:
    quiet_trainer(callbacks=[StepMonitor()], logger=both_loggers(tmp_path), max_epochs=1).fit(NotFinite(), loader())
    table = from_csv(tmp_path)
    assert [step for step, _ in table["newton/damping"]] == [1, 2, 3]
    assert [step for step, _ in table["newton/ratio"]] == [1, 3]
    assert table["newton/accepted"][1] == (2, 0.0)


def test_other_optimizers_are_refused() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"this run trains with Adam. Remove the callback, or use CurvatureMonitor"
    ):
        quiet_trainer(callbacks=[StepMonitor()]).fit(Classifier("Adam"), loader())


def test_no_logger_is_no_error() -> None:
    trainer = quiet_trainer(callbacks=[StepMonitor()], max_epochs=1)
    trainer.fit(Classifier(), loader())
    assert "newton/damping" in trainer.callback_metrics


def test_a_trial_run_logs_its_step() -> None:
    trainer = quiet_trainer(callbacks=[StepMonitor(every_n_train_steps=10)], fast_dev_run=True)
    trainer.fit(Classifier(), loader())
    assert "newton/damping" in trainer.callback_metrics


def test_a_bad_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_train_steps must be a whole number and at least 1, got 0"):
        StepMonitor(0)
