"""The one loop of every Newton optimizer: evaluate, propose, try, judge, commit."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from newtonopt._checks import check_closure, check_products, warn
from newtonopt._flat import check_parameters, flatten, unflatten
from newtonopt._shards import is_sharded
from newtonopt.evaluation import Evaluation, Products
from newtonopt.linear_operator import LinearOperator
from newtonopt.objective import Objective
from newtonopt.operators import gauss_newton, hessian
from newtonopt.optimizers.checkpoints import completed, joined, spread
from newtonopt.optimizers.escape import leave
from newtonopt.optimizers.rates import is_everywhere, per_entry
from newtonopt.optimizers.report import StepReport
from newtonopt.optimizers.settings import PER_GROUP, check_settings
from newtonopt.optimizers.trials import Outcome, Proposal, search

_MAX_FAILURES = 5
_CLIPPING = (
    "The closure clips gradients. newtonopt takes the gradient of the loss itself: clipping has no effect on its "
    "step, which is bounded by other means. Remove gradient_clip_val (or clip_grad_norm_) to silence this."
)


class NewtonOptimizer(torch.optim.Optimizer, ABC):
    """Base of the family. A subclass says how it proposes a step and names its one parameter of control and the rule
    for it; all else, from closure to report, is here.
    """

    control: ClassVar[str | None]
    """What bounds the steps and adapts to their success: "damping", "radius" or "sigma"; None for a line search."""

    def __init__(self, params: ParamsT, settings: dict[str, Any]) -> None:
        check_products(settings["products"])
        check_settings(settings, self.control)
        super().__init__(params, settings)
        self.last_step: StepReport | None = None
        self._warned_of_clipping = False
        self._fell_back = False
        if is_sharded(self._params):
            # Without a state, torch.distributed.checkpoint takes a step to get one.
            _ = self._memory

    @abstractmethod
    def _propose(self, evaluation: Evaluation, rates: float | Tensor) -> Proposal:
        """A proposal from the live evaluation; `rates` is the learning rate, one number or one for each entry."""

    def _next_control(self, control: float, ratio: float, length: float) -> float:
        """The rule: the next control, from a trial's ratio and the length of its step before learning rates."""
        return control

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
            ValueError: Another setting differs, or the parameters cannot share one flat vector with the others.
        """
        shared = self.param_groups[0] if self.param_groups else self.defaults
        for name in self.defaults:
            if name not in PER_GROUP and param_group.get(name, shared[name]) != shared[name]:
                raise ValueError(
                    f"{name}={param_group[name]!r} in a parameter group: the step couples all groups, so {name} is one "
                    f"setting for the whole optimizer (here {shared[name]!r}). Only lr and weight_decay may differ "
                    "between groups."
                )
        own = {name: param_group[name] for name in PER_GROUP if name in param_group}
        check_settings({**self.defaults, **own}, self.control)
        super().add_param_group(
            {**{name: shared[name] for name in self.defaults if name not in PER_GROUP}, **param_group}
        )
        try:
            check_parameters(self._params)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Clears the gradients, computes the loss, calls `backward` and returns the loss, as for
                `torch.optim.LBFGS`.

        Returns:
            What the closure returned at the starting point, detached; the loss if it returned nothing.

        Raises:
            TypeError: `closure` cannot be called.
            RuntimeError: No closure, a closure without a loss or with one of other parameters, gradients accumulated
                across closures, every parameter frozen, or a loss, gradient or curvature that
                was not finite in five steps running.
        """
        if closure is None:
            raise RuntimeError(
                f"{type(self).__name__}.step() needs a closure that computes the loss and calls backward: "
                'optimizer.step(closure). Lightning gives one, except with precision="16-mixed", whose gradient '
                'scaler calls step() without it: use precision="bf16-mixed" or "32-true".'
            )
        check_closure(closure)
        if _skips_backward(closure):
            return self._run_without_backward(closure)
        trained = [(group, p) for group in self.param_groups for p in group["params"] if p.requires_grad and p.numel()]
        if not trained:
            raise RuntimeError("Every parameter of this optimizer is frozen or empty: none requires a gradient.")
        params, before = [p for _, p in trained], dict(self._memory)
        self._forget_if_changed(params)
        decay = per_entry([float(group["weight_decay"]) for group, _ in trained], params)
        rates = per_entry([float(group["lr"]) for group, _ in trained], params)
        products: Products = "finite_difference" if self._fell_back else self.param_groups[0]["products"]
        objective = Objective(closure, params, decay, products)
        try:
            evaluation = objective.record()
            if evaluation.clipped and not self._warned_of_clipping:
                self._warned_of_clipping = True
                warn(_CLIPPING)
            self._take_step(objective, evaluation, rates)
        except BaseException:
            # An error leaves all as it was; the state's vectors are never changed in place.
            objective.rewind()
            self._memory.clear()
            self._memory.update(before)
            raise
        _put_gradients(params, evaluation.data_gradient)
        return evaluation.loss if evaluation.returned is None else evaluation.returned

    def _run_without_backward(self, closure: Callable[[], Any]) -> Any:
        """Lightning runs batches so, after averaging weights, for the statistics of BatchNorm."""
        returned = closure()
        loss = float(returned) if isinstance(returned, Tensor) and returned.numel() == 1 else math.nan
        self._report(loss, math.nan, reason="the closure left backward out, to move statistics only")
        return returned

    def _take_step(self, objective: Objective, evaluation: Evaluation, rates: float | Tensor) -> None:
        memory = self._memory
        memory["steps"] += 1
        loss, norm = float(evaluation.loss), float(evaluation.gradient.norm())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            evaluation.free()
            return self._fail(loss, norm, "gradient" if math.isfinite(loss) else "loss")
        place = self._critical(evaluation.gradient, norm)
        known = place and (loss, norm) == (memory.get("settled_loss"), memory.get("settled_norm"))
        if known or is_everywhere(rates, 0.0):
            evaluation.free()
            settled = f"{place}, and no negative curvature was found here before"
            return self._report(loss, norm, reason=settled if known else "the learning rate is zero")
        try:
            # A step taken inside autocast would have it round the solver's vectors.
            with torch.autocast(evaluation.gradient.device.type, enabled=False):
                proposal = self._leave(evaluation, rates, place) if place else self._propose(evaluation, rates)
        except FloatingPointError:
            return self._fail(loss, norm, "curvature")
        finally:
            # The graph goes before any trial, so that no two are alive at once.
            evaluation.free()
        memory["failures"] = 0
        # What has no second derivative now has none in the next step.
        self._fell_back = self._fell_back or (evaluation.may_fall_back and evaluation.form == "finite_difference")
        spent = {"iterations": proposal.iterations, "products": proposal.products, "form": evaluation.form}
        if not proposal.steps:
            memory.update(settled_loss=loss, settled_norm=norm)
            return self._report(loss, norm, reason=proposal.reason, **spent)
        if float(proposal.steps[0].abs().max()) <= self.param_groups[0]["tolerance_step"]:
            reason = f"no entry of the step is above tolerance_step; {proposal.reason}"
            return self._report(loss, norm, predicted_decrease=proposal.decreases[0], reason=reason, **spent)
        if memory["steps"] == 1:
            objective.check_replay(evaluation)
        self._try(objective, evaluation, proposal, loss, norm, spent)

    def _try(
        self,
        objective: Objective,
        evaluation: Evaluation,
        proposal: Proposal,
        loss: float,
        norm: float,
        spent: dict[str, Any],
    ) -> None:
        """Try a proposal, and shorter ones while that is rejected and there are any; move, report, adapt."""
        trials, turns = 0, self.param_groups[0].get("max_trials", 1)
        while True:
            outcome = self._judge(objective, evaluation.gradient, proposal, loss, evaluation.eps)
            trials += outcome.trials
            used = self._controls
            self._adapt(outcome.ratio, proposal.length)
            turns -= 1
            if outcome.accepted or turns == 0 or proposal.shrink is None or self.control is None:
                break
            proposal = proposal.shrink(self._memory[self.control])
        if outcome.accepted:
            objective.move(outcome.step)
        self._report(
            loss,
            norm,
            trial_loss=outcome.loss,
            predicted_decrease=outcome.predicted,
            ratio=outcome.ratio,
            trials=trials,
            step_norm=float(outcome.step.norm()) if outcome.accepted else 0.0,
            accepted=outcome.accepted,
            reason=proposal.reason if outcome.accepted else f"rejected, no trial decreased the loss; {proposal.reason}",
            **spent,
            **used,
        )

    def _critical(self, gradient: Tensor, norm: float) -> str:
        """In words, why the gradient counts as zero; empty if it does not."""
        # Where the square underflows, no solver can tell the gradient from zero.
        if norm <= torch.finfo(gradient.dtype).tiny ** 0.5:
            return "the gradient is zero"
        if float(gradient.abs().max()) <= self.param_groups[0]["tolerance_gradient"]:
            return "no entry of the gradient is above tolerance_gradient"
        return ""

    def _leave(self, evaluation: Evaluation, rates: float | Tensor, place: str) -> Proposal:
        return leave(self._curvature(evaluation), evaluation.gradient, rates, place, self._length_along)

    def _curvature(self, evaluation: Evaluation) -> LinearOperator:
        return (gauss_newton if self.param_groups[0]["curvature"] == "gauss_newton" else hessian)(evaluation)

    @property
    def _controls(self) -> dict[str, float]:
        return {} if self.control is None else {self.control: self._memory[self.control]}

    def _adapt(self, ratio: float, length: float = 0.0) -> None:
        if self.control is not None:
            self._memory[self.control] = self._next_control(self._memory[self.control], ratio, length)

    def _fail(self, loss: float, norm: float, what: str) -> None:
        """A loss, gradient or curvature not finite moves nothing; it tightens the control, and soon an error."""
        memory = self._memory
        memory["failures"] += 1
        self._report(loss, norm, ratio=-math.inf, reason=f"the {what} is not finite")
        self._adapt(-math.inf)
        if memory["failures"] >= _MAX_FAILURES:
            raise RuntimeError(
                f"The {what} was not finite in {memory['failures']} steps in a row; the parameters were left as they "
                "were. Check the data for NaN or infinite entries, the model's initialisation, and operations such as "
                "log or sqrt at zero."
            )

    def _report(self, loss: float, gradient_norm: float, reason: str, **values: Any) -> None:
        fields = {"trial_loss": loss, **self._controls, **values}
        self.last_step = StepReport(loss=loss, gradient_norm=gradient_norm, reason=reason, **fields)

    @property
    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def _memory(self) -> dict[str, Any]:
        """The state, kept under the first parameter as torch's LBFGS keeps its own."""
        memory: dict[str, Any] = self.state[self.param_groups[0]["params"][0]]
        if not memory:
            memory.update(steps=0, failures=0, settled_loss=math.inf, settled_norm=math.inf)
            if self.control is not None:
                memory[self.control] = float(self.param_groups[0][self.control])
        return memory

    def _forget_if_changed(self, params: Sequence[Tensor]) -> None:
        """Drop vectors from earlier steps when other parameters are frozen now than then."""
        trained = {id(p) for p in params}
        layout = [p.numel() if id(p) in trained else 0 for p in self._params]
        memory = self._memory
        if memory.get("layout", layout) != layout:
            for name in [name for name, value in memory.items() if isinstance(value, Tensor)]:
                del memory[name]
            memory.update(settled_loss=math.inf, settled_norm=math.inf)
        memory["layout"] = layout

    def _blank(self, like: Tensor) -> dict[str, Any]:
        """What the state may hold besides, with vectors of zeros made from the flat vector `like`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The state and the settings, as torch's optimizers give them.

        Of sharded parameters vectors are given in pieces, one DTensor for each parameter, so that
        `torch.distributed.checkpoint` can save them and load them on any number of processes. All that the state may
        hold is there then, zeros for what is not known yet, and a new optimizer's can be loaded into.
        """
        state_dict: dict[str, Any] = super().state_dict()
        params = self._params
        if is_sharded(params):
            layout = self._memory.get("layout", [p.numel() if p.requires_grad else 0 for p in params])
            trained = [number for number, size in enumerate(layout) if size]
            with torch.no_grad():
                like = [params[number] for number in trained]
                memory = {"layout": layout, **self._blank(flatten([None] * len(like), like)), **self._memory}
                state_dict["state"] = spread(memory, params, trained)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by `state_dict`, settings included, as torch's optimizers do.

        Raises:
            ValueError: The state is that of another kind of optimizer.
        """
        super().load_state_dict(joined(completed(state_dict, self.defaults, type(self).__name__), self._params))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("last_step", None)
        self.__dict__.setdefault("_warned_of_clipping", False)
        self.__dict__.setdefault("_fell_back", False)


def _skips_backward(closure: Callable[[], Any]) -> bool:
    """Whether this is Lightning's closure without a `backward`."""
    hosts = (closure.func, *closure.args) if isinstance(closure, functools.partial) else (closure,)
    return any(
        type(host).__module__.partition(".")[0] in ("lightning", "pytorch_lightning")
        and getattr(host, "_backward_fn", host) is None
        for host in hosts
    )


def _put_gradients(params: Sequence[Tensor], gradient: Tensor) -> None:
    """Leave the recorded gradient in `.grad`, unclipped; a parameter that the loss does not use keeps None."""
    for p, piece in zip(params, unflatten(gradient, params), strict=True):
        if p.grad is not None:
            p.grad.copy_(piece)
        elif bool(piece.any()):
            p.grad = piece.clone()
