"""The loss's curvature, logged while a model trains."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT

from newtonopt.checks import check_flag, check_whole, explains_arguments
from newtonopt.closure.evaluation import Products
from newtonopt.closure.isolation import UnprotectedError, Watch
from newtonopt.curvature.measure import take
from newtonopt.curvature.measurement import Layers, Matrix, Measurement, Settings
from newtonopt.curvature.sharpness import Kind

from .charts import curvature_charts
from .logs import Charts, add_charts, log_values
from .measuring import Subject, at_rest
from .panels import add_figures, add_text
from .probe import Probe
from .schedule import Allowance, Schedule

# What checkpoints hold of the monitors, by prefix.
_STATE = "CurvatureMonitor"
# What other callbacks and libraries call an argument, and what it is called here.
_ELSEWHERE = {
    **dict.fromkeys(("every", "every_n_steps", "every_n_batches", "log_every_n_steps"), "every_n_train_steps"),
    **dict.fromkeys(("k", "top_k", "top_n", "n_eigenvalues", "num_eigenvalues"), "top"),
    **dict.fromkeys(("loader", "dataloaders", "train_dataloaders", "val_dataloaders", "batches"), "dataloader"),
    "every_n_train_epochs": "every_n_epochs",
    "params": "parameters",
    "radius": "sharpness_radius",
}


_A_LOSS_OF_ITS_OWN = 'Or give the module another method that returns the loss alone, and name it by step="...".'


class CurvatureMonitor(Callback):
    """Log the extreme eigenvalues of the Hessian, a sharpness measure and the stability threshold during training.

    The loss is that of `training_step` on the first batches that training saw, kept as the probe, weighted by their
    sizes. It is measured in full precision, without autocast, and leaves no trace: parameters, `.grad`, buffers, random
    state, metrics, logs, and all state that `training_step` can reach stay as they were to the bit. What cannot be put
    back, such as an iterator that `training_step` moves on, ends measuring with a warning that names it. A measurement
    that fails warns once and is left out; training goes on.

    Under the Trainer's `fast_dev_run` it measures once, at the end, if not before.

    Values go to every logger, under `curvature/`, and to `trainer.callback_metrics`. TensorBoard's custom-scalars page
    gets a category of charts.

    Args:
        every_n_train_steps: Optimizer steps between measurements, one or more; None (default): 100, unless
            `every_n_epochs` is given.
        every_n_epochs: Epochs between measurements, one or more, at the end of an epoch's last batch; None (default):
            by steps.
        at_start: Whether to measure before the first step as well, or as soon as there are `num_batches`. Then the
            values are there for an EarlyStopping that is strict. Default False.
        at_end: Whether to measure after the last step as well. Default False.
        top: How many of the largest eigenvalues, one or more. Default 3.
        bottom: How many of the smallest eigenvalues, zero or more. Default 1.
        curvature: Of which matrix: "hessian" (default) or "gauss_newton".
        gradient: Whether to measure the curvature along the gradient, for one product. Default True.
        preconditioned: Whether to measure the largest eigenvalue of the matrix as Adam and its kin see it too
            (`preconditioned`), which is the one that their stability threshold is for. Default False.
        layers: Patterns of parameters' names, such as ["encoder.*", "*.bias"]: the largest eigenvalue of each such
            diagonal block, under `curvature/lambda_max_of/`, for as many products each; "parts": of each of the model's
            parts; None (default): none.
        trace: Whether to measure the trace, with its standard error. Default False.
        density: Whether to show the density of all eigenvalues in TensorBoard, as a figure and as a histogram. Default
            False.
        loss_slice: Along how many eigenvectors to show the loss and its quadratic model in TensorBoard: none (0), the
            top one (1), or the top one and the bottom one (2), which takes 441 losses. Default 0.
        slice_radius: How far the slice reaches, above zero. Default 1.
        sharpness: "ball" (default): the worst loss increase at Euclidean distance up to `sharpness_radius`;
            "adaptive_ball": the same with each step relative to its parameter's size (Kwon et al. 2021); "average": the
            mean increase at that distance; None: not measured.
        sharpness_radius: Above zero. Default 0.05 (Foret et al. 2021).
        mode: "train" (default): the function that training minimises, with Dropout's random numbers held fixed; "eval":
            the model in evaluation mode.
        num_batches: How many of the first batches make the probe, one or more; of an epoch with fewer, all. Default 1.
        dataloader: A loader, or a list of batches, to measure on instead, all of it each time; None (default): the
            first batches.
        device: Where the first batches are kept, such as "cpu"; None (default): where training has them.
        precision: "full" (default): that of the weights, without autocast; "training": as in training.
        step: The module's method that returns the loss, called as `training_step` is. Default "training_step". With
            manual optimization name another, for `training_step` would train the model.
        parameters: A regular expression to be found in the names of those that are looked at, such as "^generator";
            None (default): all.
        text: Whether to say in words what a measurement means, on TensorBoard's text page. Default True.
        products: How curvature products are formed, "auto" (default), "cached", "streamed" or
            "finite_difference": see `evaluate`.
        tolerance: Relative width that an eigenvalue's interval must reach, between 0 and 1. Default 1e-2: a chart shows
            no more.
        max_products: Bound on the eigenvalues' curvature products in one measurement, one or more. The extreme
            eigenvalues' intervals are logged as wide as they are then; a further eigenvalue, shown without an interval,
            is left out unless it is known to a tenth. Default 24: on networks of digits the largest is known to a
            percent or better then, and of the smallest the sign; 100 narrow its interval too.
        max_seconds: How long a measurement may take, roughly; what does not fit is left out. None (default): no bound.
        certify_every: Every how many measurements start at random, one or more; 1: all. The others follow the
            eigenvectors of the last one, with a quarter of `max_products` or a little more, and certify nothing:
            `curvature/certified` is 0, and the bounds enclose some eigenvalue, perhaps not the extreme one. Between
            measurements vectors are kept, `top + bottom + 1` times the parameters. Default 10.
        max_overhead: The share of the training time that measuring may add, above 0 and at most 1, such as
            0.15 for 15 %: measurements that would exceed it are left out, but for the first of each kind and those at
            the start and the end. None (default): no bound.
        seed: Of the random start vectors. Default 0.
        prefix: The tags' group. Default "curvature". Two monitors in one run need two.

    Raises:
        ValueError: A setting out of its range; when a fit starts, a `step`, `parameters` or `layers` that the module
            has none of, or another monitor with the same `prefix`.

    Warns:
        UserWarning: A fit ends without a measurement, or one fails, or has nothing to be `preconditioned` by.
    """

    @explains_arguments(_ELSEWHERE)
    def __init__(
        self,
        every_n_train_steps: int | None = None,
        top: int = 3,
        bottom: int = 1,
        sharpness: Kind | None = "ball",
        sharpness_radius: float = 0.05,
        mode: Literal["train", "eval"] = "train",
        num_batches: int = 1,
        products: Products = "auto",
        tolerance: float = 1e-2,
        max_products: int = 24,
        seed: int = 0,
        *,
        every_n_epochs: int | None = None,
        at_start: bool = False,
        at_end: bool = False,
        curvature: Matrix = "hessian",
        gradient: bool = True,
        preconditioned: bool = False,
        layers: Layers = None,
        trace: bool = False,
        density: bool = False,
        loss_slice: Literal[0, 1, 2] = 0,
        slice_radius: float = 1.0,
        dataloader: Iterable[Any] | None = None,
        device: str | None = None,
        precision: Literal["full", "training"] = "full",
        step: str = "training_step",
        parameters: str | None = None,
        text: bool = True,
        max_seconds: float | None = None,
        certify_every: int = 10,
        max_overhead: float | None = None,
        prefix: str = "curvature",
    ) -> None:
        self._schedule = Schedule(every_n_train_steps, every_n_epochs, at_start, at_end)
        self._settings = Settings(
            top=top,
            bottom=bottom,
            curvature=curvature,
            gradient=gradient,
            preconditioned=preconditioned,
            layers=layers,
            trace=trace,
            density=density,
            loss_slice=loss_slice,
            slice_radius=slice_radius,
            sharpness=sharpness,
            sharpness_radius=sharpness_radius,
            products=products,
            tolerance=tolerance,
            max_products=max_products,
            max_seconds=max_seconds,
            seed=seed,
            prefix=prefix,
        )
        check_flag("text", text)
        check_whole("certify_every", certify_every, 1)
        self._subject = Subject(step, mode, precision, parameters)
        self._probe = Probe(num_batches, dataloader, device)
        self._allowance = Allowance(max_overhead)
        # Each argument can be read under its name.
        given: dict[str, Any] = {"num_batches": num_batches, "dataloader": dataloader, "device": device, "text": text}
        given |= {"certify_every": certify_every, "max_overhead": max_overhead}
        vars(self).update(vars(self._schedule) | vars(self._settings) | vars(self._subject) | given)
        self._text = text
        self._certify_every = certify_every
        self._begin()

    def _begin(self) -> None:
        """Forget the last fit."""
        self._probe.clear()
        self._enabled = True
        self._watch: Watch | None = None
        self._watched = False
        self._last: Measurement | None = None
        self._followed = 0
        self._differences = False
        self._last_step = 0
        self._measured_at: int | None = None
        self._lacked_batches = False
        self._charts: dict[str, Charts] = {}
        self._warned: set[str] = set()

    # Hooks, and not `state_dict`: of two with one prefix Trainer would say that they cannot be saved, and not why.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault(_STATE, {})[self._settings.prefix] = self._probe.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get(_STATE, {}).get(self._settings.prefix)
        if state is not None:
            self._probe.load_state_dict(state)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before a checkpoint is loaded."""
        if stage != "fit":
            return
        prefix = self._settings.prefix
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(c, CurvatureMonitor) and c._settings.prefix == prefix for c in callbacks) > 1:
            raise ValueError(
                f"prefix must be another one in each CurvatureMonitor of a Trainer, got {prefix!r} in several, which "
                "would write the same tags. Give each a prefix of its own."
            )
        self._begin()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._subject.check(pl_module, self._settings)
        self._enabled = pl_module.automatic_optimization or self._subject.step != "training_step"
        if not self._enabled:
            rank_zero_warn(
                "CurvatureMonitor measures nothing: it gets the loss from training_step, which under manual "
                'optimization would train the model. Give it step="...", the name of a method of the module that takes '
                "a batch and its index and returns the loss, and where there are several networks "
                'parameters="^generator" or the like.'
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        self._allowance.restart()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._probe.offer(batch, batch_idx)
        if self._schedule.at_start and self._measured_at is None:
            self._look(trainer, pl_module)
        if self._enabled and not self._watched and self._subject.step == "training_step":
            # The first step of training tells whether a measurement would change what cannot be put back.
            self._watched = True
            self._watch = Watch(pl_module.training_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        if self._watch is not None and (changed := self._watch.changed()):
            self._stop(f"measuring would change training. {UnprotectedError(changed)}")
        self._watch = None
        due = self._schedule.after_step(self._last_step, trainer.global_step)
        self._last_step = trainer.global_step
        if trainer.is_last_batch:
            self._probe.close()
            due = due or self._schedule.after_epoch(trainer.current_epoch)
        if due and self._fits(trainer):
            self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An epoch that was cut short had no last batch.
        self._probe.close()
        if self._schedule.after_epoch(trainer.current_epoch) and self._fits(trainer):
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A trial run is to find out whether all works, and ends before a measurement is due.
        is_trial = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if self._schedule.at_end or (is_trial and self._measured_at is None):
            self._look(trainer, pl_module)
        if self._enabled and self._measured_at is None:
            why = self._probe.lack() if self._lacked_batches else self._schedule.lack(trainer.global_step)
            rank_zero_warn(f"CurvatureMonitor measured nothing in this fit: {why}, or set at_end=True.")

    def _fits(self, trainer: Trainer) -> bool:
        """Whether time allows it, on all processes alike."""
        if self._measured_at == trainer.global_step:
            return False
        return trainer.strategy.reduce_boolean_decision(self._allowance.allows(self._certifies()), all=True)

    def _certifies(self) -> bool:
        """Whether the next measurement starts at random."""
        return self._last is None or self._followed + 1 >= self._certify_every

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log, once a step."""
        if not self._enabled or self._measured_at == trainer.global_step:
            return
        if not self._probe.complete:
            self._lacked_batches = True
            return
        self._measured_at = trainer.global_step
        certifies, began = self._certifies(), time.perf_counter()
        try:
            values = self._measure(trainer, pl_module)
        except UnprotectedError as error:
            self._stop(f"at step {trainer.global_step} a measurement would have changed training further. {error}")
            return
        except Exception as error:
            self._last = None
            self._warn(
                "measure",
                f"CurvatureMonitor could not measure at step {trainer.global_step}, and training goes on: "
                f"{str(error) or type(error).__name__}",
            )
            return
        finally:
            self._allowance.spend(certifies, time.perf_counter() - began)
        log_values(trainer, values)
        if self._text:
            add_text(trainer, values, self._subject.in_words(trainer, pl_module))
        # An optimizer that has taken no step yet may still do.
        if values.lack is not None and trainer.global_step > 0:
            self._warn("preconditioned", f"CurvatureMonitor cannot do what preconditioned=True asks for: {values.lack}")
        try:
            add_figures(trainer, values)
        except ImportError as error:
            self._warn("figures", f"CurvatureMonitor draws no figures: {error}")
        for category, charts in curvature_charts(values, values.prefix).items():
            known = self._charts.get(category, {})
            if not charts.keys() <= known.keys():
                self._charts[category] = {**known, **charts}
                add_charts(trainer, category, self._charts[category])

    def _stop(self, why: str) -> None:
        """Measure no more in this fit."""
        self._enabled = False
        rank_zero_warn(f"CurvatureMonitor measures nothing from here on: {why} {_A_LOSS_OF_ITS_OWN}")

    def _warn(self, subject: str, message: str) -> None:
        """Once a fit on each subject."""
        if subject not in self._warned:
            rank_zero_warn(message)
        self._warned.add(subject)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> Measurement:
        settings = replace(self._settings, products="finite_difference") if self._differences else self._settings
        with self._subject.measuring(pl_module):
            closure, samples = self._subject.loss_over(self._probe, trainer, pl_module)
            named = self._subject.trained(pl_module)
            last = None if self._certifies() else self._last
            params = [p for _, p in named]
            watch = Watch(closure)
            try:
                values = at_rest(
                    lambda: take(closure, params, trainer.optimizers, settings, samples, named, last),
                    params,
                    trainer.optimizers,
                )
            finally:
                if changed := watch.changed():
                    raise UnprotectedError(changed)
        self._last = values
        self._followed = 0 if last is None or values.read("certified") == 1.0 else self._followed + 1
        # What has no second derivative now has none the next time.
        self._differences = values.form == "finite_difference"
        return values
