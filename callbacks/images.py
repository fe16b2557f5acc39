"""Figures as images in every logger that takes images: TensorBoard, wandb and MLflow."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

from newtonopt.curvature.drawing import pixels


def takes_images(trainer: Trainer) -> bool:
    """Return whether a logger takes images, on the process that writes."""
    return trainer.is_global_zero and any(
        isinstance(logger, (TensorBoardLogger, WandbLogger, MLFlowLogger)) for logger in trainer.loggers
    )


def add_image(trainer: Trainer, tag: str, figure: Any) -> None:
    """Write a figure of matplotlib's at the global step, drawn once for all loggers; MLflow gets a file a step."""
    step = trainer.global_step
    image = pixels(figure)
    for logger in trainer.loggers:
        # The experiment of each logger is an object of another library, which need not be installed.
        experiment: Any
        if isinstance(logger, TensorBoardLogger):
            experiment = logger.experiment
            experiment.add_image(tag, image, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(tag, [image], step)
        elif isinstance(logger, MLFlowLogger):
            experiment = logger.experiment
            experiment.log_image(logger.run_id, image, f"{tag}/{step:08d}.png")
