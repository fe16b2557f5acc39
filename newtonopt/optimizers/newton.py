"""The loop of all Newton optimizers: evaluate, propose, try, judge, commit.

Optimizers differ in how they bound a step:

- A damping (HessianFree, DampedNewton), a radius (TrustRegionNewton) or a sigma (CubicNewton) is the *control*: a
  number of the state that enters the proposal, is judged by the ratio of the loss's actual to its predicted decrease,
  and after a rejection gives a shorter proposal. HessianFree and DampedNewton also shorten the step itself.
- A line search (NewtonCG) bounds the step while it is tried. There is no control, and a failure ends the step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from newtonopt.checks import check_closure, listed_group, listed_groups, warn
from newtonopt.closure.evaluation import Evaluation, Known, Products
from newtonopt.closure.objective import RESTLESS, Objective, ParametersMovedError
from newtonopt.lightning import does_nothing, refuse_skipped_batches, skips_backward
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.operators.matrices import diagonal_blocks, gauss_newton, hessian
from newtonopt.optimizers.escape import STALLED, critical, is_settled, is_stalled, leave, progressed, settled
from newtonopt.optimizers.model import Proposal, QuadraticModel
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
from newtonopt.optimizers.state import (
    S,
    check_kind,
    check_layout,
    empty_entries,
    fitted,
    followed,
    home,
    packed,
    read,
    unpacked,
    write,
)
from newtonopt.optimizers.trials import Outcome, backtracking, reported
from newtonopt.vectors.flat import check_any, check_parameters, flatten, unflatten
from newtonopt.vectors.sharded import is_sharded, local_part

_MAX_FAILURES = 5
_CLIPPING = (
    "The closure clips gradients. newtonopt takes the gradient of the loss itself: clipping has no effect on its "
    "step, which is bounded by other means. Remove gradient_clip_val (or clip_grad_norm_) to silence this."
)
_UNPROTECTED = (
    "The closure changes {}, which cannot be restored after a trial: an iterator, or an array or container too large "
    "to copy. Each trial advances it. Advance it outside the closure, once per step."
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


@dataclass(frozen=True)
class Experience:
    """Facts that an optimizer has learnt about the closure: copied and pickled with it, but not saved in its state.

    Attributes:
        known: Verdicts of the checks of products, and whether the closure computes the same when it runs again.
        fell_back: Whether products are known to need finite differences.
        warned_of_clipping: Whether the user was told that clipping has no effect.
    """

    known: Known = field(default_factory=Known)
    fell_back: bool = False
    warned_of_clipping: bool = False


class NewtonOptimizer(torch.optim.Optimizer, ABC, Generic[S]):
    """Base of the family: everything from the closure to the report.

    A member says how it proposes a step, and which control bounds the step and by which rule.
    """

    control: ClassVar[str | None]
    """Name of the control: "damping", "radius" or "sigma"; None for a line search."""
    state_type: type[S]
    """Class of the state."""

    def __init__(self, params: ParamsT, settings: dict[str, Any]) -> None:
        self._check(plain(settings))
        super().__init__(listed_groups(params), plain(settings, keep_rate=True))
        check_any(self._params)
        warn_of_small_rates(self.param_groups)
        self.last_step: StepReport | None = None
        self._experience = Experience()

    # The loop.

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, curvature_closure: Callable[[], Any] | None = None) -> Any:
        """Take up to `steps_per_call` Newton steps; stop early at a tolerance, a minimum or a non-finite number.

        All steps of a call minimise one function, with the same random numbers. Afterwards everything that the closure
        changes, such as `.grad`, BatchNorm's statistics, the random state, logs, counters and lists, is as one run of
        it at the starting point leaves it. A closure may clamp or normalise parameters: the starting point and each
        trial are then where it leaves them.

        Args:
            closure: Clears the gradients, computes the loss, calls `backward` and returns the loss, as for
                `torch.optim.LBFGS`. One that calls no `backward` may return a loss that requires a gradient. Where a
                trial has no loss, return infinity: an error would end the step.
            curvature_closure: A closure for other data, usually fewer. Its loss gives the curvature products, while the
                loss, the gradient and the trials come from `closure` (Martens 2010, sec. 4; Byrd, Chin, Neveitt &
                Nocedal 2011). It leaves no trace. None (default): use `closure`.

        Returns:
            The closure's return value at the starting point, detached; the loss if it returned nothing.

        Raises:
            TypeError: `closure` or `curvature_closure` cannot be called.
            ValueError: A setting in `param_groups` is out of its range by now.
            MemoryError: The matrix or sketch that a step holds would not fit; nothing was evaluated.
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
        state = self._state
        call = Call(closure, curvature_closure, self.param_groups, self._experience, state.length or None)
        try:
            state = fitted(state, self._params)
            self._check_room(call.params, state)
            state = self._take_steps(call, state)
        except BaseException:
            call.undo()
            raise
        self._remember(state)
        return call.finish()

    def _take_steps(self, call: Call, state: S) -> S:
        earlier: StepReport | None = None
        for _ in range(self._settings["steps_per_call"]):
            state, report, goes_on = self._take_step(call, state)
            self.last_step = earlier = report if earlier is None else following(earlier, report)
            if not goes_on:
                break
        return state

    def _take_step(self, call: Call, state: S) -> tuple[S, StepReport, bool]:
        """Take one Newton step, with the numbers of the boxes in docs/optimizers.

        Returns:
            The new state, the report, and whether another step may follow.
        """
        # 1. Evaluate the loss f, its gradient g and its curvature A at the point x.
        state = replace(state, steps=state.steps + 1)
        evaluation, curved = call.evaluate()
        self._warn_of_clipping(evaluation)
        loss, gradient, norm = float(evaluation.loss), evaluation.gradient, float(evaluation.gradient.norm())
        model = QuadraticModel(gradient, call.rates, loss, evaluation.eps)

        # 2. Propose a step s from the model m(s) = g's + s'As / 2 and the control.
        broken = not_finite(loss, norm, evaluation, curved)
        try:
            if broken is None:
                self._check_replay(call.objective, evaluation)
                with unrounded(gradient):
                    proposal = self._propose_or_escape(model, curved, norm, state)
        except FloatingPointError:
            broken = "curvature"
        finally:
            # Free the graphs before any trial, so that only one is in memory at a time.
            evaluation.free()
            curved.free()
        if broken is not None:
            return self._failed(loss, norm, broken, state)
        state = replace(proposal.state, failures=0, length=self._learn(call, curved) or proposal.state.length)
        report = StepReport(loss, norm, proposal.reason, loss, checks=curved.checks, form=curved.form)
        report = replace(report, iterations=proposal.iterations, products=proposal.products)
        if not proposal.steps:
            return state, self._with_control(report, state), False
        if float(proposal.steps[0].step.abs().max()) <= self._settings["tolerance_step"]:
            reason = f"no entry of the step is above tolerance_step; {proposal.reason}"
            report = replace(report, predicted_decrease=proposal.steps[0].decrease, reason=reason)
            return replace(state, stalls=state.stalls + 1), self._with_control(report, state), False

        trials, turns = 0, self._settings["max_trials"]
        while True:
            # 3. Try it: the ratio r = (f(x) - f(x + s)) / -m(s), and a line search where there is one.
            outcome, state = self._try(call.objective, model, proposal, state)
            trials, turns = trials + outcome.trials, turns - 1
            # 4. Judge it: the ratio of the step as it was proposed adapts the control.
            report = self._with_control(report, state)
            state = self._adapted(state, outcome.first_ratio, model, proposal)
            if outcome.accepted or outcome.ends or turns == 0 or proposal.shorter is None or self.control is None:
                break
            # 2. Propose a shorter step under the tightened control, from what was computed for the first.
            try:
                with unrounded(gradient):
                    proposal = proposal.shorter.at(state)
            except FloatingPointError:
                break
            state = proposal.state

        # 5. Commit: x becomes x + s if the step was accepted, and stays where it is otherwise.
        state = progressed(state, model, outcome, proposal.leaves, norm)
        if outcome.accepted:
            call.objective.move(outcome.step)
        # The next line search from the same point would fail again; another control makes another step.
        goes_on = outcome.accepted or self.control is not None
        return state, reported(report, proposal, outcome, trials), goes_on

    # For members to override.

    def _check(self, settings: dict[str, Any]) -> None:
        """Raise a ValueError if a setting is out of its range: when it is given, and again in every step."""
        check_settings(settings, self.control)

    def _check_room(self, params: Sequence[Tensor], state: S) -> None:
        """Raise a MemoryError, before the closure runs, if what a step must hold would not fit in memory."""

    @abstractmethod
    def _propose(self, model: QuadraticModel, state: S) -> Proposal[S]:
        """Return a proposal under the state's control."""

    def _try(self, objective: Objective, model: QuadraticModel, proposal: Proposal[S], state: S) -> tuple[Outcome, S]:
        """Try a proposal's steps; return the outcome and the updated state."""
        return backtracking(objective, model, proposal), state

    def _next_control(self, state: S, ratio: float, length: float) -> float:
        """Return the next control, from a trial's ratio and the step's length before learning rates.

        `_adapted` then hastens its decrease (`rules.hastened`) unless `_decisive_control` returns zero.
        """
        return state.control

    def _decisive_control(self, model: QuadraticModel, proposal: Proposal[S]) -> float:
        """Return roughly the control above which it, not the curvature, limits the step; zero: never hasten."""
        return 0.0

    def _length_along(self, slope: float, bend: float, control: float) -> float:
        """Return the step length along a unit vector with slope <= 0 and curvature `bend` < 0.

        As far as the size of the curvature (Royer, O'Neill & Wright 2020): the search doubles and halves that.
        """
        return -bend

    # Parts of the loop.

    def _propose_or_escape(self, model: QuadraticModel, curved: Evaluation, norm: float, state: S) -> Proposal[S]:
        """Return a proposal: along negative curvature at a critical point, without a step if none is to be taken."""
        loss, searches = model.loss, self._settings["curvature"] == "hessian"
        place = critical(model.gradient, norm, self._settings["tolerance_gradient"])
        # A tensor of rates has at least two distinct values, so it is not zero everywhere.
        if not isinstance(model.rates, Tensor) and model.rates == 0.0:
            return Proposal([], state, "the learning rate is zero")
        if place is not None and is_settled(state, loss, norm):
            before = ", and no negative curvature was found here before" if searches else ""
            return Proposal([], state, place + before)
        blocks = lambda: diagonal_blocks(curved, self._settings["curvature"])  # noqa: E731
        model = replace(model, curvature=self._curvature(curved), blocks=blocks, evaluation=curved)
        if place is not None or (searches and is_stalled(state, loss)):
            away = leave(model, state, place or STALLED, self._length_along)
            if away.steps:
                return away
            state = settled(state, loss, norm)
            if place is not None:
                return replace(away, state=state)
        return self._propose(model, state)

    def _curvature(self, evaluation: Evaluation) -> LinearOperator:
        return (gauss_newton if self._settings["curvature"] == "gauss_newton" else hessian)(evaluation)

    def _adapted(
        self, state: S, ratio: float, model: QuadraticModel | None = None, proposal: Proposal[S] | None = None
    ) -> S:
        """Return the state with the control updated for this ratio. `proposal` is None if no step was tried."""
        if self.control is None:
            return state
        agreements = run_of(state.agreements, ratio)
        new = self._next_control(state, ratio, 0.0 if proposal is None else proposal.length)
        if model is not None and proposal is not None and (decisive := self._decisive_control(model, proposal)):
            new = hastened(state.control, new, agreements, decisive, torch.finfo(model.gradient.dtype).eps)
        low, high = (self._settings[f"{bound}_{self.control}"] for bound in ("min", "max"))
        return replace(state, agreements=agreements, control=min(max(new, low), high))

    def _failed(self, loss: float, norm: float, what: str, state: S) -> tuple[S, StepReport, bool]:
        """Reject a step whose numbers are not finite: tighten the control, and raise after `_MAX_FAILURES` in a row."""
        state = replace(state, failures=state.failures + 1)
        report = StepReport(loss, norm, f"the {what} is not finite", loss, first_ratio=-math.inf)
        self.last_step = report = self._with_control(report, state)
        if state.failures >= _MAX_FAILURES:
            raise RuntimeError(
                f"The {what} was not finite in {state.failures} steps in a row; the parameters were left as they "
                "were. Check the data for NaN or infinite entries, the model's initialisation, operations such as log "
                "or sqrt at zero, and the scale of loss and parameters: their squares must not overflow."
            )
        return self._adapted(state, -math.inf), report, False

    def _with_control(self, report: StepReport, state: S) -> StepReport:
        used: dict[str, Any] = {} if self.control is None else {self.control: state.control}
        return replace(report, **used)

    def _warn_of_clipping(self, evaluation: Evaluation) -> None:
        if evaluation.clipped and not self._experience.warned_of_clipping:
            self._experience = replace(self._experience, warned_of_clipping=True)
            warn(_CLIPPING)

    def _check_replay(self, objective: Objective, evaluation: Evaluation) -> None:
        """See once that the closure computes the same again when it runs again."""
        experience = self._experience
        if not experience.known.replayed:
            objective.check_replay(evaluation)
            self._experience = replace(experience, known=replace(experience.known, replayed=True))
            if objective.unprotected:
                warn(_UNPROTECTED.format(", ".join(objective.unprotected)))

    def _learn(self, call: Call, curved: Evaluation) -> float | None:
        """Remember what was found out about the products; return how far finite differences look, if that was found.

        The length is part of the state, so that a resumed run forms the same differences.
        """
        experience = self._experience
        self._experience = replace(experience, known=replace(experience.known, verdicts=curved.verdicts))
        # A closure that has no second derivatives in this step will have none in the next.
        if curved.may_fall_back and curved.form == "finite_difference":
            self._experience = replace(self._experience, fell_back=True)
            call.fall_back()
        lengths = (verdict.manner.length for verdict in curved.verdicts.values())
        return next((length for length in lengths if length is not None), None)

    def _run_without_backward(self, closure: Callable[[], Any]) -> Any:
        """Run the closure alone: Lightning runs batches so, after averaging weights, for BatchNorm's statistics."""
        returned = closure()
        loss = float(returned) if isinstance(returned, Tensor) and returned.numel() == 1 else math.nan
        report = StepReport(loss, math.nan, "the closure left backward out, to move statistics only", loss)
        self.last_step = self._with_control(report, self._state)
        return returned

    # Groups.

    @property
    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def _settings(self) -> dict[str, Any]:
        """The settings that all groups share."""
        return self.param_groups[0]

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

    # The state, as torch keeps and saves it.

    @property
    def _state(self) -> S:
        key = home(self.state, self._params)
        control = math.inf if self.control is None else float(self._settings[self.control])
        return self.state_type(control) if key is None else read(self.state_type, self.state[key], self.control)

    def _remember(self, state: S) -> None:
        """Keep the state in `optimizer.state`."""
        params = self._params
        key = home(self.state, params)
        if key is None:
            key = next((p for p in params if p.requires_grad), params[0])
        write(state, self.state[key], self.control)

    def _only_a_state_is_wanted(self) -> bool:
        """Make a state to load into, with vectors of zeros, if a `step` without a closure asks for nothing else.

        `torch.distributed.checkpoint` takes such a step where an optimizer has no state: with gradients and learning
        rates of zero.
        """
        idle = all(float(group["lr"]) == 0.0 for group in self.param_groups)
        if self.state or not idle or any(p.grad is not None and bool((p.grad != 0).any()) for p in self._params):
            return False
        self._remember(replace(self._state, **empty_entries(self.state_type, self._settings, self._params)))
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the settings, as torch's optimizers give them.

        Vectors of sharded parameters are given in pieces, one DTensor for each parameter, so that
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
        number = next(number for number, p in enumerate(params) if p is key) if key is not None else None
        entries = dict(state.get(number, {}))
        write(self._state, entries, self.control)
        others = {name: value for name, value in state.items() if name != number}
        ours = packed(entries, self.state_type, self._settings, params)
        return {**state_dict, "state": {**others, **{n: {**others.get(n, {}), **mine} for n, mine in ours.items()}}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by `state_dict`, settings included, as torch's optimizers do.

        Raises:
            ValueError: The state is that of another kind of optimizer, or of another model.
        """
        entries: dict[str, Any] = {}

        def take(optimizer: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            check_kind(given, tuple(self.defaults), type(self).__name__)
            check_layout(given, self._params)
            ours, others = unpacked(given, self._params)
            entries.update(ours)
            return {**given, "state": others}

        def put(optimizer: torch.optim.Optimizer) -> None:
            if entries:
                self._remember(self._state)
                self.state[home(self.state, self._params)].update(entries)
                self._remember(followed(self._state, self._params))

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
        return {**super().__getstate__(), "last_step": self.last_step, "_experience": self._experience}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Torch's own, which is no setting of ours.
        self.defaults.pop("differentiable", None)


class Call:
    """The points that one call of `step` passes: at the first one the closure runs for real, later without a trace.

    All evaluations begin with the same random state, so that the same function is minimised throughout.

    Args:
        closure: Closure of the loss.
        curvature_closure: Closure of the curvature; None: the same.
        groups: The parameter groups.
        experience: Facts that earlier calls have learnt.
        length: How far finite differences look; None: not known yet.

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
        experience: Experience,
        length: float | None,
    ) -> None:
        trained = [(group, p) for group in groups for p in group["params"] if p.requires_grad and p.numel()]
        if not trained:
            raise RuntimeError(
                "Every parameter of this optimizer is frozen or empty: none requires a gradient. Unfreeze some by "
                "requires_grad_(), or take no step."
            )
        self.params = [p for _, p in trained]
        self.rates = _per_entry([float(rate_of(group)) for group, _ in trained], self.params)
        decay = _per_entry([float(group["weight_decay"]) for group, _ in trained], self.params)
        products: Products = "finite_difference" if experience.fell_back else groups[0]["products"]
        known = replace(experience.known, length=length)
        curved = closure if curvature_closure is None else curvature_closure
        self._curved = Objective(curved, self.params, decay, products, known=known)
        # By differences, which the loss alone never needs, no graph of it is kept.
        alone: Products = "finite_difference"
        self.objective = self._curved
        if curvature_closure is not None:
            self.objective = Objective(closure, self.params, decay, alone, known=Known(replayed=known.replayed))
        self._start = self.objective.point
        self._began = False
        self._gradient: Tensor | None = None
        self._returned: Any = None

    def evaluate(self) -> tuple[Evaluation, Evaluation]:
        """Return the evaluation of the loss at the present point, and the one whose products are the curvature's."""
        if self._curved is self.objective:
            evaluation = self._evaluated()
            return evaluation, evaluation
        # The curvature first, so that an error finds everything as it was.
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
        return evaluation, again

    def _evaluated(self) -> Evaluation:
        if self._gradient is not None:
            return self.objective.evaluate()
        self._began = True
        evaluation = self.objective.record()
        self._gradient = evaluation.data_gradient
        self._returned = evaluation.loss if evaluation.returned is None else evaluation.returned
        return evaluation

    def _curvature(self) -> Evaluation | None:
        """Return the curvature's evaluation, or None if its closure moves the parameters."""
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
        """Leave the first point's gradient in `.grad`; return what the closure returned there, or the loss."""
        self.objective.settle()
        if self._gradient is not None:
            _put_gradients(self.params, self._gradient)
        return self._returned


def _per_entry(values: Sequence[float], params: Sequence[Tensor]) -> float | Tensor:
    """Return the common value, or a vector `(n,)` with each parameter's own."""
    if len(set(values)) == 1:
        return values[0]
    return flatten([torch.full_like(local_part(p), v) for v, p in zip(values, params, strict=True)], params)


def _put_gradients(params: Sequence[Tensor], gradient: Tensor) -> None:
    """Leave the recorded gradient in `.grad`, unclipped; a parameter that the loss does not use keeps None."""
    for p, piece in zip(params, unflatten(gradient, params), strict=True):
        if p.grad is not None:
            p.grad.copy_(piece)
        elif bool(piece.any()):
            p.grad = piece.clone()


def unrounded(vector: Tensor) -> torch.autocast:
    """Return a context without autocast, which would round the solver's vectors."""
    return torch.autocast(vector.device.type, enabled=False)


def not_finite(loss: float, norm: float, evaluation: Evaluation, curved: Evaluation) -> str | None:
    """Return the name of the number that is not finite, or None if all are."""
    if not math.isfinite(loss):
        return "loss"
    if not math.isfinite(norm):
        finite = math.isfinite(float(evaluation.gradient.abs().max()))
        return "gradient's norm (each entry is: divide the loss by a constant)" if finite else "gradient"
    return None if curved is evaluation or math.isfinite(float(curved.loss)) else "curvature_closure's loss"
