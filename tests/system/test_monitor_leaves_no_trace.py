"""Training with CurvatureMonitor is training without it, bit for bit, whatever `training_step` keeps its state in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from keepers import KEEPERS, content, make
from lightning_problems import BATCHES, loader, monitor_of, quiet_trainer
from torch import Tensor, nn

from newtonopt.callbacks import CurvatureMonitor


class Keeping(L.LightningModule):
    """Its loss depends on what a keeper draws."""

    def __init__(self, keeper: Any, where: str = "attribute") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
        if where == "attribute":
            self.keeper = keeper
        elif where == "submodule":
            self.layers[0].transforms = [{"keeper": keeper}]
        self.where = where

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        keeper = self.keeper if self.where == "attribute" else self.layers[0].transforms[0]["keeper"]
        x, y = batch
        return F.cross_entropy((1 + 0.1 * keeper.draw()) * self.layers(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.layers.parameters(), lr=0.1)


def trained(model: L.LightningModule, state: Callable[[], Any], *callbacks: L.Callback, **settings: Any) -> list[Any]:
    """Return weights, statistics and state after a fit."""
    trainer = quiet_trainer(callbacks=list(callbacks), **{"max_epochs": 1, **settings})
    trainer.fit(model, loader())
    return [content(model.layers), content(state()), content(torch.get_rng_state())]


def monitor(**settings: Any) -> CurvatureMonitor:
    quick = {"every_n_train_steps": 1, "top": 1, "bottom": 0, "max_products": 2, "sharpness": None, "text": False}
    return monitor_of({**quick, **settings})


class All:
    """All keepers at once."""

    def __init__(self) -> None:
        self.keepers = {name: make(name) for name in KEEPERS}

    def draw(self) -> float:
        return sum(keeper.draw() for keeper in self.keepers.values()) / len(self.keepers)

    def state(self) -> Any:
        return {name: keeper.state() for name, keeper in self.keepers.items()}


@pytest.mark.parametrize(
    ("where", "products"),
    [
        ("attribute", "auto"),
        ("submodule", "finite_difference"),
        pytest.param("submodule", "streamed", marks=pytest.mark.slow),
    ],
)
def test_training_that_keeps_all_kinds_of_state_is_the_same_to_the_bit(where: str, products: Any) -> None:
    keeper = All()
    without = trained(Keeping(keeper, where), keeper.state)
    keeper, watcher = All(), monitor(products=products)
    watched = trained(Keeping(keeper, where), keeper.state, watcher)
    assert watcher._measured_at == BATCHES, "it has measured"
    assert dict(watched[1]) == dict(without[1])
    assert watched == without


@pytest.mark.slow
@pytest.mark.parametrize("name", KEEPERS)
def test_training_with_and_without_a_monitor_is_the_same_to_the_bit(name: str) -> None:
    where = "submodule" if list(KEEPERS).index(name) % 2 else "attribute"
    keeper = make(name)
    without = trained(Keeping(keeper, where), keeper.state)
    keeper, watcher = make(name), monitor(products="finite_difference" if where == "attribute" else "auto")
    watched = trained(Keeping(keeper, where), keeper.state, watcher)
    assert watcher._measured_at == BATCHES, "it has measured"
    assert watched == without


class Streaming(Keeping):
    """Takes numbers from an iterator, which no measurement can put back."""

    def __init__(self) -> None:
        super().__init__(None)
        self.stream = self.numbers()

    @staticmethod
    def numbers() -> Iterator[float]:
        number = 0.0
        while True:
            number += 1.0
            yield number

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy((1 + 0.1 * next(self.stream)) * self.layers(x), y)


def test_what_cannot_be_put_back_is_named_before_anything_is_measured() -> None:
    without = trained(Streaming(), lambda: None)
    with pytest.warns(
        UserWarning, match=r"measures nothing from here on: .* changes self\.stream, which cannot .*step="
    ):
        watched = trained(Streaming(), lambda: None, monitor())
    assert watched == without


def test_what_cannot_be_put_back_ends_measuring_where_the_first_step_is_too_late() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, watcher = Streaming(), monitor(at_start=True)
        trained(model, lambda: None, watcher)
    said = [str(w.message) for w in caught if "CurvatureMonitor" in str(w.message)]
    assert len(said) == 1
    assert "would have changed training" in said[0] and "module.stream" in said[0]
    assert watcher._measured_at == 0


def test_an_iterator_that_only_training_moves_is_no_hindrance() -> None:
    class Measured(Streaming):
        def loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self.layers(batch[0]), batch[1])

    without = trained(Measured(), lambda: None)
    watcher = monitor(step="loss")
    assert trained(Measured(), lambda: None, watcher) == without
    assert watcher._measured_at == BATCHES


class Tied(Keeping):
    def __init__(self) -> None:
        super().__init__(None)
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
        self.layers[1].weight.data = self.layers[0].weight.data.t()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self.layers(batch[0]), batch[0])


def test_parameters_that_share_memory_are_not_measured() -> None:
    without = trained(Tied(), lambda: None)
    with pytest.warns(UserWarning, match="could not measure at step 1.*params must not share memory"):
        assert trained(Tied(), lambda: None, monitor()) == without


class Scheduling(Keeping):
    """Lowers the learning rate of its own optimizer as it goes."""

    def __init__(self) -> None:
        super().__init__(None)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.optimizers().param_groups[0]["lr"] *= 0.5
        return F.cross_entropy(self.layers(batch[0]), batch[1])


def test_settings_of_the_optimizer_that_the_step_changes_are_put_back() -> None:
    ends = []
    for callbacks in ([], [monitor()]):
        model = Scheduling()
        ends.append(trained(model, lambda model=model: model.trainer.optimizers[0].param_groups[0]["lr"], *callbacks))
    assert ends[0] == ends[1]
    assert ends[0][1] == 0.1 * 0.5**BATCHES
