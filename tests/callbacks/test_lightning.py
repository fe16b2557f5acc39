"""On what CurvatureMonitor measures: kept batches, a loader of the user's, the same ones after resuming."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_problems import Classifier, both_loggers, from_csv, loader, monitor_of, points, quiet_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from newtonopt.callbacks import CurvatureMonitor, Probe
from newtonopt.curvature import measure


def quick(**settings: Any) -> CurvatureMonitor:
    standard = {"every_n_train_steps": 1, "top": 2, "sharpness": None, "max_products": 40, "certify_every": 1}
    return monitor_of({**standard, **settings})


class Smooth(Classifier):
    """No random numbers, no BatchNorm: a loss that can be computed again from outside."""

    def __init__(self) -> None:
        super().__init__("SGD")
        torch.manual_seed(3)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def on_train_epoch_end(self) -> None:
        pass


def curvature(trainer: L.Trainer) -> dict[str, float]:
    found = {tag: float(v) for tag, v in trainer.callback_metrics.items() if tag.startswith("curvature")}
    return {tag: value for tag, value in found.items() if tag != "curvature-bookkeeping/seconds"}


def test_the_values_are_those_of_measure_on_the_mean_over_all_samples() -> None:
    x, y = points()
    data = DataLoader(TensorDataset(x, y), batch_size=9)
    model = Smooth()
    trainer = quiet_trainer(max_epochs=1, callbacks=[quick(dataloader=data, sharpness="ball")])
    trainer.fit(model, loader())

    def closure() -> Tensor:
        return F.cross_entropy(model.layers(x), y)

    expected = dict(measure(closure, model.parameters(), trainer.optimizers[0], max_products=40, top=2))
    del expected["curvature-bookkeeping/seconds"]
    assert curvature(trainer) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert "curvature/stability_ratio" in expected and "curvature/sharpness" in expected


@pytest.mark.parametrize("products", ["cached", "streamed", "finite_difference"])
@pytest.mark.parametrize("own", [False, True], ids=["", "with its own generator"])
def test_a_shuffling_loader_is_the_same_function_each_time(products: Any, own: bool) -> None:
    """Its order and the steps' Dropout masks are replayed, and training's own are left alone."""
    weights = []
    for watched in (False, True):
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(0)
        generator = torch.Generator().manual_seed(5) if own else None
        data = DataLoader(TensorDataset(*points()), batch_size=8, shuffle=True, generator=generator)
        model, monitor = Classifier("SGD"), quick(dataloader=data, products=products, max_products=4)
        trainer = quiet_trainer(max_epochs=1, callbacks=[monitor] if watched else [])
        trainer.fit(model, data)
        weights.append([p.detach() for p in model.parameters()])
    assert "curvature/lambda_max" in trainer.callback_metrics
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))


def test_batches_are_kept_on_the_device_asked_for() -> None:
    model, trainer = Smooth(), quiet_trainer(max_epochs=1, callbacks=[quick(device="meta")])
    with pytest.warns(UserWarning, match="could not measure at step 1"):  # what was moved to meta is lost
        trainer.fit(model, loader())
    trainer = quiet_trainer(max_epochs=1, callbacks=[quick(device="cpu")])
    trainer.fit(model, loader())
    assert "curvature/lambda_max" in trainer.callback_metrics


def resumed(folder: Path, batches: list[Any], **probe: Any) -> dict[str, float]:
    """The last measurement of a run that stopped after its first epoch and was continued on other batches."""
    torch.manual_seed(0)
    first = quiet_trainer(max_epochs=1, callbacks=[quick(num_batches=2, **probe)])
    first.fit(Smooth(), one_by_one(batches))
    first.save_checkpoint(folder / "first.ckpt")
    second = quiet_trainer(max_epochs=2, callbacks=[quick(num_batches=2, **probe)], logger=both_loggers(folder))
    other = [tuple(t.flip(0)[:5] for t in batch) for batch in batches]
    second.fit(Smooth(), one_by_one(other), ckpt_path=folder / "first.ckpt")
    second.save_checkpoint(folder / "last.ckpt")
    return curvature(second)


def one_by_one(batches: list[Any]) -> DataLoader:
    return DataLoader(batches, batch_size=None)


def truth_of(checkpoint: Path, batches: list[Any]) -> float:
    """The largest eigenvalue of a saved model's loss on the batches."""
    model = Smooth()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    found = measure(lambda: F.cross_entropy(model.layers(inputs), labels), model.parameters(), sharpness=None)
    return found["curvature/lambda_max"]


def test_a_checkpoint_holds_no_data_unless_asked_to(tmp_path: Path) -> None:
    batches = [(torch.randn(1000, 4), torch.randint(3, (1000,))) for _ in range(2)]
    sizes = {}
    for name, monitors in {
        "without": [],
        "with": [quick(num_batches=2)],
        "save_probe": [quick(num_batches=2, save_probe=True)],
    }.items():
        trainer = quiet_trainer(max_epochs=1, callbacks=monitors)
        trainer.fit(Smooth(), one_by_one(batches))
        trainer.save_checkpoint(tmp_path / name)
        sizes[name] = (tmp_path / name).stat().st_size
    assert sizes["with"] <= sizes["without"] + 1024
    data = sum(t.numel() * t.element_size() for batch in batches for t in batch)
    assert data <= sizes["save_probe"] - sizes["without"] <= data + 4096


def test_a_resumed_run_measures_on_its_first_batches_and_says_so(tmp_path: Path) -> None:
    batches = [tuple(batch) for batch in loader()]
    with pytest.warns(
        UserWarning, match=r"measures on other batches from here on.* Give probe=Probe\(save_probe=True"
    ) as w:
        values = resumed(tmp_path, batches)
    assert sum("other batches" in str(warning.message) for warning in w) == 1
    other = [tuple(t.flip(0)[:5] for t in batch) for batch in batches[:2]]
    assert values["curvature/lambda_max"] == pytest.approx(truth_of(tmp_path / "last.ckpt", other), rel=1e-3)
    # The history is marked: in the values, and in words.
    assert from_csv(tmp_path)["curvature-bookkeeping/probe_step"] == [(step, 3.0) for step in (5, 6)]
    assert "Its batches were taken at step 3; earlier values belong to other batches." in written_text(tmp_path)


def written_text(folder: Path) -> str:
    events = EventAccumulator(str(folder / "tb")).Reload()
    return "".join(e.tensor_proto.string_val[0].decode() for e in events.Tensors("curvature/in_words/text_summary"))


def test_a_resumed_run_measures_on_the_batches_that_were_saved(tmp_path: Path) -> None:
    batches = [tuple(batch) for batch in loader()]
    values = resumed(tmp_path, batches, save_probe=True)
    probe = torch.load(tmp_path / "first.ckpt", weights_only=True)["CurvatureMonitor"]["curvature"]["batches"]
    for (kept, index), (number, batch) in zip(probe, enumerate(batches), strict=False):
        assert index == number
        assert all(torch.equal(a, b) for a, b in zip(kept, batch, strict=True))
    assert len(probe) == 2
    assert values["curvature/lambda_max"] == pytest.approx(truth_of(tmp_path / "last.ckpt", batches[:2]), rel=1e-3)
    assert "curvature-bookkeeping/probe_step" not in values and "were taken at step" not in written_text(tmp_path)


def test_with_saved_batches_a_resumed_run_continues_to_the_bit(tmp_path: Path) -> None:
    def fit(name: str, epochs: int, start: Path | None = None) -> dict[str, list[tuple[int, float]]]:
        monitor = quick(num_batches=2, save_probe=True, sharpness="ball")
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[monitor], logger=both_loggers(tmp_path / name))
        trainer.fit(Smooth(), one_by_one([tuple(batch) for batch in loader()]), ckpt_path=start)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        return {
            tag: values for tag, values in from_csv(tmp_path / name).items() if tag != "curvature-bookkeeping/seconds"
        }

    whole, first = fit("whole", 2), fit("first", 1)
    second = fit("second", 2, tmp_path / "first.ckpt")
    assert {tag: [*values, *second[tag]] for tag, values in first.items()} == whole
    assert [step for step, _ in second["curvature/lambda_max"]] == [4, 5, 6]


def test_a_second_fit_in_one_process_is_marked_too(tmp_path: Path) -> None:
    trainer = quiet_trainer(max_epochs=1, callbacks=[quick()])
    trainer.fit(Smooth(), loader())
    assert "curvature-bookkeeping/probe_step" not in curvature(trainer)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Smooth(), loader(5))
    assert curvature(trainer)["curvature-bookkeeping/probe_step"] == 3.0


def test_a_fit_after_validating_a_checkpoint_takes_batches_of_its_own(tmp_path: Path) -> None:
    class Validated(Smooth):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    first = quiet_trainer(max_epochs=1, callbacks=[quick()])
    first.fit(Smooth(), loader())
    first.save_checkpoint(tmp_path / "first.ckpt")
    second = quiet_trainer(max_epochs=1, callbacks=[quick(save_probe=True)])
    second.validate(Validated(), loader(), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    second.fit(Validated(), loader(5), loader())
    second.save_checkpoint(tmp_path / "second.ckpt")
    [[(inputs, _), _]] = torch.load(tmp_path / "second.ckpt", weights_only=True)["CurvatureMonitor"]["curvature"][
        "batches"
    ]
    assert len(inputs) == 5


@dataclass
class Pair:
    x: Tensor
    y: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        yield from (self.x, self.y)

    def __getitem__(self, index: int) -> Tensor:
        return (self.x, self.y)[index]


def test_batches_that_no_checkpoint_can_hold_are_not_saved_with_a_warning(tmp_path: Path) -> None:
    batches = [Pair(*batch) for batch in loader()]
    with (
        pytest.warns(UserWarning, match="saves no batches with checkpoints: save_probe needs batches made of"),
        pytest.warns(UserWarning, match="measures on other batches from here on"),
    ):
        values = resumed(tmp_path, batches, save_probe=True)
    assert "curvature/lambda_max" in values


def test_saving_a_loader_is_refused() -> None:
    with pytest.raises(ValueError, match=r"save_probe must be False beside a dataloader, got True\. Leave it out"):
        Probe(dataloader=loader(), save_probe=True)


class Own:
    """A batch of the user's own class, whose `to` moves it in place."""

    def __init__(self, x: Tensor, y: Tensor, lock: Any = None) -> None:
        self.x, self.y, self.lock = x, y, lock

    def to(self, device: torch.device, non_blocking: bool = False) -> Own:
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self


class ChangesItsBatch(Smooth):
    def training_step(self, batch: Own, batch_idx: int) -> Tensor:
        batch.x.mul_(1.5)
        batch.y = batch.y.flip(0)
        return F.cross_entropy(self.layers(batch.x), batch.y)


def test_a_batch_of_the_users_own_class_is_left_to_training() -> None:
    """Whatever the step does to it, in measurements it does to copies."""
    weights = []
    for monitors in ([], [quick(at_start=True)]):
        model, trainer = ChangesItsBatch(), quiet_trainer(callbacks=monitors)
        trainer.fit(model, one_by_one([Own(x.clone(), y.clone()) for x, y in loader()]))
        weights.append([p.detach().clone() for p in model.parameters()])
    assert "curvature/lambda_max" in trainer.callback_metrics
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))


class TakesItsBatch(Smooth):
    def training_step(self, batch: Own, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layers(batch.x), batch.y)


def test_a_batch_that_cannot_be_copied_is_measured_as_it_is() -> None:
    trainer = quiet_trainer(max_epochs=1, callbacks=[quick()])
    trainer.fit(TakesItsBatch(), one_by_one([Own(*batch, lock=threading.Lock()) for batch in loader()]))
    assert "curvature/lambda_max" in trainer.callback_metrics


def test_batches_that_do_not_tell_their_numbers_of_samples_are_not_weighted() -> None:
    trainer = quiet_trainer(max_epochs=1, callbacks=[quick(num_batches=2)])
    with pytest.warns(UserWarning, match=r"number of samples, .*, got one of type Own\. .* or measure one batch on"):
        trainer.fit(TakesItsBatch(), one_by_one([Own(*batch) for batch in loader()]))


def first_batch(model: Smooth, casts: bool) -> Callable[[], Tensor]:
    x, y = next(iter(loader()))

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=casts):
            return F.cross_entropy(model.layers(x), y)

    return closure


def test_measuring_as_in_training_uses_its_autocast() -> None:
    values = {}
    for precision in ("full", "training"):
        model = Smooth()
        trainer = quiet_trainer(max_epochs=1, precision="bf16-mixed", callbacks=[quick(precision=precision)])
        trainer.fit(model, loader())
        values[precision] = curvature(trainer)["curvature/lambda_max"]
        truth = measure(first_batch(model, precision == "training"), model.parameters(), sharpness=None)
        assert values[precision] == pytest.approx(truth["curvature/lambda_max"], rel=1e-6)
    assert values["full"] != values["training"]
    assert values["full"] == pytest.approx(values["training"], rel=0.02)
