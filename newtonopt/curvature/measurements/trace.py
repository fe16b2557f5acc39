"""The sum of all eigenvalues."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from newtonopt.curvature.measurements.measurement import Chart, Measurement, Tag, View
from newtonopt.curvature.traces import TraceEstimate, trace


@dataclass(frozen=True)
class Trace(Measurement[TraceEstimate]):
    """The trace of the curvature matrix with its standard error, for up to 100 products, or `max_products` where that
    is more.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import Trace, measure
        >>> w = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> found = measure(lambda: w[0] ** 2 + 3 * w[1] ** 2, [w], measurements=[Trace()])
        >>> round(found["curvature/trace"], 6)
        8.0

    See Also:
        - `trace()`: the function behind it.
        - `Density`: where the eigenvalues lie that sum to it.
        - `docs/monitor.md`: how to add a measurement to a run.
    """

    tags: ClassVar[tuple[Tag, ...]] = (
        Tag("trace", "L / θ²", "the sum of the eigenvalues"),
        Tag("trace_error", "L / θ²", "its standard error"),
    )
    charts: ClassVar[tuple[Chart, ...]] = (Chart("Trace", ("trace",), more=True),)

    def measure(self, view: View) -> TraceEstimate | None:
        """Return the trace to the tolerance of the eigenvalues, or as well as the budget allows."""
        budget = view.affordable_for_whole_spectrum()
        if budget == 0:
            return None
        return trace(view.matrix, tolerance=view.plan.tolerance, max_products=budget, seed=view.plan.seed)

    def values(self, result: TraceEstimate) -> dict[str, float]:
        """Return trace and standard error."""
        return {"trace": result.value, "trace_error": result.standard_error}
