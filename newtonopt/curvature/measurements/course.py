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

# Losses whose median is called the first one, or the very first where that is lower: a spike may come at once. Weights
# of a step in three running means: of the loss, over about four steps for its highest and lowest and over about twenty
# for where it is now, and of its change from step to step.
_HEAD, _QUICK, _NOW, _SLOW = 5, 0.25, 0.1, 0.05
# A change counts as this many times the usual one at most, and at least as this share of the loss, so that a spike does
# not pass for noise.
_USUAL, _SMALL = 4.0, 0.01
# Usual changes by which a running mean must move to have moved by more than noise.
_NOISE = 8.0
# A run has lost what it had gained where it had gained this share of its first loss, and has lost this share of that.
_GAINED, _LOST = 0.2, 0.6
# Shares of the first loss by which a running mean above it is called raised, and a spike.
_RAISED, _SPIKED = 0.1, 0.5
# A loss has not fallen where after so many steps it is not below the first one; not by the first share of that where it
# has been raised meanwhile. Where it has not, noise must be below the second share.
_STEPS, _FALLEN, _QUIET = 50, 0.1, 0.1

Trouble = Literal["lost", "spiked", "stuck"]


@dataclass(frozen=True)
class Course:
    """The training loss of a run, as every step has reported it, and the highest stability ratio measured so far.

    Attributes:
        head: The losses of the first five steps; fewer at the start.
        steps: How many finite losses there were.
        first: The very first, or the median of the first five where that is lower.
        lowest: Lowest running mean over about four steps.
        quick: That running mean now.
        now: The running mean over about twenty steps now.
        highest: Highest single loss since the last measurement; infinite if one was not finite.
        spiked: Whether the running mean over four steps has been far above the first loss since the last measurement.
        raised: Whether it has been above the first loss by more than noise since the start.
        noise: Usual change of the loss from step to step.
        calm: The lowest such change so far, after which the loss must move to have moved by more than noise.
        ratio: Highest stability ratio measured.
        at: Step at which it was measured.

    Example:
        >>> from newtonopt.curvature.measurements.course import Course
        >>> Course().then([2.3] * 8 + [1.0] * 20 + [40.0] + [2.3] * 40).trouble
        'lost'
        >>> Course().then([2.3] * 8 + [1.0] * 20).trouble is None
        True
    """

    head: tuple[float, ...] = ()
    steps: int = 0
    first: float = 0.0
    lowest: float = math.inf
    quick: float = 0.0
    now: float = 0.0
    highest: float = -math.inf
    spiked: bool = False
    raised: bool = False
    noise: float = 0.0
    calm: float = 0.0
    ratio: float = -math.inf
    at: int = 0

    @property
    def here(self) -> float:
        """The loss now: the lower one of two running means, as the slow one remembers a spike for long."""
        return min(self.now, self.quick)

    @property
    def trouble(self) -> Trouble | None:
        """The way in which training has gone wrong, for all that its losses show; None where it has not.

        "lost": most of what the loss had fallen is lost. "spiked": the loss was far above the first one since the last
        measurement. "stuck": the loss has not fallen since the start.
        """
        size, gain = abs(self.first), self.first - self.lowest
        if gain >= max(_GAINED * size, _NOISE * self.calm) and self.here - self.lowest >= _LOST * gain > 0.0:
            return "lost"
        if self.spiked:
            return "spiked"
        fallen = _FALLEN if self.raised else 0.0
        told = self.steps >= _STEPS and size > 0.0 and (self.raised or self.calm <= _QUIET * size)
        return "stuck" if told and self.here >= self.first - fallen * size else None

    def then(self, losses: Iterable[float]) -> Course:
        """Return the course with the losses of the steps since the last measurement."""
        course = replace(self, highest=-math.inf, spiked=False)
        for loss in losses:
            course = course._with(loss) if math.isfinite(loss) else replace(course, highest=math.inf, spiked=True)
        return course

    def _with(self, loss: float) -> Course:
        """Return the course with one loss more."""
        if len(self.head) == _HEAD:
            return self._moved(loss)
        head = (*self.head, loss)
        course = replace(self, head=head, highest=max(self.highest, loss))
        if len(head) < _HEAD:
            return course
        first, noise = min(head[0], median(head)), min(abs(b - a) for a, b in pairwise(head))
        course = replace(course, first=first, lowest=first, quick=first, now=first, noise=noise, calm=noise)
        for entry in head:
            course = course._moved(entry)
        return course

    def _moved(self, loss: float) -> Course:
        """Return the course with its running means moved on."""
        first, quick = self.first, self.quick + _QUICK * (loss - self.quick)
        change = min(abs(loss - self.quick), _USUAL * self.noise + _SMALL * abs(first))
        noise = self.noise + _SLOW * (change - self.noise)
        # The first changes are too few to tell how calm the loss is.
        calm = noise if self.steps < _STEPS // 2 else min(self.calm, noise)
        rise, enough = quick - first, _NOISE * self.calm
        return replace(
            self,
            steps=self.steps + 1,
            lowest=min(self.lowest, quick),
            quick=quick,
            now=self.now + _NOW * (loss - self.now),
            highest=max(self.highest, loss),
            spiked=self.spiked or rise >= max(_SPIKED * abs(first), enough) > 0.0,
            raised=self.raised or rise >= max(_RAISED * abs(first), enough) > 0.0,
            noise=noise,
            calm=calm,
        )

    def with_ratio(self, ratio: float | None, step: int) -> Course:
        """Return the course with the stability ratio measured at a step; None: not measured."""
        return self if ratio is None or ratio <= self.ratio else replace(self, ratio=ratio, at=step)

    def verdict(self) -> str:
        """Return the trouble with its figures, for the first line of the text; empty: none."""
        first, lowest, now = (written(loss, 2) for loss in (self.first, self.lowest, self.here))
        high = written(self.highest, 2) if math.isfinite(self.highest) else "infinity or NaN"
        if self.trouble == "lost":
            return f"training has failed on the way: the loss fell from {first} to {lowest} and is back at {now}"
        if self.trouble == "spiked":
            start = f"; at the start it was {first}" if self.steps else ""
            return f"the loss has spiked to {high} since the last measurement{start}"
        return f"the loss has hardly fallen: {first} at the start, {now} now" if self.trouble == "stuck" else ""

    def advice(self) -> str:
        """Return what to do about the trouble; empty: nothing."""
        again = "start again with a learning rate 3 to 10 times lower, or warm up"
        when = "measure with every_n_train_steps=2, at_start=True to see when it happens"
        if self.trouble == "lost":
            return f"A small ratio says nothing about a run that has failed: {again}, and {when}."
        if self.trouble == "spiked":
            return f"A small ratio after a spike says little. If the loss does not fall again, {again}, and {when}."
        if self.trouble == "stuck" and self.raised:
            return f"The loss has been higher meanwhile, so that a small ratio says nothing: {again}, and {when}."
        if self.trouble == "stuck":
            return "A small ratio does not tell why: compare short runs at a tenth and at ten times the learning rate."
        return ""

    def earlier(self, ratio: float | None) -> str:
        """Return the highest stability ratio so far, where it was beyond the edge and higher than this one."""
        if self.ratio <= EDGE[1] or (ratio is not None and self.ratio <= ratio):
            return ""
        return f"highest {written(self.ratio, 2)} at step {self.at}"
