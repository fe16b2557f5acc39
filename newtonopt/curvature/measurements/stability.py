"""The largest eigenvalue against the optimizer's stability threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.optim import SGD, Optimizer

from newtonopt.curvature.measurements.course import EDGE, Course
from newtonopt.curvature.measurements.eigenvalues import ExtremeEigenvalues
from newtonopt.curvature.measurements.measurement import Chart, Measured, Measurement, Tag, UnmeasurableError, View
from newtonopt.curvature.measurements.preconditioned import Preconditioned
from newtonopt.curvature.showing import written
from newtonopt.curvature.stability import stability_threshold

# Ratio below which training is called far from the edge of stability.
_FAR = 0.1
# Ratio from which it does not tell by how much to lower the learning rate: failed runs have such ratios.
_HUGE = 10.0

State = Literal["below", "edge", "beyond"]


@dataclass(frozen=True)
class StabilityRatio:
    """An eigenvalue against a threshold.

    Attributes:
        threshold: Largest eigenvalue at which steps do not grow.
        ratio: Largest eigenvalue over it.
        preconditioned: Whether the eigenvalue is that of the preconditioned matrix.
        lr: Learning rate of all groups; None (default) where they differ.
    """

    threshold: float
    ratio: float
    preconditioned: bool
    lr: float | None = None

    @property
    def state(self) -> State:
        """Where training is with regard to the edge of stability."""
        return "below" if self.ratio < EDGE[0] else "edge" if self.ratio <= EDGE[1] else "beyond"


@dataclass(frozen=True)
class Stability(Measurement[StabilityRatio]):
    """The optimizer's stability threshold, and the largest eigenvalue over it: of the matrix itself for SGD, of the
    preconditioned matrix for Adam and its kin, and for SGD with several learning rates.

    `CurvatureMonitor` and `measure` take it always, for no product; for Adam and its kin beside `Preconditioned`. There
    is no result where no threshold is known, where the optimizers train only a part of the parameters, and where
    several optimizers have different thresholds.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import measure
        >>> w = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> found = measure(lambda: w[0] ** 2 + 4 * w[1] ** 2, [w], torch.optim.SGD([w], lr=0.2))
        >>> found["curvature/stability_threshold"], round(found["curvature/stability_ratio"], 6)
        (10.0, 0.8)

    See Also:
        - `stability_threshold()`: the function behind it.
        - `Preconditioned`: the eigenvalue that counts for Adam and its kin.
        - `docs/edge_of_stability.md`: a run that goes there.
    """

    tags: ClassVar[tuple[Tag, ...]] = (
        Tag(
            "stability_threshold",
            "1 / learning rate",
            "the largest eigenvalue at which steps do not grow: of the curvature matrix for SGD, of the "
            "preconditioned matrix for other optimizers",
        ),
        Tag(
            "stability_ratio",
            "1",
            "the largest eigenvalue divided by the threshold; above 1 steps grow. Neither is written if the "
            "optimizers train only part of the measured parameters",
        ),
    )
    leads: ClassVar[bool] = True
    charts: ClassVar[tuple[Chart, ...]] = (
        # The ratio means the same for every optimizer, so that a folder of different runs has one chart.
        Chart("Stability ratio: above 1 steps overshoot", ("stability_ratio",)),
        # The threshold stands beside the eigenvalue that it is for, and no other.
        Chart(
            "Largest eigenvalue and the stability threshold",
            ("lambda_max", "stability_threshold"),
            more=True,
            unless="preconditioned_lambda_max",
        ),
        Chart(
            "Largest preconditioned eigenvalue and the stability threshold",
            ("preconditioned_lambda_max", "stability_threshold"),
            more=True,
        ),
    )

    def measure(self, view: View) -> StabilityRatio | None:
        """Return threshold and ratio, if they are of all parameters.

        Raises:
            UnmeasurableError: An adaptive optimizer has taken no step yet.
        """
        adapts, optimizers = view.asks_for(Preconditioned), view.training
        for optimizer in optimizers:
            if not isinstance(optimizer, SGD) and not optimizer.state and _is_known(optimizer):
                raise UnmeasurableError(
                    f"{type(optimizer).__name__} has taken no step yet. The ratio is known from the first step on."
                )
        if not optimizers or not (adapts or all(isinstance(optimizer, SGD) for optimizer in optimizers)):
            return None
        spectrum = view.of(Preconditioned) if adapts else view.of(ExtremeEigenvalues)
        try:
            thresholds = [stability_threshold(optimizer) for optimizer in optimizers]
            threshold = min(thresholds)
        except (TypeError, ValueError):  # no threshold is known, or never stable
            return None
        # A learning rate of zero, as in a warm-up, has no finite threshold; and optimizers that train a part of the
        # parameters have the threshold of that part.
        if spectrum is None or not math.isfinite(threshold) or not _train_all(optimizers, view.params):
            return None
        # The eigenvalue of the whole matrix says little where parts of it have thresholds of their own.
        if max(thresholds) > threshold:
            return None
        rates = {float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups}
        lr = rates.pop() if len(rates) == 1 else None
        return StabilityRatio(threshold, spectrum.top[0].value / threshold, adapts, lr)

    def differenced_along(self, result: StabilityRatio | None, view: View) -> Sequence[Tensor]:
        """Return no direction of its own."""
        return ()

    def values(self, result: StabilityRatio) -> dict[str, float]:
        """Return threshold and ratio."""
        return {"stability_threshold": result.threshold, "stability_ratio": result.ratio}

    def verdict(self, result: StabilityRatio, measured: Measured) -> str:
        """Return where training is with regard to the edge of stability."""
        where = {"below": "below", "edge": "at", "beyond": "beyond"}[result.state]
        earlier = measured.course.earlier(result.ratio)
        ratio = f"ratio {written(result.ratio, 2)}{f', {earlier}' if earlier else ''}"
        return f"{where} the edge of stability ({ratio})"

    def sentences(self, result: StabilityRatio, measured: Measured) -> list[str]:
        """Return whether steps are stable, and which learning rate to choose."""
        which = "of the preconditioned matrix " if result.preconditioned else ""
        at = f"is {written(result.ratio, 3)} times the stability threshold {written(result.threshold)}"
        earlier = measured.course.earlier(result.ratio)
        said = f"The largest eigenvalue {which}{at}{f' ({earlier})' if earlier else ''}"
        # A loss that spikes or does not fall, and a ratio that was high, say more than a small ratio.
        course = measured.course
        if result.state != "beyond" and course.trouble is not None:
            return [f"{said}."]
        if result.state == "below" and course.was_unstable:
            return [f"{said}. {_AFTER}"]
        return [f"{said}: {_advice(result, course)}"]


# What to do where the ratio is small after a high one.
_AFTER = (
    "A small ratio after a high one says little, as the network may be dead or flat: if the loss does not fall from "
    "here, start again with a lower learning rate, or warm up."
)


def _advice(result: StabilityRatio, course: Course) -> str:
    ratio, lr = result.ratio, result.lr
    if result.state == "beyond" and ratio >= _HUGE:
        return (
            "steps along its eigenvector overshoot. Where the loss does not fall again by itself, start again from the "
            "beginning with a learning rate 3 to 10 times lower; a ratio measured in a failed run overstates by far."
        )
    if result.state == "beyond":
        lower = (
            f"halve the learning rates, and again until it does; or warm up from {written(0.1 / ratio, 2)} of them"
            if lr is None
            else f"halve lr to {written(lr / 2, 3)}, and again until it does; or warm up to {written(lr, 3)} from "
            f"{written(0.1 * lr / ratio, 3)}"
        )
        return (
            "steps along its eigenvector overshoot and grow until the curvature falls. Where the loss does not fall "
            f"again by itself, {lower}."
        )
    if result.state == "edge":
        lower = "halve the learning rates" if lr is None else f"lower lr from {written(lr, 3)} to {written(lr / 2, 3)}"
        if course.from_start and course.steps == 0:
            return f"before the first step that is high. If the loss rises, {lower}, or warm up."
        return (
            "training is at the edge of stability, which is normal at a constant learning rate. Nothing needs to be "
            f"done while the loss falls; if it spikes, {lower}."
        )
    if ratio >= _FAR or course.ratio > EDGE[1]:
        return "steps are stable."
    room = "" if lr is None or ratio <= 0.0 else f" (lr={written(lr, 3)})"
    return (
        f"steps are stable, and far shorter than the largest eigenvalue allows{room}. If the loss falls slowly, raise "
        "the learning rate by factors of two; noise of small batches may limit it sooner."
    )


def _is_known(optimizer: Optimizer) -> bool:
    """Return whether the optimizer has a finite stability threshold."""
    try:
        return math.isfinite(stability_threshold(optimizer))
    except (TypeError, ValueError):
        return False


def _train_all(optimizers: Sequence[Optimizer], params: Sequence[Tensor]) -> bool:
    trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return all(id(p) in trained for p in params)
