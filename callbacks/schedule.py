"""When a callback is due."""

from __future__ import annotations

import time
from dataclasses import dataclass

from newtonopt.checks import check_flag, check_positive_share, check_whole


def passes_multiple(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` lies in `(before, now]`: several optimizer steps may pass in a batch, or none."""
    return now // every > before // every


@dataclass(frozen=True)
class Schedule:
    """Every so many optimizer steps, or at the end of every so many epochs; and at both ends of training.

    Args:
        every_n_train_steps: None: every 100, or none where `every_n_epochs` is given.
        every_n_epochs: None: by steps.
        at_start: Whether it is due before the first step.
        at_end: Whether it is due after the last one.

    Raises:
        ValueError: Both intervals are given, or one is no whole number above zero, or a flag is neither True nor False.
    """

    every_n_train_steps: int | None = None
    every_n_epochs: int | None = None
    at_start: bool = False
    at_end: bool = False

    def __post_init__(self) -> None:
        for name in ("every_n_train_steps", "every_n_epochs"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        for name in ("at_start", "at_end"):
            check_flag(name, getattr(self, name))
        if self.every_n_train_steps is not None and self.every_n_epochs is not None:
            raise ValueError(
                f"every_n_train_steps must be None beside every_n_epochs={self.every_n_epochs}, got "
                f"{self.every_n_train_steps}. Give one of them."
            )

    def after_step(self, before: int, now: int) -> bool:
        """Whether it is due by steps."""
        return self.every_n_epochs is None and passes_multiple(before, now, self.every_n_train_steps or 100)

    def after_epoch(self, epoch: int) -> bool:
        """Whether it is due at the end of the epoch, counted from zero."""
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0

    def lack(self, steps: int) -> str:
        """In words, why it may never have been due in a training that took this many steps."""
        if self.every_n_epochs is not None:
            return f"it ended at step {steps}, before every_n_epochs={self.every_n_epochs} had passed. Lower that"
        every = self.every_n_train_steps or 100
        return f"it ended at step {steps}, before one was due by every_n_train_steps={every}. Lower that"


class Allowance:
    """Keeps what measuring adds below a share of the time that training takes, by leaving measurements out.

    Args:
        max_overhead: The share, of training's own time; None: no bound.

    Raises:
        ValueError: It is not above zero and at most one.
    """

    def __init__(self, max_overhead: float | None) -> None:
        if max_overhead is not None:
            check_positive_share("max_overhead", max_overhead)
        self._share = max_overhead
        self.restart()

    def restart(self) -> None:
        """Training begins."""
        self._began = time.perf_counter()
        self._spent = 0.0
        self._costs: dict[bool, float] = {}

    def allows(self, certified: bool) -> bool:
        """Whether another measurement, at the cost of the last one of its kind, fits; the first one always does."""
        if self._share is None or certified not in self._costs:
            return True
        trained = time.perf_counter() - self._began - self._spent
        return self._spent + self._costs[certified] <= self._share * trained

    def spend(self, certified: bool, seconds: float) -> None:
        """Enter what a measurement took."""
        self._costs[certified] = seconds
        self._spent += seconds
