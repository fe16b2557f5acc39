"""StepMarginMonitor logs the margin of the optimizer's own step, and training stays the same to the bit."""

from __future__ import annotations

import ast
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from keepers import KEEPERS, content, make
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning_problems import (
    BATCHES,
    Classifier,
    Recorder,
    both_loggers,
    chart_tags,
    from_csv,
    from_events,
    layout,
    loader,
    quiet_trainer,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from newtonopt.callbacks import StepMarginMonitor
from newtonopt.callbacks.step_margin_monitor import Tally
from newtonopt.curvature import StepMargin

RATE = 0.3
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "Adam": "Adam",
    "lbfgs": lambda params: torch.optim.LBFGS(params, max_iter=3),
    "HessianFree": "HessianFree",
}


class Seen(L.Callback):
    """Keeps the values that each step logs."""

    def __init__(self, prefix: str = "curvature") -> None:
        self.prefix = prefix
        self.values: dict[str, list[float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        for name in [name for name in trainer.callback_metrics if name.startswith(self.prefix)]:
            self.values.setdefault(name.split("/")[1], []).append(float(trainer.callback_metrics.pop(name)))

    @property
    def margins(self) -> list[float]:
        return self.values.get("step_margin", [])


class Regression(L.LightningModule):
    """A quadratic loss of two weights, by gradient descent, with the margin of each step by hand."""

    def __init__(self, rate: float = RATE, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False, dtype=dtype)
        nn.init.constant_(self.layer.weight, 0.5)
        self.rate = rate

    def loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self.layer(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def rows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 2, dtype=torch.float64, generator=generator) * torch.tensor([2.0, 0.5], dtype=torch.float64)
    return x.to(dtype), torch.randn(12, 1, dtype=torch.float64, generator=generator).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*rows(dtype)), batch_size=4)


class Saturated(L.LightningModule):
    """A classifier in single precision whose loss, near zero, has the rounding of logarithms of numbers near one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        nn.init.zeros_(self.layer.weight)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.linspace(1.0, 1.5, 64)[:, None] * torch.eye(2).repeat(32, 1)
        return F.cross_entropy(self.layer(x), torch.arange(64) % 2)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:  # far along, as after a Newton step
            with torch.no_grad():
                self.layer.weight.copy_(15.0 * torch.eye(2))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e5)


class Rippled(L.LightningModule):
    """A loss of one weight that each step moves from zero to one, with a short wave: it has half of the slope at zero.

    Args:
        turns: The wave's phase at the longest length of the check of the gradient, in turns.
        factor: What a hook multiplies the gradient by.
        bend: Size of a second wave that is even about zero.
    """

    def __init__(self, turns: float, factor: float = 1.0, bend: float = 0.0) -> None:
        super().__init__()
        self.bend = bend
        self.weight = nn.Parameter(torch.zeros(1))
        self.weight.register_hook(lambda g: factor * g)
        self.waves = 2.0 * math.pi * turns / torch.finfo(torch.float32).eps ** (1 / 3)
        self.rate = 0.5 / factor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        phase = self.waves * self.weight
        return (1.0 - self.weight - (torch.sin(phase) + self.bend * torch.cos(phase)) / self.waves).sum()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.weight.zero_()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def by_hand(rate: float, together: int = 1, clipped: Callable[[Tensor], Tensor] = lambda g: g) -> list[float]:
    """Return the margins of gradient descent on the batches, `together` of them a step: d'Hd / (2 |g'd|)."""
    x, y = rows()
    model, margins = Regression(), []
    w = model.layer.weight.detach().reshape(-1).clone()
    for part in torch.arange(12).split(4 * together):
        a, b = x[part], y[part].reshape(-1)
        hessian, gradient = 2 * a.T @ a / len(a), 2 * a.T @ (a @ w - b) / len(a)
        step = -rate * clipped(gradient)
        margins.append(float(0.5 * step @ hessian @ step / -(gradient @ step)))
        w = w + step
    return margins


def fit(model: L.LightningModule, batches: Any = None, *callbacks: Any, **settings: Any) -> L.Trainer:
    trainer = quiet_trainer(callbacks=list(callbacks), **{"max_epochs": 1, **settings})
    trainer.fit(model, data() if batches is None else batches)
    return trainer


def monitor(**settings: Any) -> StepMarginMonitor:
    return StepMarginMonitor(**{"every_n_train_steps": 1, **settings})


# The value.


def test_gradient_descent_on_a_quadratic() -> None:
    seen = Seen()
    fit(Regression(), None, monitor(critical_sharpness=True), seen)
    assert seen.margins == pytest.approx(by_hand(RATE), rel=1e-6)
    assert seen.values["critical_step"] == pytest.approx([1 / r for r in seen.margins], rel=1e-6)
    assert seen.values["critical_sharpness"] == pytest.approx([2 * r / RATE for r in seen.margins], rel=1e-6)


@pytest.mark.parametrize("way", ["norm", "value"])
def test_the_slope_is_that_of_the_gradient_before_clipping(way: str) -> None:
    seen = Seen()
    fit(Regression(), None, monitor(), seen, gradient_clip_val=0.5, gradient_clip_algorithm=way)
    clip = (lambda g: g * min(1.0, 0.5 / float(g.norm()))) if way == "norm" else (lambda g: g.clamp(-0.5, 0.5))
    assert by_hand(RATE) != pytest.approx(by_hand(RATE, 1, clip), rel=1e-2), "clipping matters here"
    assert seen.margins == pytest.approx(by_hand(RATE, 1, clip), rel=1e-5)


def test_accumulated_batches_are_one_loss() -> None:
    x, y = rows()
    batches = DataLoader(TensorDataset(x, y), batch_size=2)
    seen = Seen()
    fit(Regression(), batches, monitor(), seen, accumulate_grad_batches=2)
    assert seen.margins == pytest.approx(by_hand(RATE), rel=1e-6)


def test_a_scaled_gradient_is_unscaled_and_a_skipped_step_is_left_out() -> None:
    class Overflowing(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch).float() * (torch.inf if batch_idx == 1 else 1.0)

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    seen, trained = Seen(), Overflowing(dtype=torch.float32)
    fit(trained, data(torch.float32), monitor(), seen, precision=None, plugins=[plugin])
    assert len(seen.margins) == BATCHES - 1
    assert seen.margins[0] == pytest.approx(by_hand(RATE)[0], rel=0.05), "float16 rounds"


def test_bfloat16_autocast() -> None:
    seen = Seen()
    fit(Regression(dtype=torch.float32), data(torch.float32), monitor(), seen, precision="bf16-mixed")
    assert seen.margins == pytest.approx(by_hand(RATE), rel=0.1)


def test_a_compiled_model() -> None:
    class Compiled(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.compiled = torch.compile(self.layer, backend="aot_eager")

        def loss(self, batch: Any) -> Tensor:
            return F.mse_loss(self.compiled(batch[0]), batch[1])

    seen = Seen()
    fit(Compiled(), None, monitor(), seen)
    assert seen.margins == pytest.approx(by_hand(RATE), rel=1e-6)


def test_a_loss_that_depends_on_the_step_is_that_of_the_step_itself() -> None:
    class Annealed(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) + 3.0 * self.global_step

    seen = Seen()
    fit(Annealed(), None, monitor(), seen)
    assert seen.margins == pytest.approx(by_hand(RATE), rel=1e-6)


def test_a_batch_that_training_writes_to() -> None:
    class Greedy(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss([t.clone() for t in batch])
            batch[0].zero_()
            return loss

    seen = Seen()
    fit(Greedy(), None, monitor(), seen)
    assert seen.margins == pytest.approx(by_hand(RATE), rel=1e-6)


def test_the_learning_rate_of_critical_sharpness_is_that_of_the_step() -> None:
    class Scheduled(Regression):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    seen = Seen()
    fit(Scheduled(), None, monitor(critical_sharpness=True), seen)
    rates = [RATE * 0.5**i for i in range(BATCHES)]
    expected = [2 / (rate * s) for rate, s in zip(rates, seen.values["critical_step"], strict=True)]
    assert seen.values["critical_sharpness"] == pytest.approx(expected, rel=1e-6)


def test_several_learning_rates_have_a_critical_step_and_no_critical_sharpness() -> None:
    class Groups(Classifier):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.layers[0].parameters(), "lr": 0.3}, {"params": self.layers[4].parameters()}]
            return torch.optim.SGD(groups, lr=0.2)

    seen = Seen()
    fit(Groups(), loader(), monitor(critical_sharpness=True), seen)
    assert len(seen.values["critical_step"]) > 0
    assert "critical_sharpness" not in seen.values


def in_words(folder: Path) -> dict[int, str]:
    """Return the sentences on TensorBoard's text page by step."""
    events = EventAccumulator(str(next(folder.rglob("*tfevents*")).parent), {"tensors": 0})
    events.Reload()
    tag = "curvature/step_in_words/text_summary"
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)}


def test_the_measured_steps_that_overshot_are_counted(tmp_path: Path) -> None:
    model = Regression(rate=0.5)
    trainer = quiet_trainer(callbacks=[monitor()], logger=both_loggers(tmp_path), max_epochs=1)
    trainer.fit(model, data())
    margins, table = by_hand(0.5), from_csv(tmp_path)
    assert [margin >= 1.0 for margin in margins] == [False, True, True], "some overshoot"
    shares = [sum(m >= 1.0 for m in margins[: i + 1]) / (i + 1) for i in range(3)]
    assert [x for _, x in table["curvature/overshot_steps"]] == pytest.approx(shares)
    assert [x for _, x in table["curvature/uphill_steps"]] == [0.0, 0.0, 0.0]
    highest = [max(margins[: i + 1]) for i in range(3)]
    assert [x for _, x in table["curvature/highest_step_margin"]] == pytest.approx(highest, rel=1e-6)
    assert re.search(r"2 of 3 measured steps overshot, the worst at step [23] \(\d.*\)\.$", in_words(tmp_path)[3])


def test_steps_uphill_are_counted(tmp_path: Path) -> None:
    class Turning(Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3, maximize=True)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().param_groups[0]["lr"] = [1e-3, 0.0, -1e-3][batch_idx]

    trainer = quiet_trainer(callbacks=[monitor()], logger=both_loggers(tmp_path), max_epochs=1)
    trainer.fit(Turning(), data())
    table, words = from_csv(tmp_path), in_words(tmp_path)
    assert table["curvature/uphill_steps"] == [(1, 1.0), (3, 0.5)], "a step that stays where it is does not count"
    assert [step for step, _ in table["curvature/step_margin"]] == [3]
    assert "did not go downhill" in words[1] and "steps so far: 1. Overshot: 0. Uphill" in words[1]
    assert "None of 2 measured steps overshot, the nearest at step 3 (0.0" in words[3]
    assert "without a margin: 1. This does not clear the learning rate" in words[3]


def test_a_step_after_which_the_loss_is_not_finite_has_overshot() -> None:
    downhill, infinite = StepMargin(1.0, -1.0, -0.5, None, 1), StepMargin(1.0, -1.0, math.inf, None, 1)
    tally = Tally().with_step(downhill, 1).with_step(infinite, 2).with_step(downhill, 3)
    assert tally == Tally(measured=3, overshot=1, uphill=0, highest=math.inf, at=2)
    assert tally.values() == {"overshot_steps": 1 / 3, "uphill_steps": 0.0, "highest_step_margin": None}
    said = "1 of 3 measured steps overshot, the worst at step 2 (the loss after it is not finite)."
    assert tally.in_words() == said


# Nothing changes.


def run(optimizer: Any, folder: Path | None, *callbacks: Any, **settings: Any) -> Any:
    """Return what a fit leaves: tensors, random states, `.grad`, outputs, logs."""
    L.seed_everything(0, verbose=False)
    model, recorder = Classifier(optimizer), Recorder()
    loggers = both_loggers(folder) if folder else False
    trainer = quiet_trainer(callbacks=[*callbacks, recorder], logger=loggers, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, loader())
    logs = {tag: v for tag, v in from_csv(folder).items() if not tag.startswith("curvature/")} if folder else {}
    state = [*model.state_dict().values(), torch.get_rng_state()], trainer.optimizers[0].state_dict()
    kept = [content(part) for part in (*state, recorder.outputs, recorder.gradients)]
    return kept, logs, float(torch.rand(())), __import__("random").random(), float(__import__("numpy").random.rand())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_and_its_logs_are_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    seen = Seen()
    without = run(OPTIMIZERS[name], tmp_path / "without")
    watched = run(OPTIMIZERS[name], tmp_path / "with", monitor(critical_sharpness=True), seen)
    assert seen.margins, "it has measured"
    assert watched == without


@pytest.mark.parametrize(
    "settings",
    [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_the_trainer_leave_training_the_same_to_the_bit(settings: dict[str, Any]) -> None:
    seen = Seen()
    without = run("Adam", None, **settings)
    assert run("Adam", None, monitor(critical_sharpness=True), seen, **settings) == without
    assert seen.margins, "it has measured"


class Keeping(L.LightningModule):
    """Its loss depends on what keepers draw, and it clamps a weight."""

    def __init__(self, keepers: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
        self.keepers = keepers

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.layers[0].weight.clamp_(-0.3, 0.3)
        drawn = sum(keeper.draw() for keeper in self.keepers.values()) / len(self.keepers)
        return F.cross_entropy((1 + 0.02 * drawn) * self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.layers.parameters(), lr=0.1)


def test_training_that_keeps_all_kinds_of_state_is_the_same_to_the_bit() -> None:
    ends, seen = [], Seen()
    for callbacks in ([], [monitor(critical_sharpness=True), seen]):
        keepers = {name: make(name) for name in KEEPERS}
        model = Keeping(keepers)
        fit(model, loader(), *callbacks)
        held = {name: keeper.state() for name, keeper in keepers.items()}
        ends.append([content(model.layers), content(held), content(torch.get_rng_state())])
    assert ends[0] == ends[1]
    assert len(seen.margins) == BATCHES


def test_what_cannot_be_put_back_is_named_before_anything_is_measured() -> None:
    class Streaming(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.stream = self.numbers()

        @staticmethod
        def numbers() -> Iterator[float]:
            number = 0.0
            while True:
                number += 1.0
                yield number

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return next(self.stream) * self.loss(batch)

    ends = [Streaming(), Streaming()]
    fit(ends[0])
    with pytest.warns(UserWarning, match=r"measures nothing from here on: .* changes self\.stream, which cannot"):
        fit(ends[1], None, monitor())
    assert torch.equal(*(model.layer.weight for model in ends))


# When it measures, and when not.


def test_the_schedule_and_the_loggers(tmp_path: Path) -> None:
    trainer = quiet_trainer(callbacks=[monitor(every_n_train_steps=2)], logger=both_loggers(tmp_path), max_epochs=2)
    trainer.fit(Classifier("Adam"), loader())
    table, events = from_csv(tmp_path), from_events(tmp_path)
    assert [step for step, _ in table["curvature/step_margin"]] == [2, 4, 6]
    assert [step for step, _ in events["curvature/step_margin"]] == [2, 4, 6]
    page = layout(tmp_path)
    shown = {title: chart_tags(chart, events) for title, chart in page["Last step"].items()}
    assert shown == {"Step margin": [["curvature/step_margin"]]}


def test_a_trial_run_measures_its_step() -> None:
    trainer = quiet_trainer(callbacks=[StepMarginMonitor()], fast_dev_run=True)
    trainer.fit(Classifier("Adam"), loader())
    assert "curvature/step_margin" in trainer.callback_metrics


def test_a_fit_without_a_measurement_says_so() -> None:
    with pytest.warns(UserWarning, match="measured nothing in this fit, .* every_n_train_steps=50"):
        fit(Regression(), None, StepMarginMonitor())


def test_a_fit_whose_loss_is_not_finite_names_that_as_the_reason() -> None:
    with pytest.warns(UserWarning, match="at step 3: the loss or its gradient was not finite at step 2. Lower the"):
        trainer = fit(Regression(rate=1e200), None, StepMarginMonitor(every_n_train_steps=2), max_epochs=1)
    assert trainer.global_step == 3


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_a_fit_whose_loss_is_not_finite_says_so(factor: float) -> None:
    class Infinite(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return factor * self.loss(batch)

    with pytest.warns(UserWarning, match="measured nothing in this fit, .* the loss or its gradient was not finite"):
        fit(Infinite(), None, monitor())


def test_early_stopping() -> None:
    stop = EarlyStopping("curvature/step_margin", mode="max", stopping_threshold=-1e9)
    trainer = fit(Regression(), None, monitor(), stop, max_epochs=4)
    assert trainer.global_step == BATCHES, "it stops at its first check"


class Manual(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_manual_optimization_is_left_out_with_one_warning() -> None:
    seen = Seen()
    with pytest.warns(UserWarning, match="under manual optimization .* Use newtonopt.curvature.step_margin") as caught:
        fit(Manual(), None, monitor(), seen)
    assert sum("StepMarginMonitor" in str(w.message) for w in caught) == 1
    assert seen.margins == []


def test_a_loss_that_is_another_one_the_second_time_ends_measuring() -> None:
    from problems import unseen

    calls = unseen([])

    class Fickle(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            calls().append(1)
            return self.loss(batch) * (1 + len(calls()))

    seen = Seen()
    with pytest.warns(UserWarning, match="computes another loss .* when it runs again on the same batch"):
        fit(Fickle(), None, monitor(), seen)
    assert seen.margins == []


class Hooked(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.layer.weight.register_hook(lambda g: g.clamp(-0.1, 0.1))


class Clipping(Regression):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class Scaling(Regression):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (128.0 * loss).backward()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.layer.weight.grad /= 128.0


class Accumulating(Regression):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


class HalfDetached(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        return loss * loss.detach()


@pytest.mark.parametrize("kind", [Hooked, Clipping, Scaling, Accumulating, HalfDetached])
def test_a_gradient_that_is_not_the_losss_ends_measuring(kind: Callable[[], Regression]) -> None:
    seen, ends = Seen(), [kind(), kind()]
    fit(ends[0])
    with pytest.warns(UserWarning, match=r"measures nothing from here on: `\.grad` is not the gradient") as caught:
        fit(ends[1], None, monitor(), seen)
    assert sum("StepMarginMonitor" in str(w.message) for w in caught) == 1
    # A sum over two steps is wrong from the second one on.
    assert seen.margins == pytest.approx(by_hand(RATE)[:1] if kind is Accumulating else [], rel=1e-6)
    assert torch.equal(*(model.layer.weight for model in ends))


def test_the_gradient_is_checked_again_later() -> None:
    class Late(Regression):
        def __init__(self) -> None:
            super().__init__(rate=1e-3)
            self.layer.weight.register_hook(lambda g: 0.5 * g if self.global_step > 10 else g)

    seen = Seen()
    with pytest.warns(UserWarning, match="the loss changes 2 times as much as it foretells"):
        fit(Late(), None, monitor(), seen, max_epochs=18)
    assert len(seen.margins) == 50


def test_the_check_of_the_gradient_costs_two_forward_passes_of_the_first_measurements() -> None:
    from problems import unseen

    calls = unseen([])

    class Counting(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            calls().append(self.global_step)
            return self.loss(batch)

    fit(Counting(), None, monitor(), max_epochs=2)
    assert [calls().count(step) for step in range(6)] == [1 + 1 + 1 + 2, 1 + 1 + 2, 1 + 1 + 2, 2, 2, 2]


# Half a turn shows .5 and .82 of the slope at the two longest lengths, one turn .5 and .5.
@pytest.mark.parametrize("turns", [0.1, 0.3, 0.5, 1.0, 4.0, 20.0])
def test_a_loss_that_curves_over_a_small_part_of_the_step_does_not_fail_the_check(turns: float) -> None:
    seen = Seen()
    fit(Rippled(turns), None, monitor(), seen)  # a warning is an error
    assert seen.margins == pytest.approx(3 * [0.5], abs=1e-2)


@pytest.mark.parametrize("turns", [0.1, 0.5, 1.0, 4.0])
@pytest.mark.parametrize(("factor", "bend"), [(2.0, 0.0), (1.1, 0.0), (0.8, 0.0), (2.0, 8.0)])
def test_a_wrong_gradient_of_a_loss_that_curves_so_is_found(turns: float, factor: float, bend: float) -> None:
    with pytest.warns(UserWarning, match=r"is not the gradient .* curves too strongly for this check") as caught:
        fit(Rippled(turns, factor, bend), None, monitor())
    [told] = [found for w in caught if (found := re.search(r"changes (\S+) times as much", str(w.message)))]
    assert float(told[1]) == pytest.approx(1.0 / factor, rel=0.05)


def test_the_lengths_end_where_rounding_counts() -> None:
    from problems import unseen

    calls = unseen([])

    class Counting(Rippled):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            calls().append(self.global_step)
            return super().training_step(batch, batch_idx)

    seen = Seen()
    fit(Counting(100.0), None, monitor(), seen)
    assert len(seen.margins) == BATCHES
    # The wave is shorter than most of six lengths; the last one is 1.6 times the shortest one that rounding leaves.
    assert [calls().count(step) for step in range(3)] == [1 + 1 + 1 + 2 * 6, 1 + 1 + 2 * 6, 1 + 1 + 2 * 6]


def test_a_step_that_training_step_clamps_ends_where_it_is_clamped_to() -> None:
    class Clamped(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                self.layer.weight.clamp_(0.45, 0.5)
            return self.loss(batch)

    x, y = rows()
    w, expected = torch.full((2,), 0.5, dtype=torch.float64), []
    for part in torch.arange(12).split(4):
        a, b = x[part], y[part].reshape(-1)
        hessian, gradient = 2 * a.T @ a / len(a), 2 * a.T @ (a @ w - b) / len(a)
        step = (w - 1e-2 * gradient).clamp(0.45, 0.5) - w
        expected.append(float(0.5 * step @ hessian @ step / -(gradient @ step)))
        w = w + step
    assert 0.45 in w.tolist(), "it clamps"
    seen = Seen()
    fit(Clamped(1e-2), None, monitor(), seen)
    assert seen.margins == pytest.approx(expected, rel=1e-6)


def test_a_kink_at_the_start_of_a_step_passes_the_check() -> None:
    class Kinked(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) + 50.0 * self.shift.relu().sum() - 0.1 * self.shift.sum()

    seen = Seen()
    fit(Kinked(), None, monitor(), seen)
    assert len(seen.margins) == BATCHES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_fail_the_check(dtype: torch.dtype) -> None:
    class Offset(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) + 1e6

    fit(Offset(rate=1e-3, dtype=dtype), data(dtype), monitor())  # a warning is an error


def test_the_rounding_of_a_saturated_classifier_does_not_fail_the_check() -> None:
    seen = Seen()
    fit(Saturated(), None, StepMarginMonitor(every_n_train_steps=2), seen, max_epochs=2)
    assert len(seen.margins) == 3  # at steps 2, 4 and 6


def test_a_failure_warns_once_and_training_goes_on() -> None:
    from problems import unseen

    calls = unseen([])

    class Failing(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            calls().append(1)
            if len(calls()) % 2 == 0:
                raise ValueError("not again")
            return self.loss(batch)

    ends = [Regression(), Failing()]
    fit(ends[0])
    with pytest.warns(UserWarning, match="could not measure step 1, and training goes on: ValueError: not again") as w:
        fit(ends[1], None, monitor())
    assert sum("StepMarginMonitor" in str(one.message) for one in w) == 1
    assert torch.equal(*(model.layer.weight for model in ends))


def test_a_skipped_batch_is_left_out() -> None:
    class Skipping(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else self.loss(batch)

    seen = Seen()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*returned `None`")
        fit(Skipping(), None, monitor(), seen)
    assert len(seen.margins) == BATCHES - 1


def test_two_monitors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most one StepMarginMonitor, got several. Remove the others"):
        fit(Regression(), None, monitor(), monitor(prefix="other"))


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="every_n_train_steps must be a whole number and at least 1, got 0"):
        StepMarginMonitor(0)
    with pytest.raises(ValueError, match="critical_sharpness must be True or False, got 1"):
        StepMarginMonitor(critical_sharpness=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"prefix must consist of letters, .* got '<b> x//'. Write 'curvature'"):
        StepMarginMonitor(prefix="<b> x//")
    with pytest.raises(TypeError, match=r"Write every_n_train_steps=\.\.\."):
        StepMarginMonitor(every=3)  # type: ignore[call-arg]


def test_the_manual_has_every_tag_and_every_argument_with_its_default(tmp_path: Path) -> None:
    trainer = quiet_trainer(callbacks=[monitor(critical_sharpness=True)], logger=both_loggers(tmp_path), max_epochs=1)
    trainer.fit(Regression(), data())
    written = {tag.removeprefix("curvature/") for tag in from_csv(tmp_path) if tag.startswith("curvature/")}
    manual = (Path(__file__).parents[2] / "docs" / "monitor.md").read_text().split("## StepMarginMonitor")[1]
    arguments, tags = manual.split("| argument |")[1].split("| tag |")
    assert set(re.findall(r"^\| `(\w+)` \|", tags, re.MULTILINE)) == written
    defaults = {p.name: p.default for p in inspect.signature(StepMarginMonitor).parameters.values()}
    told = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", arguments, re.MULTILINE)
    assert {name: ast.literal_eval(value) for name, value in told} == defaults
