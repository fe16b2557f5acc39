"""Train a classifier of handwritten digits from the command line, with any optimizer and any callback.

    python examples/digits.py fit --config configs/hessian_free.yaml

The data are scikit-learn's 1797 real 8 x 8 images. Everything else is Lightning's own: `--optimizer` takes
`newtonopt.HessianFree` as it takes `torch.optim.Adam`, and `--trainer.callbacks` takes
`newtonopt.callbacks.CurvatureMonitor`. `python examples/digits.py fit --help` lists all options.
"""

from __future__ import annotations

import itertools
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

PIXELS, CLASSES = 64, 10


class DigitsClassifier(L.LightningModule):
    """A small network for 8 x 8 grey images and its loss.

    Args:
        network: `"mlp"`, fully connected, or `"conv"`, 3 x 3 convolutions, each followed by 2 x 2 mean pooling.
        hidden: the widths of the hidden layers, or the channels of the convolutions (three at most).
        activation: the nonlinearity after each hidden layer. Tanh is smooth; ReLU has no second derivative of its own.
        loss: `"cross_entropy"`, or `"mse"` for half the mean squared distance between outputs and one-hot targets.
    """

    def __init__(
        self,
        network: Literal["mlp", "conv"] = "mlp",
        hidden: tuple[int, ...] = (128,),
        activation: Literal["tanh", "relu"] = "tanh",
        loss: Literal["cross_entropy", "mse"] = "cross_entropy",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        nonlinearity = nn.Tanh if activation == "tanh" else nn.ReLU
        self.network = (_mlp if network == "mlp" else _conv)(hidden, nonlinearity)
        self.loss = _half_squared_distance if loss == "mse" else F.cross_entropy

    def forward(self, images: Tensor) -> Tensor:
        """Return scores, shape (batch, 10), of images of shape (batch, 64)."""
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch; log it with the share of images classified correctly."""
        return self._evaluate(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log loss and accuracy on the held-out images."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log loss and accuracy on the held-out images as a test."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        loss, accuracy = self.score(*batch)
        self.log(f"{stage}_loss", loss, prog_bar=stage == "train", batch_size=len(batch[0]))
        self.log(f"{stage}_accuracy", accuracy, prog_bar=stage == "val", batch_size=len(batch[0]))
        return loss

    def score(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean loss and accuracy over the given images."""
        outputs = self(images)
        return self.loss(outputs, labels), (outputs.argmax(1) == labels).float().mean()


def _mlp(widths: tuple[int, ...], nonlinearity: type[nn.Module]) -> nn.Sequential:
    layers = [layer for pair in itertools.pairwise((PIXELS, *widths)) for layer in (nn.Linear(*pair), nonlinearity())]
    return nn.Sequential(*layers, nn.Linear((PIXELS, *widths)[-1], CLASSES))


def _conv(channels: tuple[int, ...], nonlinearity: type[nn.Module]) -> nn.Sequential:
    if not 1 <= len(channels) <= 3:
        raise ValueError(f"hidden must be one to three channels, since each halves the 8 x 8 images, got {channels}.")
    blocks = [
        layer
        for pair in itertools.pairwise((1, *channels))
        for layer in (nn.Conv2d(*pair, kernel_size=3, padding=1), nonlinearity(), nn.AvgPool2d(2))
    ]
    features = channels[-1] * PIXELS // 4 ** len(channels)
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *blocks, nn.Flatten(), nn.Linear(features, CLASSES))


def _half_squared_distance(outputs: Tensor, labels: Tensor) -> Tensor:
    targets = F.one_hot(labels, CLASSES).to(outputs.dtype)
    return F.mse_loss(outputs, targets, reduction="sum") / (2 * len(outputs))


class DigitsData(L.LightningDataModule):
    """Scikit-learn's digits, split into images to train on and images to hold out, every class in proportion.

    Args:
        batch_size: images in a training batch; 0 takes all of them in every step.
        test_fraction: share of the 1797 images held out for validation and test, in [0, 1); 0 trains on all of them.
        standardize: scale each pixel to mean 0 and deviation 1 over the training images, instead of to [0, 1].
        seed: seed of the split, independent of the training seed.
    """

    def __init__(self, batch_size: int = 0, test_fraction: float = 0.2, standardize: bool = False, seed: int = 0):
        super().__init__()
        if batch_size < 0:
            raise ValueError(f"batch_size must be zero or positive, got {batch_size}. Write 0 for all images at once.")
        if not 0 <= test_fraction < 1:
            raise ValueError(f"test_fraction must be in [0, 1), got {test_fraction}.")
        images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
        train, held_out = _split(labels, test_fraction, seed)
        if standardize:
            deviation, mean = torch.std_mean(images[train], dim=0, correction=0)
            images = (images - mean) / torch.where(deviation > 0, deviation, 1)  # some border pixels are always 0
        else:
            images = images / 16
        self.train = _Batches(images[train].float(), labels[train])
        self.held_out = _Batches(images[held_out].float(), labels[held_out])
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        """Return the training images, in a new order in each epoch unless every batch holds all of them."""
        shuffle = 0 < self.batch_size < len(self.train)
        return DataLoader(self.train, self.batch_size or len(self.train), shuffle=shuffle, collate_fn=tuple)

    def val_dataloader(self) -> list[DataLoader]:
        """Return the held-out images as one batch; an empty list when all images are for training."""
        return [DataLoader(self.held_out, len(self.held_out), collate_fn=tuple)] if len(self.held_out) else []

    test_dataloader = val_dataloader


class _Batches(TensorDataset):
    """Tensors that give a whole batch at once: stacking 1797 single images costs more than a training step."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return self[torch.tensor(indices)]


def _split(labels: Tensor, test_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    everything = torch.arange(len(labels))
    if test_fraction == 0:
        return everything, everything[:0]
    return train_test_split(everything, test_size=test_fraction, stratify=labels, random_state=seed)


class DigitsCLI(LightningCLI):
    """LightningCLI, plus a table of results after `fit`."""

    def after_fit(self) -> None:
        """Print accuracy, loss, curvature where a monitor measured it, and where to look further."""
        if not self.trainer.is_global_zero:
            return
        metrics = self.trainer.callback_metrics
        console = Console()
        console.print(table_of([*_scores(self.model, self.datamodule), *_curvature(metrics)], metrics))
        if self.trainer.log_dir is not None:
            console.print(f"Logs: {self.trainer.log_dir}", soft_wrap=True, highlight=False)
            console.print(f"See them: {tensorboard_command(self.trainer.log_dir)}", soft_wrap=True, highlight=False)


def table_of(rows: Iterable[tuple[str, ...]], metrics: Mapping[str, Tensor]) -> Table:
    """Return the rows as a table. Intervals are called bounds only if the last measurement was certified."""
    followed = float(metrics.get("curvature-bookkeeping/certified", 1.0)) == 0.0
    table = Table("", "value", "interval" if followed else "bounds", title="At the end of training")
    if followed:
        table.caption = "The last measurement tracked the one before: each interval holds an eigenvalue, "
        table.caption += "perhaps not the extreme one."
    for row in rows:
        table.add_row(*row)
    return table


def tensorboard_command(folder: str) -> str:
    """Return a command that also works outside the virtual environment, where no program `tensorboard` is found."""
    return shlex.join([sys.executable, "-m", "tensorboard.main", "--logdir", folder])


@torch.no_grad()
def _scores(model: DigitsClassifier, data: DigitsData) -> Iterator[tuple[str, ...]]:
    model.eval()
    for name, batches in (("train", data.train), ("test", data.held_out)):
        if len(batches):
            loss, accuracy = model.score(*(tensor.to(model.device) for tensor in batches.tensors))
            yield f"{name} accuracy", f"{accuracy:.2%}", ""
            yield f"{name} loss", f"{loss:.4g}", ""


def _curvature(metrics: dict[str, Tensor]) -> Iterator[tuple[str, ...]]:
    for name, tag in (
        ("largest Hessian eigenvalue", "lambda_max"),
        ("smallest Hessian eigenvalue", "lambda_min"),
        ("sharpness", "sharpness"),
        ("largest preconditioned eigenvalue", "preconditioned_lambda_max"),
        ("stability threshold", "stability_threshold"),
    ):
        value, lower, upper = (metrics.get(f"curvature/{tag}{end}") for end in ("", "_lower", "_upper"))
        if value is not None:
            yield name, f"{value:.4g}", "" if lower is None or upper is None else f"{lower:.6g} to {upper:.6g}"


if __name__ == "__main__":
    # https://github.com/Lightning-AI/pytorch-lightning/issues/21326: Lightning calls a function that torch has renamed.
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the data are in memory already
    DigitsCLI(DigitsClassifier, DigitsData)
