"""CurvatureMonitor in real training runs: it changes nothing, its values are true, and they reach every logger."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import math
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning_problems import (
    BATCHES,
    OPTIMIZERS,
    Classifier,
    all_tags,
    both_loggers,
    chart_tags,
    from_csv,
    from_events,
    layout,
    loader,
    monitor_of,
    quiet_trainer,
)
from problems import Doubled
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.autograd.functional import hessian as dense_hessian
from torch.func import functional_call

from newtonopt import curvature
from newtonopt.callbacks import Budget, CurvatureMonitor, Probe, StepMonitor
from newtonopt.callbacks.curvature_monitor import StepLosses
from newtonopt.callbacks.lightning import PROBE_TAG
from newtonopt.curvature import (
    Alignment,
    Density,
    GaussNewtonSpectrum,
    Layers,
    LossSlice,
    Measurement,
    Preconditioned,
    RelativeSharpness,
    Sharpness,
    Tag,
    Trace,
)
from newtonopt.curvature.measurements.measurement import COST_TAGS


def small_monitor(**settings: Any) -> CurvatureMonitor:
    return monitor_of({"every_n_train_steps": 1, "max_products": 30, **settings})


def everything(model: Classifier, trainer: L.Trainer, folder: Path) -> dict[str, Any]:
    """All that a measurement could have changed."""
    metrics = [model.accuracy, model.updated, *model.several.values()]
    logged = {
        f"{name}/{tag}": values
        for name, table in (("events", from_events(folder)), ("csv", from_csv(folder)))
        for tag, values in table.items()
        if not tag.startswith("curvature")
    }
    return {
        "parameters and buffers": {name: t.clone() for name, t in model.state_dict().items()},
        "gradients": [p.grad for p in model.parameters()],
        "optimizer": {i: dict(state) for i, state in enumerate(trainer.optimizers[0].state.values())},
        "random": [
            torch.get_rng_state(),
            torch.from_numpy(np.random.get_state()[1].astype(np.int64)),
            random.getstate()[1],
        ],
        "flags": [module.training for module in model.modules()],
        "metrics": [{name: getattr(metric, name) for name in metric._defaults} for metric in metrics],
        "counts": [metric._update_count for metric in metrics],
        "logged": logged,
    }


def fitted(optimizer: str, folder: Path, *callbacks: L.Callback) -> dict[str, Any]:
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    model, trainer = Classifier(optimizer), quiet_trainer(logger=both_loggers(folder), callbacks=list(callbacks))
    trainer.fit(model, loader(shuffle=True))
    return everything(model, trainer, folder)


@pytest.mark.parametrize("optimizer", [pytest.param("SGD", marks=pytest.mark.slow), "Adam", "HessianFree"])
def test_measuring_changes_nothing(optimizer: str, tmp_path: Path) -> None:
    without = fitted(optimizer, tmp_path / "without")
    further = [Trace(), Density(), Layers(["layers.0.*"]), LossSlice()]
    everything_else: dict[str, Any] = {"at_start": True}
    everything_else |= {
        "measurements": further if optimizer == "HessianFree" else [*further, Preconditioned()],
        "precision": "training",
        "dataloader": list(loader()),
        "device": "cpu",
    }
    for mode, every, more in (("train", 2, {}), ("eval", 6, everything_else)):
        monitor = small_monitor(every_n_train_steps=every, max_products=10, mode=mode, num_batches=2, **more)
        watched = fitted(optimizer, tmp_path / mode, monitor)
        assert len(from_csv(tmp_path / mode)["curvature/lambda_max"]) == (3 if mode == "train" else 2)
        for what, expected in without.items():
            torch.testing.assert_close(
                watched[what], expected, rtol=0, atol=0, msg=lambda m, where=f"{mode}, {what}": f"{where}: {m}"
            )


class Plain(Classifier):
    """The same loss without random numbers, in which a dense Hessian can be taken."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def on_train_epoch_end(self) -> None:
        pass


class Batches(L.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(tuple(t.clone() for t in batch))


def dense_truth(
    model: Plain, batches: list[tuple[Tensor, Tensor]], mode: str
) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor]:
    """The objective as a function of flat parameters in float64; the parameters; gradient and Hessian there."""
    model = copy.deepcopy(model).double().train(mode == "train")
    names, shapes = [n for n, _ in model.layers.named_parameters()], [p.shape for p in model.layers.parameters()]
    total = sum(len(y) for _, y in batches)

    def objective(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes])
        values = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        buffers = {name: b.clone() for name, b in model.layers.named_buffers()}
        losses = [
            F.cross_entropy(functional_call(model.layers, {**values, **buffers}, x.double()), y) for x, y in batches
        ]
        return sum(loss * len(y) / total for loss, (_, y) in zip(losses, batches, strict=True))

    point = torch.cat([p.detach().flatten() for p in model.layers.parameters()]).requires_grad_()
    [gradient] = torch.autograd.grad(objective(point), point)
    return objective, point.detach(), gradient, dense_hessian(objective, point.detach())


def worst_rise(
    objective: Callable[[Tensor], Tensor], point: Tensor, hessian: Tensor, gradient: Tensor, radius: float
) -> float:
    """By brute force: the linearised maximiser, many times over, from many starts."""
    top = torch.linalg.eigh(hessian)[1][:, -2:].T
    best = -torch.inf
    for start in [*top, *-top, gradient, *torch.randn(2, len(point), dtype=point.dtype)]:
        step = radius * start / start.norm()
        for _ in range(60):
            at = (point + step).requires_grad_()
            loss = objective(at)
            best = max(best, loss.item())
            [ascent] = torch.autograd.grad(loss, at)
            step = radius * ascent / ascent.norm()
    return best - objective(point).item()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_values_are_those_of_the_dense_matrix(mode: str, precision: str, tmp_path: Path) -> None:
    dtype, accuracy = (torch.float64, 1e-9) if precision == "64-true" else (torch.float32, 1e-4)
    model, batches = Plain("SGD", dropout=0.0 if mode == "train" else 0.5), Batches()
    monitor = CurvatureMonitor(
        every_n_train_steps=4,
        top=3,
        bottom=2,
        sharpness=Sharpness(radius=0.2),
        probe=Probe(mode=mode, num_batches=2),
        budget=Budget(tolerance=1e-3, max_products=200),
    )
    trainer = quiet_trainer(precision=precision, callbacks=[batches, monitor], logger=both_loggers(tmp_path))
    trainer.fit(model, loader(14, dtype=dtype))  # batches of 14 and 8, twice: measured once, at the final parameters
    objective, point, gradient, hessian = dense_truth(model, batches.seen[:2], mode)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    size = float(eigenvalues.abs().max())
    table = from_csv(tmp_path)
    assert len(table["curvature/lambda_max"]) == 1
    values = {tag: entries[0][1] for tag, entries in table.items() if tag.startswith("curvature")}

    for name, truth in (("lambda_max", eigenvalues[-1]), ("lambda_min", eigenvalues[0])):
        value, lower, upper = (values[f"curvature/{name}{end}"] for end in ("", "_lower", "_upper"))
        assert lower - accuracy * size <= truth <= upper + accuracy * size
        assert lower <= value <= upper
        assert upper - lower <= 2e-3 * abs(value)
    for name, truth in (("lambda_2", eigenvalues[-2]), ("lambda_3", eigenvalues[-3]), ("lambda_min_2", eigenvalues[1])):
        assert values[f"curvature/{name}"] == pytest.approx(float(truth), rel=2e-3, abs=accuracy * size)
    rayleigh = float(gradient @ hessian @ gradient / (gradient @ gradient))
    assert values["curvature-more/gradient_curvature"] == pytest.approx(rayleigh, abs=accuracy * size)
    worst = worst_rise(objective, point, hessian, gradient, 0.2)
    assert 0.97 * worst <= values["curvature/sharpness"] <= 1.001 * worst  # its search ends a little below the top
    assert values["curvature/stability_threshold"] == pytest.approx((2 + 2 * 0.9) / 0.1)
    assert values["curvature/stability_ratio"] == pytest.approx(values["curvature/lambda_max"] / 38)


def test_tags_reach_every_logger_and_the_trainer(tmp_path: Path) -> None:
    trainer = quiet_trainer(
        max_epochs=1, callbacks=[small_monitor(bottom=2, certify_every=1)], logger=both_loggers(tmp_path)
    )
    trainer.fit(Classifier("SGD"), loader())
    bounds = [f"lambda_{end}{part}" for end in ("max", "min") for part in ("", "_lower", "_upper")]
    others = ["lambda_2", "lambda_3", "lambda_min_2", "sharpness", "stability_threshold", "stability_ratio"]
    tags = {f"curvature/{name}" for name in [*bounds, *others]}
    tags |= {f"curvature-bookkeeping/{name}" for name in ("products", "seconds", "certified", "converged")}
    tags |= {f"curvature-more/gradient_{name}" for name in ("curvature", "alignment")}
    table, events = from_csv(tmp_path), from_events(tmp_path)
    for tag in tags:
        assert [step for step, _ in table[tag]] == [step for step, _ in events[tag]] == [1, 2, 3]
        assert [value for _, value in events[tag]] == pytest.approx([value for _, value in table[tag]])
        assert float(trainer.callback_metrics[tag]) == pytest.approx(table[tag][-1][1])
    for found in (table, events, trainer.callback_metrics):
        assert {tag for tag in found if tag.startswith("curvature")} == tags


class OfTwoTerms(Classifier):
    """A loss with a penalty."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        output = super().training_step(batch, batch_idx)
        penalty = torch.stack([p.square().sum() for p in self.parameters()]).sum()
        return {**output, "loss": output["loss"] + 0.1 * penalty}

    def other_loss(self) -> Tensor:
        x, y = next(iter(loader()))
        return F.cross_entropy(self.layers(x), y)


def test_the_manual_has_every_tag_and_no_other(tmp_path: Path) -> None:
    module = OfTwoTerms("Adam")
    further = [
        *(Preconditioned(), Layers(["layers.0.*"]), Trace(), Density(), GaussNewtonSpectrum(), LossSlice()),
        *(Alignment(), RelativeSharpness(module.other_loss)),
    ]
    everything = {"bottom": 2, "sharpness": "average", "measurements": further, "every_n_epochs": 1}
    monitor = small_monitor(**everything, every_n_train_steps=None)
    trainer = quiet_trainer(max_epochs=1, callbacks=[monitor], logger=both_loggers(tmp_path))
    trainer.fit(module, loader())
    written = [tag.partition("/")[2] for tag in all_tags(tmp_path) if tag.startswith("curvature")]
    names = {tag.removesuffix("/text_summary") for tag in written}
    tags = (Path(__file__).parents[2] / "docs" / "monitor.md").read_text().split("## Tags")[1].split("\n## ")[0]
    told = re.findall(r"^\| `([^`]+)` \|", tags, re.MULTILINE)
    # Products that are not symmetric, and batches taken late, are not met here.
    unmet = [name for name in told if not any(Tag(name, "", "").fits(tag) for tag in names)]
    assert unmet == ["asymmetry", "probe_step"]
    assert {tag for tag in names if not any(Tag(name, "", "").fits(tag) for name in told)} == {"in_words", "record"}


def test_the_manual_says_of_each_tag_what_its_measurement_says() -> None:
    public = [getattr(curvature, name) for name in curvature.__all__]
    kinds = [thing for thing in public if isinstance(thing, type) and issubclass(thing, Measurement)]
    tags = [*(tag for kind in kinds for tag in getattr(kind, "tags", ())), *COST_TAGS, PROBE_TAG]
    manual = (Path(__file__).parents[2] / "docs" / "monitor.md").read_text()
    table = [line for line in manual.split("## Tags")[1].split("\n## ")[0].splitlines() if line.startswith("| `")]
    assert sorted(table) == sorted(f"| `{tag.name}` | {tag.description} | {tag.unit} |" for tag in tags)
    groups = re.findall(r"under `curvature-(\w+)/`", manual.split("## Tags")[1].split("\n| tag")[0])
    assert sorted(groups) == sorted({tag.group for tag in tags} - {""})


class Bar(ProgressBar):
    """Keeps what a progress bar would show after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[dict[str, Any]] = []

    def disable(self) -> None:
        pass

    def enable(self) -> None:
        pass

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        self.shown.append(self.get_metrics(trainer, pl_module))


@pytest.mark.parametrize("asked", [True, False])
def test_the_progress_bar_shows_the_last_eigenvalue_if_asked_and_logs_stay_the_same(
    asked: bool, tmp_path: Path
) -> None:
    bar, monitor = Bar(), small_monitor(every_n_train_steps=2, progress_bar=asked)
    trainer = quiet_trainer(
        callbacks=[monitor, bar], logger=both_loggers(tmp_path), enable_progress_bar=True, log_every_n_steps=3
    )
    trainer.fit(Classifier("SGD"), loader())
    logged = dict(from_csv(tmp_path)["curvature/lambda_max"])
    assert list(logged) == [2, 4, 6]
    expected = [logged.get(step // 2 * 2) if asked else None for step in range(1, 2 * BATCHES + 1)]
    assert [shown.get("curvature/lambda_max") for shown in bar.shown] == pytest.approx(expected)


def test_early_stopping_watches_curvature_without_a_logger() -> None:
    stop = EarlyStopping("curvature/lambda_max", mode="max", stopping_threshold=-1e9)
    trainer = quiet_trainer(max_epochs=5, callbacks=[small_monitor(sharpness=None), stop])
    trainer.fit(Classifier("Adam"), loader())
    assert trainer.current_epoch == 1


@pytest.mark.parametrize(
    ("every", "accumulate", "expected"), [(2, 1, [2, 4, 6, 8]), (1, 2, [1, 2, 3, 4, 5, 6]), (4, 2, [4])]
)
def test_each_multiple_of_the_interval_is_measured_once(
    every: int, accumulate: int, expected: list[int], tmp_path: Path
) -> None:
    monitor = small_monitor(every_n_train_steps=every, sharpness=None)
    trainer = quiet_trainer(
        max_epochs=3, accumulate_grad_batches=accumulate, callbacks=[monitor], logger=both_loggers(tmp_path)
    )
    trainer.fit(Classifier("SGD"), loader())
    assert [step for step, _ in from_csv(tmp_path)["curvature-bookkeeping/products"]] == expected


class WithPage(Classifier):
    """Has charts of its own."""

    def on_fit_start(self) -> None:
        self.logger.experiment.add_custom_scalars({"Mine": {"Loss": ["Multiline", ["loss_step$"]]}})


def test_charts_join_those_of_the_user_and_name_tags_that_were_written(tmp_path: Path) -> None:
    trainer = quiet_trainer(max_epochs=1, callbacks=[small_monitor(), StepMonitor()], logger=both_loggers(tmp_path))
    trainer.fit(WithPage("HessianFree"), loader())
    page, written = layout(tmp_path), from_events(tmp_path)
    # Newton steps stand last, though their monitor wrote first.
    assert list(page) == ["Mine", "Curvature", "Curvature: more", "Newton steps"]
    assert [*page["Mine"]] == ["Loss"]
    curvature = {**page["Curvature"], **page["Curvature: more"]}
    for end, title in (("max", "Largest eigenvalue and its interval"), ("min", "Smallest eigenvalue and its interval")):
        assert curvature[title].HasField("margin")
        bounds = [[f"curvature/lambda_{end}{part}"] for part in ("", "_lower", "_upper")]
        assert chart_tags(curvature[title], written) == bounds
    largest = [["curvature/lambda_2", "curvature/lambda_3", "curvature/lambda_max"]]
    assert chart_tags(curvature["Largest eigenvalues"], written) == largest
    assert chart_tags(curvature["Products"], written) == [["curvature-bookkeeping/products"]]
    assert all(tags for chart in curvature.values() for tags in chart_tags(chart, written))


def test_runs_of_other_settings_share_their_charts_to_the_byte(tmp_path: Path) -> None:
    pages = []
    for name, top, further in (("Adam", 1, [Preconditioned(), Trace()]), ("SGD", 3, []), ("HessianFree", 2, [])):
        monitor = small_monitor(top=top, measurements=further, at_start=True)
        trainer = quiet_trainer(max_epochs=1, callbacks=[monitor], logger=both_loggers(tmp_path / name))
        trainer.fit(Classifier(name), loader())
        pages.append(
            {title: chart for category in layout(tmp_path / name).values() for title, chart in category.items()}
        )
    adam, sgd, hessian_free = pages
    preconditioned = {
        f"Largest preconditioned eigenvalue and {what}" for what in ("its interval", "the stability threshold")
    }
    assert {*adam} - {*sgd} == {"Trace", *preconditioned}
    assert {*sgd} - {*adam} == {"Largest eigenvalue and the stability threshold"}
    # Neither is known before the first step.
    assert {*sgd} - {*hessian_free} == {title for title in sgd if "tability" in title}
    for one, other in itertools.combinations(pages, 2):
        assert [one[title] for title in one if title in other] == [other[title] for title in other if title in one]
        assert all(
            one[title].SerializeToString() == other[title].SerializeToString() for title in one if title in other
        )


OPTIMIZERS_WITHOUT_THRESHOLD: dict[str, Callable[..., Any]] = {
    "Adadelta": torch.optim.Adadelta,
    "HessianFree": OPTIMIZERS["HessianFree"],
    "ascent": lambda params: torch.optim.SGD(params, lr=0.01, maximize=True),
    "standstill": lambda params: torch.optim.SGD(params, lr=0.0),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS_WITHOUT_THRESHOLD.values(), ids=OPTIMIZERS_WITHOUT_THRESHOLD.keys())
def test_no_threshold_is_logged_where_none_is_known(optimizer: Callable[..., Any], tmp_path: Path) -> None:
    trainer = quiet_trainer(max_epochs=1, callbacks=[small_monitor()], logger=both_loggers(tmp_path))
    trainer.fit(Classifier(optimizer), loader())
    assert "curvature/lambda_max" in trainer.callback_metrics
    assert not [tag for tag in trainer.callback_metrics if "stability" in tag]
    assert not [title for title in layout(tmp_path)["Curvature"] if "stability" in title]


def test_adams_threshold_stands_beside_the_preconditioned_eigenvalue() -> None:
    trainer = quiet_trainer(max_epochs=1, callbacks=[small_monitor()])
    trainer.fit(Classifier("Adam"), loader())
    threshold, ratio, largest = (
        trainer.callback_metrics[f"curvature/{name}"]
        for name in ("stability_threshold", "stability_ratio", "preconditioned_lambda_max")
    )
    assert float(ratio) == pytest.approx(float(largest / threshold), rel=1e-6)


class WithoutSecondDerivative(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(Doubled.apply(self.layers(batch[0])), batch[1])


def test_a_measurement_that_fails_warns_once_a_fit_and_training_goes_on() -> None:
    monitor = small_monitor(products="cached")
    for _ in range(2):
        model, trainer = WithoutSecondDerivative("SGD"), quiet_trainer(callbacks=[monitor])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", message=".*(LeafSpec|many workers|torch.jit)")
            trainer.fit(model, loader())
        [warning] = caught
        assert str(warning.message).startswith("CurvatureMonitor could not measure at step 1, and training goes on: ")
        assert trainer.global_step == 2 * BATCHES
        assert not [tag for tag in trainer.callback_metrics if tag.startswith("curvature")]


class Speechless(Measurement[float]):
    """Cannot say what it measured."""

    tags = (Tag("one", "", "always one"),)

    def measure(self, view: Any) -> float:
        return 1.0

    def values(self, result: float) -> dict[str, float]:
        return {"one": result}

    def sentences(self, result: float, measured: Any) -> list[str]:
        raise KeyError("no words")


def test_a_measurement_that_cannot_be_shown_warns_once_and_training_goes_on(tmp_path: Path) -> None:
    monitor = small_monitor(measurements=[Speechless()], sharpness=None)
    trainer = quiet_trainer(callbacks=[monitor], logger=both_loggers(tmp_path))
    with pytest.warns(UserWarning, match="could not show all of a measurement .* KeyError: 'no words'"):
        trainer.fit(Classifier("SGD"), loader())
    assert trainer.global_step == 2 * BATCHES
    assert {value for _, value in from_csv(tmp_path)["curvature/one"]} == {1.0}


class Root(L.LightningModule):
    """A loss that has next to no curvature far out, where it is large."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (1.0 + self.w.square()).sqrt().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Thrown(L.Callback):
    """Puts the parameters elsewhere after the second step."""

    def __init__(self, place: float) -> None:
        self.place = place

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            module.w.data.fill_(self.place)


def records_of(folder: Path) -> dict[int, Any]:
    """The records for the Curvature tab, by step."""
    accumulator = EventAccumulator(str(folder / "tb"), size_guidance={"tensors": 0})
    accumulator.Reload()
    return {
        event.step: json.loads(event.tensor_proto.string_val[0]) for event in accumulator.Tensors("curvature/record")
    }


@pytest.mark.parametrize(
    ("settings", "states"),
    [
        ({"every_n_train_steps": 1}, ["below", "diverged", "diverged"]),  # each certified
        ({"every_n_train_steps": 2}, ["diverged"]),  # measured late
        (
            {"every_n_train_steps": 2, "probe": Probe(dataloader=[torch.zeros(1)])},
            ["below"],
        ),  # training has another loss
        ({"every_n_train_steps": 1, "probe": Probe(dataloader=[torch.zeros(1)])}, ["below", "diverged", "diverged"]),
    ],
)
def test_a_run_whose_loss_has_risen_far_is_called_diverged(
    settings: dict[str, Any], states: list[str], tmp_path: Path
) -> None:
    monitor = CurvatureMonitor(budget=Budget(certify_every=1), **settings)
    trainer = quiet_trainer(callbacks=[Thrown(1000.0), monitor], logger=both_loggers(tmp_path), max_epochs=1)
    trainer.fit(Root(), loader())
    found = records_of(tmp_path)
    assert [record["state"] for record in found.values()] == states
    assert found[2]["words"][0].startswith("In short: diverged: the loss is 2000, ") is ("diverged" in states)


class Digits(L.LightningModule):
    """A ReLU network on the digits, whose units die at learning rates that are too high."""

    def __init__(self, lr: float, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        hidden = [nn.Linear(64, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 64), nn.ReLU()]
        self.layers = nn.Sequential(*hidden, nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def train_dataloader(self) -> Any:
        images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
        return torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(images.float() / 4, labels),
            batch_size=16 if self.layers[2].p > 0.0 else 128,
            shuffle=True,
        )


def digits_run(model: Digits, folder: Path) -> dict[int, Any]:
    """Return the records of 120 steps, measured every 40."""
    monitor = CurvatureMonitor(every_n_train_steps=40, top=1, sharpness=None)
    trainer = quiet_trainer(callbacks=[monitor], logger=both_loggers(folder), max_epochs=-1, max_steps=120)
    trainer.fit(model)
    return records_of(folder)


@pytest.mark.parametrize("lr", [0.5, 1.0])
def test_a_network_that_has_died_is_not_called_stable(lr: float, tmp_path: Path) -> None:
    found = digits_run(Digits(lr), tmp_path)
    assert len(found) == 3
    for record in found.values():
        assert record["state"] in ("diverged", "lost", "spiked", "stuck")
        words = " ".join(record["words"])
        assert "raise the learning rate" not in words and "steps are stable" not in words
        assert "start again with a learning rate" in words or "restart with a lower learning rate" in words


def test_a_noisy_run_that_learns_is_called_stable(tmp_path: Path) -> None:
    found = digits_run(Digits(0.005, dropout=0.3), tmp_path)
    assert [record["state"] for record in found.values()] == ["below"] * 3


def test_the_loss_of_a_step_is_kept_until_it_is_read_and_forgotten_with_the_fit() -> None:
    losses = StepLosses()
    for k in range(600):
        losses.add(torch.tensor(float(k), requires_grad=True), 2, k // 2)
    assert losses.take() == [2.0 * (2 * k + 0.5) for k in range(300)] and losses.take() == [], "a mean for each step"
    monitor = CurvatureMonitor(every_n_train_steps=2)
    for _ in range(2):
        quiet_trainer(callbacks=[monitor], max_epochs=1).fit(Root(), loader())
        assert monitor._course.steps == BATCHES - BATCHES % 2 > 0


class Losing(L.LightningModule):
    """A loss that falls for twenty steps, and is back at its start from then on."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.at = at

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        k = self.at + batch_idx
        return self.w.square().sum() * 0.01 + (2.0 - 0.05 * k if k < 20 else 2.0)

    def other(self, batch: Any, batch_idx: int) -> Tensor:
        return self.w.square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("probe", "state"),
    [
        ({}, "lost"),
        ({"follow_loss": False}, "below"),
        ({"step": "other"}, "below"),  # whose loss is another one
    ],
)
def test_the_words_tell_of_the_training_loss_where_that_is_measured(
    probe: dict[str, Any], state: str, tmp_path: Path
) -> None:
    where = Probe(dataloader=[torch.zeros(1)], **probe)
    monitor = CurvatureMonitor(every_n_train_steps=60, top=1, sharpness=None, probe=where)
    batches = torch.utils.data.DataLoader(torch.zeros(60, 1))
    quiet_trainer(callbacks=[monitor], logger=both_loggers(tmp_path), max_epochs=1).fit(Losing(), batches)
    (record,) = records_of(tmp_path).values()
    assert record["state"] == state
    assert ("is back at 2" in record["words"][0]) is (state == "lost")
    assert monitor._course.from_start is (probe == {}), "where no loss is followed, nothing is said of the first step"


def test_batches_of_one_step_count_once() -> None:
    monitor = CurvatureMonitor(every_n_train_steps=6, probe=Probe(dataloader=[torch.zeros(1)]))
    batches = torch.utils.data.DataLoader(torch.zeros(24, 1))
    quiet_trainer(callbacks=[monitor], max_epochs=1, accumulate_grad_batches=4).fit(Losing(), batches)
    assert monitor._course.steps == 6
    assert monitor._course.recent[0] == pytest.approx(0.01 + (2.0 + 1.95 + 1.9 + 1.85) / 4, rel=1e-3)


def test_a_checkpoint_between_two_measurements_forgets_no_spike(tmp_path: Path) -> None:
    class Saving(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 40:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    class Spiking(Losing):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.w.square().sum() * 0.01 + (50.0 if 30 <= batch_idx < 36 else 2.0 - 0.01 * batch_idx)

    monitor = CurvatureMonitor(every_n_train_steps=60, top=1, sharpness=None)
    batches = torch.utils.data.DataLoader(torch.zeros(60, 1))
    trainer = quiet_trainer(callbacks=[Saving(), monitor], logger=both_loggers(tmp_path), max_epochs=1)
    trainer.fit(Spiking(), batches)
    (record,) = records_of(tmp_path).values()
    assert record["state"] == "spiked"


def test_a_resumed_run_knows_its_losses_and_another_fit_does_not_know_its_start(tmp_path: Path) -> None:
    def monitor() -> CurvatureMonitor:
        return CurvatureMonitor(every_n_train_steps=30, top=1, sharpness=None)

    first, batches = monitor(), torch.utils.data.DataLoader(torch.zeros(40, 1))
    trainer = quiet_trainer(callbacks=[first], max_epochs=1)
    trainer.fit(Losing(), batches)
    assert first._course.steps == 30
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = monitor()
    with pytest.warns(UserWarning, match="measures on other batches from here on"):
        quiet_trainer(callbacks=[resumed], max_epochs=2).fit(
            Losing(40), batches, ckpt_path=tmp_path / "a.ckpt", weights_only=True
        )
    assert (resumed._course.steps, resumed._course.trouble, resumed._course.from_start) == (60, "lost", True)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(Losing(40), batches)
    assert first._course.trouble is None and not first._course.from_start


@pytest.mark.parametrize(("place", "what"), [(math.inf, "The loss is inf"), (0.0, "The gradient is not finite")])
def test_a_loss_that_is_not_finite_leaves_a_record_that_says_so(place: float, what: str, tmp_path: Path) -> None:
    class Overflowing(Root):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.w.abs().sqrt().sum()

    monitor = CurvatureMonitor(every_n_train_steps=2)
    trainer = quiet_trainer(callbacks=[Thrown(place), monitor], logger=both_loggers(tmp_path), max_epochs=1)
    with pytest.warns(UserWarning, match=f"could not measure at step 2, .*{what}.* lower the learning rate"):
        trainer.fit(Overflowing(), loader())
    found = records_of(tmp_path)[2]
    (words,) = found.pop("words")
    assert found == {"version": 1, "values": {}, "certified": None, "state": "failed", "remark": ""}
    assert words.startswith(f"Nothing could be measured at step 2. {what}")
    assert words.endswith("If training has brought it there, lower the learning rate.")


def test_a_record_of_a_failure_that_cannot_be_written_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("newtonopt.callbacks.curvature_monitor.add_failure", full)
    monitor = CurvatureMonitor(every_n_train_steps=2)
    trainer = quiet_trainer(callbacks=[Thrown(math.inf), monitor], logger=both_loggers(tmp_path), max_epochs=1)
    with (
        pytest.warns(UserWarning, match="could not show all of a measurement at step 2, .*no space left"),
        pytest.warns(UserWarning, match="could not measure at step 2"),
    ):
        trainer.fit(Root(), loader())
    assert trainer.global_step == BATCHES


class Hopeless(Speechless):
    """Cannot measure anything."""

    tags = (Tag("two", "", "always two"),)

    def measure(self, view: Any) -> float:
        raise torch.linalg.LinAlgError("no factor")


def test_one_measurement_that_fails_leaves_the_others_with_one_warning(tmp_path: Path) -> None:
    monitor = small_monitor(measurements=[Hopeless(), Trace()], at_start=True)
    trainer = quiet_trainer(callbacks=[monitor], logger=both_loggers(tmp_path))
    with pytest.warns(
        UserWarning, match="could not measure Hopeless at step 0, and leaves it out: no factor"
    ) as caught:
        trainer.fit(Classifier("SGD"), loader())
    assert sum("Hopeless" in str(warning.message) for warning in caught) == 1
    values = from_csv(tmp_path)
    for tag in ("/lambda_max", "/trace", "-bookkeeping/products"):
        assert [step for step, _ in values[f"curvature{tag}"]] == list(range(2 * BATCHES + 1))
    assert "curvature/two" not in values


def test_without_second_derivatives_it_measures_by_finite_differences(tmp_path: Path) -> None:
    trainer = quiet_trainer(callbacks=[small_monitor(sharpness="ball")], logger=both_loggers(tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message=".*(LeafSpec|many workers|torch.jit)")
        trainer.fit(WithoutSecondDerivative("SGD"), loader())
    assert [str(w.message) for w in caught if "finite differences" not in str(w.message)] == []
    assert len(caught) == 1
    assert "curvature/sharpness" in trainer.callback_metrics
    assert len(from_csv(tmp_path)["curvature/lambda_max"]) > 1
    monitor = trainer.callbacks[0]
    monitor.setup(trainer, Plain("SGD"), "fit")
    assert not monitor._differences  # another model may have them


class HalfPrecision(Plain):
    """A parameter in float16, in which curvature is not computed."""

    def __init__(self) -> None:
        super().__init__("SGD")
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float16))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.scale.float() * super().training_step(batch, batch_idx)


def test_a_model_that_cannot_be_measured_still_trains() -> None:
    trainer = quiet_trainer(max_epochs=1, callbacks=[small_monitor()])
    with pytest.warns(UserWarning, match=r"could not measure at step 1, and training goes on: .*float16"):
        trainer.fit(HalfPrecision(), loader())
    assert trainer.global_step == BATCHES


FLAGS = ("at_start", "at_end", "gradient", "text", "progress_bar")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every_n_train_steps": 0}, "every_n_train_steps must be a whole number and at least 1, got 0"),
        ({"every_n_epochs": True}, "every_n_epochs must be a whole number and at least 1, got True"),
        ({"top": 0}, "top must be a whole number and at least 1, got 0"),
        ({"top": "3"}, "top must be a whole number and at least 1, got '3'"),
        ({"top": True}, "top must be a whole number and at least 1, got True"),
        ({"bottom": -1}, "bottom must be a whole number and at least 0, got -1"),
        ({"num_batches": 0}, "num_batches must be a whole number and at least 1, got 0"),
        ({"certify_every": True}, "certify_every must be a whole number and at least 1, got True"),
        ({"max_products": 0}, "max_products must be a whole number and at least 1, got 0"),
        *((({flag: "yes"}), f"{flag} must be True or False, got 'yes'") for flag in FLAGS),
        ({"sharpness": "cube"}, "sharpness must be 'ball' or 'adaptive_ball' or 'average' or None, got 'cube'"),
        ({"mode": "test"}, "mode must be 'train' or 'eval', got 'test'"),
        ({"measurements": [int]}, "measurements must hold measurements only, got <class 'int'> in it"),
        ({"measurements": [Sharpness()]}, "measurements must hold at most one Sharpness"),
        ({"probe": 3}, "probe must be a Probe, or None, got 3"),
        ({"budget": {}}, "budget must be a Budget, or None, got {}"),
        ({"tolerance": 1.0}, r"tolerance must be in \(0, 1\), got 1.0"),
        ({"products": "guess"}, "products must be 'auto' or .*, got 'guess'"),
        ({"curvature": "fisher"}, "curvature must be 'hessian' or 'gauss_newton', got 'fisher'"),
        ({"precision": "half"}, "precision must be 'full' or 'training', got 'half'"),
        ({"max_seconds": 0}, "max_seconds must be positive and finite, got 0"),
        ({"prefix": ""}, "prefix must consist of letters, .* got ''. Write 'curvature'"),
        ({"device": "gpu"}, "device must be one of this machine, got 'gpu'. Write 'cpu'"),
        (
            {"dataloader": iter([])},
            "dataloader must be a loader or a list of batches, or None, got an iterator, which ends after one pass",
        ),
        ({"dataloader": 5}, "dataloader must be a loader or a list of batches, or None, got 5"),
        ({"dataloader": "train"}, "dataloader must be a loader or a list of batches, or None, got 'train'"),
        ({"parameters": "("}, r"parameters must be a regular expression, or None for all, got '\(' \(missing \)"),
        ({"parameters": ["encoder"]}, r"parameters must be a regular expression, or None for all, got \['encoder'\]"),
        ({"step": None}, "step must be the name of a method, got None"),
        (
            {"measurements": [LossSlice(2)], "top": 1, "bottom": 0},
            r"directions must be at most top \+ bottom, 1, .*, got 2",
        ),
    ],
)
def test_bad_arguments_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        monitor_of(settings)


def test_it_has_few_arguments_and_a_change_of_one_holds(tmp_path: Path) -> None:
    names = list(inspect.signature(CurvatureMonitor).parameters)
    assert len(names) <= 18
    monitor = small_monitor(top=1, bottom=0, sharpness=None)
    assert all(hasattr(monitor, name) for name in names)
    monitor.top, monitor.measurements, monitor.budget = 2, [Trace()], Budget(max_products=5)
    trainer = quiet_trainer(max_epochs=1, callbacks=[monitor])
    trainer.fit(Classifier("SGD"), loader())
    assert {"curvature/lambda_2", "curvature/trace"} <= trainer.callback_metrics.keys()
    monitor.top = 0
    with pytest.raises(ValueError, match="top must be a whole number and at least 1, got 0"):
        quiet_trainer(max_epochs=1, callbacks=[monitor]).fit(Classifier("SGD"), loader())


class OutOfPlace(Plain):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step((batch[0] * 3 + 1, batch[1]), batch_idx)


class InPlace(Plain):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        batch[0].mul_(3).add_(1)
        return super().training_step(batch, batch_idx)


class WithoutIndex(Plain):
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        return super().training_step((batch[0] * 3 + 1, batch[1]), 0)


@pytest.mark.parametrize("kind", [InPlace, WithoutIndex])
def test_the_step_may_change_its_batch_and_leave_out_the_index(kind: type[Plain]) -> None:
    values = []
    for model in (OutOfPlace("SGD"), kind("SGD")):
        torch.manual_seed(0)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.5)
        trainer = quiet_trainer(max_epochs=1, callbacks=[small_monitor(num_batches=2)])
        trainer.fit(model, loader())
        values.append({tag: float(v) for tag, v in trainer.callback_metrics.items() if not tag.endswith("/seconds")})
    assert values[0] == values[1]
    assert "curvature/sharpness" in values[0]


class PartlyFrozen(Plain):
    """A BatchNorm layer that training holds in evaluation mode."""

    def on_train_epoch_start(self) -> None:
        self.layers[1].eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls.batches.append((self.layers[1].training, self.layers[3].training))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_layer_held_in_evaluation_mode_stays_in_it(mode: str) -> None:
    model = PartlyFrozen("SGD")
    quiet_trainer(max_epochs=1, callbacks=[small_monitor(mode=mode)]).fit(model, loader())
    assert len(model.calls.batches) > BATCHES
    assert set(model.calls.batches) == ({(False, True)} if mode == "train" else {(False, True), (False, False)})
    assert model.layers[3].training and not model.layers[1].training


def test_the_command_line_builds_both_monitors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fit"])
    settings = {"every_n_train_steps": 2, "top": 4, "sharpness": None, "products": "cached", "at_start": True}
    probe = {"num_batches": 3, "mode": "eval", "precision": "training", "parameters": "^layer", "device": "cpu"}
    listing = [
        {"class_path": "newtonopt.curvature.Trace"},
        {"class_path": "newtonopt.curvature.Layers", "init_args": {"patterns": ["layer.*"]}},
        {"class_path": "newtonopt.curvature.LossSlice", "init_args": {"directions": 2, "radius": 0.5}},
    ]
    given = {**settings, "probe": probe, "budget": {"max_overhead": 0.15}, "measurements": listing}
    callbacks = [
        {"class_path": "newtonopt.callbacks.CurvatureMonitor", "init_args": given},
        {"class_path": "newtonopt.callbacks.StepMonitor", "init_args": {"every_n_train_steps": 5}},
    ]
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    arguments = {
        "trainer": {**quiet, "callbacks": callbacks},
        "optimizer": {"class_path": "newtonopt.HessianFree", "init_args": {"rank": 5}},
    }
    cli = LightningCLI(Bare, run=False, args=arguments, save_config_callback=None, seed_everything_default=False)
    curvature = next(c for c in cli.trainer.callbacks if isinstance(c, CurvatureMonitor))
    steps = next(c for c in cli.trainer.callbacks if isinstance(c, StepMonitor))
    assert {name: getattr(curvature, name) for name in settings} == settings
    assert curvature.probe == Probe(**probe) and curvature.budget == Budget(max_overhead=0.15)
    assert curvature.measurements == [Trace(), Layers(["layer.*"]), LossSlice(2, 0.5)]
    assert steps.every_n_train_steps == 5


class Bare(L.LightningModule):
    """For the command line: all of its arguments have a plain type."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(width, width)
