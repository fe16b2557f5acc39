"""Checks of arguments that users give."""

from __future__ import annotations

import math
from typing import get_args

from newtonopt.evaluation import Products


def check_closure(closure: object) -> None:
    """Refuse what cannot be called with a TypeError."""
    if not callable(closure):
        raise TypeError(
            f"closure is a {type(closure).__name__}: give a function of no argument that computes the loss, calls "
            "backward and returns the loss."
        )


def check_weight(weight: object) -> None:
    """Refuse a weight that is not positive with a ValueError."""
    if weight is not None and not (isinstance(weight, (int, float)) and 0 < weight < math.inf):
        raise ValueError(f"weight is {weight!r}: give a finite number above zero, or None.")


def check_products(products: str) -> None:
    """Refuse an unknown way to form products with a ValueError."""
    if products not in get_args(Products):
        raise ValueError(f"products is {products!r}: choose {', '.join(map(repr, get_args(Products)))}.")
