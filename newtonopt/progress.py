"""A progress bar for long passes over a data set, and for large matrices."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Seconds before a bar appears: shorter passes show none.
_DELAY = 3.0


@contextmanager
def progress(total: int | None, what: str = "pass over the data") -> Iterator[Callable[..., Any]]:
    """Show a progress bar in a `with` block, by tqdm (which Lightning requires) if it is installed.

    No bar appears for a single part, during the first seconds, or if the output is no terminal.

    Args:
        total: Number of parts; None if it is unknown.
        what: Label of the bar.

    Yields:
        A function to call after each part, or with the number of parts done since the last call.
    """
    bars = _tqdm() if total != 1 else None
    if bars is None:
        yield _nothing
        return
    with bars(total=total, desc=f"newtonopt: {what}", delay=_DELAY, leave=False, disable=None) as bar:
        yield bar.update


def _tqdm() -> Any:
    try:
        return importlib.import_module("tqdm").tqdm
    except ImportError:
        return None


def _nothing(done: int = 1) -> None:
    pass
