"""Lightning on a device: with the monitors training stays bit-for-bit the same, and bfloat16 autocast works."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from devices import SLOW_ON_CPU
from lightning_problems import Classifier, both_loggers, from_events, loader, quiet_trainer

from newtonopt.callbacks import CurvatureMonitor, Probe, StepMonitor
from newtonopt.curvature import Trace


def fit(device: str, optimizer: str, **settings: Any) -> Classifier:
    L.seed_everything(0, verbose=False)
    module = Classifier(optimizer)
    accelerator = "gpu" if device == "cuda" else "cpu"
    quiet_trainer(accelerator=accelerator, devices=1, max_epochs=3, **settings).fit(module, loader())
    return module


@pytest.mark.parametrize("device", SLOW_ON_CPU)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("optimizer", ["Adam", "HessianFree"])
def test_monitors_change_no_bit_of_training(optimizer: str, precision: str, device: str, tmp_path: Path) -> None:
    monitors = [
        CurvatureMonitor(every_n_train_steps=2, measurements=[Trace()]),
        *([StepMonitor()] if optimizer != "Adam" else []),
    ]
    plain = fit(device, optimizer, precision=precision)
    watched = fit(device, optimizer, precision=precision, callbacks=monitors, logger=both_loggers(tmp_path))
    for name, value in plain.state_dict().items():
        assert torch.equal(watched.state_dict()[name], value), name
    found = from_events(tmp_path)
    assert [step for step, _ in found["curvature/lambda_max"]] == [2, 4, 6, 8]
    assert all(math.isfinite(value) for tag in found for _, value in found[tag])


@pytest.mark.parametrize("device", SLOW_ON_CPU)
def test_the_monitor_keeps_its_probe_where_it_is_told_to(device: str, tmp_path: Path) -> None:
    seen = []
    for kept in (None, "cpu"):
        folder = tmp_path / str(kept)
        fit(
            device,
            "Adam",
            callbacks=[CurvatureMonitor(every_n_train_steps=3, probe=Probe(device=kept))],
            logger=both_loggers(folder),
        )
        seen.append(from_events(folder)["curvature/lambda_max"])
    assert seen[0] == seen[1]
