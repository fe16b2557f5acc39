"""How near an optimizer's steps come to raising the loss, logged while a model trains, for a forward pass each."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from tensorboard.plugins.custom_scalar.layout_pb2 import Category
from torch import Tensor
from torch.optim import Optimizer

from newtonopt.autodiff.graph import coarsest
from newtonopt.checks import check_flag, check_prefix, check_whole, explains_arguments
from newtonopt.closure.isolation import Isolation, UnprotectedError, Watch
from newtonopt.closure.writes import WriteTap
from newtonopt.curvature import StepMargin
from newtonopt.curvature.showing import written
from newtonopt.curvature.step_margins import along
from newtonopt.vectors.flat import differs
from newtonopt.vectors.processes import Processes
from newtonopt.vectors.scaling import dot
from newtonopt.vectors.sharded import is_sharded, local_part, resharded

from .lightning import is_trial, log_values, loss_in, passes_multiple, step_again, unwatch_step, watch_step
from .tensorboard import add_page, add_words, multiline

# A replay whose loss differs from training's by more than this share of it is of another function. One that differs
# by less, but by more than this share of g'd, was rounded in another way, as of a compiled model without its compiler.
_ANOTHER, _ROUNDED = 0.01, 1e-3
# The first measurements, and one in so many later ones, check that `.grad` is the gradient of the loss: it may differ
# from a difference of losses by this share, and four rounding units. TF32, which GPUs may take for float32, keeps ten
# bits. Where they disagree, up to so many shorter lengths are tried, and two that differ by less than the last share
# show a slope.
_FIRST, _LATER, _SLOPE, _TF32 = 3, 50, 0.02, 2.0**-11
_SHORTER, _SAME = 6, 0.05
_NOT_THE_GRADIENT = (
    "`.grad` is not the gradient of training_step's loss: along the step the loss changes {:.3g} times as much as it "
    "foretells. Usual reasons: tensor hooks that change gradients; clipping in `backward`; a loss scale of your own; "
    "gradients that `optimizer_zero_grad` keeps; a detached part of the loss that depends on the parameters; "
    "a tensor other than a buffer that training_step writes to. Clip by gradient_clip_val, and accumulate by "
    "accumulate_grad_batches. If none of them applies, the loss curves too strongly for this check, even over a small "
    "part of the step: lower the learning rate."
)


class StepMarginMonitor(Callback):
    """Log whether the steps that it measures raise the loss of their own batch, for a forward pass each.

    Let d be the step that the optimizer has just taken on a batch, `phi(s) = L(theta + s d) - L(theta)` the change of
    that batch's loss, with the same random numbers, and g its gradient before clipping. The step margin
    `1 - phi(1) / g'd` is 0 where the loss falls as the gradient foretells, 1/2 at the lowest point along the step, and
    1 or more where the step has overshot. At the edge of stability it hovers around 1. Below the edge it tells nothing
    of the largest eigenvalue, and it lags behind a rising one: `CurvatureMonitor` measures that.

    A margin below 1 does not clear the learning rate: training may fail by steps between the measured ones, or by steps
    that lower the loss of their own batch and raise that of the others. So the share of the measured steps that have
    overshot so far is logged beside the last margin, with the highest margin and the share that went uphill.

    It works with any optimizer, any kernel, mixed precision, gradient clipping and accumulation, compiled models, and
    on several processes, where the loss is their mean. Training stays the same to the bit: parameters, `.grad`,
    buffers, random state, metrics and logs. A measurement that fails warns once and is left out; training goes on.

    Values go to every logger and to `trainer.callback_metrics`. A step that goes uphill on its batch has no margin and
    is counted; one that a gradient scaler has skipped is left out. The first three measurements, and every fiftieth,
    run two forward passes more, to check that `.grad` is the gradient of the loss that `training_step` returns, and up
    to fourteen more where those disagree. A step that is measured keeps three copies of the parameters for as long.

    Args:
        every_n_train_steps: Optimizer steps between measurements, one or more. Default 50: a forward pass is about
            half of a training step, so that measuring adds about one percent.
        critical_sharpness: Whether to look for the critical step too, where the loss would rise, for up to five more
            forward passes (Kalra et al. 2026, arXiv 2601.16979). Default False.
        prefix: Prefix of the tags. Default "curvature".

    Raises:
        ValueError: A setting is out of its range; when a fit starts, the Trainer has another StepMarginMonitor.

    Warns:
        UserWarning: The module optimizes manually, `training_step` computes another loss when it runs again,
            `.grad` is not the gradient of that loss, a measurement fails, or a fit ends without one.

    Example:
        >>> from newtonopt.callbacks import StepMarginMonitor
        >>> StepMarginMonitor(every_n_train_steps=10, critical_sharpness=True).every_n_train_steps
        10

    See Also:
        - `step_margin()`: the same for one step, in any training loop.
        - `CurvatureMonitor`: eigenvalues, with bounds.
        - `docs/monitor.md`: every setting and tag.
    """

    @explains_arguments(
        {
            **dict.fromkeys(("every", "every_n_steps", "every_n_batches", "log_every_n_steps"), "every_n_train_steps"),
            "critical": "critical_sharpness",
        }
    )
    def __init__(
        self, every_n_train_steps: int = 50, critical_sharpness: bool = False, prefix: str = "curvature"
    ) -> None:
        check_whole("every_n_train_steps", every_n_train_steps, 1)
        check_flag("critical_sharpness", critical_sharpness)
        check_prefix(prefix)
        self.every_n_train_steps = every_n_train_steps
        self.critical_sharpness = critical_sharpness
        self.prefix = prefix
        self._begin()

    def _begin(self) -> None:
        """Forget the last fit."""
        self._enabled = True
        self._watch: Watch | None = None
        self._watched = False
        self._checked = False
        self._starts_again = False
        self._count = 0
        self._tally = Tally()
        self._measured = False
        self._warned = False
        self._infinite_at: int | None = None
        self._first_loss: float | None = None
        self._step = 0
        self._is_played = False
        self._forget()

    def _forget(self) -> None:
        """Forget the last step."""
        self._played: list[Played] = []
        self._before: list[Tensor] = []
        self._gradient: list[Tensor | None] | None = None
        self._found: StepMargin | None = None
        self._rate: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(c, StepMarginMonitor) for c in callbacks) > 1:
            raise ValueError("callbacks must hold at most one StepMarginMonitor, got several. Remove the others.")
        self._begin()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enabled = pl_module.automatic_optimization
        if not self._enabled:
            rank_zero_warn(
                "StepMarginMonitor measures nothing: under manual optimization training_step would train the model "
                "when it runs again. Use newtonopt.curvature.step_margin, or CurvatureMonitor with a Probe(step=...)."
            )

    # A training step, in the order of its hooks.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._enabled:
            return
        if not self._watched:
            # The first step of training tells whether running it again would change what cannot be put back.
            self._watched, self._watch = True, Watch(pl_module.training_step)
        every = 1 if is_trial(trainer) else self.every_n_train_steps
        self._step, self._is_played = trainer.global_step, False
        if passes_multiple(self._step, self._step + 1, every):
            watch_step(
                trainer,
                lambda run, args: self._around(trainer, pl_module, run, args),
                lambda: self._after(trainer, pl_module),
            )

    def _around(self, trainer: Trainer, module: LightningModule, run: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """Run `training_step`, and keep what it takes to run it again."""
        if self._is_played:  # an optimizer runs its closure again
            return run()
        self._is_played = True
        # The tap of a Newton optimizer must not see what is done here.
        with torch._C.DisableTorchFunction():
            params = _trained(module)
            again = step_again(trainer, module, args)
            isolation = Isolation(again, params)
            isolation.begin()
        output = run()
        if output is not None:  # a step that skips its batch
            with torch._C.DisableTorchFunction():
                isolation.ended()
                self._before = _copies(params)
                loss = loss_in(output, "training_step")
                self._played.append(Played(again, isolation, float(loss.detach()), _rounding(trainer, loss)))
                self._gradient = None
        return output

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._played or self._gradient is not None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        with torch._C.DisableTorchFunction():
            gradients = [p.grad for p in _trained(pl_module)]
            self._gradient = [None if g is None else local_part(g).detach() / scale for g in gradients]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        rates = {float(group["lr"]) for group in optimizer.param_groups if "lr" in group}
        self._rate = rates.pop() if len(rates) == 1 else None

    def _after(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure, right after the optimizer's step."""
        self._check_watch()
        if not self._enabled or self._gradient is None:
            return
        try:
            self._found = self._measure(_trained(module), self._gradient, trainer.accumulate_grad_batches)
        except Exception as error:
            if not self._warned:
                rank_zero_warn(
                    f"StepMarginMonitor could not measure step {trainer.global_step + 1}, and training goes on: "
                    f"{type(error).__name__}: {error}"
                )
            self._warned = True
        for played in self._played:
            if played.isolation.unprotected:
                self._stop(f"it would have changed training further. {UnprotectedError(played.isolation.unprotected)}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        unwatch_step(trainer)
        self._check_watch()
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self._enabled and self._first_loss is None and isinstance(loss, Tensor):
            self._first_loss = abs(float(loss.detach()))
        if self._found is not None:
            self._log(trainer, self._found)
        if trainer.global_step != self._step:
            self._forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        unwatch_step(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget()
        if self._enabled and not self._measured and not self._warned:
            why = (
                f"no step was due by every_n_train_steps={self.every_n_train_steps}, or none went downhill. Lower that."
                if self._infinite_at is None
                else f"the loss or its gradient was not finite at step {self._infinite_at}. Lower the learning rate, "
                "or look for a root or a logarithm at zero."
            )
            rank_zero_warn(
                f"StepMarginMonitor measured nothing in this fit, which ended at step {trainer.global_step}: {why}"
            )

    def _check_watch(self) -> None:
        if self._watch is not None and (changed := self._watch.changed()):
            self._stop(f"that would change training. {UnprotectedError(changed)}")
        self._watch = None

    def _stop(self, why: str) -> None:
        """Measure no more in this fit."""
        if self._enabled:
            rank_zero_warn(f"StepMarginMonitor measures nothing from here on: {why}")
        self._enabled = False

    # A measurement.

    def _measure(
        self, params: Sequence[Tensor], gradient: Sequence[Tensor | None], micro_batches: int
    ) -> StepMargin | None:
        """Return the margin of the step just taken; None for one that was skipped or starts at no finite loss."""
        before, after = self._before, _copies(params)
        processes = Processes(before[0])

        def mean(compute: Callable[[], float]) -> float:
            return float(processes.gather(lambda: (None, (compute(), 0.0)))[1][:, 0].mean())

        def loss_at(place: Sequence[Tensor]) -> float:
            return mean(lambda: sum(played.loss_at(params, place) for played in self._played) / micro_batches)

        def place_at(s: float) -> Sequence[Tensor]:
            return after if s == 1.0 else [torch.lerp(b, a, s) for b, a in zip(before, after, strict=True)]

        def rise(s: float) -> float:
            return loss_at(place_at(s)) - loss

        def foretold(place: Sequence[Tensor]) -> float:
            whole = processes.count if is_sharded(params) else 1
            return whole * mean(lambda: _inner(gradient, before, place))

        def rise_and_foretold(s: float) -> tuple[float, float]:
            # A training_step that clamps parameters has put them elsewhere, and its loss is the one there.
            return rise(s), foretold([local_part(p).detach() for p in params])

        slope = foretold(after)
        loss = mean(lambda: sum(played.loss for played in self._played) / micro_batches)
        if not (math.isfinite(slope) and math.isfinite(loss)):
            self._infinite_at = self._step + 1 if self._infinite_at is None else self._infinite_at
            return None
        if not abs(slope) > 0.0:
            return None
        try:
            if self._starts_again or not self._checked:
                again = loss_at(before)
                if not abs(again - loss) <= _ANOTHER * abs(loss):
                    self._stop(
                        f"training_step computes another loss ({again:.6g}, not {loss:.6g}) when it runs again on the "
                        "same batch with the same random numbers."
                    )
                    return None
                self._starts_again = self._starts_again or abs(again - loss) > _ROUNDED * abs(slope)
                self._checked, loss = True, again if self._starts_again else loss
            end, slope = rise_and_foretold(1.0)
            if not abs(slope) > 0.0:
                return None
            found = along(lambda s: end if s == 1.0 else rise(s), slope, loss, self.critical_sharpness)
            if not math.isfinite(end) and self._infinite_at is None:
                self._infinite_at = self._step + 1
            if found.margin is not None and (self._count < _FIRST or self._count % _LATER == 0):
                unit = mean(lambda: max(played.unit for played in self._played))
                # A loss near zero is the small difference of terms as large as the first loss was, such as the
                # logarithm of a probability near one, and has their rounding.
                terms = max(abs(found.loss), mean(lambda: self._first_loss or 0.0))
                wrong = _disagreement(rise_and_foretold, found, unit, unit * terms)
                if wrong is not None:
                    self._stop(_NOT_THE_GRADIENT.format(wrong))
                    return None
            self._count += found.margin is not None
            return found
        finally:
            _place(params, after)

    def _log(self, trainer: Trainer, found: StepMargin) -> None:
        self._tally = self._tally.with_step(found, trainer.global_step)
        names = {"step_margin": found.margin, "critical_step": found.critical_step, **self._tally.values()}
        if found.critical_step is not None and self._rate:
            names["critical_sharpness"] = 2.0 / (self._rate * found.critical_step)
        log_values(trainer, {f"{self.prefix}/{name}": value for name, value in names.items() if value is not None})
        add_words(trainer, f"{self.prefix}/step_in_words", f"{found.in_words()}  \n{self._tally.in_words()}")
        if found.margin is not None and not self._measured:
            chart = multiline("Step margin", [f"{re.escape(self.prefix)}/step_margin$"])
            add_page(trainer, [Category(title="Last step", chart=[chart])])
            self._measured = True


@dataclass(frozen=True)
class Tally:
    """The steps that were measured in a fit so far.

    Attributes:
        measured: How many there were.
        overshot: How many had a margin of one or more, or ended where the loss is not finite.
        uphill: How many did not go downhill on their own batch, and have no margin.
        highest: The highest margin; infinite where the loss is not finite after a step, None where no step had one.
        at: Its step.
    """

    measured: int = 0
    overshot: int = 0
    uphill: int = 0
    highest: float | None = None
    at: int = 0

    def with_step(self, found: StepMargin, step: int) -> Tally:
        """Return the tally with one more step."""
        if not found.slope < 0.0:
            return replace(self, measured=self.measured + 1, uphill=self.uphill + 1)
        margin = math.inf if found.margin is None else found.margin
        higher = self.highest is None or margin > self.highest
        return Tally(
            self.measured + 1,
            self.overshot + (margin >= 1.0),
            self.uphill,
            margin if higher else self.highest,
            step if higher else self.at,
        )

    def values(self) -> dict[str, float | None]:
        """Return the values by name; None for a highest margin that is not finite."""
        return {
            "overshot_steps": self.overshot / self.measured,
            "uphill_steps": self.uphill / self.measured,
            "highest_step_margin": self.highest if self.highest is not None and self.highest < math.inf else None,
        }

    def in_words(self) -> str:
        """Return sentences that say how many steps overshot, and what their number leaves open."""
        said = f"Measured steps so far: {self.measured}. Overshot: {self.overshot}."
        if self.highest is not None:
            highest = "the loss after it is not finite" if self.highest == math.inf else written(self.highest, 3)
            said = f"{self.overshot or 'None'} of {self.measured} measured steps overshot, the "
            said += f"{'worst' if self.overshot else 'nearest'} at step {self.at} ({highest})."
        if self.uphill:
            said += f" Uphill on their own batch, without a margin: {self.uphill}."
        if not self.overshot:
            said += " This does not clear the learning rate: other steps and other batches are not measured."
        return said


@dataclass(frozen=True, eq=False)
class Played:
    """A run of `training_step` in training that can be run again.

    Attributes:
        again: Runs it again; returns the loss.
        isolation: Where it started.
        loss: The loss that it returned.
        unit: The rounding unit of its coarsest dtype.
    """

    again: Callable[[], Tensor]
    isolation: Isolation
    loss: float
    unit: float

    def loss_at(self, params: Sequence[Tensor], place: Sequence[Tensor]) -> float:
        """Return the loss with the parameters at a place, from where the run in training started, without a trace."""
        _place(params, place)
        # The parameters have moved while a module compiled for training kept its code: run that without the compiler.
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        alone = self.isolation.isolated()
        with torch.enable_grad(), alone as writes, resharded(params, trace=False), eager, WriteTap(writes):
            return float(self.again().detach())


def _disagreement(
    rise_and_foretold: Callable[[float], tuple[float, float]], found: StepMargin, unit: float, rounding: float
) -> float | None:
    """Return the change of the loss across the step's start over the one that `.grad` foretells, if they disagree.

    None: they agree, or curvature or rounding may explain the difference. Costs two forward passes; where they
    disagree, two more for each shorter length, until one agrees or rounding counts.

    Args:
        rise_and_foretold: Returns phi(s), and the change that `.grad` foretells.
        found: The margin of the step.
        unit: The rounding unit of the loss.
        rounding: The rounding error of the loss.
    """
    # Short enough for the curvature along the step not to count, mostly, and long enough for rounding not to count.
    longest = 0.25 / max(1.0, abs(found.margin or 0.0))
    h = min(longest, max(unit ** (1 / 3) / max(1.0, abs(found.margin or 0.0)), 20.0 * rounding / -found.slope))
    shorter = [0.5 * h / 4.0**i for i in range(1, _SHORTER + 1)]
    ratios, certain = [], []
    for s in (h, 0.5 * h, *(s for s in shorter if s >= 100.0 * rounding / -found.slope)):
        (ahead, expected_ahead), (behind, expected_behind) = rise_and_foretold(s), rise_and_foretold(-s)
        change, expected = ahead - behind, expected_ahead - expected_behind
        # The second difference is small for a smooth loss, and as large as the change at a kink such as ReLU's.
        error, bend = abs(change - expected), abs(ahead + behind)
        allowed = (_SLOPE + 4.0 * unit) * abs(expected) + 4.0 * rounding
        if not error > allowed + min(bend, 0.25 * abs(expected)):
            return None
        ratios.append(change / expected if expected else math.inf)
        certain.append(error > allowed + bend)
    # A slope shows as one ratio at the two shortest lengths; a loss that curves within them has two.
    same = abs(ratios[-1] - ratios[-2]) <= _SAME * abs(ratios[-1])
    return ratios[-1] if same and all(certain[-2:]) else None


def _rounding(trainer: Trainer, loss: Tensor) -> float:
    """Return the rounding unit of the coarsest dtype that a loss was computed in."""
    unit, device = torch.finfo(loss.dtype).eps, loss.device.type
    with trainer.precision_plugin.train_step_context():
        if torch.is_autocast_enabled(device):  # a compiled graph does not show its dtypes
            unit = max(unit, torch.finfo(torch.get_autocast_dtype(device)).eps)
    unit = coarsest([loss.grad_fn], unit)
    return unit if device == "cpu" or loss.dtype == torch.float64 else max(unit, _TF32)


def _trained(module: LightningModule) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def _copies(params: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of this process's parts of the parameters."""
    return [local_part(p).detach().clone() for p in params]


def _place(params: Sequence[Tensor], place: Sequence[Tensor]) -> None:
    """Write values into the parameters, hidden from autograd, where they differ."""
    for p, values in zip(params, place, strict=True):
        part = local_part(p).detach()
        if differs(part, values):
            part.data.copy_(values)


def _inner(gradient: Sequence[Tensor | None], before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return g'(after - before) over this process's parts."""
    total = 0.0
    for g, b, a in zip(gradient, before, after, strict=True):
        if g is not None:
            whole = g.to_dense() if g.is_sparse else g
            total += dot(whole.reshape(-1), (a - b).reshape(-1))
    return total
