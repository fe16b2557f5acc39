"""Checks of arguments that users give, and warnings that name the user's line.

Errors have one form: `{name} must be {range}, got {value}.`, then a sentence that says what to write, if there is one.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

P = ParamSpec("P")

# Seeds of torch's generators are the whole numbers below this one.
SEEDS = 2**64
# Files of this package, and of torch, which wraps the step: a warning names the first line outside of them.
_NOT_THE_USERS = tuple(str(Path(module).parent) for module in (__file__, torch.__file__))


def warn(message: str) -> None:
    """Warn, and name the user's line as the place."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def shown(value: object) -> str:
    """Return how an error message shows a value: its repr if that is short, else its kind."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else kind_of(value)


def kind_of(value: object) -> str:
    """Return the class of a value with its article, "a Tensor"; "None" for None."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


_CLOSURE = "a function without arguments that computes the loss, calls backward and returns the loss"
# A module without a forward pass of its own has one of these, which only raise an error.
_NO_FORWARD = ("_forward_unimplemented", "LightningModule.forward")


def check_closure(closure: object, name: str = "closure") -> None:
    """Raise a TypeError if a closure cannot be called without arguments, as modules and loss functions cannot."""
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
            f"{name} must be {_CLOSURE}, got {shown(closure)}, which takes {', '.join(needed)}. Bind its arguments: "
            f"functools.partial(function, {', '.join(needed)})."
        )


def _needed(closure: Callable[..., object]) -> list[str]:
    """Return the names of the arguments without a default."""
    if isinstance(closure, nn.Module):
        # Wrappers (DDP, DataParallel, torch.compile) take any arguments and pass them on.
        wraps = isinstance(closure, (DistributedDataParallel, nn.DataParallel))
        inner = dict(closure.named_children()).get("module" if wraps else "_orig_mod")
        if inner is not None:
            return _needed(inner)
    called = closure.forward if isinstance(closure, nn.Module) else closure
    if getattr(called, "__qualname__", "") in _NO_FORWARD:
        return ["input"]
    try:
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):  # builtin functions have no signature
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


def explains_arguments(elsewhere: Mapping[str, str]) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorate an `__init__` so that the error for an unknown argument says what to write instead.

    Args:
        elsewhere: For names that other libraries use, the replacement: the name of an argument here, or a sentence.
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
    """Return a sentence that says what to write instead of an unknown name.

    Args:
        name: Unknown name.
        names: Known names. The sentence lists them if none is like the unknown one.
        elsewhere: Replacements, as for `explains_arguments`.
    """
    meant = elsewhere.get(name, "")
    if " " in meant:
        return meant
    close = [meant] if meant in names else difflib.get_close_matches(name, names, 1, _ALIKE)
    return f"Write {close[0]}=..." if close else f"Its arguments are {', '.join(names)}."


# How alike two names must be (difflib's ratio): weigth_decay and weight_decay are, max_radius and max_trials are not.
_ALIKE = 0.75


def check_weight(weight: object) -> None:
    """Raise a ValueError if a weight is neither None nor positive and finite; True is no number."""
    if weight is None:
        return
    if not _is_number(weight) or not 0.0 < weight < math.inf:
        raise ValueError(f"weight must be positive and finite, or None, got {shown(weight)}.{_plain(weight)}")


def check_whole(name: str, value: object, least: int) -> None:
    """Raise a ValueError if a value is no int or below `least`; True and False are no numbers."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number and at least {least}, got {shown(value)}.{_plain(value)}")


def check_seed(seed: object) -> None:
    """Raise a ValueError if a value is no seed of torch's generators, or negative."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < SEEDS:
        raise ValueError(f"seed must be a whole number from 0 to 2**64 - 1, got {shown(seed)}.{_plain(seed)}")


def check_share(name: str, value: object) -> None:
    """Raise a ValueError if a value is not strictly between 0 and 1."""
    if not _is_number(value) or not 0.0 < value < 1.0:
        raise ValueError(f"{name} must be in (0, 1), got {shown(value)}.{_as_share(value)}{_plain(value)}")


def check_positive_share(name: str, value: object) -> None:
    """Raise a ValueError if a value is not above 0 and at most 1."""
    if not _is_number(value) or not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be above 0 and at most 1, got {shown(value)}.{_as_share(value)}{_plain(value)}")


def check_up_to_one(name: str, value: object) -> None:
    """Raise a ValueError if a value is not between 0 and 1, both included."""
    if not _is_number(value) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {shown(value)}.{_as_share(value)}{_plain(value)}")


def check_positive(name: str, value: object) -> None:
    """Raise a ValueError if a value is not positive and finite; True is no number."""
    if not _is_number(value) or not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {shown(value)}.{_plain(value)}")


def check_not_negative(name: str, value: object) -> None:
    """Raise a ValueError if a value is negative or not finite; True is no number."""
    if not _is_number(value) or not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be zero or positive, and finite, got {shown(value)}.{_plain(value)}")


def check_above_one(name: str, value: object) -> None:
    """Raise a ValueError if a value is not above 1 and finite."""
    if not _is_number(value) or not 1.0 < value < math.inf:
        raise ValueError(f"{name} must be above 1 and finite, got {shown(value)}.{_plain(value)}")


def check_below_one(name: str, value: object) -> None:
    """Raise a ValueError if a value is negative, or 1 or more."""
    if not _is_number(value) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {shown(value)}.{_as_share(value)}{_plain(value)}")


def _is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is an int or a float; True, False and np.float32, which would round, are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _as_share(value: object) -> str:
    """Return a sentence that writes a percentage as a share."""
    return f" Write {value / 100:g} for {value:g} %." if _is_number(value) and 1.0 < value <= 100.0 else ""


def _plain(value: object) -> str:
    """Return a sentence that makes a Python number of a NumPy scalar or a tensor with one entry."""
    is_scalar = isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1)
    return " Write a Python number: .item() gives it." if is_scalar else ""


def check_prefix(prefix: object) -> None:
    """Raise a ValueError if something is not a prefix of tags."""
    if not isinstance(prefix, str) or not re.fullmatch(r"[-\w.]+(/[-\w.]+)*", prefix):
        raise ValueError(
            "prefix must consist of letters, digits, '_', '-' and '.', with single '/' between, got "
            f"{shown(prefix)}. Write 'curvature', for example."
        )


def check_flag(name: str, value: object) -> None:
    """Raise a ValueError if a value is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}.{_plain(value)}")


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise a ValueError if a value is none of those allowed."""
    # Compare with values of the same type only: arrays compare entry by entry.
    if not any(isinstance(value, type(one)) and value == one for one in allowed):
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {shown(value)}.")


def check_instance(name: str, value: object, kind: type, what: str, remedy: str) -> None:
    """Raise a TypeError if a value is no instance of a class.

    Args:
        name: Name of the argument.
        value: Value given for it.
        kind: Class.
        what: Description of the class with its article, for the message.
        remedy: Sentence that says what to write.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, got {shown(value)}. {remedy}")


def listed(name: str, items: Any, holds: str, such_as: str) -> list[Any]:
    """Return the entries of an iterable as a list.

    Args:
        name: Name of the argument.
        items: Value given for it.
        holds: Description of its entries, for the message.
        such_as: Expression that a user would write for it.

    Raises:
        TypeError: `items` is no iterable, or a tensor, module, mapping, string or set.
        ValueError: `items` is an iterator that gave nothing.
    """
    if not isinstance(items, Iterable) or isinstance(items, (Tensor, nn.Module, Mapping, str, set, frozenset)):
        remedies = {Tensor: "a list with one entry", Mapping: f"{such_as}, or a list of the mapping's entries"}
        remedies[set] = "a list, which keeps its order"
        remedy = next((words for kind, words in remedies.items() if isinstance(items, kind)), such_as)
        raise TypeError(f"{name} must be an iterable of {holds}, got {kind_of(items)}. Write {remedy}.")
    given = list(items)
    if not given and isinstance(items, Iterator):
        raise ValueError(
            f"{name} must hold at least one entry, got {kind_of(items)} that gave none: it was empty, or was used "
            f"before and ends after one pass. Write {such_as} again, or keep a list of it."
        )
    return given


def listed_groups(params: Any) -> list[Any]:
    """Return the argument `params` of an optimizer as a list of parameter groups.

    Raises:
        TypeError: `params` is no iterable of tensors, of pairs of a name and a tensor, or of groups.
        ValueError: `params` is empty.
    """
    given = listed("params", params, "tensors or of parameter groups", "model.parameters()")
    if not given:
        raise ValueError(f"params must hold at least one tensor, got {params!r}. Write model.parameters().")
    return given if isinstance(given[0], dict) else [{"params": given}]


def listed_group(group: Any) -> dict[str, Any]:
    """Return a copy of a parameter group with its parameters as a list.

    Raises:
        TypeError: `group` is no parameter group, or its parameters are no tensors.
    """
    if not isinstance(group, dict) or "params" not in group:
        what = f"one with {', '.join(map(str, group)) or 'nothing'}" if isinstance(group, dict) else kind_of(group)
        raise TypeError(
            f"A parameter group must be a dict with an entry 'params', got {what}. Write "
            "{'params': model.parameters(), 'lr': 0.5}."
        )
    one = isinstance(group["params"], Tensor)
    given = [group["params"]] if one else listed("params", group["params"], "tensors", "model.parameters()")
    for entry in given:
        p = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry  # a name and a tensor
        if not isinstance(p, Tensor):
            raise TypeError(f"params must hold tensors only, got {kind_of(p)} in it. Write model.parameters().")
    return {**group, "params": given}
