"""Subclasses of `torch.Tensor` that a user's closure computes with.

Methods of such a tensor may be overridden, need attributes that our results lack, or return the subclass again. So
newtonopt calls methods of plain tensors only.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T", Tensor, Tensor | None)


def is_wrapper(t: Tensor) -> bool:
    """Return whether `t` keeps its data in other tensors, as DTensors, MaskedTensors and jagged NestedTensors do."""
    return type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__


def plain(t: T) -> T:
    """Return `t` as a `torch.Tensor` with the same data and graph; `t` itself if it is no subclass.

    Wrappers are returned as they are, because they have no data of their own.
    """
    if t is None or type(t) in (Tensor, nn.Parameter) or is_wrapper(t):
        return t
    return t.as_subclass(Tensor)  # as_subclass cannot be overridden


def alike(t: Tensor, original: Tensor) -> Tensor:
    """Return the plain tensor `t` as a tensor of the class and with the attributes of `original`."""
    if type(original) is Tensor or isinstance(original, nn.Parameter) or is_wrapper(original):
        return t
    result = t.as_subclass(type(original))
    vars(result).update(vars(original))
    return result


def detached(t: Tensor) -> Tensor:
    """Return `t` without its graph; its class and attributes stay."""
    return alike(plain(t).detach(), t)


def copied(t: Tensor) -> Tensor:
    """Return a detached copy of `t`; its class and attributes stay."""
    return alike(plain(t).detach().clone(), t)
