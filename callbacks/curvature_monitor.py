"""The loss's curvature, logged while a model trains."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from statistics import fmean
from typing import Any, TypeGuard

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from newtonopt.checks import (
    check_flag,
    check_instance,
    check_positive,
    check_positive_share,
    check_share,
    check_whole,
    explains_arguments,
)
from newtonopt.closure.evaluation import Products
from newtonopt.closure.isolation import UnprotectedError, Watch
from newtonopt.curvature import ExtremeEigenvalues, Measured, Measurement, Preconditioned, Sharpness
from newtonopt.curvature.ascent import Kind
from newtonopt.curvature.dashboard import dashboard
from newtonopt.curvature.eigenvalues.extreme import keeps_up
from newtonopt.curvature.histories import Log, loss_tag
from newtonopt.curvature.measurements.course import Course
from newtonopt.curvature.measurements.measurement import Losses, Matrix, Plan, take
from newtonopt.curvature.measuring import for_optimizers, list_of
from newtonopt.vectors.sharded import local_part

from .images import add_image, takes_images
from .lightning import PROBE_TAG, Batches, Probe, at_rest, is_trial, log_values, passes_multiple, show_in_bar
from .step_monitor import last_step_of
from .tensorboard import add_failure, add_figures, add_page, add_record, add_text, page_of

# Key in checkpoints of the monitors' state, which is kept by prefix.
_STATE = "CurvatureMonitor"


@dataclass(frozen=True)
class Budget:
    """How much time and how many products CurvatureMonitor may spend.

    Args:
        max_products: Bound on the eigenvalues' curvature products in one measurement, one or more. The extreme
            eigenvalues' intervals are logged as wide as they are then; a further eigenvalue, shown without an interval,
            is left out unless it is known to a tenth. Default 24: on networks of digits the largest is known to a
            percent or better then, and of the smallest the sign; 100 narrow its interval too.
        max_seconds: How long a measurement may take, roughly; what does not fit is left out. None (default): no bound.
        max_overhead: The share of the training time that measuring may add, above 0 and at most 1, such as 0.15 for
            15 %: measurements that would exceed it are left out, but for the first of each kind and those at the start
            and the end, which do not count. None (default): 0.1 where the monitor is given neither
            `every_n_train_steps` nor `every_n_epochs`, and no bound where it is given one of them.
        certify_every: Every how many measurements at least one starts at random, one or more; 1: all. The first
            interval is ten, or this if it is less. It doubles while tracking keeps up with what random starts find,
            and is ten again where it does not. The other measurements track the eigenvectors of the last one, with a
            quarter of `max_products` or a little more, and certify nothing: `certified` is 0, and the bounds enclose
            some eigenvalue, perhaps not the extreme one. Between measurements vectors are kept, `top + bottom + 1`
            times the parameters. Default 40: a certified measurement costs three to ten times as much as a tracked
            one, and has the sharpness too.
        tolerance: Relative width that an eigenvalue's interval must reach, between 0 and 1. Default 1e-2: a chart shows
            no more.

    Raises:
        ValueError: A setting is out of its range.

    Example:
        >>> from newtonopt.callbacks import Budget, CurvatureMonitor
        >>> CurvatureMonitor(budget=Budget(max_overhead=0.15)).budget.max_products
        24

    See Also:
        - `CurvatureMonitor`: takes it as `budget`.
        - `Probe`: what is measured.
        - `docs/monitor.md`: what a measurement costs, and how a budget is kept.
    """

    max_products: int = 24
    max_seconds: float | None = None
    max_overhead: float | None = None
    certify_every: int = 40
    tolerance: float = 1e-2

    def __post_init__(self) -> None:
        check_whole("max_products", self.max_products, 1)
        if self.max_seconds is not None:
            check_positive("max_seconds", self.max_seconds)
        if self.max_overhead is not None:
            check_positive_share("max_overhead", self.max_overhead)
        check_whole("certify_every", self.certify_every, 1)
        check_share("tolerance", self.tolerance)


# Measurements from one that starts at random to the next, at first and where tracking has not kept up.
_INTERVAL = 10

# Losses of batches that are kept as single tensors before they are put into one.
_PACKED = 256

# Name under which a checkpoint has what the training loss did.
_COURSE = "course"

# Share of the training time that measuring may add where nobody has said how often to measure.
_SHARE = 0.1

# Names that other callbacks and libraries give to an argument, and its name here.
_ELSEWHERE = {
    **dict.fromkeys(("every", "every_n_steps", "every_n_batches", "log_every_n_steps"), "every_n_train_steps"),
    **dict.fromkeys(("k", "top_k", "top_n", "n_eigenvalues", "num_eigenvalues"), "top"),
    **dict.fromkeys(
        ("loader", "dataloaders", "train_dataloaders", "val_dataloaders", "batches"),
        "Write probe=Probe(dataloader=...).",
    ),
    "every_n_train_epochs": "every_n_epochs",
    "params": "Write probe=Probe(parameters=...).",
    **dict.fromkeys(("radius", "sharpness_radius"), "Write sharpness=Sharpness(radius=...)."),
    **{name: f"Write probe=Probe({name}=...)." for name in Probe.__dataclass_fields__},
    **{name: f"Write budget=Budget({name}=...)." for name in Budget.__dataclass_fields__},
    "trace": "Write measurements=[Trace()].",
    "density": "Write measurements=[Density()].",
    "gauss_newton": "Write measurements=[GaussNewtonSpectrum()].",
    "layers": "Write measurements=[Layers()].",
    "alignment": "Write measurements=[Alignment()].",
    "preconditioned": "Write measurements=[Preconditioned()].",
    "loss_slice": "Write measurements=[LossSlice()].",
}


class CurvatureMonitor(Callback):
    """Log the extreme eigenvalues of the Hessian, a sharpness measure and the stability threshold during training.

    The loss is that of `training_step` on the first batches that training saw, kept as the probe, weighted by their
    sizes. It is measured in full precision, without autocast, and leaves no trace: parameters, `.grad`, buffers, random
    state, metrics, logs, and all state that `training_step` can reach stay as they were to the bit. State that cannot
    be put back, such as an iterator that `training_step` moves on, ends measuring with a warning that names it. A
    measurement that fails warns once and is left out; the others are logged, and training goes on.

    Under the Trainer's `fast_dev_run` it measures once, at the end, if not before; under `barebones` not at all.

    Values go to every logger, under `curvature/`, and to `trainer.callback_metrics`. TensorBoard's custom-scalars page
    gets a category of charts. Each argument can be read and changed under its name; a change holds from the next
    measurement on, that of `probe` from the next fit on.

    Args:
        every_n_train_steps: Optimizer steps between measurements, one or more; None (default): 100, unless
            `every_n_epochs` is given.
        top: How many of the largest eigenvalues, one or more. Default 3.
        bottom: How many of the smallest eigenvalues, zero or more. Default 1.
        sharpness: "ball" (default): the worst loss increase at Euclidean distance up to 0.05; "adaptive_ball": the same
            with each step relative to its parameter's size (Kwon et al. 2021); "average": the mean increase at that
            distance; a `Sharpness`, for another radius; None: not measured. It is measured where eigenvalues are
            certified, and each time with `Sharpness(always=True)`.
        measurements: Further measurements: `Layers`, `Trace`, `Density`, `GaussNewtonSpectrum`, `Alignment`,
            `RelativeSharpness`, `LossSlice`, or one of your own. Where Adam or its kin trains, `Preconditioned` is
            measured without being asked for.
        every_n_epochs: Epochs between measurements, one or more, at the end of an epoch's last batch; None (default):
            by steps.
        at_start: Whether to measure before the first step as well, or as soon as the probe has all its batches. Then
            the values are there for an EarlyStopping that is strict. Default False.
        at_end: Whether to measure after the last step as well. Default False.
        gradient: Whether to measure the curvature along the gradient, for one product. Default True.
        curvature: The matrix that is measured: "hessian" (default) or "gauss_newton".
        products: How curvature products are formed, "auto" (default), "cached", "streamed" or
            "finite_difference": see `evaluate`.
        seed: Seed of the random start vectors. Default 0.
        figure_every: Every how many measurements a figure of the whole run so far, as `plot_history` draws it, goes to
            every logger that takes images (TensorBoard, wandb, MLflow), and at the end of the fit; one or more. None
            (default): no figure: drawing one takes about as long as a measurement.
        text: Whether to say in words what a measurement means, on TensorBoard's text page. Default True.
        progress_bar: Whether the progress bar shows the largest eigenvalue, as last measured. Default False, as for
            `self.log`.
        prefix: Prefix of the tags. Default "curvature". Two monitors in one run need two.
        probe: The batches, loss and parameters that are measured; None (default): `Probe()`.
        budget: Time and products that measuring may take; None (default): `Budget()`.

    Raises:
        TypeError: `measurements`, `probe` or `budget` is of another kind.
        ValueError: A setting is out of its range; when a fit starts, the module lacks what the probe or a measurement
            names, or another monitor has the same `prefix`.

    Warns:
        UserWarning: A fit ends without a measurement, or one fails, or there is nothing to measure for one of the
            `measurements`.

    Example:
        >>> from newtonopt.callbacks import CurvatureMonitor
        >>> from newtonopt.curvature import Trace
        >>> monitor = CurvatureMonitor(every_n_train_steps=50, top=1, measurements=[Trace()])
        >>> monitor.top, monitor.measurements
        (1, [Trace()])

    See Also:
        - `Probe`, `Budget`: what is measured, and how much it may cost.
        - `measure()`: the same in any training loop.
        - `StepMarginMonitor`: cheaper, and for the loss along the optimizer's own steps.
        - `docs/monitor.md`: every setting and tag.
        - `docs/read_your_curvature.md`: what the values say, and what to do.
    """

    @explains_arguments(_ELSEWHERE)
    def __init__(
        self,
        every_n_train_steps: int | None = None,
        top: int = 3,
        bottom: int = 1,
        sharpness: Kind | Sharpness | None = "ball",
        # Without its parameter, which jsonargparse takes for settings of all measurements.
        measurements: Sequence[Measurement] = (),  # type: ignore[type-arg]
        *,
        every_n_epochs: int | None = None,
        at_start: bool = False,
        at_end: bool = False,
        gradient: bool = True,
        curvature: Matrix = "hessian",
        products: Products = "auto",
        seed: int = 0,
        figure_every: int | None = None,
        text: bool = True,
        progress_bar: bool = False,
        prefix: str = "curvature",
        probe: Probe | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.every_n_train_steps = every_n_train_steps
        self.top = top
        self.bottom = bottom
        self.sharpness = sharpness
        self.measurements = measurements
        self.every_n_epochs = every_n_epochs
        self.at_start = at_start
        self.at_end = at_end
        self.gradient = gradient
        self.curvature: Matrix = curvature
        self.products: Products = products
        self.seed = seed
        self.figure_every = figure_every
        self.text = text
        self.progress_bar = progress_bar
        self.prefix = prefix
        self.probe = Probe() if probe is None else probe
        self.budget = Budget() if budget is None else budget
        self._check()
        self._begin()

    def _check(self) -> None:
        """Refuse settings that are out of their range."""
        for name in ("every_n_train_steps", "every_n_epochs", "figure_every"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        if self.every_n_train_steps is not None and self.every_n_epochs is not None:
            raise ValueError(
                f"every_n_train_steps must be None beside every_n_epochs={self.every_n_epochs}, got "
                f"{self.every_n_train_steps}. Give one of them."
            )
        for name in ("at_start", "at_end", "text", "progress_bar"):
            check_flag(name, getattr(self, name))
        check_instance("probe", self.probe, Probe, "a Probe, or None", "Write Probe(num_batches=4), for example.")
        check_instance(
            "budget", self.budget, Budget, "a Budget, or None", "Write Budget(max_products=100), for example."
        )
        self._plan()

    def _plan(self) -> Plan:
        """Return what is measured, from the settings as they are now."""
        return Plan(
            list_of(self.top, self.bottom, self.sharpness, self.gradient, self.measurements),
            self.curvature,
            self.products,
            self.budget.tolerance,
            self.budget.max_products,
            self.budget.max_seconds,
            self.seed,
            self.prefix,
        )

    def _begin(self) -> None:
        """Forget the last fit."""
        self._batches = Batches(self.probe)
        self._allowance = Allowance(self._share())
        self._enabled = True
        self._watch: Watch | None = None
        self._watched = False
        self._last: Measured | None = None
        self._losses: Losses | None = None
        self._course, self._step_losses = Course(), StepLosses()
        self._tracked, self._interval = 0, _INTERVAL
        self._differences = False
        self._last_step = 0
        self._measured_at: int | None = None
        self._lacked_batches = False
        self._names: set[str] = set()
        self._charts = 0
        self._warned: set[str] = set()
        self._log = Log()
        self._undrawn = 0

    # Hooks, and not `state_dict`: of two with one prefix Trainer would say that they cannot be saved, and not why.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = self._batches.state_dict()
        # Losses since the last measurement wait there.
        self._course = self._course.also(self._step_losses.take())
        checkpoint.setdefault(_STATE, {})[self.prefix] = {**state, _COURSE: asdict(self._course)}
        if state and self.probe.save_probe and not state["batches"]:
            self._warn(
                "save",
                "CurvatureMonitor saves no batches with checkpoints: save_probe needs batches made of tensors, "
                "numbers, strings, lists, tuples and dicts alone. Give probe=Probe(dataloader=...) to measure on the "
                "same ones after resuming.",
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get(_STATE, {}).get(self.prefix)
        if state is not None and trainer.state.fn == TrainerFn.FITTING:
            self._course = Course(**state[_COURSE])
            if batches := {name: value for name, value in state.items() if name != _COURSE}:
                self._batches.load_state_dict(batches)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew before a checkpoint is loaded."""
        if stage != "fit":
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(c, CurvatureMonitor) and c.prefix == self.prefix for c in callbacks) > 1:
            raise ValueError(
                f"prefix must be another one in each CurvatureMonitor of a Trainer, got {self.prefix!r} in several, "
                "which would write the same tags. Give each its own prefix."
            )
        self._check()
        self._begin()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.probe.check_model(pl_module, self._plan().measurements)
        if trainer.barebones:
            self._enabled = False
            rank_zero_warn(
                "CurvatureMonitor measures nothing under Trainer(barebones=True), which shows what training costs by "
                "itself. Leave barebones out to measure."
            )
            return
        self._enabled = pl_module.automatic_optimization or self.probe.step != "training_step"
        if not self._enabled:
            rank_zero_warn(
                "CurvatureMonitor measures nothing: it gets the loss from training_step, which under manual "
                'optimization would train the model. Give it probe=Probe(step="..."), the name of a method of the '
                "module that takes a batch and its index and returns the loss, and where there are several networks "
                'parameters="^generator" or the like.'
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        if self._course.steps == 0 and (trainer.global_step > 0 or not self.probe.follows_training):
            self._course = replace(self._course, from_start=False)
        self._allowance = Allowance(self._share())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batches.offer(batch, batch_idx, trainer.global_step)
        if self.at_start and self._measured_at is None:
            self._look(trainer, pl_module)
        if self._enabled and not self._watched and self.probe.step == "training_step":
            # The first step of training tells whether a measurement would change what cannot be put back.
            self._watched = True
            self._watch = Watch(pl_module.training_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        if self._watch is not None and (changed := self._watch.changed()):
            self._stop(f"measuring would change training. {UnprotectedError(changed)}")
        self._watch = None
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if self._follows(loss):
            self._step_losses.add(loss, trainer.accumulate_grad_batches, self._last_step)
        if self._losses is None:
            self._losses = self._loss_of(trainer, loss)
        due = self._due_after_step(self._last_step, trainer.global_step)
        self._last_step = trainer.global_step
        if trainer.is_last_batch:
            # Validation runs before the epoch's end hooks, and EarlyStopping may look for values there.
            self._batches.close()
            due = due or self._due_after_epoch(trainer.current_epoch)
        if due and self._fits(trainer):
            self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An epoch that was cut short had no last batch.
        self._batches.close()
        if self._due_after_epoch(trainer.current_epoch) and self._fits(trainer):
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.at_end or (is_trial(trainer) and self._measured_at is None):
            self._look(trainer, pl_module)
        if self._undrawn:
            self._draw(trainer)
        if self._enabled and self._measured_at is None:
            why = self._batches.lack() if self._lacked_batches else self._why_never_due(trainer.global_step)
            rank_zero_warn(f"CurvatureMonitor measured nothing in this fit: {why}, or set at_end=True.")

    def _loss_of(self, trainer: Trainer, loss: Any) -> Losses | None:
        """Return the loss of the first step of training, which tells whether the loss has risen since, even where the
        first measurement comes late; None where it is another one than the probe's.
        """
        if not self._follows(loss) or self.probe.dataloader is not None:
            return None
        first = float(loss) * trainer.accumulate_grad_batches
        return Losses(first, first, first) if math.isfinite(first) else None

    def _follows(self, loss: Any) -> TypeGuard[Tensor]:
        """Return whether the words are to tell of the training loss: not where another loss is measured."""
        return self._enabled and self.probe.follows_training and isinstance(loss, Tensor)

    def _due_after_step(self, before: int, now: int) -> bool:
        return self.every_n_epochs is None and passes_multiple(before, now, self.every_n_train_steps or 100)

    def _due_after_epoch(self, epoch: int) -> bool:
        """Return whether a measurement is due at the end of the epoch, counted from zero."""
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0

    def _why_never_due(self, steps: int) -> str:
        if self.every_n_epochs is not None:
            return f"it ended at step {steps}, before every_n_epochs={self.every_n_epochs} had passed. Lower that"
        every = self.every_n_train_steps or 100
        return f"it ended at step {steps}, before one was due by every_n_train_steps={every}. Lower that"

    def _share(self) -> float | None:
        """Return the share of the training time that measuring may add; None: no bound."""
        own = self.every_n_train_steps is None and self.every_n_epochs is None
        return _SHARE if own and self.budget.max_overhead is None else self.budget.max_overhead

    def _fits(self, trainer: Trainer) -> bool:
        """Return whether time allows a measurement, on all processes alike."""
        if self._measured_at == trainer.global_step:
            return False
        return trainer.strategy.reduce_boolean_decision(self._allowance.allows(self._certifies()), all=True)

    def _certifies(self) -> bool:
        """Return whether the next measurement starts at random."""
        return self._last is None or self._tracked + 1 >= min(self._interval, self.budget.certify_every)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log, once a step."""
        if not self._enabled or self._measured_at == trainer.global_step:
            return
        if not self._batches.complete:
            self._lacked_batches = True
            return
        self._measured_at = trainer.global_step
        certifies, began = self._certifies(), time.perf_counter()
        try:
            measured = self._measure(trainer, pl_module)
        except UnprotectedError as error:
            self._stop(f"at step {trainer.global_step} a measurement would have changed training further. {error}")
            return
        except Exception as error:
            self._last = None
            why = str(error) or type(error).__name__
            if isinstance(error, FloatingPointError):
                why = f"{why} If training has brought it there, lower the learning rate."
                words = f"Nothing could be measured at step {trainer.global_step}. {why}"
                self._guard(trainer, partial(add_failure, trainer, self.prefix, words))
            self._warn(
                "measure",
                f"CurvatureMonitor could not measure at step {trainer.global_step}, and training goes on: {why}",
            )
            return
        finally:
            self._allowance.spend(certifies, time.perf_counter() - began)
        if self.progress_bar:
            self._guard(trainer, partial(show_in_bar, trainer, measured, measured.plan.tag_of("lambda_max")))
        self._guard(trainer, partial(log_values, trainer, measured))
        self._guard(trainer, partial(self._show, trainer, pl_module, measured))

    def _guard(self, trainer: Trainer, show: Callable[[], None]) -> None:
        """Show something; an error gives one warning and lets training go on."""
        try:
            show()
        except Exception as error:
            self._warn(
                "show",
                f"CurvatureMonitor could not show all of a measurement at step {trainer.global_step}, and training "
                f"goes on: {type(error).__name__}: {error}",
            )

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> Measured:
        plan = replace(self._plan(), products="finite_difference") if self._differences else self._plan()
        with self.probe.measuring(pl_module):
            closure, samples = self._batches.loss(trainer, pl_module)
            named = self.probe.trained(pl_module)
            last = None if self._certifies() else self._last
            params = [p for _, p in named]
            plan = for_optimizers(plan, trainer.optimizers, params)
            watch = Watch(closure)
            try:
                measured = at_rest(
                    lambda: take(
                        closure,
                        params,
                        trainer.optimizers,
                        plan,
                        samples,
                        named,
                        last,
                        lenient=True,
                        losses=self._losses,
                    ),
                    params,
                    trainer.optimizers,
                )
            finally:
                if changed := watch.changed():
                    raise UnprotectedError(changed)
        if self._batches.began:
            since = {f"{PROBE_TAG.folder(plan.prefix)}/{PROBE_TAG.name}": float(self._batches.began)}
            measured = replace(measured, numbers={**measured.numbers, **since})
        ratio, step = measured.read("stability_ratio"), trainer.global_step
        course = self._course.also(self._step_losses.take()).with_ratio(ratio, step)
        measured, self._course = replace(measured, course=course), course.after_measuring()
        self._tracked += 1
        if last is None or measured.read("certified") == 1.0:
            self._tracked, self._interval = 0, self._next_interval(measured)
        self._last, self._losses = measured, measured.losses
        # A loss that has no second derivative now has none the next time.
        self._differences = measured.form == "finite_difference"
        return measured

    def _next_interval(self, certified: Measured) -> int:
        """Return after how many measurements the next one is certified: twice as many where tracking has kept up."""
        if self._last is None:
            return _INTERVAL
        kinds = (ExtremeEigenvalues, Preconditioned)
        found = [(self._last.of(kind), certified.of(kind)) for kind in kinds]
        kept_up = all(keeps_up(last, now) for last, now in found if last is not None and now is not None)
        return 2 * min(self._interval, self.budget.certify_every) if kept_up else _INTERVAL

    def _show(self, trainer: Trainer, pl_module: LightningModule, measured: Measured) -> None:
        """Write words, figures and charts of the measurement to TensorBoard."""
        remark = self.probe.in_words(trainer, pl_module, self._batches.began)
        add_record(trainer, measured, remark)
        if self.text:
            add_text(trainer, measured, remark)
        # An optimizer that has taken no step yet may still do.
        for name, reason in measured.unmeasurable().items() if trainer.global_step > 0 else ():
            self._warn(name, f"CurvatureMonitor cannot measure {name}: {reason}")
        for name, message in measured.failed().items():
            step = trainer.global_step
            self._warn(name, f"CurvatureMonitor could not measure {name} at step {step}, and leaves it out: {message}")
        try:
            add_figures(trainer, measured)
        except ImportError as error:
            self._warn("figures", f"CurvatureMonitor draws no figures: {error}")
        if self.figure_every is not None:
            self._remember(trainer, measured)
            if self._undrawn >= self.figure_every:
                self._draw(trainer)
        self._names.update(measured.names())
        page = page_of(measured.plan, measured.charts(), self._names)
        # A value that comes late, such as the ratio to a threshold that a warm-up delays, brings its chart.
        charts = sum(len(category.chart) for category in page)
        if charts > self._charts:
            self._charts = charts
            add_page(trainer, page)

    def _remember(self, trainer: Trainer, measured: Measured) -> None:
        """Keep a measurement for the figure of the run, beside the loss and the Newton steps that are logged."""
        self._log.add(trainer.global_step, measured)
        # The step's own report: a StepMonitor that stands behind this callback has not logged it yet.
        values = last_step_of(trainer)
        logged = trainer.callback_metrics
        if loss := loss_tag(logged):
            values[loss] = float(logged[loss])
        for name, value in values.items():
            self._log.add_training(trainer.global_step, name, value)
        self._undrawn += 1

    def _draw(self, trainer: Trainer) -> None:
        """Draw the run so far for the loggers that take images."""
        self._undrawn = 0
        if not takes_images(trainer):
            return
        try:
            add_image(trainer, f"{self.prefix}/dashboard", dashboard(self._log.history()))
        except Exception as error:
            self._warn("figures", f"CurvatureMonitor draws no figures: {error}")

    def _stop(self, why: str) -> None:
        """Measure no more in this fit."""
        self._enabled = False
        rank_zero_warn(
            f"CurvatureMonitor measures nothing from here on: {why} Or give the module another method that returns the "
            'loss alone, and name it by probe=Probe(step="...").'
        )

    def _warn(self, subject: str, message: str) -> None:
        """Warn once a fit on each subject."""
        if subject not in self._warned:
            rank_zero_warn(message)
        self._warned.add(subject)


class StepLosses:
    """Keeps the training loss of every step where it is, so that no step waits for the device."""

    def __init__(self) -> None:
        self._single: list[Tensor] = []
        self._packed: list[Tensor] = []
        self._steps: list[int] = []

    def add(self, loss: Tensor, parts: int, step: int) -> None:
        """Keep the loss of a batch.

        Args:
            loss: The loss, divided by `parts`.
            parts: Number of batches whose gradients a step accumulates.
            step: Number of steps taken before it. Batches of one step have the same.
        """
        loss = local_part(loss.detach())
        if loss.numel() == 1:
            self._single.append(loss.reshape(()) if parts == 1 else loss.reshape(()) * parts)
            self._steps.append(step)
        if len(self._single) == _PACKED:
            self._pack()

    def take(self) -> list[float]:
        """Return the mean loss of each step as a number, and forget them."""
        if self._single:
            self._pack()
        losses = [loss for packed in self._packed for loss in packed.tolist()]
        batches = zip(self._steps, losses, strict=True)
        means = [fmean(loss for _, loss in batch) for _, batch in groupby(batches, key=itemgetter(0))]
        self._packed, self._steps = [], []
        return means

    def _pack(self) -> None:
        """Put single losses, which take some hundred bytes each, into one tensor."""
        self._packed.append(torch.stack(self._single))
        self._single = []


class Allowance:
    """Keeps what measuring adds below a share of the time that training takes, by leaving measurements out.

    The first measurement of each kind is allowed and does not count: its time tells what the next one takes.

    Args:
        share: Share of training's own time, from when this is made; None: no bound.
    """

    def __init__(self, share: float | None) -> None:
        self._share = share
        self._began = time.perf_counter()
        self._measured = self._counted = 0.0
        self._costs: dict[bool, float] = {}

    def allows(self, certified: bool) -> bool:
        """Return whether a measurement, at the cost of the last one of its kind, fits; the first one always does."""
        if self._share is None or certified not in self._costs:
            return True
        trained = time.perf_counter() - self._began - self._measured
        return self._counted + self._costs[certified] <= self._share * trained

    def spend(self, certified: bool, seconds: float) -> None:
        """Enter what a measurement took."""
        if certified in self._costs:
            self._counted += seconds
        self._measured += seconds
        self._costs[certified] = seconds
