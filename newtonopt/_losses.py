"""What is known of the losses in `torch.nn.functional`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

# The losses whose second derivative with respect to these positional arguments is positive semi-definite, so that they
# define a Gauss-Newton matrix. A difference loss is convex in both of its arguments together; elsewhere a target that
# needs gradients counts as constant.
CONVEX_LOSSES: dict[Callable[..., Any], tuple[int, ...]] = {
    F.cross_entropy: (0,),
    F.binary_cross_entropy_with_logits: (0,),
    F.binary_cross_entropy: (0,),
    F.soft_margin_loss: (0,),
    F.multilabel_soft_margin_loss: (0,),
    F.poisson_nll_loss: (0,),
    F.mse_loss: (0, 1),
    F.huber_loss: (0, 1),
    F.smooth_l1_loss: (0, 1),
}
# Linear in the log-probabilities they are given: convex, with curvature, only in the logits in front of `log_softmax`.
LOG_PROBABILITY_LOSSES = frozenset({F.nll_loss, F.kl_div})


def mean_over(loss: Callable[..., Any], given: dict[str, Any]) -> Tensor | float | None:
    """What a loss of `torch.nn.functional` divides its sum by; None if it does not."""
    if given.get("reduction", "mean") not in ("mean", "batchmean"):
        return None
    z, target = given["input"], given["target"]
    if given.get("reduction") == "batchmean":
        return float(z.shape[0])
    if loss in (F.cross_entropy, F.nll_loss) and not target.is_floating_point():
        counted = target != given.get("ignore_index", -100)
        weight = given.get("weight")
        total: Tensor = counted.sum() if weight is None else (weight[target.clamp(min=0)] * counted).sum()
        return total
    return float(z.numel())


def is_convex(loss: Callable[..., Any], given: dict[str, Any]) -> bool:
    """Whether a call of a recognised loss is convex, as it is unless weights or targets are negative.

    Args:
        loss: A function of `CONVEX_LOSSES` or `LOG_PROBABILITY_LOSSES`.
        given: Its arguments, by name.
    """
    weight, target = given.get("weight"), given["target"]
    if _is_negative(weight):
        return False
    if loss is F.binary_cross_entropy_with_logits and given.get("pos_weight") is not None:
        # The second derivative is the logistic function's slope times this.
        return not _is_negative(1 + (given["pos_weight"] - 1) * target)
    if loss is F.cross_entropy and target.is_floating_point():
        # The second derivative is the softmax's covariance times this.
        by_class = target.movedim(min(1, target.dim() - 1), -1)
        return not _is_negative((by_class if weight is None else by_class * weight).sum(-1))
    if loss is F.poisson_nll_loss and not given.get("log_input", True):
        return not _is_negative(target)
    return True


def _is_negative(t: Any) -> bool:
    return isinstance(t, Tensor) and bool((t.detach() < 0).any())
