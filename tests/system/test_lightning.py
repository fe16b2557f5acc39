"""The Newton optimizers in Lightning's Trainer, with its closure unmodified."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_problems import (
    BATCHES,
    OPTIMIZERS,
    Classifier,
    Recorder,
    both_loggers,
    from_csv,
    from_events,
    loader,
    points,
    quiet_trainer,
)
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_precision, multiclass_recall

from newtonopt import DampedNewton, HessianFree

NEWTON = pytest.mark.parametrize("optimizer", ["HessianFree", "DampedNewton"])


def loss_on_all_points(model: Classifier) -> float:
    x, y = points()
    model = copy.deepcopy(model).double().train()
    return F.cross_entropy(model.layers(x.double()), y).item()


@NEWTON
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_trains_in_each_precision(optimizer: str, precision: str) -> None:
    model = Classifier(optimizer, dropout=0.0)
    before = loss_on_all_points(model)
    dtype = torch.float64 if precision == "64-true" else torch.float32
    quiet_trainer(precision=precision, max_epochs=8).fit(model, loader(22, dtype=dtype))
    assert loss_on_all_points(model) < 0.5 * before
    assert model.layers[0].weight.dtype == dtype


def parameters_after(model: Classifier, **settings: Any) -> list[Tensor]:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    quiet_trainer(**settings).fit(model, loader())
    return [p.detach().clone() for p in model.parameters()]


@NEWTON
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_warns_once_and_changes_nothing(optimizer: str, algorithm: str) -> None:
    model = Classifier(optimizer)
    plain = parameters_after(copy.deepcopy(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message=".*(LeafSpec|many workers|torch.jit)")
        clipped = parameters_after(model, gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm)
    assert [str(w.message)[:30] for w in caught] == ["The closure clips gradients. n"]
    assert all(map(torch.equal, plain, clipped))


def test_accumulation_is_refused_with_advice() -> None:
    with pytest.raises(
        RuntimeError, match=r"set accumulate_grad_batches=1 in Lightning. To use several batches, loop over them"
    ):
        quiet_trainer(accumulate_grad_batches=2).fit(Classifier(), loader())


@pytest.mark.parametrize("optimizer", [HessianFree, DampedNewton])
def test_a_step_without_closure_says_which_precision_to_use(optimizer: Callable[..., Any]) -> None:
    with pytest.raises(
        RuntimeError, match=r'precision="16-mixed", whose gradient scaler.*use precision="bf16-mixed" or "32-true"'
    ):
        optimizer(Classifier().parameters()).step()


@NEWTON
def test_logs_hold_the_recorded_points_and_nothing_else(optimizer: str, tmp_path: Path) -> None:
    model = Classifier(optimizer)
    quiet_trainer(logger=both_loggers(tmp_path)).fit(model, loader())
    calls, first = model.calls, model.calls.recorded()
    assert len(first) == 2 * BATCHES < len(calls.batches), "some steps must have tried something"
    losses = torch.stack([calls.losses[i] for i in first])
    scores, labels = ([values[i] for i in first] for values in (calls.scores, calls.labels))
    sizes = torch.tensor([float(len(y)) for y in labels])
    epochs = [slice(0, BATCHES), slice(BATCHES, 2 * BATCHES)]

    def mean(values: Tensor) -> Tensor:
        return torch.stack([(values[e] * sizes[e]).sum() / sizes[e].sum() for e in epochs])

    def overall(metric: Callable[..., Tensor], **settings: Any) -> Tensor:
        return torch.stack(
            [metric(torch.cat(scores[e]), torch.cat(labels[e]), num_classes=3, **settings) for e in epochs]
        )

    accuracies = [
        multiclass_accuracy(z, y, num_classes=3, average="micro") for z, y in zip(scores, labels, strict=True)
    ]
    steps, ends = list(range(2 * BATCHES)), [BATCHES - 1, 2 * BATCHES - 1]
    expected = {
        "loss_step": (steps, losses),
        "loss_epoch": (ends, mean(losses)),
        "accuracy_step": (steps, torch.stack(accuracies)),
        "accuracy_epoch": (ends, overall(multiclass_accuracy, average="micro")),
        "updated": (ends, overall(multiclass_accuracy, average="micro")),
        "precision": (ends, overall(multiclass_precision)),
        "recall": (ends, overall(multiclass_recall)),
        "twice": (ends, mean(2 * losses)),
        "square": (ends, mean(losses**2)),
    }
    events, table = from_events(tmp_path), from_csv(tmp_path)
    assert events.pop("raw") == list(zip(steps, losses.tolist(), strict=True))
    assert events.keys() - {"epoch"} == table.keys() == expected.keys()
    for tag, (at, values) in expected.items():
        for written in (events[tag], table[tag]):
            assert [step for step, _ in written] == at, tag
            torch.testing.assert_close(torch.tensor([value for _, value in written]), values, rtol=1e-6, atol=1e-6)
    assert events["loss_step"] == list(zip(steps, losses.tolist(), strict=True)), "one value per batch, to the bit"


class NormLogger(L.Callback):
    """A callback that logs from inside the closure, like callbacks that watch gradients."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Classifier, optimizer: Any) -> None:
        norm = torch.cat([p.grad.flatten() for p in pl_module.parameters()]).norm()
        self.log("by_callback", norm, on_step=False, on_epoch=True, batch_size=1)
        self.log_dict({"by_callbacks_dict": norm}, on_step=False, on_epoch=True, batch_size=1)
        pl_module.log("by_module", norm, on_step=False, on_epoch=True, batch_size=1)


def test_callbacks_that_log_inside_the_closure_log_the_recorded_points() -> None:
    model, trainer = Classifier(), quiet_trainer(max_epochs=1, callbacks=[NormLogger()])
    trainer.fit(model, loader())
    norms = [torch.cat([g.flatten() for g in model.calls.gradients[i]]).norm() for i in model.calls.recorded()]
    for tag in ("by_callback", "by_callbacks_dict", "by_module"):
        torch.testing.assert_close(
            trainer.callback_metrics[tag], torch.stack(norms).mean(), msg=lambda m, tag=tag: f"{tag}: {m}"
        )


class Drawing(Classifier):
    """A module that asks its logger for the folder of a file."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        folder = Path(self.logger.log_dir)
        folder.mkdir(exist_ok=True)
        (folder / f"{self.logger.version}-{batch_idx}.txt").write_text(self.logger.experiment.log_dir)
        return super().training_step(batch, batch_idx)


def test_trials_can_ask_the_logger_for_its_folder(tmp_path: Path) -> None:
    model = Drawing()
    quiet_trainer(max_epochs=1, logger=both_loggers(tmp_path)).fit(model, loader())
    assert len(model.calls.recorded()) < len(model.calls.batches)
    assert {path.name for path in tmp_path.rglob("*.txt")} == {f"tb-{i}.txt" for i in range(BATCHES)}


@NEWTON
@pytest.mark.parametrize(
    "clip", [None, pytest.param(1e-3, marks=pytest.mark.filterwarnings("ignore:The closure clips"))]
)
def test_outputs_and_gradients_are_the_recorded_points(optimizer: str, clip: float | None) -> None:
    model, recorder = Classifier(optimizer), Recorder()
    quiet_trainer(callbacks=[recorder], gradient_clip_val=clip).fit(model, loader())
    calls, first = model.calls, model.calls.recorded()
    assert len(first) < len(calls.losses)
    assert [o["loss"].item() for o in recorder.outputs] == [calls.losses[i].item() for i in first]
    assert [o["scores"].shape for o in recorder.outputs] == 2 * [(8, 3), (8, 3), (6, 3)]
    for left, i in zip(recorder.gradients, first, strict=True):
        torch.testing.assert_close(left, calls.gradients[i])


class Manual(Classifier):
    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer, dropout=0.0)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = super(Manual, self).training_step(batch, batch_idx)["loss"]
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


@NEWTON
def test_manual_optimization(optimizer: str, tmp_path: Path) -> None:
    model = Manual(optimizer)
    before = loss_on_all_points(model)
    quiet_trainer(max_epochs=8, logger=both_loggers(tmp_path)).fit(model, loader(22))
    assert loss_on_all_points(model) < 0.5 * before
    recorded = [model.calls.losses[i].item() for i in model.calls.recorded()]
    assert [value for _, value in from_events(tmp_path)["loss_step"]] == recorded


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_manual_step_without_a_closure_asks_for_one(wrapped: bool) -> None:
    class Without(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers(use_pl_optimizer=wrapped)
            self.manual_backward(Classifier.training_step(self, batch, batch_idx)["loss"])
            optimizer.step()

    with pytest.raises(RuntimeError, match=r"needs a closure .*: optimizer\.step\(closure\), under manual"):
        quiet_trainer(max_epochs=1).fit(Without(lambda params: HessianFree(params)), loader(22))


def test_several_steps_a_batch_log_and_hand_over_the_first_points(tmp_path: Path) -> None:
    model, recorder = Classifier(lambda params: HessianFree(params, rank=10, steps_per_call=3)), Recorder()
    trainer = quiet_trainer(callbacks=[recorder], logger=both_loggers(tmp_path))
    trainer.fit(model, loader())
    calls, first = model.calls, model.calls.recorded()
    assert len(calls.losses) > 3 * len(first) and trainer.global_step == 2 * BATCHES
    losses = [calls.losses[i].item() for i in first]
    assert [value for _, value in from_events(tmp_path)["loss_step"]] == losses
    assert [o["loss"].item() for o in recorder.outputs] == losses
    for left, i in zip(recorder.gradients, first, strict=True):
        torch.testing.assert_close(left, calls.gradients[i])
    assert model.layers[1].num_batches_tracked == 2 * BATCHES, "the statistics moved once a batch"
    assert trainer.optimizers[0].last_step.steps == 3


class OfPart(Classifier):
    """Manual optimization with curvature from the first rows of the batch."""

    def __init__(self) -> None:
        super().__init__("HessianFree", dropout=0.0)
        self.automatic_optimization = False
        self.of_part = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()

        def closure(rows: int = 22) -> Tensor:
            optimizer.zero_grad()
            loss = super(OfPart, self).training_step([t[:rows] for t in batch], batch_idx)["loss"]
            self.manual_backward(loss)
            return loss

        optimizer.step(closure, curvature_closure=lambda: closure(11))


def test_curvature_of_a_part_under_manual_optimization(tmp_path: Path) -> None:
    model = OfPart()
    before = loss_on_all_points(model)
    quiet_trainer(max_epochs=8, logger=both_loggers(tmp_path)).fit(model, loader(22))
    assert loss_on_all_points(model) < 0.5 * before
    sizes = [len(y) for y in model.calls.labels]
    whole = [i for i, size in enumerate(sizes) if size == 22]
    assert sizes.count(11) == 8, "one run of the part a step"
    epochs = [model.calls.batches[i][0] for i in whole]
    recorded = [model.calls.losses[whole[epochs.index(epoch)]].item() for epoch in range(8)]
    assert [value for _, value in from_events(tmp_path)["loss_step"]] == recorded
    assert model.layers[1].num_batches_tracked == 8


class Seeded(Classifier):
    """A module whose random numbers depend on the step only: Lightning does not save the random state."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed = self.global_step
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)


class Saver(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


@NEWTON
def test_resuming_from_a_checkpoint_is_bit_equal(optimizer: str, tmp_path: Path) -> None:
    start = Seeded(optimizer)
    model, resumed = copy.deepcopy(start), copy.deepcopy(start)
    whole, rest = (quiet_trainer(max_epochs=4, callbacks=more) for more in ([Saver(tmp_path / "half")], []))
    whole.fit(model, loader())
    torch.load(tmp_path / "half", weights_only=True)
    rest.fit(resumed, loader(), ckpt_path=tmp_path / "half")
    assert rest.global_step == whole.global_step == 4 * BATCHES
    assert len(resumed.calls.recorded()) == 2 * BATCHES
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
    ours, theirs = rest.optimizers[0].state_dict(), whole.optimizers[0].state_dict()
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)
    assert ours["param_groups"] == theirs["param_groups"]


def with_schedule_and_groups(kind: str) -> Callable[..., Any]:
    def make(params: Any) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        params = list(params)
        groups = [{"params": params[:2], "lr": 0.3, "weight_decay": 0.1}, {"params": params[2:]}]
        optimizer = type(OPTIMIZERS[kind](params))(groups, lr=1.0, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return make


@NEWTON
def test_schedulers_and_groups_give_the_steps_of_a_plain_loop(optimizer: str) -> None:
    by_trainer = Seeded(with_schedule_and_groups(optimizer))
    by_hand = copy.deepcopy(by_trainer)
    trainer = quiet_trainer()
    trainer.fit(by_trainer, loader())

    [newton], [schedule] = by_hand.configure_optimizers()
    for step, (x, y) in enumerate(2 * list(loader())):
        torch.manual_seed(step)
        random.seed(step)
        np.random.seed(step)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            newton.zero_grad()
            scores = by_hand.layers(x * (1 + 0.01 * random.random() + 0.01 * np.random.rand()))
            loss = F.cross_entropy(scores, y)
            loss.backward()
            return loss

        newton.step(closure)
        schedule["scheduler"].step()
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates == pytest.approx([0.3 / 8, 1 / 8]), "halved after steps 2, 4 and 6"
    assert math.isfinite(newton.last_step.loss) and newton.last_step == trainer.optimizers[0].last_step
    torch.testing.assert_close(by_trainer.layers.state_dict(), by_hand.layers.state_dict(), rtol=0, atol=0)
