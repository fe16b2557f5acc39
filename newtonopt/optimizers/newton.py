"""What one call of `step` evaluates: the loss by the user's closure, and the curvature by the same or by another."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from newtonopt.checks import check_closure, listed_group, listed_groups, warn
from newtonopt.closure.evaluation import Evaluation, Known, Matrix, Products, Verdict
from newtonopt.closure.objective import RESTLESS, Objective, ParametersMovedError
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.operators.matrices import gauss_newton, hessian
from newtonopt.optimizers.checkpoints import check_kind, check_layout, follow, home, layout_now, packed, unpacked
from newtonopt.optimizers.escape import STALLED, critical, is_settled, is_stalled, leave, note_progress, settle
from newtonopt.optimizers.rates import is_everywhere, per_entry
from newtonopt.optimizers.report import StepReport, following
from newtonopt.optimizers.rules import hastened, run_of
from newtonopt.optimizers.settings import (
    PER_GROUP,
    check_group,
    check_groups,
    check_names,
    check_settings,
    plain,
    rate_of,
    shared_settings,
    warn_of_small_rates,
)
from newtonopt.optimizers.trials import Outcome, Proposal, search
from newtonopt.vectors.flat import check_any, check_parameters, flatten, unflatten
from newtonopt.vectors.sharded import is_sharded


class Call:
    """The points that one call passes: at the first one the closure runs for real, later without a trace.

    All evaluations begin with the same random state, so that the same function is minimised throughout.

    Args:
        closure: Of the loss.
        curvature_closure: Of the curvature; None: the same.
        groups: The parameter groups.
        falls_back: Whether products are known to need finite differences.
        verdicts: Verdicts of earlier checks of the products.
        length: How far finite differences look; None: not known yet.
        replayed: Whether the closures were seen to compute the same again when they run again.

    Attributes:
        params: The parameters that are neither frozen nor empty.
        rates: Their learning rate, one number or one for each entry `(n,)`.
        objective: The loss.

    Raises:
        RuntimeError: Every parameter is frozen or empty.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        curvature_closure: Callable[[], Any] | None,
        groups: Sequence[dict[str, Any]],
        *,
        falls_back: bool,
        verdicts: Mapping[Matrix, Verdict],
        length: float | None,
        replayed: bool,
    ) -> None:
        trained = [(group, p) for group in groups for p in group["params"] if p.requires_grad and p.numel()]
        if not trained:
            raise RuntimeError(
                "Every parameter of this optimizer is frozen or empty: none requires a gradient. Unfreeze some by "
                "requires_grad_(), or take no step."
            )
        self.params = [p for _, p in trained]
        self.rates = per_entry([float(rate_of(group)) for group, _ in trained], self.params)
        decay = per_entry([float(group["weight_decay"]) for group, _ in trained], self.params)
        products: Products = "finite_difference" if falls_back else groups[0]["products"]
        curved = closure if curvature_closure is None else curvature_closure
        self._curved = Objective(curved, self.params, decay, products, known=Known(verdicts, length, replayed))
        # By differences, which the loss alone never needs, no graph of it is kept.
        alone: Products = "finite_difference"
        self.objective = self._curved
        if curvature_closure is not None:
            self.objective = Objective(closure, self.params, decay, alone, known=Known(replayed=replayed))
        self._start = self.objective.point
        self._began = False
        self._gradient: Tensor | None = None
        self._returned: Any = None

    def evaluate(self) -> tuple[Evaluation, Evaluation]:
        """At the present point: the loss's, and the one whose products are the curvature's."""
        if self._curved is self.objective:
            evaluation = basis = self._evaluated()
        else:
            # First, so that an error finds everything as it was.
            first = self._curvature()
            evaluation = self._evaluated()
            if first is not None and self._curved.point is self.objective.point:
                return evaluation, first
            # The closure has moved the parameters.
            if first is not None:
                first.free()
            again = self._curvature()
            if again is None:
                raise RuntimeError(f"The curvature_closure failed. {RESTLESS}")
            basis = again
        return evaluation, basis

    def _evaluated(self) -> Evaluation:
        if self._gradient is not None:
            return self.objective.evaluate()
        self._began = True
        evaluation = self.objective.record()
        self._gradient = evaluation.data_gradient
        self._returned = evaluation.loss if evaluation.returned is None else evaluation.returned
        return evaluation

    def _curvature(self) -> Evaluation | None:
        """None if the curvature's closure moves the parameters."""
        self._curved.point = self.objective.point
        try:
            return self._curved.evaluate()
        except ParametersMovedError:
            return None
        except RuntimeError as error:
            raise RuntimeError(f"The curvature_closure failed. {error}") from error

    def fall_back(self) -> None:
        """Form products by finite differences from the next point on."""
        self._curved.products = "finite_difference"

    def undo(self) -> None:
        """Put all back to where the call began."""
        if self.objective.point is not self._start:
            self.objective.return_to(self._start)
        if self._began:
            self.objective.rewind()

    def finish(self) -> Any:
        """Leave the first point's gradient in `.grad`; returns what the closure returned there, or the loss."""
        self.objective.settle()
        if self._gradient is not None:
            _put_gradients(self.params, self._gradient)
        return self._returned


def does_nothing(closure: Callable[[], Any]) -> bool:
    """Whether this is what Lightning gives a step that was called without a closure under manual optimization."""
    hosts = (closure.func, *closure.args) if isinstance(closure, functools.partial) else (closure,)
    return any(getattr(host, "__name__", "") == "do_nothing_closure" for host in hosts)


def skips_backward(closure: Callable[[], Any]) -> bool:
    """Whether this is Lightning's closure without a `backward`."""
    hosts = (closure.func, *closure.args) if isinstance(closure, functools.partial) else (closure,)
    return any(
        type(host).__module__.partition(".")[0] in ("lightning", "pytorch_lightning")
        and getattr(host, "_backward_fn", host) is None
        for host in hosts
    )


def refuse_skipped_batches() -> None:
    """Raise a RuntimeError if accelerate, which calls the step, leaves out all closures but every n-th.

    Its optimizer runs no closure while it accumulates gradients, so that a step would see one micro-batch of n.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_WRAPPERS):
        if frame is None:
            return
        if frame.f_globals.get("__name__") == "accelerate.optimizer":
            count = frame.f_locals["self"].gradient_state.num_steps
            if count > 1:
                raise RuntimeError(
                    f"Accelerator(gradient_accumulation_steps={count}) runs the closure of every {count}. batch only, "
                    "so that a step would leave out the others: set it to 1, and loop over the micro-batches inside "
                    "one closure, calling backward for each."
                )
        frame = frame.f_back


# Frames of hooks, decorators and schedulers between a caller of `step` and its body, at most.
_WRAPPERS = 10


def _put_gradients(params: Sequence[Tensor], gradient: Tensor) -> None:
    """Leave the recorded gradient in `.grad`, unclipped; a parameter that the loss does not use keeps None."""
    for p, piece in zip(params, unflatten(gradient, params), strict=True):
        if p.grad is not None:
            p.grad.copy_(piece)
        elif bool(piece.any()):
            p.grad = piece.clone()


def unrounded(vector: Tensor) -> torch.autocast:
    """A step taken inside autocast would have it round the solver's vectors."""
    return torch.autocast(vector.device.type, enabled=False)


def not_finite(loss: float, norm: float, evaluation: Evaluation, basis: Evaluation) -> str:
    """In words, what is not finite; empty if all is."""
    if not math.isfinite(loss):
        return "loss"
    if not math.isfinite(norm):
        finite = math.isfinite(float(evaluation.gradient.abs().max()))
        return "gradient's norm (each entry is: divide the loss by a constant)" if finite else "gradient"
    return "" if basis is evaluation or math.isfinite(float(basis.loss)) else "curvature_closure's loss"


# The one loop of every Newton optimizer: evaluate, propose, try, judge, commit.


_MAX_FAILURES = 5
_CLIPPING = (
    "The closure clips gradients. newtonopt takes the gradient of the loss itself: clipping has no effect on its "
    "step, which is bounded by other means. Remove gradient_clip_val (or clip_grad_norm_) to silence this."
)
_UNPROTECTED = (
    "The closure changes {}, which cannot be put back after a trial: an iterator, or an array or container too "
    "large to be copied. Each trial moves it on. Move it on outside of the closure, once a step."
)
_NO_CLOSURE = (
    "step() needs a closure that computes the loss and calls backward: optimizer.step(closure), under manual "
    "optimization too. Lightning's automatic optimization gives one, "
    'except with precision="16-mixed", whose gradient scaler calls step() without it: use precision="bf16-mixed" or '
    '"32-true". Training loops that call backward themselves and then step(), such as those of the Hugging Face '
    "Trainer, ignite's create_supervised_trainer, Pyro's SVI and BoTorch's fit_gpytorch_mll_torch, give none: write "
    "the loop yourself with optimizer.step(closure), as docs/setups.md shows for each, or let "
    "optimizer.register_step_pre_hook give the closure."
)


class NewtonOptimizer(torch.optim.Optimizer, ABC):
    """Base of the family. A subclass says how it proposes a step and names its one parameter of control and the rule
    for it; all else, from closure to report, is here.
    """

    control: ClassVar[str | None]
    """What bounds the steps and adapts to their success: "damping", "radius" or "sigma"; None for a line search."""

    def __init__(self, params: ParamsT, settings: dict[str, Any]) -> None:
        self._check(plain(settings))
        super().__init__(listed_groups(params), plain(settings, keep_rate=True))
        check_any(self._params)
        warn_of_small_rates(self.param_groups)
        self.last_step: StepReport | None = None
        self._warned_of_clipping = False
        self._fell_back = False
        self._verdicts: Mapping[Matrix, Verdict] = {}
        self._replayed = False

    def _check(self, settings: dict[str, Any]) -> None:
        """Refuse settings out of their range with a ValueError: when they are given, and again in every step."""
        check_settings(settings, self.control)

    @abstractmethod
    def _propose(self, evaluation: Evaluation, rates: float | Tensor) -> Proposal:
        """A proposal from the live evaluation; `rates` is the learning rate, one number or one for each entry."""

    def _next_control(self, control: float, ratio: float, length: float) -> float:
        """The rule: the next control, from a trial's ratio and the length of its step before learning rates."""
        return control

    def _check_room(self, params: Sequence[Tensor]) -> None:
        """Refuse what would not fit in memory, with a MemoryError, before the closure runs."""

    def _judge(self, objective: Objective, gradient: Tensor, proposal: Proposal, loss: float, eps: float) -> Outcome:
        """Try a proposal's steps."""
        return search(objective, gradient, proposal, loss, eps)

    def _length_along(self, slope: float, bend: float) -> float:
        """How far to go along a unit vector of slope zero or below and of negative curvature `bend`.

        As far as the size of the curvature (Royer, O'Neill & Wright 2020): the search doubles and halves that.
        """
        return -bend

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with its own `lr` and `weight_decay`; every other setting is the optimizer's.

        Raises:
            TypeError: It is no group of tensors, or has an entry that means a setting under another name.
            ValueError: Another setting differs, or the parameters cannot share one flat vector with the others.
        """
        param_group = plain(listed_group(param_group), keep_rate=True)
        check_names(param_group, ["params", *self.defaults])
        settings = self.param_groups[0] if self.param_groups else self.defaults
        shared = shared_settings(settings, self.defaults)
        check_group(param_group, shared)
        own = {name: param_group[name] for name in PER_GROUP if name in param_group}
        self._check(plain({**self.defaults, **own}))
        super().add_param_group({**shared, **param_group})
        try:
            check_parameters(self._params)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, curvature_closure: Callable[[], Any] | None = None) -> Any:
        """Take `steps_per_call` Newton steps, fewer where one ends at a tolerance, a minimum, or is not finite.

        All of them are steps on one function, with the same random numbers. What the closure leaves behind,
        such as `.grad`, BatchNorm's statistics, the random state, logs, counters and lists, is as after one run of it
        at the starting point. A closure may clamp or normalise parameters: the starting point and each trial are then
        where it leaves them.

        Args:
            closure: Clears the gradients, computes the loss, calls `backward` and returns the loss, as for
                `torch.optim.LBFGS`. One that calls no `backward` may return a loss that requires a gradient. Where a
                trial has no loss it returns infinity, for an error ends the step.
            curvature_closure: The same for other data, as a rule fewer: curvature products are those of its loss, while
                loss, gradient and trials are the closure's (Martens 2010, sec. 4; Byrd, Chin, Neveitt & Nocedal 2011).
                It leaves no trace. None (default): the closure.

        Returns:
            What the closure returned at the starting point, detached; the loss if it returned nothing.

        Raises:
            TypeError: `closure` or `curvature_closure` cannot be called.
            ValueError: A setting in `param_groups` is out of its range by now.
            MemoryError: What must be held of the curvature would not fit; nothing was evaluated.
            RuntimeError: No closure, a closure without a loss or with one of other parameters or that trains the
                parameters, gradients accumulated across closures, every parameter frozen, or a loss, gradient or
                curvature that was not finite in five calls running. An error of any kind puts parameters and state
                back to where the call began; `.grad` stays as the closure's last run for real left it.
        """
        if closure is None and self._only_a_state_is_wanted():
            return None
        if closure is None or does_nothing(closure):
            raise RuntimeError(f"{type(self).__name__}.{_NO_CLOSURE}")
        check_closure(closure)
        check_closure(closure if curvature_closure is None else curvature_closure, "curvature_closure")
        check_groups(self.param_groups, self.defaults, self._check)
        check_parameters(self._params)
        refuse_skipped_batches()
        if skips_backward(closure):
            return self._run_without_backward(closure)
        length = (self._memory["length"] or None) if self.state else None
        call = Call(
            closure,
            curvature_closure,
            self.param_groups,
            falls_back=self._fell_back,
            verdicts=self._verdicts,
            length=length,
            replayed=self._replayed,
        )
        before = {key: dict(value) if isinstance(value, dict) else value for key, value in self.state.items()}
        try:
            self._follow_parameters(call.params)
            self._check_room(call.params)
            self._take_steps(call)
        except BaseException:
            # An error leaves all as it was; the state's vectors are never changed in place.
            self.state.clear()
            self.state.update(before)
            call.undo()
            raise
        return call.finish()

    def _run_without_backward(self, closure: Callable[[], Any]) -> Any:
        """Lightning runs batches so, after averaging weights, for the statistics of BatchNorm."""
        returned = closure()
        loss = float(returned) if isinstance(returned, Tensor) and returned.numel() == 1 else math.nan
        self._report(loss, math.nan, reason="the closure left backward out, to move statistics only")
        return returned

    def _take_steps(self, call: Call) -> None:
        earlier: StepReport | None = None
        for _ in range(self.param_groups[0]["steps_per_call"]):
            goes_on = self._take_step(call)
            if earlier is not None and self.last_step is not None:
                self.last_step = following(earlier, self.last_step)
            earlier = self.last_step
            if not goes_on:
                break

    def _take_step(self, call: Call) -> bool:
        """One Newton step; returns whether another one may follow."""
        memory = self._memory
        memory["steps"] += 1
        evaluation, basis = call.evaluate()
        if evaluation.clipped and not self._warned_of_clipping:
            self._warned_of_clipping = True
            warn(_CLIPPING)
        loss, norm = float(evaluation.loss), float(evaluation.gradient.norm())
        broken = not_finite(loss, norm, evaluation, basis)
        try:
            if not broken:
                if not self._replayed:
                    call.objective.check_replay(evaluation)
                    self._replayed = True
                    if call.objective.unprotected:
                        warn(_UNPROTECTED.format(", ".join(call.objective.unprotected)))
                # The model's slope is the loss's.
                basis = dataclasses.replace(basis, gradient=evaluation.gradient)
                with unrounded(basis.gradient):
                    proposal, searching = self._proposed(basis, call.rates, loss, norm)
        except FloatingPointError:
            broken = "curvature"
        finally:
            # The graphs go before any trial, so that no two are alive at once.
            evaluation.free()
            basis.free()
        if broken:
            self._fail(loss, norm, broken)
            return False
        memory["failures"] = 0
        self._verdicts = basis.verdicts
        lengths = [verdict.manner.length for verdict in basis.verdicts.values() if verdict.manner.length is not None]
        if lengths:  # so that a resumed run forms the same differences
            memory["length"] = lengths[0]
        # What has no second derivative now has none in the next step.
        if basis.may_fall_back and basis.form == "finite_difference":
            self._fell_back = True
            call.fall_back()
        spent = {"iterations": proposal.iterations, "products": searching + proposal.products, "form": basis.form}
        spent["checks"] = basis.checks
        if not proposal.steps:
            self._report(loss, norm, reason=proposal.reason, **spent)
            return False
        if float(proposal.steps[0].abs().max()) <= self.param_groups[0]["tolerance_step"]:
            memory["stalls"] = memory.get("stalls", 0) + 1
            reason = f"no entry of the step is above tolerance_step; {proposal.reason}"
            self._report(loss, norm, predicted_decrease=proposal.decreases[0], reason=reason, **spent)
            return False
        return self._try(call.objective, evaluation, proposal, basis, searching)

    def _proposed(self, basis: Evaluation, rates: float | Tensor, loss: float, norm: float) -> tuple[Proposal, int]:
        """A proposal, without a step where none is to be taken; and the products of a search that found nothing."""
        memory = self._memory
        place = critical(basis.gradient, norm, self.param_groups[0]["tolerance_gradient"])
        if is_everywhere(rates, 0.0):
            return Proposal([], [], 0, 0, "the learning rate is zero"), 0
        searches = self.param_groups[0]["curvature"] == "hessian"
        if place and is_settled(memory, loss, norm):
            return Proposal([], [], 0, 0, place + ", and no negative curvature was found here before" * searches), 0
        if not (place or (searches and is_stalled(memory, loss))):
            return self._propose(basis, rates), 0
        away = leave(self._curvature(basis), basis.gradient, rates, place or STALLED, self._length_along)
        if not away.steps:
            settle(memory, loss, norm)
        return (away, 0) if away.steps or place else (self._propose(basis, rates), away.products)

    def _try(
        self, objective: Objective, evaluation: Evaluation, proposal: Proposal, basis: Evaluation, searching: int
    ) -> bool:
        """Try a proposal, and shorter ones while that is rejected; move, report, adapt. Returns as `_take_step`."""
        loss, norm = float(evaluation.loss), float(evaluation.gradient.norm())
        trials, turns = 0, self.param_groups[0].get("max_trials", 1)
        while True:
            outcome = self._judge(objective, evaluation.gradient, proposal, loss, evaluation.eps)
            trials += outcome.trials
            used = self._controls
            self._adapt(outcome.first_ratio, proposal, evaluation.gradient)
            turns -= 1
            if outcome.accepted or turns == 0 or proposal.shrink is None or self.control is None:
                break
            try:
                with unrounded(evaluation.gradient):
                    proposal = proposal.shrink(self._memory[self.control])
            except FloatingPointError:
                break
        note_progress(self._memory, outcome, proposal.leaves, loss, norm, evaluation.eps)
        if outcome.accepted:
            objective.move(outcome.step)
        self._report(
            loss,
            norm,
            trial_loss=outcome.loss,
            predicted_decrease=outcome.predicted,
            ratio=outcome.ratio,
            first_ratio=outcome.first_ratio,
            iterations=proposal.iterations,
            products=searching + proposal.products,
            checks=basis.checks,
            form=basis.form,
            trials=trials,
            step_norm=float(outcome.step.norm()) if outcome.accepted else 0.0,
            accepted=outcome.accepted,
            reason=proposal.reason if outcome.accepted else f"rejected, {outcome.refusal}; {proposal.reason}",
            **used,
        )
        return outcome.accepted or self.control is not None

    def _curvature(self, evaluation: Evaluation) -> LinearOperator:
        return (gauss_newton if self.param_groups[0]["curvature"] == "gauss_newton" else hessian)(evaluation)

    @property
    def _controls(self) -> dict[str, float]:
        return {} if self.control is None else {self.control: self._memory[self.control]}

    def _adapt(self, ratio: float, proposal: Proposal | None = None, gradient: Tensor | None = None) -> None:
        if self.control is None:
            return
        memory, control = self._memory, self._memory[self.control]
        memory["agreements"] = run_of(memory["agreements"], ratio)
        new = self._next_control(control, ratio, 0.0 if proposal is None else proposal.length)
        if proposal is not None and gradient is not None and (matters := self._matters(proposal, gradient)):
            new = hastened(control, new, memory["agreements"], matters, torch.finfo(gradient.dtype).eps)
        low, high = (self.param_groups[0][f"{bound}_{self.control}"] for bound in ("min", "max"))
        memory[self.control] = min(max(new, low), high)

    def _matters(self, proposal: Proposal, gradient: Tensor) -> float:
        """From about which value the control, not the curvature, sets the length of a step; zero: it always may."""
        return 0.0

    def _fail(self, loss: float, norm: float, what: str) -> None:
        """A loss, gradient or curvature not finite moves nothing; it tightens the control, and soon an error."""
        memory = self._memory
        memory["failures"] += 1
        self._report(loss, norm, first_ratio=-math.inf, reason=f"the {what} is not finite")
        self._adapt(-math.inf)
        if memory["failures"] >= _MAX_FAILURES:
            raise RuntimeError(
                f"The {what} was not finite in {memory['failures']} steps in a row; the parameters were left as they "
                "were. Check the data for NaN or infinite entries, the model's initialisation, operations such as log "
                "or sqrt at zero, and the scale of loss and parameters, whose squares must be numbers."
            )

    def _report(self, loss: float, gradient_norm: float, reason: str, **values: Any) -> None:
        fields = {"trial_loss": loss, **self._controls, **values}
        self.last_step = StepReport(loss=loss, gradient_norm=gradient_norm, reason=reason, **fields)

    @property
    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def _memory(self) -> dict[str, Any]:
        """The state, kept under one parameter as torch's LBFGS keeps its own: the first one trained."""
        params = self._params
        key = home(self.state, params)
        if key is not None:
            memory: dict[str, Any] = self.state[key]
            return memory
        memory = self.state[next((p for p in params if p.requires_grad), params[0])]
        memory.update(steps=0, failures=0, stalls=0, patience=1, settled_loss=math.inf, settled_norm=math.inf)
        memory["length"] = 0.0  # of finite differences, not known yet
        if self.control is not None:
            memory["agreements"] = 0
            memory[self.control] = float(self.param_groups[0][self.control])
        return memory

    def _follow_parameters(self, params: Sequence[Tensor]) -> None:
        """Bring vectors from earlier steps to the parameters' device and precision; drop them when other parameters are
        frozen now than then, and before the first step, when they are zeros to load into.
        """
        memory, layout = self._memory, layout_now(self._params)
        if memory["steps"] == 0 or memory.get("layout", layout) != layout:
            for name in [name for name, value in memory.items() if isinstance(value, Tensor)]:
                del memory[name]
            memory.update(settled_loss=math.inf, settled_norm=math.inf)
        memory["layout"] = layout
        follow(memory, params)

    def _only_a_state_is_wanted(self) -> bool:
        """Make a state to load into, with vectors of zeros, if a `step` without a closure asks for nothing else.

        `torch.distributed.checkpoint` takes such a step where an optimizer has no state: with gradients and learning
        rates of zero.
        """
        idle = all(float(group["lr"]) == 0.0 for group in self.param_groups)
        if self.state or not idle or any(p.grad is not None and bool((p.grad != 0).any()) for p in self._params):
            return False
        trained = [p for p in self._params if p.requires_grad and p.numel()]
        blank = self._blank(flatten([None] * len(trained), trained)) if trained else {}
        self._memory.update(layout=layout_now(self._params), **blank)
        return True

    def _blank(self, like: Tensor) -> dict[str, Any]:
        """What the state may hold besides, with vectors of zeros made from the flat vector `like`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The state and the settings, as torch's optimizers give them.

        Of sharded parameters vectors are given in pieces, one DTensor for each parameter, so that
        `torch.distributed.checkpoint` can save them and load them on any number of processes. All that the state may
        hold is there then, zeros for what is not known yet, and a new optimizer's can be loaded into.
        """
        # Before the user's own hooks, which see what is saved.
        hook = self.register_state_dict_post_hook(lambda _, state_dict: self._packed(state_dict), prepend=True)
        try:
            state_dict: dict[str, Any] = super().state_dict()
        finally:
            hook.remove()
        return state_dict

    def _packed(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        params, state = self._params, state_dict["state"]
        key = home(self.state, params)
        if key is None and not is_sharded(params):
            return state_dict
        memory = self._memory
        number = next(number for number, p in enumerate(params) if p is key) if key is not None else None
        others = {name: value for name, value in state.items() if name != number}
        ours = packed(memory, self._blank, params)
        return {**state_dict, "state": {**others, **{n: {**others.get(n, {}), **mine} for n, mine in ours.items()}}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by `state_dict`, settings included, as torch's optimizers do.

        Raises:
            ValueError: The state is that of another kind of optimizer, or of another model.
        """
        memory: dict[str, Any] = {}

        def take(optimizer: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            check_kind(given, tuple(self.defaults), type(self).__name__)
            check_layout(given, self._params)
            ours, others = unpacked(given, self._params)
            memory.update(ours)
            return {**given, "state": others}

        def put(optimizer: torch.optim.Optimizer) -> None:
            if memory:
                self._memory.update(memory)
                follow(self._memory, self._params)

        # After the user's own hooks, which may repair a state, and before those that see what was loaded. In between
        # torch would round vectors to the parameters' precision.
        hooks = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        names = ("last_step", "_warned_of_clipping", "_fell_back", "_verdicts", "_replayed")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Torch's own, which is no setting of ours.
        self.defaults.pop("differentiable", None)
