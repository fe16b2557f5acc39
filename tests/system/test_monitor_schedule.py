"""When CurvatureMonitor measures, in real training runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping
from lightning_problems import (
    BATCHES,
    Classifier,
    both_loggers,
    from_csv,
    from_events,
    loader,
    monitor_of,
    quiet_trainer,
)
from torch import Tensor, nn

from newtonopt.callbacks import Budget, CurvatureMonitor
from newtonopt.callbacks.curvature_monitor import Allowance


def quick(**settings: Any) -> CurvatureMonitor:
    return monitor_of({"top": 1, "bottom": 0, "sharpness": None, "max_products": 8, **settings})


class Validated(Classifier):
    """Has a validation and a test, and remembers in which stage it was measured."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.layers(batch[0]), batch[1]))

    test_step = validation_step


class Broken(Validated):
    """A module whose loss for measurements fails."""

    def broken(self, batch: Any, batch_idx: int) -> Tensor:
        raise ArithmeticError("no loss here")


def measured_steps(folder: Path, monitor: CurvatureMonitor, **settings: Any) -> list[int]:
    trainer = quiet_trainer(callbacks=[monitor], logger=both_loggers(folder), **settings)
    trainer.fit(Validated("SGD"), loader(), loader())
    return [step for step, _ in from_csv(folder).get("curvature-bookkeeping/products", [])]


@pytest.mark.parametrize(
    ("monitor", "settings", "steps"),
    [
        ({"every_n_epochs": 1}, {}, [3, 6, 9]),
        ({"every_n_epochs": 2}, {}, [6]),
        ({"every_n_epochs": 1}, {"max_steps": 5}, [3, 5]),
        ({"every_n_epochs": 1}, {"limit_train_batches": 2}, [2, 4, 6]),
        ({"every_n_epochs": 1, "num_batches": 5}, {}, [3, 6, 9]),
        ({"at_start": True}, {}, [0]),
        ({"at_end": True}, {}, [9]),
        ({"every_n_train_steps": 3, "at_start": True, "at_end": True}, {}, [0, 3, 6, 9]),
        ({"at_start": True, "num_batches": 3}, {}, [2]),
        ({"at_start": True, "at_end": True}, {"accumulate_grad_batches": 3}, [0, 3]),
    ],
    ids=str,
)
def test_it_measures_when_told_to(
    monitor: dict[str, Any], settings: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    assert measured_steps(tmp_path, quick(**monitor), **{"max_epochs": 3, **settings}) == steps


@pytest.mark.parametrize(
    ("monitor", "settings", "why"),
    [
        ({}, {}, r"ended at step 3, before one was due by every_n_train_steps=100\. Lower that, or set at_end=True"),
        ({"every_n_epochs": 2}, {}, r"ended at step 3, before every_n_epochs=2 had passed\. Lower that"),
        ({"every_n_train_steps": 1, "num_batches": 7}, {"max_steps": 2}, r"num_batches=7, and training had seen 2"),
    ],
    ids=str,
)
def test_a_fit_without_a_measurement_says_why(
    monitor: dict[str, Any], settings: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=f"measured nothing in this fit: .*{why}") as caught:
        assert measured_steps(tmp_path, quick(**monitor), **{"max_epochs": 1, **settings}) == []
    assert sum("measured nothing" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize("monitor", [{}, {"num_batches": 7}, {"every_n_epochs": 2}, {"max_overhead": 1e-9}], ids=str)
@pytest.mark.parametrize("batches", [True, 2])
def test_a_trial_run_measures_once(monitor: dict[str, Any], batches: Any) -> None:
    """Whoever asks for one wants to know whether all works."""
    callback = quick(**monitor)
    trainer = quiet_trainer(callbacks=[callback], fast_dev_run=batches)
    trainer.fit(Validated("SGD"), loader(), loader())
    assert float(trainer.callback_metrics["curvature/lambda_max"]) > 0.0
    assert callback._measured_at == trainer.global_step == int(batches)


def test_a_trial_run_shows_a_failure() -> None:
    trainer = quiet_trainer(callbacks=[quick(step="broken")], fast_dev_run=True)
    with pytest.warns(UserWarning, match="CurvatureMonitor could not measure at step 1, .*: no loss here"):
        trainer.fit(Broken("SGD"), loader(), loader())


class Silent(Classifier):
    """Logs nothing: a barebones Trainer warns of whatever is logged."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def on_train_epoch_end(self) -> None:
        pass


def test_a_barebones_run_says_why_nothing_is_measured() -> None:
    bare = {"log_every_n_steps": None, "logger": None, "enable_checkpointing": None}
    bare |= {"enable_progress_bar": None, "enable_model_summary": None}
    monitor = quick(every_n_train_steps=1, at_start=True, at_end=True)
    trainer = quiet_trainer(callbacks=[monitor], barebones=True, **bare)
    with pytest.warns(UserWarning, match=r"measures nothing under Trainer\(barebones=True\)") as caught:
        trainer.fit(Silent("SGD"), loader())
    assert sum("CurvatureMonitor" in str(warning.message) for warning in caught) == 1
    assert "curvature/lambda_max" not in trainer.callback_metrics
    monitor.setup(trainer, Silent("SGD"), "fit")
    assert monitor._enabled  # the next run may be another


def test_intervals_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="every_n_train_steps must be None beside every_n_epochs=1, got 5"):
        CurvatureMonitor(every_n_train_steps=5, every_n_epochs=1)
    with pytest.raises(ValueError, match="every_n_epochs must be a whole number and at least 1, got 0"):
        CurvatureMonitor(every_n_epochs=0)


def test_measuring_takes_no_larger_share_than_allowed(tmp_path: Path) -> None:
    """The first measurement of each kind is free; after that one that takes longer than it may is left out."""
    for share, steps in ((1e-6, [1, 2]), (None, [1, 2, 3, 4, 5, 6])):
        folder = tmp_path / str(share)
        assert measured_steps(folder, quick(every_n_train_steps=1, max_overhead=share), max_epochs=2) == steps
    ends = {"at_start": True, "at_end": True, "certify_every": 1, "max_overhead": 1e-6}
    assert measured_steps(tmp_path / "ends", quick(every_n_train_steps=1, **ends), max_epochs=1) == [0, 3]
    with pytest.raises(ValueError, match="max_overhead must be above 0 and at most 1, got 0"):
        quick(max_overhead=0)


def test_measuring_is_bounded_unless_somebody_says_how_often() -> None:
    bounds = [CurvatureMonitor(**settings)._share() for settings in ({}, {"every_n_train_steps": 100})]
    assert bounds == [0.1, None]
    assert CurvatureMonitor(every_n_epochs=1, budget=Budget(max_overhead=0.5))._share() == 0.5


def test_the_first_measurement_of_a_kind_does_not_count() -> None:
    allowance = Allowance(1e-15)
    allowance.spend(True, 1e-9)
    allowance.spend(False, 0.0)
    assert allowance.allows(False)
    allowance.spend(True, 1e-9)
    assert not allowance.allows(False)


def test_a_measurement_that_took_no_time_is_always_allowed() -> None:
    allowance = Allowance(1.0)
    allowance.spend(True, 0.0)
    assert allowance.allows(True)
    allowance.spend(True, 1e9)
    assert not allowance.allows(True)


class Quadratic(L.LightningModule):
    """A quadratic loss whose largest eigenvalue stays where it is, or moves to another parameter at every step."""

    def __init__(self, moves: bool) -> None:
        super().__init__()
        self.moves = moves
        self.w = nn.Parameter(torch.ones(40))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        scales = torch.ones(40)
        scales[self.global_step % 40 if self.moves else 0] = 9.0
        return (scales * self.w.square()).sum()


def certified_measurements(folder: Path) -> list[int]:
    values = [value for _, value in from_csv(folder)["curvature-bookkeeping/certified"]]
    # TensorBoard draws a margin chart only where all three were written at the same steps.
    for name in ("lambda_max", "lambda_max_lower", "lambda_max_upper"):
        assert len(from_csv(folder)[f"curvature/{name}"]) == len(values)
    return [number for number, value in enumerate(values) if value == 1.0]


@pytest.mark.parametrize(
    ("moves", "settings", "certified"),
    [
        (False, {}, [0, 10, 30, 70, 110]),
        (False, {"certify_every": 12}, [0, *range(10, 114, 12)]),
        (False, {"certify_every": 3}, list(range(0, 114, 3))),
        (True, {}, list(range(0, 114, 10))),
    ],
)
def test_intervals_between_certified_measurements_double_while_tracking_keeps_up(
    moves: bool, settings: dict[str, Any], certified: list[int], tmp_path: Path
) -> None:
    monitor = quick(every_n_train_steps=1, gradient=False, **settings)
    trainer = quiet_trainer(callbacks=[monitor], logger=both_loggers(tmp_path), max_epochs=38)
    trainer.fit(Quadratic(moves), loader())
    assert certified_measurements(tmp_path) == certified


def test_a_strict_early_stopping_finds_what_was_measured_at_the_start() -> None:
    for at_start in (True, False):
        stop = EarlyStopping("curvature/lambda_max", mode="max", stopping_threshold=1e9, patience=9)
        trainer = quiet_trainer(callbacks=[quick(at_start=at_start), stop])
        if at_start:
            trainer.fit(Classifier("SGD"), loader())
            assert trainer.global_step == 2 * BATCHES
        else:
            with pytest.raises(RuntimeError, match="Early stopping conditioned on metric `curvature/lambda_max`"):
                trainer.fit(Classifier("SGD"), loader())


def test_early_stopping_at_validation_sees_the_epochs_measurement() -> None:
    """Validation runs before the epoch's end hooks: the measurement must be there already."""
    stop = EarlyStopping("curvature/lambda_max", mode="max", stopping_threshold=-1e9, check_on_train_epoch_end=False)
    trainer = quiet_trainer(max_epochs=5, callbacks=[stop, quick(every_n_epochs=1)])
    trainer.fit(Validated("SGD"), loader(), loader())
    assert trainer.global_step == BATCHES


def test_sanity_checking_fast_dev_run_validate_and_test_pass_it_by(tmp_path: Path) -> None:
    monitor = quick(every_n_train_steps=1, at_start=True, at_end=True)
    trainer = quiet_trainer(fast_dev_run=True, callbacks=[monitor], enable_checkpointing=False)
    trainer.fit(Validated("SGD"), loader(), loader())
    assert trainer.global_step == 1
    assert "curvature/lambda_max" in trainer.callback_metrics

    trainer = quiet_trainer(callbacks=[monitor], logger=both_loggers(tmp_path), num_sanity_val_steps=2, max_epochs=1)
    model = Validated("SGD")
    trainer.validate(model, loader(), verbose=False)
    trainer.test(model, loader(), verbose=False)
    assert not [tag for tag in trainer.callback_metrics if tag.startswith("curvature")]
    trainer.fit(model, loader(), loader())
    assert [step for step, _ in from_events(tmp_path)["curvature/lambda_max"]] == [0, 1, 2, 3]
    trainer.validate(model, loader(), verbose=False)
    assert [step for step, _ in from_events(tmp_path)["curvature/lambda_max"]] == [0, 1, 2, 3]


class GAN(L.LightningModule):
    """Two networks, two optimizers, steps by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4))
        self.critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.SGD(self.generator.parameters(), lr=0.1),
            torch.optim.SGD(self.critic.parameters(), lr=0.05),
        ]

    def generator_loss(self, batch: Any, batch_idx: int) -> Tensor:
        noise = torch.randn(len(batch[0]), 2)
        return F.softplus(-self.critic(self.generator(noise))).mean()

    def critic_loss(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        fake = self.generator(torch.randn(len(batch[0]), 2)).detach()
        self.log("critic", self.critic(fake).mean())
        return {"loss": F.softplus(-self.critic(batch[0])).mean() + F.softplus(self.critic(fake)).mean()}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, loss in zip(self.optimizers(), (self.generator_loss, self.critic_loss), strict=True):
            self.toggle_optimizer(optimizer)
            value = loss(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(value if isinstance(value, Tensor) else value["loss"])
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def trained(folder: Path | None, *monitors: CurvatureMonitor) -> tuple[GAN, L.Trainer]:
    torch.manual_seed(0)
    model = GAN()
    trainer = quiet_trainer(callbacks=list(monitors), logger=both_loggers(folder) if folder else False)
    trainer.fit(model, loader())
    return model, trainer


def test_each_network_of_a_gan_is_measured_by_its_own_loss(tmp_path: Path) -> None:
    plain, _ = trained(None)
    names = ("generator", "critic")
    monitors = [
        quick(every_n_train_steps=4, step=f"{name}_loss", parameters=f"^{name}", prefix=name, gradient=False)
        for name in names
    ]
    watched, trainer = trained(tmp_path, *monitors)
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)
    table = from_csv(tmp_path)
    for name, threshold in zip(names, (20.0, 40.0), strict=True):
        assert [step for step, _ in table[f"{name}/lambda_max"]] == [4, 8, 12]
        assert float(trainer.callback_metrics[f"{name}/stability_threshold"]) == pytest.approx(threshold)
    assert float(trainer.callback_metrics["generator/lambda_max"]) != float(
        trainer.callback_metrics["critic/lambda_max"]
    )


def test_manual_optimization_without_a_loss_trains_on_with_one_warning() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message=".*(LeafSpec|many workers|torch.jit)")
        model, trainer = trained(None, quick(every_n_train_steps=1, at_end=True))
    [warning] = caught
    assert "would train the model" in str(warning.message) and 'step="..."' in str(warning.message)
    assert trainer.global_step == 4 * BATCHES
    for p, q in zip(trained(None)[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), TypeError("no"), KeyError("no")])
def test_no_error_stops_training(error: Exception) -> None:
    class Failing(Classifier):
        def loss(self, batch: Any, batch_idx: int) -> Tensor:
            raise error

    with pytest.warns(UserWarning, match="could not measure at step 1, and training goes on"):
        trainer = quiet_trainer(callbacks=[quick(every_n_train_steps=1, step="loss")])
        trainer.fit(Failing("SGD"), loader())
    assert trainer.global_step == 2 * BATCHES
