"""The loss along one or two directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from newtonopt.checks import check_closure, check_positive, check_weight, check_whole, shown
from newtonopt.closure.evaluation import Products, check_products
from newtonopt.closure.objective import Objective
from newtonopt.curvature.drawing import figure_of, panels
from newtonopt.curvature.showing import as_table, as_text, written
from newtonopt.operators.matrices import hessian
from newtonopt.vectors.flat import trained_parameters
from newtonopt.vectors.scaling import dot, norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class LossSurface:
    """The loss at `theta + a d`, or at `theta + a d + b e`, and its quadratic model there.

    Attributes:
        coordinates: Values of a, and of b, `(points,)`, float64 on the CPU.
        losses: Losses `(points,)`, or `(points, points)` with a along the rows' index, float64 on the CPU; losses that
            are not finite stay so.
        model: Second-order Taylor polynomial at the same places, of the same shape.
        loss: Loss at theta.
        slopes: Slopes of the loss along the directions, `(1,)` or `(2,)`.
        curvatures: Second derivatives along the directions, `(1, 1)` or `(2, 2)`.
        products: Hessian products that were used, one a direction.
        names: Names of the directions in a figure.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import loss_slice
        >>> w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> surface = loss_slice(lambda: w[0] ** 2 + w[1], [w], torch.eye(2, dtype=torch.float64), points=3)
        >>> surface.losses.tolist()
        [[0.0, 1.0, 2.0], [-1.0, 0.0, 1.0], [0.0, 1.0, 2.0]]
        >>> torch.equal(surface.losses, surface.model)
        True

    See Also:
        - `loss_slice()`: computes it.
        - `Spectrum`: eigenvectors to slice along.
    """

    coordinates: Tensor = field(repr=False)
    losses: Tensor = field(repr=False)
    model: Tensor = field(repr=False)
    loss: float
    slopes: Tensor
    curvatures: Tensor
    products: int
    names: tuple[str, ...]

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_table(self)

    def plot(self, ax: Axes | Sequence[Axes] | None = None) -> Figure:
        """Draw loss and model as two lines; in two dimensions as contours side by side.

        Args:
            ax: Axes of matplotlib's to draw in, two of them in two dimensions; None (default): a new figure, which
                `plt.show()` shows.

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is missing.
            TypeError: `ax` is something else, or another number of axes.
        """
        drawn_in = panels(ax, self.losses.dim())
        steps = self.coordinates.numpy()
        if self.losses.dim() == 1:
            (axes,) = drawn_in
            axes.plot(steps, self.losses.numpy(), color="C0", linewidth=1.5, label="loss")
            axes.plot(steps, self.model.numpy(), color="C1", linestyle="--", label="quadratic model")
            axes.plot(0.0, self.loss, "ko", markersize=4)
            axes.set(xlabel=f"step along {self.names[0]}", ylabel="loss")
            axes.set_title(
                f"slope {written(float(self.slopes[0]), 3)}, curvature {written(float(self.curvatures[0, 0]), 3)}"
            )
            axes.legend(frameon=False)
            return figure_of(axes)
        finite = self.losses[self.losses.isfinite()]
        both = torch.cat([finite, self.model.reshape(-1)])
        levels = _levels(float(both.min()), float(both.max()))
        for panel, values, title in zip(drawn_in, (self.losses, self.model), ("loss", "quadratic model"), strict=True):
            # The first coordinate runs to the right.
            drawn = panel.contourf(steps, steps, values.T.numpy(), levels=levels, cmap="viridis")
            panel.plot(0.0, 0.0, "w+", markersize=8)
            panel.set(xlabel=f"step along {self.names[0]}", title=title, aspect="equal")
        drawn_in[0].set_ylabel(f"step along {self.names[1]}")
        figure = figure_of(drawn_in[0])
        figure.colorbar(drawn, ax=drawn_in, label="loss")
        return figure


@torch.inference_mode(False)
def loss_slice(
    closure: Callable[[], Any],
    params: Iterable[Tensor],
    directions: Tensor | Sequence[Tensor],
    radius: float = 1.0,
    points: int = 41,
    products: Products = "auto",
    weight: float | None = None,
) -> LossSurface:
    """Return the loss on a line or a square through the parameters, beside its quadratic model.

    Parameters, random state and buffers are as before afterwards.

    Args:
        closure: Computes the loss, as for `evaluate`.
        params: The parameters; those without `requires_grad` are left alone.
        directions: One or two flat vectors `(n,)`, such as `spectrum.top[0].vector`, of any length: coordinates count
            them as they are. One alone may be given without a sequence.
        radius: Reach of the coordinates, from -radius to radius; above zero. Default 1.
        points: Points in each direction, at least 3; an odd number has the parameters themselves among them. Default
            41: a square takes the loss 1681 times.
        products: How Hessian products are formed, as for `evaluate`.
        weight: Weight of this process in the mean over several, as for `evaluate`.

    Returns:
        The slice.

    Raises:
        TypeError: A direction is no tensor, or `closure` or `params` of another kind.
        ValueError: An argument is out of range, or a direction is of another length than the parameters, zero or not
            finite.
        FloatingPointError: The loss at the parameters is not finite.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import loss_slice
        >>> w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> loss_slice(lambda: w.square().sum(), [w], torch.tensor([2.0, 0.0]), points=3).losses.tolist()
        [4.0, 0.0, 4.0]

    See Also:
        - `LossSurface`: the result, which can be drawn.
        - `LossSlice`: the same in a training run.
        - `docs/measurements.md`: errors and costs beside those of other measurements.
    """
    check_positive("radius", radius)
    check_whole("points", points, 3)
    check_products(products)
    check_closure(closure)
    check_weight(weight)
    objective = Objective(closure, trained_parameters(params), products=products, weight=weight)
    axes = _axes(directions, objective.point)
    evaluation = objective.evaluate()
    objective.check_replay(evaluation)
    H = hessian(evaluation)
    curved = [H @ axis for axis in axes]
    slopes = torch.tensor([dot(evaluation.gradient, axis) for axis in axes], dtype=torch.float64, device="cpu")
    curvatures = torch.tensor([[dot(a, Hb) for Hb in curved] for a in axes], dtype=torch.float64, device="cpu")
    loss = float(evaluation.loss)
    del H
    evaluation.free()
    steps = torch.linspace(-radius, radius, points, dtype=torch.float64, device="cpu")
    grid = torch.cartesian_prod(*[steps] * len(axes)).reshape(-1, len(axes))
    losses = [objective.loss_at(_combined(place, axes)) for place in grid.tolist()]
    shape = (points,) * len(axes)
    model = loss + grid @ slopes + 0.5 * ((grid @ curvatures) * grid).sum(1)
    return LossSurface(
        steps,
        torch.tensor(losses, dtype=torch.float64, device="cpu").reshape(shape),
        model.reshape(shape),
        loss,
        slopes,
        0.5 * (curvatures + curvatures.T),
        len(axes),
        ("the direction",) if len(axes) == 1 else ("the first direction", "the second direction"),
    )


def _combined(place: list[float], axes: list[Tensor]) -> Tensor:
    step = place[0] * axes[0]
    return step if len(axes) == 1 else step + place[1] * axes[1]


def _axes(directions: Tensor | Sequence[Tensor], point: Tensor) -> list[Tensor]:
    if isinstance(directions, Tensor) and directions.dim() < 2:
        return _axes([directions], point)
    if not isinstance(directions, (Tensor, list, tuple)):
        raise TypeError(
            f"directions must be one or two flat vectors, got {shown(directions)}. Write spectrum.top[0].vector, for "
            "example."
        )
    if len(directions) not in (1, 2):
        raise ValueError(f"directions must be one or two flat vectors, got {len(directions)}.")
    for direction in directions:
        if not isinstance(direction, Tensor):
            raise TypeError(f"directions must hold flat tensors only, got {shown(direction)} in it.")
        if direction.shape != point.shape:
            raise ValueError(
                f"directions must have the parameters' shape as a flat vector, {tuple(point.shape)}, got "
                f"{tuple(direction.shape)}."
            )
        if not 0.0 < norm(direction) < math.inf:
            raise ValueError("directions must be finite and not zero, got a vector that is not.")
    return [direction.to(point.dtype).to(point.device) for direction in directions]


def _levels(low: float, high: float) -> Any:
    """Return round values that part the range into about sixteen."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(16).tick_values(low, high if high > low else low + 1.0)
