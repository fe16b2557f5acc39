"""Figures reach every logger that takes images, and nobody imports a logger's library for that."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning_problems import Classifier, loader, quiet_trainer
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from newtonopt.callbacks import CurvatureMonitor, StepMonitor
from newtonopt.callbacks.images import add_image, takes_images
from newtonopt.curvature import LossSlice
from newtonopt.curvature.drawing import pixels


class Wandb(WandbLogger):
    """wandb's logger with the documented method, in a process without wandb."""

    def __init__(self) -> None:
        self.images: list[tuple[str, Any, int | None]] = []
        self.metrics: list[tuple[dict[str, float], int | None]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: list[Any]) -> None:
        self.images.append((key, images, step))

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics.append((metrics, step))

    def log_hyperparams(self, params: Any) -> None: ...
    def log_graph(self, model: Any, *args: Any, **kwargs: Any) -> None: ...
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None: ...
    def finalize(self, status: str) -> None: ...

    name = version = save_dir = None
    experiment = SimpleNamespace(add_scalar=lambda *args: None)


class MLFlow(MLFlowLogger):
    """MLflow's logger with a client that has the documented method, in a process without MLflow."""

    def __init__(self) -> None:
        self.images: list[tuple[str, Any, str]] = []

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(log_image=lambda run, image, file: self.images.append((run, image, file)))

    run_id = "run"


def trainer(*loggers: Any, writes: bool = True) -> Any:
    return SimpleNamespace(loggers=[*loggers], is_global_zero=writes, global_step=30)


def figure() -> Figure:
    drawn = Figure(figsize=(2, 1), dpi=50)
    drawn.subplots().plot([0, 1], color="red")
    return drawn


def images_of(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """The images of a run by tag: their steps and pixels."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return {
        tag: [(e.step, np.asarray(Image.open(io.BytesIO(e.encoded_image_string)))) for e in events.Images(tag)]
        for tag in events.Tags()["images"]
    }


@pytest.mark.parametrize("behind", [False, True])
def test_the_figure_has_the_newton_step_that_its_measurement_follows(
    behind: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(
        "newtonopt.callbacks.curvature_monitor.dashboard", lambda history: (drawn.append(history), figure())[1]
    )
    board = TensorBoardLogger(tmp_path, name="", version="run")
    curvature = CurvatureMonitor(2, top=1, bottom=0, gradient=False, sharpness=None, figure_every=1)
    callbacks = [curvature, StepMonitor()] if behind else [StepMonitor(), curvature]
    quiet_trainer(max_epochs=1, logger=board, callbacks=callbacks).fit(Classifier(optimizer="HessianFree"), loader())
    events = EventAccumulator(board.log_dir, size_guidance={"scalars": 0}).Reload()
    logged = {e.step: e.value for e in events.Scalars("newton/step_norm")}
    shown = drawn[-1].training["newton/step_norm"]
    assert shown and shown == {step: pytest.approx(logged[step]) for step in shown}


def test_every_logger_gets_the_same_pixels(tmp_path: Path) -> None:
    board, wandb, mlflow = TensorBoardLogger(tmp_path), Wandb(), MLFlow()
    add_image(trainer(board, wandb, CSVLogger(tmp_path), mlflow), "curvature/x", figure())
    expected = pixels(figure())
    assert expected.shape == (50, 100, 3) and len(np.unique(expected)) > 2
    board.experiment.close()
    ((step, image),) = images_of(Path(board.log_dir))["curvature/x"]
    assert step == 30 and np.array_equal(image, expected)
    ((key, (image,), at),) = wandb.images
    assert (key, at) == ("curvature/x", 30) and np.array_equal(image, expected)
    ((run, image, file),) = mlflow.images
    assert (run, file) == ("run", "curvature/x/00000030.png") and np.array_equal(image, expected)


def test_only_the_process_that_writes_draws_and_only_for_loggers_that_take_images(tmp_path: Path) -> None:
    assert takes_images(trainer(CSVLogger(tmp_path), Wandb())) and takes_images(trainer(MLFlow()))
    assert not takes_images(trainer(CSVLogger(tmp_path))) and not takes_images(trainer())
    assert not takes_images(trainer(Wandb(), writes=False))


def test_the_loggers_libraries_are_not_imported() -> None:
    assert "wandb" not in sys.modules and "mlflow" not in sys.modules


@pytest.mark.parametrize(("every", "steps"), [(None, []), (1, [1, 2, 3]), (2, [2, 3]), (7, [3])])
def test_a_figure_of_the_run_comes_every_so_many_measurements_and_at_the_end(
    tmp_path: Path, every: int | None, steps: list[int]
) -> None:
    board, wandb = TensorBoardLogger(tmp_path), Wandb()
    monitor = CurvatureMonitor(every_n_train_steps=1, top=1, bottom=0, sharpness=None, figure_every=every)
    quiet_trainer(max_epochs=1, callbacks=[StepMonitor(), monitor], logger=[board, wandb]).fit(Classifier(), loader())
    board.experiment.close()
    images = images_of(Path(board.log_dir)).get("curvature/dashboard", [])
    assert [step for step, _ in images] == steps
    assert [step for _, _, step in wandb.images] == steps
    assert all(image.shape[1] == 900 for _, image in images)


def test_the_figure_shows_loss_newton_steps_and_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    name = "newtonopt.callbacks.curvature_monitor.add_image"
    monkeypatch.setattr(name, lambda trainer, tag, figure: seen.append((tag, figure)))
    monitor = CurvatureMonitor(1, top=1, bottom=0, sharpness=None, figure_every=9, prefix="mine")
    logger = TensorBoardLogger(tmp_path)
    quiet_trainer(max_epochs=1, callbacks=[StepMonitor(), monitor], logger=logger).fit(Classifier(), loader())
    ((tag, drawn),) = seen
    assert tag == "mine/dashboard"
    titles = [axes.get_title(loc="left") for axes in drawn.axes]
    wanted = ["Largest eigenvalues", "Training loss", "Damping, radius or sigma", "Actual over predicted decrease"]
    assert titles == wanted
    for axes in drawn.axes[1:]:
        assert [1.0, 2.0, 3.0] in [np.asarray(line.get_xdata()).tolist() for line in axes.lines]
    assert drawn.get_supxlabel().startswith("Step 3. The largest eigenvalue is ")


def test_figures_of_measurements_reach_the_other_loggers_too() -> None:
    wandb = Wandb()
    monitor = CurvatureMonitor(3, top=1, bottom=0, sharpness=None, measurements=[LossSlice()])
    quiet_trainer(max_epochs=1, callbacks=[monitor], logger=wandb).fit(Classifier("SGD"), loader())
    assert [(key, step) for key, _, step in wandb.images] == [("curvature/loss_slice", 3)]


def test_a_logger_that_fails_ends_nothing() -> None:
    class Broken(Wandb):
        def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: list[Any]) -> None:
            raise ConnectionError("no network")

    monitor = CurvatureMonitor(1, top=1, bottom=0, sharpness=None, figure_every=1)
    with pytest.warns(UserWarning, match="CurvatureMonitor draws no figures: no network"):
        quiet_trainer(max_epochs=1, callbacks=[monitor], logger=Broken()).fit(Classifier("SGD"), loader())


def test_without_matplotlib_there_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = CurvatureMonitor(1, top=1, bottom=0, sharpness=None, figure_every=1)
    for name in ("matplotlib.figure", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.warns(UserWarning, match="CurvatureMonitor draws no figures: A figure needs matplotlib"):
        quiet_trainer(max_epochs=1, callbacks=[monitor], logger=TensorBoardLogger(tmp_path)).fit(
            Classifier("SGD"), loader()
        )


@pytest.mark.parametrize("every", [0, -1, 1.5, "2"])
def test_figures_come_every_whole_number_of_measurements(every: Any) -> None:
    with pytest.raises(ValueError, match="figure_every must be a whole number"):
        CurvatureMonitor(figure_every=every)
