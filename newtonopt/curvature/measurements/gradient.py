"""The curvature along the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.optim import SGD

from newtonopt.curvature.measurements.eigenvalues import ExtremeEigenvalues
from newtonopt.curvature.measurements.measurement import Chart, Measured, Measurement, Tag, View
from newtonopt.curvature.showing import written
from newtonopt.vectors.scaling import dot, norm

# From this ratio of the largest eigenvalue to the curvature along the gradient on, the loss is called ill conditioned:
# the largest stable step of gradient descent is a fiftieth of the one that decreases the loss most.
_ILL = 100.0


@dataclass(frozen=True)
class GradientShare:
    """Curvature along the gradient g.

    Attributes:
        curvature: The Rayleigh quotient g'Ag / g'g.
        alignment: Share of g'g along the top eigenvectors; None where these were not measured.
        plain: Whether SGD without momentum trains, whose step is along the gradient. Default False.
    """

    curvature: float
    alignment: float | None
    plain: bool = False


@dataclass(frozen=True)
class AlongGradient(Measurement[GradientShare]):
    """The curvature along the gradient, for one product, and the gradient's share along the top eigenvectors.

    `CurvatureMonitor` and `measure` take it unless `gradient=False`.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import measure
        >>> w = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
        >>> found = measure(lambda: w[0] ** 2 + 3 * w[1] ** 2, [w], top=1)
        >>> found.read("gradient_curvature"), round(found.read("gradient_alignment"), 6)
        (2.0, 0.0)

    See Also:
        - `gradient_curvature()`: the function that measures it at one point.
        - `StepMarginMonitor`: the loss along the optimizer's own steps.
        - `docs/read_your_curvature.md`: what the curvature along the gradient says about a run.
    """

    tags: ClassVar[tuple[Tag, ...]] = (
        Tag("gradient_curvature", "L / θ²", "the curvature along the gradient g: g'Hg / g'g", "more"),
        Tag("gradient_alignment", "0 to 1", "the fraction of g'g along the `top` eigenvectors", "more"),
    )
    charts: ClassVar[tuple[Chart, ...]] = (
        Chart("Curvature along the gradient", ("gradient_curvature",), more=True),
        Chart("Gradient's share along the top eigenvectors", ("gradient_alignment",), more=True),
    )
    uses_quotient: ClassVar[bool] = True

    def measure(self, view: View) -> GradientShare | None:
        """Return curvature and share; None where the gradient is zero."""
        if view.quotient is None:
            return None
        spectrum, length = view.of(ExtremeEigenvalues), norm(view.gradient)
        if spectrum is None:
            return GradientShare(view.quotient, None, _is_plain(view))
        cosines = [(dot(entry.vector, view.gradient) / length) ** 2 for entry in spectrum.top]
        return GradientShare(view.quotient, math.fsum(cosines), _is_plain(view))

    def differenced_along(self, result: GradientShare | None, view: View) -> Sequence[Tensor]:
        """Return no direction of its own."""
        return ()

    def values(self, result: GradientShare) -> dict[str, float]:
        """Return curvature and share."""
        share = {} if result.alignment is None else {"gradient_alignment": result.alignment}
        return {"gradient_curvature": result.curvature, **share}

    def verdict(self, result: GradientShare, measured: Measured) -> str:
        """Return whether the loss is ill conditioned for gradient descent."""
        excess = _excess(result, measured)
        return "" if excess is None else f"ill conditioned for gradient descent ({written(excess, 2)} times)"

    def sentences(self, result: GradientShare, measured: Measured) -> list[str]:
        """Return how the loss falls along the gradient, and whether the largest eigenvalue forbids to go that far.

        A learning rate is named only where SGD without momentum trains: it says nothing of other optimizers' steps.
        """
        curvature = result.curvature
        if not math.isfinite(curvature):
            return []
        if curvature == 0.0:
            return ["Along the gradient the curvature is zero: the loss falls linearly."]
        if curvature < 0.0:
            longer = "" if measured.troubled else ", and longer steps lower it more"
            return [
                f"Along the gradient the curvature is {written(curvature, 3)}: the loss falls faster than "
                f"linearly{longer}."
            ]
        best, rates = 1.0 / curvature, result.plain
        said = f"Along the gradient the curvature is {written(curvature, 3)}"
        if rates:
            said += (
                f": plain gradient descent on this batch lowers the loss most at a learning rate of {written(best, 3)}"
            )
        excess = _excess(result, measured)
        if excess is not None:
            allowed = f" and allows it less than {written(2.0 * best / excess, 3)}" if rates else ""
            said += (
                f". The largest eigenvalue is {written(excess, 3)} times as large{allowed}: for gradient descent the "
                "loss is ill conditioned"
            )
            if not measured.troubled:
                said += ". Adam, or a second-order optimizer such as HessianFree, can take the longer step"
        return [f"{said}."]


def _excess(result: GradientShare, measured: Measured) -> float | None:
    """Return the largest eigenvalue over the curvature along the gradient, where that is called ill conditioned."""
    largest = measured.read("lambda_max")
    if largest is None or not 0.0 < _ILL * result.curvature <= largest:
        return None
    return largest / result.curvature


def _is_plain(view: View) -> bool:
    """Return whether SGD without momentum trains."""
    return bool(view.training) and all(
        isinstance(optimizer, SGD) and all(group["momentum"] == 0.0 for group in optimizer.param_groups)
        for optimizer in view.training
    )
