"""Special cases for Lightning: what they change while they are in force, and that all of it is taken back."""

from __future__ import annotations

import functools
from typing import Any

import lightning as L
import lightning.fabric.wrappers as fabric
import lightning_problems
import pytest
import torch
from lightning.pytorch.loops.optimization.automatic import Closure
from torch import nn

from newtonopt.autodiff.gradients import grad
from newtonopt.lightning import closure_objects, fabric_backward, held_by_trainer, is_lightning_module, silenced


class CountingCallback(L.Callback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_before_zero_grad(self, *args: Any) -> None:
        self.seen.append(1)


class Counting(L.LightningDataModule):
    count = 0

    def train_dataloader(self) -> Any:
        return lightning_problems.loader()


class UsesItsDataModule(lightning_problems.Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trainer.datamodule.count += 1
        return super().training_step(batch, batch_idx)


def test_callbacks_and_data_modules_of_the_users_see_one_run_a_step() -> None:
    callback, data, model = CountingCallback(), Counting(), UsesItsDataModule()
    lightning_problems.quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, datamodule=data)
    assert len(model.calls.batches) > lightning_problems.BATCHES
    assert data.count == len(callback.seen) == lightning_problems.BATCHES


class Logging(L.LightningModule):
    """A module in the hands of a trainer with a logger and a callback that logs."""

    def __init__(self) -> None:
        super().__init__()
        self.logger_of_run, self.callback = Counter(), CountingCallback()
        self.log_before = lambda *args, **kwargs: None
        self.callback.log = self.log_before  # type: ignore[attr-defined]
        self._trainer = lightning_problems.quiet_trainer(callbacks=[self.callback])
        self._trainer.loggers = [self.logger_of_run]


class Counter(L.pytorch.loggers.logger.DummyLogger):
    name, version = "run", 3

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[Any] = []

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self.logged.append(args)


@pytest.mark.parametrize("raises", [False, True])
def test_a_silenced_module_logs_nothing_until_the_run_ends(raises: bool) -> None:
    module = Logging()
    trainer, callback = module.trainer, module.callback

    def run() -> None:
        with silenced(module):
            module.log("loss", 1.0)  # outside of any loop, where Lightning's own would raise
            callback.log("loss", 1.0)  # type: ignore[attr-defined]
            (logger,) = trainer.loggers
            logger.log_metrics({"loss": 1.0})
            with logger.experiment as run:
                run["series"] = 1
            assert (logger.name, logger.version) == ("run", 3)
            if raises:
                raise KeyError("inside")

    if raises:
        with pytest.raises(KeyError, match="inside"):
            run()
    else:
        run()
    assert module.logger_of_run.logged == []
    assert trainer.loggers == [module.logger_of_run]
    assert callback.log is module.log_before  # type: ignore[attr-defined]


def test_a_module_without_a_trainer_is_silenced_too() -> None:
    module = lightning_problems.Classifier()
    assert is_lightning_module(module) and not is_lightning_module(nn.Linear(1, 1))
    with silenced(module):
        module.log("loss", 1.0)


def test_callbacks_data_module_and_optimizers_are_the_users() -> None:
    module = Logging()
    module.trainer.strategy.optimizers = [torch.optim.SGD(nn.Linear(1, 1).parameters())]
    given, optimizers = held_by_trainer(vars(module))
    assert module.callback in given and None in given  # no data module
    assert optimizers == module.trainer.optimizers
    assert held_by_trainer(vars(nn.Linear(1, 1))) == ([], [])


def test_lightnings_closure_is_found_in_what_it_hands_to_step() -> None:
    closure, module = Closure(lambda: None), nn.Linear(1, 1)  # type: ignore[arg-type,return-value]
    bound = functools.partial(functools.partial(print, module), closure, key=module.forward)
    assert list(closure_objects(bound)) == [closure]
    assert list(closure_objects(closure)) == [closure]
    for other in (print, lambda: None, module, module.forward, 3):
        assert list(closure_objects(other)) == []


def test_derivatives_pass_the_hooks_of_fabric() -> None:
    x = torch.ones(2, requires_grad=True)
    z = x.exp()
    z.register_hook(functools.partial(fabric._backward_hook, True))
    with pytest.raises(RuntimeError, match=r"fabric\.backward"):
        torch.autograd.grad(z.sum(), x, retain_graph=True)
    (g,) = grad(z.sum(), [x], keep=True)
    assert torch.equal(g, z)
    with pytest.raises(KeyError, match="inside"), fabric_backward():
        assert fabric._in_fabric_backward
        raise KeyError("inside")
    assert not fabric._in_fabric_backward
