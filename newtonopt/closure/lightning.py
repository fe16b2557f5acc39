"""Special cases for Lightning and accelerate, each with its reason."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

# Frames of hooks, decorators and schedulers between a caller of `step` and its body, at most.
_WRAPPERS = 10


def does_nothing(closure: Callable[[], Any]) -> bool:
    """Return whether this is the closure that Lightning passes where a user calls `step()` without one.

    It does so under manual optimization. The closure returns None and computes no loss, so that the error for a missing
    closure says more than the one for a closure without a loss.
    """
    hosts = (closure.func, *closure.args) if isinstance(closure, functools.partial) else (closure,)
    return any(getattr(host, "__name__", "") == "do_nothing_closure" for host in hosts)


def skips_backward(closure: Callable[[], Any]) -> bool:
    """Return whether this is a closure of Lightning's that calls no `backward`.

    `WeightAveraging` runs batches so after it has averaged weights, to bring the statistics of BatchNorm up to date.
    """
    hosts = (closure.func, *closure.args) if isinstance(closure, functools.partial) else (closure,)
    return any(
        type(host).__module__.partition(".")[0] in ("lightning", "pytorch_lightning")
        and getattr(host, "_backward_fn", host) is None
        for host in hosts
    )


def refuse_skipped_batches() -> None:
    """Raise a RuntimeError if accelerate calls the step and leaves out all closures but every n-th.

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
