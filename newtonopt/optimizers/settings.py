"""Checks of the settings that users give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

# Settings that a parameter group may have of its own.
PER_GROUP = ("lr", "weight_decay")


def check_choices(settings: dict[str, Any], **allowed: Sequence[Any]) -> None:
    """Refuse a setting that is none of the values allowed for it, with a ValueError."""
    for name, values in allowed.items():
        if settings[name] not in values:
            raise ValueError(f"{name} is {settings[name]!r}: choose {' or '.join(map(repr, values))}.")


def check_number(name: str, value: Any, least: float, *, above: bool = False) -> None:
    """Refuse a setting that is no finite number, or one below `least` (or at it, if `above`), with a ValueError."""
    number = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
    if not number or not (least < value if above else least <= value) or not value < math.inf:
        what = f"above {least:g}" if above else f"{least:g} or more"
        raise ValueError(f"{name} is {value!r}: give a finite number, {what}.")


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse values of the settings that all optimizers share, with a ValueError."""
    for name in PER_GROUP:
        check_number(name, settings[name], 0)
    for name in ("damping", "min_damping", "max_damping"):
        check_number(name, settings[name], 0, above=True)
    check_number("damping_factor", settings["damping_factor"], 1, above=True)
    low, high = settings["min_damping"], settings["max_damping"]
    if not low <= high:
        raise ValueError(f"min_damping is {low!r} and max_damping {high!r}: give a minimum below the maximum.")
    if not low <= settings["damping"] <= high:
        raise ValueError(f"damping is {settings['damping']!r}, outside min_damping {low!r} and max_damping {high!r}.")
