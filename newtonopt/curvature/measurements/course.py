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
# A run has lost what it had gained where it had gained this share of its first loss, and has lost this share of that.
_GAINED, _LOST = 0.2, 0.6
# Shares of the first loss by which a median above it is called raised, and a spike.
_RAISED, _SPIKED = 0.1, 0.5
# A single loss has jumped where it is this share of the first one above that and the present one, and by this many
# usual changes.
_JUMPED, _FAR = 1.0, 20.0
# A loss has not fallen where after so many steps it is not below the first one; not by the first share of that where it
# has been raised meanwhile. Where it has not, noise must be below the second share.
_STEPS, _FALLEN, _QUIET = 50, 0.1, 0.1

# A run has recovered from a high ratio where its loss has fallen by this share below its lowest then.
_RECOVERED = 0.1

Trouble = Literal["lost", "spiked", "risen", "stuck", "jumped"]


@dataclass(frozen=True)
class Course:
    """The training loss of a run, as every step has reported it, and the highest stability ratio measured so far.

    All but a jump is told from medians over five and thirty steps: noise with heavy tails, and a spike of one or two
    steps, move no median.

    Attributes:
        recent: The last thirty losses; fewer at the start.
        steps: How many finite losses there were.
        first: The very first, or the median of the first five where that is lower: a spike may come at once.
        lowest: Lowest median of five so far.
        highest: Highest single loss since the last measurement; infinite if one was not finite.
        ago: Steps from there to the measurement.
        peak: Highest median of five since the last measurement; infinite if a loss was not finite.
        summit: Highest median of five so far.
        calm: The lowest median of the changes from step to step so far: the usual change where there is only noise.
        ratio: Highest stability ratio measured.
        at: Step at which it was measured; None if that is not known.
        then_lowest: Lowest median of the losses at that time, or the first loss.

    Example:
        >>> from newtonopt.curvature.measurements.course import Course
        >>> Course().then([2.3] * 8 + [1.0] * 20 + [40.0] + [2.3] * 40).trouble
        'lost'
        >>> Course().then([2.3] * 8 + [1.0] * 20).trouble is None
        True
    """

    recent: tuple[float, ...] = ()
    steps: int = 0
    first: float = 0.0
    lowest: float = math.inf
    highest: float = -math.inf
    ago: int = 0
    peak: float = -math.inf
    summit: float = -math.inf
    calm: float = 0.0
    ratio: float = -math.inf
    at: int | None = None
    then_lowest: float = math.inf

    @property
    def now(self) -> float:
        """The loss now: the lower one of the two medians, as the long one remembers a spike for fifteen steps."""
        return min(median(self.recent), median(self.recent[-_SHORT:])) if self.recent else math.nan

    @property
    def trouble(self) -> Trouble | None:
        """The way in which training has gone wrong, for all that its losses show; None where it has not.

        "lost": most of what the loss had fallen is lost. "risen": the loss is above the first one. "spiked": it was far
        above that since the last measurement. "stuck": it has not fallen since the start. "jumped": it was far above
        the first one for a step or two, as after a bad batch.
        """
        size, gain = abs(self.first), self.first - self.lowest
        if gain >= max(_GAINED * size, _NOISE * self.calm) and self.now - self.lowest >= _LOST * gain > 0.0:
            return "lost"
        if self.steps >= _SHORT and self._is_above(self.now, _RAISED):
            return "risen"
        if self._is_above(self.peak, _SPIKED):
            return "spiked"
        fallen = _FALLEN if self.raised else 0.0
        told = self.steps >= _STEPS and size > 0.0 and (self.raised or self.calm <= _QUIET * size)
        if told and self.now >= self.first - fallen * size:
            return "stuck"
        jump = self.highest - max(self.first, self.now)
        return "jumped" if jump >= max(_JUMPED * size, _FAR * self.calm) and jump > 0.0 else None

    @property
    def raised(self) -> bool:
        """Whether the loss has been above the first one since the start, by more than noise."""
        return self._is_above(self.summit, _RAISED)

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
        recovered = self.now < self.then_lowest - _RECOVERED * abs(self.then_lowest)
        return self.ratio > EDGE[1] and not recovered

    def _is_above(self, loss: float, share: float) -> bool:
        """Return whether a median of losses is above the first loss by this share of it, and by more than noise."""
        return loss - self.first >= max(share * abs(self.first), _NOISE * self.calm) and loss > self.first

    def then(self, losses: Iterable[float]) -> Course:
        """Return the course with the losses of the steps since the last measurement."""
        course = replace(self, highest=-math.inf, ago=0, peak=-math.inf)
        for loss in losses:
            course = course._with(loss) if math.isfinite(loss) else replace(course, highest=math.inf, peak=math.inf)
        return course

    def _with(self, loss: float) -> Course:
        """Return the course with one loss more."""
        recent, steps = (*self.recent, loss)[-_LONG:], self.steps + 1
        is_highest = loss > self.highest
        course = replace(
            self,
            recent=recent,
            steps=steps,
            highest=loss if is_highest else self.highest,
            ago=0 if is_highest else self.ago + 1,
        )
        if steps <= _SHORT:
            course = replace(course, first=min(recent[0], median(recent)))
        if steps < _SHORT:
            return course
        short, change = median(recent[-_SHORT:]), median(abs(b - a) for a, b in pairwise(recent))
        return replace(
            course,
            lowest=min(self.lowest, short),
            peak=max(self.peak, short),
            summit=max(self.summit, short),
            calm=change if steps <= _LONG else min(self.calm, change),
        )

    def with_ratio(self, ratio: float | None, step: int | None = None) -> Course:
        """Return the course with the stability ratio measured at a step; None: not measured."""
        if ratio is None or ratio <= self.ratio:
            return self
        lowest = min(self.lowest, self.first) if self.steps else math.inf
        return replace(self, ratio=ratio, at=step, then_lowest=lowest)

    def verdict(self) -> str:
        """Return the trouble with its figures, for the first line of the text; empty: none."""
        first, lowest, now = (written(loss, 2) for loss in (self.first, self.lowest, self.now))
        high = written(self.highest, 2) if math.isfinite(self.highest) else "infinity or NaN"
        if self.trouble == "lost":
            return f"training has failed on the way: the loss fell from {first} to {lowest} and is back at {now}"
        if self.trouble == "spiked":
            start = f"; at the start it was {first}" if self.steps else ""
            return f"the loss has spiked to {high} since the last measurement{start}"
        if self.trouble == "risen":
            return f"the loss has risen from {first} to {now} since the start"
        if self.trouble == "stuck":
            return f"the loss has hardly fallen: {first} at the start, {now} now"
        return f"the loss jumped to {high} for a step or two, and is {now} now" if self.trouble == "jumped" else ""

    def advice(self) -> str:
        """Return what to do about the trouble; empty: nothing."""
        again = "start again with a learning rate 3 to 10 times lower, or warm up"
        when = "measure with every_n_train_steps=2, at_start=True to see when it happens"
        if self.trouble == "lost":
            return f"A small ratio says nothing about a run that has failed: {again}, and {when}."
        if self.trouble == "spiked":
            return f"A small ratio after a spike says little. If the loss does not fall again, {again}, and {when}."
        if self.trouble == "risen":
            return (
                "So far training has not lowered the loss. Where it does not fall soon, lower the learning rate, "
                "whatever the curvature says."
            )
        if self.trouble == "stuck" and self.raised:
            return f"The loss has been higher meanwhile, so that a small ratio says nothing: {again}, and {when}."
        if self.trouble == "stuck":
            return "A small ratio does not tell why: compare short runs at a tenth and at ten times the learning rate."
        if self.trouble == "jumped":
            when = f" {self.ago} steps before this measurement" if self.ago else ""
            return f"Where the ratio is small, that is a bad batch and not the curvature: look at the samples{when}."
        return ""

    def earlier(self, ratio: float | None) -> str:
        """Return the highest stability ratio so far, where it was beyond the edge and higher than this one."""
        if self.ratio <= EDGE[1] or (ratio is not None and self.ratio <= ratio):
            return ""
        return f"highest {written(self.ratio, 2)}{'' if self.at is None else f' at step {self.at}'}"
