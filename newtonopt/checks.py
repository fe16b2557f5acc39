"""Checks of arguments that users give, and warnings that name the user's line."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

P = ParamSpec("P")

# How many seeds a generator of torch's tells apart: the whole numbers below.
SEEDS = 2**64
# Files in which a warning's cause is not the user's: this package, and torch, which wraps the step.
_NOT_THE_USERS = tuple(str(Path(module).parent) for module in (__file__, torch.__file__))


def warn(message: str) -> None:
    """Warn, and name the user's line as the place."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def shown(value: object) -> str:
    """Return what an error message shows of a value: itself if that is short, else its kind."""
    text = repr(value)
    if len(text) <= 60 and "\n" not in text:
        return text
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


_CLOSURE = "a function of no argument that computes the loss, calls backward and returns the loss"
# A module that was given no forward pass of its own has one of these, which only raises.
_NO_FORWARD = ("_forward_unimplemented", "LightningModule.forward")


def check_closure(closure: object, name: str = "closure") -> None:
    """Refuse what cannot be called without arguments with a TypeError: a module and a loss function take some."""
    if not callable(closure) or isinstance(closure, type):
        remedy = " Give the function itself, not the loss that it returns." if isinstance(closure, Tensor) else ""
        raise TypeError(f"{name} must be {_CLOSURE}, got {shown(closure)}.{remedy}")
    needed = _needed(closure)
    if needed and isinstance(closure, nn.Module):
        raise TypeError(
            f"{name} must be {_CLOSURE}, got the module {type(closure).__name__}. Write such a function around it: "
            "loss = F.mse_loss(model(inputs), targets); loss.backward(); return loss."
        )
    if needed:
        raise TypeError(
            f"{name} must be {_CLOSURE}, got {shown(closure)}, which takes {', '.join(needed)}. Bind what it takes: "
            f"functools.partial(function, {', '.join(needed)})."
        )


def _needed(closure: Callable[..., object]) -> list[str]:
    """Return the names of the arguments that a call must give."""
    if isinstance(closure, nn.Module):
        # Wrappers take any arguments and pass them on: of several processes or devices, and of torch.compile.
        wraps = isinstance(closure, (DistributedDataParallel, nn.DataParallel))
        inner = dict(closure.named_children()).get("module" if wraps else "_orig_mod")
        if inner is not None:
            return _needed(inner)
    called = closure.forward if isinstance(closure, nn.Module) else closure
    if getattr(called, "__qualname__", "") in _NO_FORWARD:
        return ["input"]
    try:
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):  # builtin functions have none
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


def explains_arguments(elsewhere: Mapping[str, str]) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorate an `__init__` so that the error for an argument it does not have says which one is meant.

    Args:
        elsewhere: The replacement for each argument that other libraries have: the name of an argument here, or a
            sentence.
    """

    def decorate(init: Callable[P, None]) -> Callable[P, None]:
        names = [name for name in inspect.signature(init).parameters if name != "self"]
        owner = init.__qualname__.split(".")[0]

        @functools.wraps(init)
        def checked(*args: P.args, **kwargs: P.kwargs) -> None:
            for name, value in kwargs.items():
                if name not in names:
                    remedy = instead(name, names, elsewhere)
                    raise TypeError(f"{owner} takes no {name}, got {name}={shown(value)}. {remedy}")
            init(*args, **kwargs)

        return checked

    return decorate


def instead(name: str, names: Sequence[str], elsewhere: Mapping[str, str]) -> str:
    """Return what to write instead of a name that is none of these; their list where nothing is like it."""
    meant = elsewhere.get(name, "")
    if " " in meant:
        return meant
    close = [meant] if meant in names else difflib.get_close_matches(name, names, 1, _ALIKE)
    return f"Write {close[0]}=..." if close else f"Its arguments are {', '.join(names)}."


# How alike names must be for one to be meant: weigth_decay and weight_decay, not max_radius and max_trials.
_ALIKE = 0.75


def check_weight(weight: object) -> None:
    """Refuse a weight that is not positive with a ValueError; True is no number."""
    if weight is None:
        return
    if not _is_number(weight) or not 0.0 < weight < math.inf:
        raise ValueError(f"weight must be positive and finite, or None, got {shown(weight)}.{_plain(weight)}")


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse what is no whole number, or a smaller one, with a ValueError; True and False are none."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number and at least {least}, got {shown(value)}.{_plain(value)}")


def check_seed(seed: object) -> None:
    """Refuse what no generator of torch's takes as a seed, and negative numbers, with a ValueError."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < SEEDS:
        raise ValueError(f"seed must be a whole number from 0 to 2**64 - 1, got {shown(seed)}.{_plain(seed)}")


def check_share(name: str, value: object) -> None:
    """Refuse what is not strictly between zero and one with a ValueError."""
    if not _is_number(value) or not 0.0 < value < 1.0:
        raise ValueError(f"{name} must be in (0, 1), got {shown(value)}.{_as_share(value)}{_plain(value)}")


def check_positive_share(name: str, value: object) -> None:
    """Refuse what is not above zero and at most one with a ValueError."""
    if not _is_number(value) or not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be above 0 and at most 1, got {shown(value)}.{_as_share(value)}{_plain(value)}")


def check_positive(name: str, value: object) -> None:
    """Refuse what is not positive and finite with a ValueError; True is no number."""
    if not _is_number(value) or not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {shown(value)}.{_plain(value)}")


def check_not_negative(name: str, value: object) -> None:
    """Refuse what is negative or not finite with a ValueError; True is no number."""
    if not _is_number(value) or not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be zero or positive, and finite, got {shown(value)}.{_plain(value)}")


def check_above_one(name: str, value: object) -> None:
    """Refuse what is not above one and finite with a ValueError."""
    if not _is_number(value) or not 1.0 < value < math.inf:
        raise ValueError(f"{name} must be above 1 and finite, got {shown(value)}.{_plain(value)}")


def check_below_one(name: str, value: object) -> None:
    """Refuse what is negative, or one and above, with a ValueError."""
    if not _is_number(value) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {shown(value)}.{_as_share(value)}{_plain(value)}")


def _is_number(value: object) -> TypeGuard[float]:
    """Return whether it is a number of Python's; True and False are none, nor is np.float32, which would round."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _as_share(value: object) -> str:
    """Say how a percentage is written as a share."""
    return f" Write {value / 100:g} for {value:g} %." if _is_number(value) and 1.0 < value <= 100.0 else ""


def _plain(value: object) -> str:
    """Say how a scalar of NumPy's or a tensor of one entry is made a number of Python's."""
    is_scalar = isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1)
    return " Write a Python number: .item() gives it." if is_scalar else ""


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False with a ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}.{_plain(value)}")


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse what is none of the values allowed with a ValueError."""
    # Compared with values of its own type only, for an array compares entry by entry.
    if not any(isinstance(value, type(one)) and value == one for one in allowed):
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {shown(value)}.")


def check_instance(name: str, value: object, kind: type, what: str, remedy: str) -> None:
    """Refuse what is no instance of a class with a TypeError.

    Args:
        name: Name of the argument.
        value: Value given for it.
        kind: Class that it must be an instance of.
        what: Description of the class, with its article.
        remedy: Sentence that says what to write.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, got {shown(value)}. {remedy}")
