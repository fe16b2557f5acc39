"""The loss along eigenvectors, beside its quadratic model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from newtonopt.checks import check_choice, check_positive, check_whole
from newtonopt.curvature.drawing import drawing
from newtonopt.curvature.measurements.eigenvalues import ExtremeEigenvalues
from newtonopt.curvature.measurements.measurement import Measurement, Tag, View
from newtonopt.curvature.slices import LossSurface, loss_slice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Losses along each direction.
_POINTS = 21


@dataclass(frozen=True)
class LossSlice(Measurement[LossSurface]):
    """The loss and its quadratic model along the top eigenvector, or on the square of the top and the bottom one, as a
    figure.

    Args:
        directions: 1 (default): along the top eigenvector, which takes 21 losses; 2: along the top one and the bottom
            one (the second where `bottom` is 0), which takes 441 losses.
        radius: How far the slice reaches, above zero. Default 1.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import LossSlice, measure
        >>> w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> found = measure(lambda: w[0] ** 2 + 3 * w[1] ** 2, [w], measurements=[LossSlice(radius=0.5)])
        >>> round(float(found.of(LossSlice).losses.max()), 6)
        0.75

    See Also:
        - `loss_slice()`: the function behind it, along any direction.
        - `LossSurface`: the result.
        - `docs/monitor.md`: how to add a measurement to a run.
    """

    directions: Literal[1, 2] = 1
    radius: float = 1.0

    tags: ClassVar[tuple[Tag, ...]] = (
        Tag("loss_slice", "", "a figure of the loss and its quadratic model along eigenvectors"),
    )
    uses_matrix: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_whole("directions", self.directions, 1)  # True is no number of directions
        check_choice("directions", self.directions, (1, 2))
        check_positive("radius", self.radius)

    def check_list(self, measurements: Sequence[Measurement[Any]]) -> None:
        """Raise ValueError if fewer eigenvectors are measured than there are directions."""
        count = sum(m.top + m.bottom for m in measurements if isinstance(m, ExtremeEigenvalues))
        if self.directions > count:
            raise ValueError(
                f"directions must be at most top + bottom, {count}, because the slice is along those eigenvectors, got "
                f"{self.directions}. Raise top or bottom."
            )

    def measure(self, view: View) -> LossSurface | None:
        """Return the slice, named by its eigenvectors."""
        spectrum = view.of(ExtremeEigenvalues)
        if spectrum is None:
            return None
        ends = {"top": spectrum.top[:1], "bottom": spectrum.bottom[:1], "second": spectrum.top[1:]}
        named = [(f"the {end} eigenvector", entry.vector) for end, found in ends.items() for entry in found]
        losses = _POINTS**self.directions
        if len(named) < self.directions or view.affordable(losses) < losses:
            return None
        names, vectors = zip(*named[: self.directions], strict=True)
        surface = loss_slice(
            view.closure, view.params, vectors, self.radius, _POINTS, products=view.form, weight=view.weight
        )
        return replace(surface, names=names)

    def values(self, result: LossSurface) -> dict[str, float]:
        """Return no number: a slice is looked at."""
        return {}

    def figures(self, result: LossSurface) -> dict[str, Figure]:
        """Return the slice as a figure."""
        figure, axes = drawing(result.losses.dim())
        result.plot(ax=axes)
        return {"loss_slice": figure}
