"""Set-ups of Lightning's Trainer and Fabric work with the Newton optimizers, or an error says what to change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning_problems import BATCHES, both_loggers, from_csv, from_events, loader, points, quiet_trainer
from torch import Tensor, nn

from newtonopt import DampedNewton, HessianFree
from newtonopt.callbacks import Budget, CurvatureMonitor, StepMonitor

NEWTON = pytest.mark.parametrize("optimizer", [HessianFree, DampedNewton])


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


class Plain(L.LightningModule):
    """A classifier that logs its loss, and nothing else."""

    def __init__(self, make_optimizer: Callable[..., Any] = HessianFree) -> None:
        super().__init__()
        self.layers = layers()
        self.make_optimizer = make_optimizer

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.layers(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def loss_on_all_points(self) -> float:
        x, y = points()
        with torch.no_grad():
            return F.cross_entropy(self.layers(x.to(self.layers[0].weight.dtype)).double(), y).item()


class MicroBatches(Plain):
    """Manual optimization: one step on the gradients of several micro-batches."""

    def __init__(self, make_optimizer: Callable[..., Any], parts: int) -> None:
        super().__init__(make_optimizer)
        self.automatic_optimization = False
        self.parts = parts

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()

        def closure() -> None:
            optimizer.zero_grad()
            for x, y in zip(*(t.chunk(self.parts) for t in batch), strict=True):
                self.manual_backward(F.cross_entropy(self.layers(x), y) * len(y) / len(batch[1]))

        optimizer.step(closure)


@NEWTON
def test_micro_batches_inside_one_closure_equal_the_full_batch(optimizer: Any) -> None:
    whole = MicroBatches(optimizer, 1).double()
    parts = copy.deepcopy(whole)
    parts.parts = 3
    before = whole.loss_on_all_points()
    for model in (whole, parts):
        trainer = quiet_trainer(max_epochs=3)
        trainer.fit(model, loader(22, dtype=torch.float64))
        assert trainer.global_step == 3
    assert whole.loss_on_all_points() < before
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-7, atol=1e-9)


class TwoNetworks(L.LightningModule):
    """Manual optimization with an optimizer for each of two networks that share a loss."""

    def __init__(self, second: Callable[..., Any], *, toggle: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.encoder = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.decoder = nn.Linear(5, 4)
        self.second = second
        self.toggle = toggle
        self.losses: list[float] = []

    def configure_optimizers(self) -> Any:
        return HessianFree(self.encoder.parameters()), self.second(self.decoder.parameters())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, _ = batch
        for optimizer in self.optimizers():  # type: ignore[union-attr]

            def closure(optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = F.mse_loss(self.decoder(self.encoder(x)), x)
                self.manual_backward(loss)
                return loss

            if self.toggle:
                self.toggle_optimizer(optimizer)
            self.losses.append(optimizer.step(closure).item())
            if self.toggle:
                self.untoggle_optimizer(optimizer)


@pytest.mark.parametrize("toggle", [False, True])
@pytest.mark.parametrize("second", [DampedNewton, HessianFree, lambda params: torch.optim.SGD(params, lr=0.1)])
def test_several_optimizers_under_manual_optimization(second: Callable[..., Any], toggle: bool) -> None:
    model = TwoNetworks(second, toggle=toggle)
    trainer = quiet_trainer(max_epochs=4)
    trainer.fit(model, loader(22))
    assert trainer.global_step == len(model.losses) == 8
    assert model.losses == sorted(model.losses, reverse=True)
    assert model.losses[-1] < 0.9 * model.losses[0]


@NEWTON
def test_max_steps_counts_newton_steps(optimizer: Any) -> None:
    model = Plain(optimizer)
    before = model.loss_on_all_points()
    trainer = quiet_trainer(max_epochs=-1, max_steps=BATCHES + 1)
    trainer.fit(model, loader())
    assert trainer.global_step == BATCHES + 1
    assert trainer.optimizers[0].state_dict()["state"][0]["steps"] == BATCHES + 1
    assert model.loss_on_all_points() < before


class ResumableLoader:
    """A loader of different batches whose place in the epoch Lightning saves and restores."""

    def __init__(self) -> None:
        self.first = self.following = 0

    def __iter__(self) -> Iterator[list[Tensor]]:
        first, self.first = self.first, 0
        for i, batch in enumerate(loader()):
            if i >= first:
                self.following = (i + 1) % BATCHES
                yield batch

    def __len__(self) -> int:
        return BATCHES

    def state_dict(self) -> dict[str, int]:
        return {"following": self.following}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["following"]


class Saver(L.Callback):
    """A callback that saves after the first batch of the second epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == BATCHES + 1:
            trainer.save_checkpoint(self.path)


@NEWTON
def test_resuming_in_the_middle_of_an_epoch_is_bit_equal(optimizer: Any, tmp_path: Path) -> None:
    start = Plain(optimizer)
    model, resumed = copy.deepcopy(start), copy.deepcopy(start)
    whole, rest = (quiet_trainer(max_epochs=3, callbacks=more) for more in ([Saver(tmp_path / "middle")], []))
    whole.fit(model, ResumableLoader())
    torch.load(tmp_path / "middle", weights_only=True)
    rest.fit(resumed, ResumableLoader(), ckpt_path=tmp_path / "middle")
    assert rest.global_step == whole.global_step == 3 * BATCHES
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
    ours, theirs = rest.optimizers[0].state_dict(), whole.optimizers[0].state_dict()
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)


def halving(optimizer: Any) -> Callable[..., Any]:
    def make(params: Any) -> Any:
        newton = optimizer(params)
        schedule = torch.optim.lr_scheduler.StepLR(newton, step_size=1, gamma=0.5)
        return {"optimizer": newton, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return make


@NEWTON
def test_learning_rates_are_monitored(optimizer: Any, tmp_path: Path) -> None:
    monitor = LearningRateMonitor(logging_interval="step", log_weight_decay=True)
    quiet_trainer(max_epochs=1, logger=both_loggers(tmp_path), callbacks=[monitor]).fit(
        Plain(halving(optimizer)), loader()
    )
    rates = list(enumerate([1.0, 0.5, 0.25]))
    assert from_events(tmp_path)[f"lr-{optimizer.__name__}"] == rates
    assert from_csv(tmp_path)[f"lr-{optimizer.__name__}"] == rates
    assert from_events(tmp_path)[f"lr-{optimizer.__name__}-weight_decay"] == [(step, 0.0) for step, _ in rates]


class Skipping(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if batch_idx == 0 else None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # Lightning's own, once a process
def test_a_training_step_without_a_loss_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="return the loss from training_step: None"):
        quiet_trainer(max_epochs=1).fit(Skipping(HessianFree), loader())


class Kept(L.Callback):
    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        self.weights.append([p.detach().clone() for p in pl_module.parameters()])


@NEWTON
@pytest.mark.parametrize("batch_norm", [False, True])
def test_stochastic_weight_averaging(optimizer: Any, batch_norm: bool) -> None:
    model, kept = Plain(optimizer), Kept()
    if batch_norm:
        model.layers.insert(1, nn.BatchNorm1d(6))
    swa = StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=2, annealing_epochs=1)
    trainer = quiet_trainer(max_epochs=5, callbacks=[kept, swa])
    trainer.fit(model, loader(22))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5)
    for p, *averaged in zip(model.parameters(), *kept.weights[:4], strict=True):
        torch.testing.assert_close(p.detach(), torch.stack(averaged).mean(0))


@NEWTON
def test_early_stopping_on_the_loss(optimizer: Any) -> None:
    stop = EarlyStopping("loss", stopping_threshold=0.3, patience=100)
    model = Plain(optimizer)
    trainer = quiet_trainer(max_epochs=100, callbacks=[stop])
    trainer.fit(model, loader(22))
    assert 0 < stop.stopped_epoch < 99
    assert float(trainer.callback_metrics["loss"]) < 0.3


@NEWTON
def test_early_stopping_on_curvature(optimizer: Any) -> None:
    stop = EarlyStopping("curvature/lambda_max", mode="max", stopping_threshold=-1e9, strict=False)
    monitors = [
        CurvatureMonitor(every_n_train_steps=2, sharpness=None, budget=Budget(max_products=30)),
        StepMonitor(),
        stop,
    ]
    trainer = quiet_trainer(max_epochs=5, callbacks=monitors)
    trainer.fit(Plain(optimizer), loader(22))
    assert trainer.global_step == 2, "the first measurement"


@NEWTON
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_takes_the_steps_of_a_plain_loop(optimizer: Any, precision: Any) -> None:
    x, y = points()
    by_hand, start = layers(), layers()
    by_hand.load_state_dict(start.state_dict())
    newton = optimizer(by_hand.parameters())

    def plain_closure() -> Tensor:
        newton.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
            scores = by_hand(x)
        loss = F.cross_entropy(scores.float(), y)
        loss.backward()
        return loss

    fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision)
    model, by_fabric = fabric.setup(start, optimizer(start.parameters()))

    def closure() -> Tensor:
        by_fabric.zero_grad()
        loss = F.cross_entropy(model(x), y)
        fabric.backward(loss)
        return loss

    for _ in range(3):
        expected, loss = newton.step(plain_closure), by_fabric.step(closure)
        assert torch.equal(loss, expected)
    assert all(map(torch.equal, by_hand.parameters(), start.parameters()))
    assert by_fabric.optimizer.last_step.accepted


@NEWTON
def test_fabric_saves_and_resumes(optimizer: Any, tmp_path: Path) -> None:
    x, y = points()
    fabric = L.Fabric(accelerator="cpu", devices=1)

    def run(network: nn.Module, steps: int, load: bool = False, save: bool = False) -> None:
        model, newton = fabric.setup(network, optimizer(network.parameters()))
        state = {"model": model, "optimizer": newton}
        if load:
            fabric.load(tmp_path / "state", state)

        def closure() -> Tensor:
            newton.zero_grad()
            loss = F.cross_entropy(model(x), y)
            fabric.backward(loss)
            return loss

        for _ in range(steps):
            newton.step(closure)
        if save:
            fabric.save(tmp_path / "state", state)

    whole, half, rest = (layers() for _ in range(3))
    half.load_state_dict(whole.state_dict())
    run(whole, 4)
    run(half, 2, save=True)
    torch.load(tmp_path / "state", weights_only=True)
    run(rest, 2, load=True)
    assert all(map(torch.equal, whole.parameters(), rest.parameters()))


@NEWTON
def test_trains_with_bfloat16_weights(optimizer: Any) -> None:
    model = Plain(optimizer)
    before = model.loss_on_all_points()
    quiet_trainer(precision="bf16-true", max_epochs=8).fit(model, loader(22))
    assert model.layers[0].weight.dtype == torch.bfloat16
    assert model.loss_on_all_points() < 0.8 * before


@NEWTON
@pytest.mark.parametrize("device", DEVICES)
def test_float16_with_a_gradient_scaler_is_refused_with_advice(optimizer: Any, device: str) -> None:
    plugin = MixedPrecision("16-mixed", device, torch.amp.GradScaler(device))
    accelerator = "gpu" if device == "cuda" else "cpu"
    with pytest.raises(RuntimeError, match=r'precision="16-mixed".*use precision="bf16-mixed" or "32-true"'):
        quiet_trainer(plugins=plugin, accelerator=accelerator, devices=1).fit(Plain(optimizer), loader())


@NEWTON
def test_float16_weights_are_refused_with_advice(optimizer: Any) -> None:
    with pytest.raises(ValueError, match=r"torch\.float16.*Keep the weights in float32.*bf16-mixed"):
        quiet_trainer(precision="16-true").fit(Plain(optimizer), loader())
