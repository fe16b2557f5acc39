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
    """A function to call after each of `total` parts, or with the number of those done: a bar by tqdm, which Lightning
    brings, if it is installed.

    None is drawn for a single part, nor where the output is no terminal.
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
