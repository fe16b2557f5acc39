"""Checks of arguments that users give, and warnings that name the user's line."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from newtonopt.evaluation import Products

# Files in which a warning's cause is not the user's: this package, and torch, which wraps the step.
_NOT_THE_USERS = tuple(str(Path(module).parent) for module in (__file__, torch.__file__))


def warn(message: str) -> None:
    """Warn, and name the user's line as the place."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def check_closure(closure: object, name: str = "closure") -> None:
    """Refuse what cannot be called with a TypeError."""
    if not callable(closure):
        raise TypeError(
            f"{name} is a {type(closure).__name__}: give a function of no argument that computes the loss, calls "
            "backward and returns the loss."
        )


def check_weight(weight: object) -> None:
    """Refuse a weight that is not positive with a ValueError; True is no number."""
    if weight is None:
        return
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 < weight < math.inf:
        raise ValueError(f"weight is {weight!r}: give a finite number (int or float) above zero, or None.")


def check_products(products: str) -> None:
    """Refuse an unknown way to form products with a ValueError."""
    if products not in get_args(Products):
        raise ValueError(f"products is {products!r}: choose {', '.join(map(repr, get_args(Products)))}.")


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse what is no whole number, or a smaller one, with a ValueError; True and False are none."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number and at least {least}, got {value!r}")


def check_share(name: str, value: object) -> None:
    """Refuse what is not strictly between zero and one with a ValueError."""
    if not isinstance(value, (int, float)) or not 0.0 < value < 1.0:
        raise ValueError(f"{name} must be in (0, 1), got {value!r}")


def check_positive(name: str, value: object) -> None:
    """Refuse what is not positive and finite with a ValueError; True is no number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False with a ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse what is none of the values allowed with a ValueError."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: choose {' or '.join(map(repr, allowed))}.")
