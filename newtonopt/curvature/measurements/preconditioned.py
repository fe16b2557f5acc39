"""The largest eigenvalue of the matrix as an adaptive optimizer sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from newtonopt.curvature.eigenvalues.extreme import Spectrum
from newtonopt.curvature.measurements.eigenvalues import in_words, spectrum, with_interval
from newtonopt.curvature.measurements.measurement import Chart, Measured, Measurement, Tag, UnmeasurableError, View
from newtonopt.curvature.stability import preconditioner, scaled, stability_threshold


@dataclass(frozen=True)
class Preconditioned(Measurement[Spectrum]):
    """The largest eigenvalue of the `preconditioned` matrix, which is what the stability threshold of Adam and its kin
    is for, from the optimizer's first step on.

    `CurvatureMonitor` and `measure` take it by themselves where one optimizer of that kind trains all parameters under
    view. Name it among the `measurements` to be told why there is none, or to measure it for SGD too.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import measure
        >>> w = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
        >>> def closure():
        ...     return w[0] ** 2 + 8 * w[1] ** 2
        >>> adam = torch.optim.Adam([w], lr=0.01)
        >>> closure().backward()
        >>> adam.step()
        >>> found = measure(closure, [w], adam)
        >>> round(found["curvature/preconditioned_lambda_max"], 3), round(found["curvature/stability_threshold"])
        (10.0, 3800)

    See Also:
        - `preconditioned()`: the function behind it.
        - `Stability`: the eigenvalue over its threshold.
        - `docs/edge_of_stability.md`: a run that goes there.
    """

    tags: ClassVar[tuple[Tag, ...]] = (
        Tag(
            "preconditioned_lambda_max",
            "1 / learning rate",
            "the largest eigenvalue of the preconditioned matrix",
        ),
        Tag("preconditioned_lambda_max_lower", "1 / learning rate", "the lower end of its interval"),
        Tag("preconditioned_lambda_max_upper", "1 / learning rate", "the upper end"),
    )
    charts: ClassVar[tuple[Chart, ...]] = (
        Chart(
            "Largest preconditioned eigenvalue and its interval",
            ("preconditioned_lambda_max", "preconditioned_lambda_max_lower", "preconditioned_lambda_max_upper"),
            margin=True,
            more=True,
        ),
    )

    def measure(self, view: View) -> Spectrum | None:
        """Return the largest eigenvalue, tracked from the last one."""
        if not view.optimizers:
            raise ValueError(
                "optimizer must be given to measure Preconditioned, got None. Pass the optimizer that trains."
            )
        try:
            if not view.training:
                raise ValueError(
                    "optimizer must train some of the measured parameters, got none that does. Pass the one that "
                    "trains them."
                )
            for optimizer in view.training:
                stability_threshold(optimizer)
            weights, decay = preconditioner(view.training[0], view.params)
        except (TypeError, ValueError) as error:  # no threshold is known, or never stable, or no step so far
            raise UnmeasurableError(str(error)) from error
        matrix = scaled(view.matrix, weights, decay)
        # A second one is tracked: they cross as the preconditioner changes, and the second vector becomes the first.
        return spectrum(view, matrix, 1, 0, view.before(Preconditioned), weights * view.gradient, spare=1)

    def differenced_along(self, result: Spectrum | None, view: View) -> Sequence[Tensor]:
        """Return the direction of the parameters that belongs to the top eigenvector."""
        if result is None:
            return []
        weights, _ = preconditioner(view.training[0], view.params)
        return [weights * result.top[0].vector]

    def values(self, result: Spectrum) -> dict[str, float]:
        """Return the eigenvalue with its interval."""
        return with_interval("preconditioned_lambda_max", result.top[0])

    def sentences(self, result: Spectrum, measured: Measured) -> list[str]:
        """Return the eigenvalue in words."""
        return [f"The largest eigenvalue of the preconditioned matrix is {in_words(result, result.top[0])}."]

    def spectra(self, result: Spectrum) -> tuple[Spectrum, ...]:
        """Return the eigenvalue."""
        return (result,)
