"""Mistakes in CurvatureMonitor's configuration stop a run before it trains; what cannot be measured is said once."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning
from lightning_problems import BATCHES, OPTIMIZERS, Classifier, loader, monitor_of, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from newtonopt.callbacks import Budget, CurvatureMonitor, Probe, StepMonitor
from newtonopt.curvature import Layers, Preconditioned


def quick(**settings: Any) -> CurvatureMonitor:
    return monitor_of({"top": 1, "bottom": 0, "sharpness": None, "max_products": 8, **settings})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"step": "loss"},
            "step must be the name of a method of Classifier, got 'loss'. Give the name of one that takes a",
        ),
        ({"step": "make"}, "step must be the name of a method of Classifier, got 'make'"),
        (
            {"parameters": "^encoder"},
            r"parameters must be found in the name of .* Classifier, got '\^encoder'\. Choose from layers\.0\.weight, ",
        ),
        (
            {"measurements": [Layers(["layers.*", "decoder.*"])]},
            r"patterns must each match the name of .*, got 'decoder\.\*'\. Choose from layers\.0\.weight, ",
        ),
        ({"top": 1000}, "top must be at most the number of parameters, [0-9]+, got 1000"),
        ({"bottom": 7, "parameters": "4.bias"}, "bottom must be at most the number of parameters, 3, got 7"),
        (
            {"measurements": [Layers(["layers.0.*"])], "parameters": "4"},
            r"got 'layers\.0\.\*'\. Choose from layers\.4\.weight, ",
        ),
    ],
)
def test_what_the_module_has_not_is_an_error_before_training(settings: dict[str, Any], words: str) -> None:
    model = Classifier("SGD")
    model.make = 3
    with pytest.raises(ValueError, match=words):
        quiet_trainer(callbacks=[quick(**settings)]).fit(model, loader())
    assert model.calls.batches == []


@pytest.mark.parametrize(
    ("dataloader", "words"),
    [
        (
            torch.ones(4, 2),
            "must be a loader or a list of batches, or None, got a Tensor, which is one batch. Write [b",
        ),
        (np.ones((4, 20)), "got a ndarray, which is one batch. Write [batch]."),
        ((torch.ones(4, 2), torch.ones(4)), "which is one batch. Write [batch]."),
        ({"x": torch.ones(4, 20)}, "which is one batch. Write [batch]."),
        ([], "must hold one batch at least, got [] of length 0."),
        (DataLoader(TensorDataset(torch.ones(0, 2))), "must hold one batch at least, got a DataLoader of length 0."),
        (TensorDataset(torch.ones(4, 2)), "got a TensorDataset. Write DataLoader(dataset, batch_size)."),
        (nn.Sequential(nn.Linear(2, 1)), "or None, got a Sequential."),
    ],
)
def test_what_is_no_loader_is_refused(dataloader: Any, words: str) -> None:
    with pytest.raises(ValueError, match="^dataloader .*" + re.escape(words)):
        Probe(dataloader=dataloader)


class Endless(IterableDataset[Tensor]):
    """Its length is not known."""

    def __iter__(self) -> Iterator[Tensor]:
        yield torch.ones(2)


def test_a_loader_of_unknown_length_is_taken() -> None:
    Probe(dataloader=DataLoader(Endless()))
    Probe(dataloader=Endless())


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (15, "max_overhead must be above 0 and at most 1, got 15. Write 0.15 for 15 %."),
        (-0.1, "got -0.1."),
        (True, "got True."),
        ("15", "got '15'."),
        (math.nan, "got nan."),
        (math.inf, "got inf."),
        (torch.tensor(0.1), "got tensor(0.1000). Write a Python number: .item() gives it."),
    ],
)
def test_an_overhead_is_a_share(share: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Budget(max_overhead=share)
    Budget(max_overhead=1)


@pytest.mark.parametrize(
    ("kind", "name", "remedy"),
    [
        (CurvatureMonitor, "every_n_steps", "Write every_n_train_steps=..."),
        (StepMonitor, "every_n_steps", "Write every_n_train_steps=..."),
        (CurvatureMonitor, "every_n_train_epochs", "Write every_n_epochs=..."),
        (CurvatureMonitor, "top_k", "Write top=..."),
        (CurvatureMonitor, "sharpness_radius", "Write sharpness=Sharpness(radius=...)."),
        (CurvatureMonitor, "max_products", "Write budget=Budget(max_products=...)."),
        (CurvatureMonitor, "num_batches", "Write probe=Probe(num_batches=...)."),
        (CurvatureMonitor, "trace", "Write measurements=[Trace()]."),
        (CurvatureMonitor, "sharpnes", "Write sharpness=..."),
        (StepMonitor, "zzz", "Its arguments are every_n_train_steps."),
    ],
)
def test_an_argument_of_another_callback_is_told_what_it_is_called_here(kind: Any, name: str, remedy: str) -> None:
    words = re.escape(f"{kind.__name__} takes no {name}, got {name}=3. {remedy}")
    with pytest.raises(TypeError, match=f"^{words}"):
        kind(**{name: 3})


class Lazy(Classifier):
    """Layers whose shapes are known with the first batch."""

    def __init__(self) -> None:
        super().__init__("SGD")
        self.layers = nn.Sequential(nn.LazyLinear(6), nn.BatchNorm1d(6), nn.Tanh(), nn.LazyLinear(3))


class Partly(Classifier):
    """Not all of it is trained at first."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def on_after_backward(self) -> None:
        pass


class Thaw(BaseFinetuning):
    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.layers[0], train_bn=False)

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.layers[0], optimizer)


@pytest.mark.filterwarnings("ignore:Lazy modules|The model has|A layer with UninitializedParameter:UserWarning")
def test_parameters_without_a_shape_so_far_are_no_mistake() -> None:
    trainer = quiet_trainer(
        callbacks=[quick(every_n_train_steps=1, parameters="3", measurements=[Layers(["layers.3.*"])])]
    )
    trainer.fit(Lazy(), loader())
    assert float(trainer.callback_metrics["curvature/lambda_max_of/layers.3"]) > 0.0


def test_parameters_that_are_frozen_so_far_are_no_mistake() -> None:
    monitor = quick(every_n_train_steps=5, parameters="^layers.0", measurements=[Layers(["layers.0.*"])])
    trainer = quiet_trainer(callbacks=[Thaw(), monitor])
    trainer.fit(Partly(), loader())
    assert float(trainer.callback_metrics["curvature/lambda_max_of/layers.0"]) > 0.0


class WithMonitors(Classifier):
    def configure_callbacks(self) -> list[L.Callback]:
        return [quick(), quick(prefix="other"), quick()]


def test_two_monitors_with_one_prefix_are_an_error_before_training() -> None:
    words = "prefix must be another one in each CurvatureMonitor .*, got 'curvature' .*Give each its own prefix"
    monitor = quick(at_end=True)
    for model, callbacks in (
        (Classifier("SGD"), [monitor, quick(at_end=True, parameters="4")]),
        (Classifier("SGD"), [monitor, monitor]),
        (WithMonitors("SGD"), []),
    ):
        with pytest.raises(ValueError, match=words):
            quiet_trainer(callbacks=callbacks).fit(model, loader())
        assert model.calls.batches == []


def test_two_monitors_with_a_prefix_each_keep_their_own_batches(tmp_path: Path) -> None:
    trainer = quiet_trainer(
        callbacks=[
            quick(at_end=True, save_probe=True),
            quick(at_end=True, prefix="other", num_batches=2, save_probe=True),
        ]
    )
    trainer.fit(Classifier("SGD"), loader())
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    state = torch.load(tmp_path / "both.ckpt", weights_only=True)["CurvatureMonitor"]
    assert {prefix: len(probe["batches"]) for prefix, probe in state.items()} == {"curvature": 1, "other": 2}


def fitted(optimizer: Callable[..., Any] | str, **settings: Any) -> tuple[L.Trainer, list[str]]:
    """After a fit, and what CurvatureMonitor warned of."""
    trainer = quiet_trainer(
        callbacks=[quick(every_n_train_steps=1, measurements=[Preconditioned()], at_start=True, **settings)]
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Classifier(optimizer), loader())
    assert trainer.global_step == 2 * BATCHES
    return trainer, [str(w.message) for w in caught if "CurvatureMonitor" in str(w.message)]


def ascent(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-4, maximize=True)


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        (
            torch.optim.LBFGS,
            "optimizer must have a known stability threshold, .* got a value of type LBFGS",
        ),
        (
            "HessianFree",
            "optimizer must have a known stability threshold, .* got a value of type HessianFree",
        ),
        (ascent, "maximize must be False, got True"),
        (lambda params: torch.optim.Adam(list(params)[:2]), "params must belong to the optimizer, got one of shape"),
    ],
    ids=["LBFGS", "HessianFree", "ascent", "some"],
)
def test_a_preconditioned_eigenvalue_that_there_cannot_be_warns_once(optimizer: Any, why: str) -> None:
    trainer, (words,) = fitted(optimizer)
    assert words.startswith("CurvatureMonitor cannot measure Preconditioned: ")
    assert re.search(why, words)
    assert "curvature/lambda_max" in trainer.callback_metrics
    assert "curvature/preconditioned_lambda_max" not in trainer.callback_metrics


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_a_preconditioned_eigenvalue_that_comes_with_the_first_step_is_no_reason_to_warn(optimizer: str) -> None:
    trainer, words = fitted(OPTIMIZERS[optimizer])
    assert words == []
    assert "curvature/preconditioned_lambda_max" in trainer.callback_metrics


class Failing(Classifier):
    def loss(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 2:
            raise ArithmeticError("no")
        return F.cross_entropy(self.layers(batch[0]), batch[1])


def test_a_failure_after_another_warning_is_still_said() -> None:
    monitor = quick(every_n_train_steps=1, measurements=[Preconditioned()], step="loss")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(callbacks=[monitor]).fit(Failing("HessianFree"), loader())
    words = [str(w.message) for w in caught if "CurvatureMonitor" in str(w.message)]
    assert len(words) == 2
    assert "cannot measure Preconditioned" in words[0] and "could not measure at step 2" in words[1]


class Frozen(Classifier):
    """From its first step on."""

    def on_after_backward(self) -> None:
        self.requires_grad_(False)


@pytest.mark.parametrize("parameters", [None, "^layers"])
def test_a_frozen_model_is_said_to_have_nothing_to_measure(parameters: str | None) -> None:
    trainer = quiet_trainer(callbacks=[quick(every_n_train_steps=1, parameters=parameters)], max_steps=1)
    with pytest.warns(UserWarning, match="Frozen must have a parameter with requires_grad to be measured, got none"):
        trainer.fit(Frozen("SGD"), loader())
