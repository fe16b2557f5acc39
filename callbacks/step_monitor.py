"""The steps of a Newton optimizer, logged while it trains."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from tensorboard.plugins.custom_scalar.layout_pb2 import Category

from newtonopt.checks import check_whole, explains_arguments
from newtonopt.optimizers.newton import NewtonOptimizer
from newtonopt.optimizers.report import StepReport

from .lightning import is_trial, log_values, passes_multiple
from .tensorboard import STEPS, add_page, multiline

# The same charts in every run, so that TensorBoard merges them; the first one in runs whose optimizer has such a value.
_CONTROL = multiline("Damping, radius or sigma", ["newton/(damping|radius|sigma)$"])
_CHARTS = (
    multiline("Actual over predicted decrease", ["newton/(first_)?ratio$"]),
    multiline("Iterations of the inner solver", ["newton/iterations$"]),
)


class StepMonitor(Callback):
    """Log a Newton optimizer's damping, radius or sigma, and ratios, iterations, products and norms, under `newton/`.

    `newton/ratio` is the actual over the predicted decrease of the step taken; `newton/first_ratio` is the ratio of the
    step as proposed, before a line search shortened it, and adapts the damping, radius or sigma.

    Args:
        every_n_train_steps: Optimizer steps between log entries, one or more. Default 1: a Newton step is dear, and its
            report costs nothing.

    Raises:
        ValueError: `every_n_train_steps` is below one.

    Example:
        >>> from newtonopt.callbacks import StepMonitor
        >>> StepMonitor(every_n_train_steps=10).every_n_train_steps
        10

    See Also:
        - `StepReport`: what it logs.
        - `CurvatureMonitor`: the curvature of the loss, for any optimizer.
        - `docs/monitor.md`: every setting and tag.
    """

    @explains_arguments(dict.fromkeys(("every", "every_n_steps", "log_every_n_steps"), "every_n_train_steps"))
    def __init__(self, every_n_train_steps: int = 1) -> None:
        check_whole("every_n_train_steps", every_n_train_steps, 1)
        self.every_n_train_steps = every_n_train_steps
        self._last_step = 0
        self._charts_written = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        self._charts_written = False
        if not any(isinstance(optimizer, NewtonOptimizer) for optimizer in trainer.optimizers):
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise MisconfigurationException(
                f"StepMonitor reports the steps of newtonopt's optimizers, and this run trains with {names}. Remove "
                "the callback, or use CurvatureMonitor, which works with any optimizer."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        every = 1 if is_trial(trainer) else self.every_n_train_steps
        due = passes_multiple(self._last_step, trainer.global_step, every)
        self._last_step = trainer.global_step
        report = _last_report(trainer)
        if not due or report is None:
            return
        log_values(trainer, report.by_tag())
        if not self._charts_written:
            controlled = any(value is not None for value in (report.damping, report.radius, report.sigma))
            charts = [_CONTROL, *_CHARTS] if controlled else _CHARTS
            add_page(trainer, [Category(title=STEPS, chart=charts)])
            self._charts_written = True


def last_step_of(trainer: Trainer) -> dict[str, float]:
    """Return the values of the last Newton step by their tags; none where no optimizer of ours has taken one."""
    report = _last_report(trainer)
    return {} if report is None else report.by_tag()


def _last_report(trainer: Trainer) -> StepReport | None:
    reports = (o.last_step for o in trainer.optimizers if isinstance(o, NewtonOptimizer))
    return next((report for report in reports if report is not None), None)
