"""How a run has gone between measurements: its training loss at every step, and its highest stability ratio."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Literal

from newtonopt.curvature.showing import written

# Ratios between which training is called at the edge of stability: full-batch gradient descent and Adam hover within
# 6 % of it (Cohen et al. 2021, 2022), and small networks up to 22 % above it while their loss falls
# (docs/draw_curvature_runs.py).
EDGE = (0.9, 1.25)

# Steps over which medians are taken: five, so that two bad batches do not count, and thirty for where the loss is now
# and for how it changes from step to step. Simulated losses with heavy tails choose both, and the factor below.
_SHORT, _LONG = 5, 30
# Usual changes from step to step, by which a median must move to have moved by more than noise.
_NOISE = 8.0
# A loss has fallen where it has gained this share of its first value, and is back where it has lost this share of what
# it had gained. A spike takes it back whole; before anything is gained, a spike is this share of the first loss.
_GAINED, _LOST, _SPIKED = 0.05, 0.6, 0.5
# Share of the first loss by which a median above it is called raised.
_RAISED = 0.1
# A single loss has jumped where it is this share of the first one above the median of the five before it, and this many
# usual changes. Where more than so many losses do, and more than this share of them, that is how the batches are.
_JUMPED, _FAR, _FEW, _RARE = 1.0, 20.0, 3, 0.02
# A loss has not fallen where after so many steps it is not below the first one; not by the first share of that where it
# has been raised meanwhile. Where it has not, noise must be below the second share.
_STEPS, _FALLEN, _QUIET = 50, 0.1, 0.1

Trouble = Literal["lost", "spiked", "risen", "stuck", "jumped"]


@dataclass(frozen=True)
class Course:
    """The training loss of a run, as every step has reported it, and the highest stability ratio measured so far.

    All but a jump is told from medians over five and thirty steps: noise with heavy tails, and a spike of one or two
    steps, move no median. It tells what the loss did. Whether that is wrong depends on the objective, which adversarial
    and reinforcement learning, curricula and growing penalties change on purpose.

    Attributes:
        from_start: Whether the first loss is that of the first step of training.
        recent: The last thirty losses; fewer at the start.
        steps: How many finite losses there were.
        head: The very first loss.
        start: Median of the first five.
        lowest: Lowest value so far of the larger one of the two medians.
        peak: Highest median of five since the last measurement.
        rise: Highest rise of a median of five above the lowest before it, since the last measurement.
        summit: Highest median of five so far.
        highest: The single loss that rose highest above the median of the five before it, since the last measurement;
            infinite if one was not finite.
        jump: That rise.
        jumps: How many losses have jumped so far.
        ago: Steps from there to the measurement.
        calm: The lowest median of the changes from step to step so far: the usual change where there is only noise.
        ratio: Highest stability ratio measured.
        at: Step at which it was measured; None if that is not known.
        then_lowest: The lowest the loss had been by then, by these medians; infinite where none was known.

    Example:
        >>> from newtonopt.curvature.measurements.course import Course
        >>> Course().then([2.3] * 8 + [1.0] * 20 + [40.0] + [2.3] * 40).trouble
        'lost'
        >>> Course().then([2.3] * 8 + [1.0] * 20).trouble is None
        True
    """

    from_start: bool = True
    recent: tuple[float, ...] = ()
    steps: int = 0
    head: float = 0.0
    start: float = 0.0
    lowest: float = math.inf
    peak: float = -math.inf
    rise: float = 0.0
    summit: float = -math.inf
    highest: float = -math.inf
    jump: float = 0.0
    jumps: int = 0
    ago: int = 0
    calm: float = 0.0
    ratio: float = -math.inf
    at: int | None = None
    then_lowest: float = math.inf

    @property
    def first(self) -> float:
        """The loss at the start: of the very first step where that is lower by more than noise, as a spike may come at
        once, else the median of the first five.
        """
        return self.head if self.start - self.head > _NOISE * self.calm else self.start

    @property
    def now(self) -> float:
        """The loss now: the lower one of the two medians, as the long one remembers a spike for fifteen steps."""
        return min(median(self.recent), median(self.recent[-_SHORT:])) if self.recent else math.nan

    @property
    def trouble(self) -> Trouble | None:
        """The way in which the loss behaves as it rarely does where training goes well; None: in no such way.

        "lost": most of what it had fallen is lost. "risen": it is above the first one. "spiked": it was as far up since
        the last measurement, and is not any more. "stuck": it has not fallen since the start. "jumped": a single loss
        was far above the ones before it, as for a bad batch.
        """
        first, size, noise = self.first, abs(self.first), _NOISE * self.calm
        gain = first - self.lowest
        has_gained = gain >= max(_GAINED * size, noise) and gain > 0.0
        if has_gained and self.now - self.lowest >= _LOST * gain:
            return "lost"
        if self.from_start and not has_gained and self.steps >= _SHORT and self._is_raised(self.now):
            return "risen"
        rise, least = (self.rise, gain) if has_gained else (self.peak - first, _SPIKED * size)
        if rise >= max(least, noise) and rise > 0.0:
            return "spiked"
        fallen = _FALLEN if self.raised else 0.0
        told = self.from_start and self.steps >= _STEPS and size > 0.0 and (self.raised or self.calm <= _QUIET * size)
        if told and self.now >= first - fallen * size:
            return "stuck"
        return "jumped" if self._is_jump(self.jump) and self.jumps <= max(_FEW, _RARE * self.steps) else None

    @property
    def raised(self) -> bool:
        """Whether the loss has been above the first one since the start, by more than noise."""
        return self._is_raised(self.summit)

    @property
    def overshoots(self) -> bool:
        """Whether the losses or the highest ratio suggest that steps are too long.

        A loss that stands still without ever having been higher, as at a saddle, and a bad batch do not.
        """
        trouble = self.trouble
        return trouble in ("lost", "spiked", "risen") or (trouble == "stuck" and self.raised) or self.was_unstable

    @property
    def was_unstable(self) -> bool:
        """Whether the ratio has been beyond the edge of stability, and the loss has not fallen since: the network may
        be dead, and a small ratio now says nothing.
        """
        return self.ratio > EDGE[1] and not self.now < min(self.then_lowest, self.first)

    def _is_raised(self, loss: float) -> bool:
        """Return whether a median of losses is above the first loss, by more than noise."""
        rise = loss - self.first
        return rise >= max(_RAISED * abs(self.first), _NOISE * self.calm) and rise > 0.0

    def _is_jump(self, rise: float) -> bool:
        """Return whether a loss that is so far above the ones before it has jumped."""
        return rise >= max(_JUMPED * abs(self.first), _FAR * self.calm) and rise > 0.0

    def then(self, losses: Iterable[float]) -> Course:
        """Return the course with the losses of the steps since the last measurement."""
        return self.after_measuring().also(losses)

    def after_measuring(self) -> Course:
        """Return the course without what has happened since the last measurement but one."""
        return replace(self, peak=-math.inf, rise=0.0, highest=-math.inf, jump=0.0, ago=0)

    def also(self, losses: Iterable[float]) -> Course:
        """Return the course with further losses since the last measurement."""
        course = self
        for loss in losses:
            course = course._with(loss)
        return course

    def _with(self, loss: float) -> Course:
        """Return the course with one loss more."""
        before = self.recent[-_SHORT:]
        jump = (loss - median(before) if len(before) == _SHORT else 0.0) if math.isfinite(loss) else math.inf
        jumped = {"highest": loss if math.isfinite(loss) else math.inf, "jump": jump, "ago": 0}
        course = replace(self, **(jumped if jump > self.jump else {"ago": self.ago + 1}))
        course = replace(course, jumps=self.jumps + self._is_jump(jump))
        if not math.isfinite(loss):
            return course
        recent, steps = (*self.recent, loss)[-_LONG:], self.steps + 1
        course = replace(course, recent=recent, steps=steps, head=loss if steps == 1 else self.head)
        if steps <= _SHORT:
            course = replace(course, start=median(recent))
        if steps < _SHORT:
            return course
        short, change = median(recent[-_SHORT:]), median(abs(b - a) for a, b in pairwise(recent))
        return replace(
            course,
            lowest=min(self.lowest, max(short, median(recent))),
            peak=max(self.peak, short),
            rise=max(self.rise, short - min(self.lowest, short)),
            summit=max(self.summit, short),
            calm=change if steps <= _LONG else min(self.calm, change),
        )

    def with_ratio(self, ratio: float | None, step: int | None = None) -> Course:
        """Return the course with the stability ratio measured at a step; None: not measured."""
        if ratio is None or ratio <= self.ratio:
            return self
        lowest = min(self.lowest, self.first, self.now) if self.steps else math.inf
        return replace(self, ratio=ratio, at=step, then_lowest=lowest)

    def verdict(self) -> str:
        """Return what the loss did with its figures, for the first line of the text; empty: nothing."""
        first, lowest, now = (written(loss, 2) for loss in (self.first, self.lowest, self.now))
        start = f"; it was {first} at the start, and is {now} now" if self.from_start else f"; it is {now} now"
        if self.trouble == "lost":
            return f"the loss fell from {first} to {lowest}, and is back at {now}"
        if self.trouble == "risen":
            return f"the loss has risen from {first} to {now} since the start"
        if self.trouble == "spiked":
            high = written(max(self.peak, self.highest if math.isfinite(self.highest) else self.peak), 2)
            return f"the loss has spiked to {high} since the last measurement{start}"
        if self.trouble == "stuck":
            return f"the loss has hardly fallen: {first} at the start, {now} now"
        if self.trouble == "jumped":
            high = f"jumped to {written(self.highest, 2)}" if math.isfinite(self.highest) else "was infinity or NaN"
            return f"the loss {high} for a step or two, and is {now} now"
        return ""

    def advice(self) -> str:
        """Return what to do where that is wrong; empty: nothing."""
        again = "start again with a learning rate 3 to 10 times lower, or warm up"
        when = "measure with every_n_train_steps=2, at_start=True to see when it happens"
        if self.trouble == "lost":
            return (
                "If the objective has not changed on purpose, as adversarial and reinforcement learning, curricula and "
                f"growing penalties change it, training has failed and a small ratio says nothing: {again}, and {when}."
                " Else look at what counts, such as the reward; Probe(follow_loss=False) leaves this out."
            )
        if self.trouble == "spiked":
            return f"A small ratio after a spike says little. If the loss does not fall again, {again}, and {when}."
        if self.trouble == "risen":
            return (
                "So far training has not lowered the loss. Where it does not fall soon, lower the learning rate, "
                "whatever the curvature says."
            )
        if self.trouble == "stuck" and self.raised:
            return (
                "The loss has been higher meanwhile, so that a small ratio says nothing: if it should have fallen, "
                f"{again}, and {when}."
            )
        if self.trouble == "stuck":
            return "If it should have fallen, compare short runs at a tenth and at ten times the learning rate."
        if self.trouble == "jumped":
            step = f" {self.ago} steps before this measurement" if self.ago else ""
            return f"Where the ratio is small, that is a bad batch and not the curvature: look at the samples{step}."
        return ""

    def earlier(self, ratio: float | None) -> str:
        """Return the highest stability ratio so far, where it was beyond the edge and higher than this one."""
        if self.ratio <= EDGE[1] or (ratio is not None and self.ratio <= ratio):
            return ""
        return f"highest {written(self.ratio, 2)}{'' if self.at is None else f' at step {self.at}'}"
