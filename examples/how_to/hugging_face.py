"""Curvature from the Hugging Face `Trainer`, whose code stays as it is: `python examples/how_to/hugging_face.py`.

A small BERT reads handwritten digits as sequences. One callback measures the loss of the first samples at every few
steps, prints what the values mean and writes them for TensorBoard. Needs `pip install transformers accelerate`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from newtonopt.curvature import Measured, Preconditioned, add_to_tensorboard, measure

STEPS, EVERY, SAMPLES = 60, 20, 32


class CurvatureCallback(TrainerCallback):
    """Measure curvature after the first step and after every so many."""

    def __init__(self, folder: str, every: int) -> None:
        self.writer, self.every = SummaryWriter(folder), every
        self.last: Measured | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == 1 or state.global_step % self.every == 0:
            self._measure(state.global_step, given["model"], given["optimizer"], given["train_dataloader"])

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.writer.close()

    def _measure(self, step: int, model: Any, optimizer: Any, loader: Any) -> None:
        # The samples come from the data set: to iterate the loader would draw random numbers that training needs.
        batch = loader.collate_fn([loader.dataset[i] for i in range(SAMPLES)])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        self.last = measure(
            lambda: model(**batch).loss,
            model.parameters(),
            optimizer.optimizer,  # accelerate wraps the one whose class tells the stability threshold
            measurements=[Preconditioned()],
            max_products=24,
            last=self.last,
        )
        add_to_tensorboard(self.writer, self.last, step)
        print(f"step {step}", self.last.in_words(), sep="\n", end="\n\n")


def digits() -> list[dict[str, Tensor]]:
    """Return each image as a sequence of 16 tokens, the means over 2 x 2 pixels, and its label."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    tokens = torch.nn.functional.avg_pool2d(images.view(-1, 1, 8, 8), 2).round().long().flatten(1)
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens[:500], labels[:500], strict=True)]


def main(folder: str = "logs/hugging_face", watched: bool = True) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=17,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=10,
    )
    model = BertForSequenceClassification(config)
    arguments = TrainingArguments(
        output_dir=os.path.join(folder, "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    callbacks = [CurvatureCallback(folder, EVERY)] if watched else []
    Trainer(model, arguments, train_dataset=digits(), callbacks=callbacks).train()
    return model


if __name__ == "__main__":
    main()
