"""The monitor's values in loggers other than TensorBoard's: the same values, at the same steps."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger
from lightning_problems import (
    Classifier,
    all_tags,
    both_loggers,
    from_csv,
    from_events,
    loader,
    monitor_of,
    quiet_trainer,
)
from torch import Tensor

from newtonopt.curvature import Layers, Preconditioned, Trace

Table = dict[str, list[tuple[int, float]]]


class Plain(Classifier):
    """Logs by `self.log` alone, which every logger understands."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        loss = F.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def on_train_epoch_end(self) -> None:
        pass


def logged(folder: Path, *others: Logger) -> Table:
    """Train with TensorBoard's logger and others, and return the values in TensorBoard's event files."""
    further = [Trace(), Layers(["layers.0.*"]), Preconditioned()]
    settings = {"every_n_train_steps": 2, "at_start": True, "max_products": 8, "measurements": further}
    loggers = [both_loggers(folder)[0], *others]
    trainer = quiet_trainer(max_epochs=2, callbacks=[monitor_of(settings)], logger=loggers)
    trainer.fit(Plain("Adam"), loader())
    found = {tag: values for tag, values in from_events(folder).items() if tag.startswith("curvature/")}
    assert {"curvature/lambda_max", "curvature/lambda_max_of/layers.0", "curvature/trace"} <= set(found)
    assert [step for step, _ in found["curvature/lambda_max"]] == [0, 2, 4, 6]
    # Preconditioned has nothing to measure before the first step, so that a column is added late.
    assert [step for step, _ in found["curvature/preconditioned_lambda_max"]] == [2, 4, 6]
    return found


def assert_the_same(found: Table, truth: Table) -> None:
    assert {tag for tag in found if tag.startswith("curvature/")} == set(truth)
    for tag, values in truth.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in values]
        # Event files hold float32.
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in values], rel=1e-6)


def test_csv(tmp_path: Path) -> None:
    truth = logged(tmp_path, CSVLogger(tmp_path, name="", version="csv"))
    assert_the_same(from_csv(tmp_path), truth)


@pytest.mark.filterwarnings("ignore")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=(tmp_path / "mlruns").as_uri())
    truth = logged(tmp_path, logger)
    client, run = logger.experiment, logger.run_id
    found = {
        tag: [(entry.step, entry.value) for entry in client.get_metric_history(run, tag)]
        for tag in client.get_run(run).data.metrics
    }
    assert_the_same(found, truth)


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="test")
    truth = logged(tmp_path, logger)
    logger.experiment.finish()
    assert_the_same(from_wandb(tmp_path), truth)


def from_wandb(folder: Path, seconds: float = 60.0) -> Table:
    """Return the history in the file of an offline run, which another process ends with the exit code."""
    from wandb.proto import wandb_internal_pb2

    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + seconds
    while True:
        table: Table = {}
        for data in leveldb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            for tag, value in row.items():
                if tag.startswith("curvature/"):
                    table.setdefault(tag, []).append((json.loads(row["trainer/global_step"]), json.loads(value)))
            if record.HasField("exit"):
                return table
        assert time.monotonic() < deadline, "the run's file has no end"
        time.sleep(0.5)


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format after wandb's header of seven bytes."""
    at, record = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768  # in the block, which a record's header never straddles
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


class Unreachable(CSVLogger):
    """Fails whenever it is given curvature."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:  # type: ignore[override]
        if any(tag.startswith("curvature/") for tag in metrics):
            raise ConnectionError("no server")


def test_a_logger_that_fails_leaves_the_values_to_the_others_with_one_warning(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match="could not show all .* training goes on: ConnectionError: no server"
    ) as caught:
        broken = Unreachable(tmp_path, name="", version="broken")
        truth = logged(tmp_path, broken, CSVLogger(tmp_path, name="", version="csv"))
    assert sum("no server" in str(warning.message) for warning in caught) == 1
    assert_the_same(from_csv(tmp_path), truth)
    assert "curvature/in_words/text_summary" in all_tags(tmp_path)


class Silent(Plain):
    """Logs nothing, so that Lightning saves no logger's rows before the end."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(self.layers(batch[0]), batch[1])


class Reader(L.Callback):
    """Reads the file before the run ends."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.found = from_csv(Path(trainer.logger.save_dir))
        self.waiting = len(trainer.logger.experiment.metrics)


def test_rows_are_written_when_they_are_measured(tmp_path: Path) -> None:
    """A run that is killed has its values in the file, and no rows gather in memory."""
    reader = Reader()
    monitor = monitor_of({"every_n_train_steps": 2, "max_products": 8, "sharpness": None})
    trainer = quiet_trainer(callbacks=[monitor, reader], logger=CSVLogger(tmp_path, name="", version="csv"))
    trainer.fit(Silent("SGD"), loader())
    assert [step for step, _ in reader.found["curvature/lambda_max"]] == [2, 4, 6]
    assert reader.waiting == 0
