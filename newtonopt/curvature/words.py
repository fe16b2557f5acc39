"""What measured curvature means, in sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from newtonopt.curvature.measurement import Settings

# Between these ratios of the largest eigenvalue to the threshold training is called at the edge: full-batch gradient
# descent and Adam hover within 6 % of it (Cohen et al. 2021, 2022).
_BELOW, _BEYOND = 0.9, 1.1
# Bounds this close to a value of zero are those of underflow.
_NOTHING = 1e-30


def describe(read: Callable[[str], float | None], settings: Settings) -> list[str]:
    """Sentences about the values that were measured.

    Args:
        read: The value of a name such as "lambda_max"; None if it was not measured.
        settings: What they were measured by.
    """
    smallest = _smallest(read) if settings.curvature == "hessian" else ()
    return [*_largest(read), *smallest, *_gradient(read), *_sharpness(read, settings), *_cost(read)]


def _largest(read: Callable[[str], float | None]) -> Iterator[str]:
    """Of the matrix itself, then of the preconditioned one, each with the threshold where it is the one compared."""
    preconditioned = read("preconditioned_lambda_max") is not None
    for name, words, compared in (
        ("lambda_max", "The largest eigenvalue", not preconditioned),
        ("preconditioned_lambda_max", "The largest eigenvalue of the preconditioned matrix", True),
    ):
        value, ratio, threshold = read(name), read("stability_ratio"), read("stability_threshold")
        if value is None:
            continue
        if not compared or ratio is None or threshold is None:
            yield f"{words} is {_with_bounds(read, name)}."
            continue
        yield f"{words}, {_with_bounds(read, name)}, is at {ratio:.3g} of the stability threshold {threshold:.4g}: " + (
            "steps are stable."
            if ratio < _BELOW
            else "training is at the edge of stability."
            if ratio <= _BEYOND
            else "steps along it overshoot and grow, until the curvature falls."
        )


def _with_bounds(read: Callable[[str], float | None], name: str) -> str:
    value, lower, upper = (read(f"{name}{end}") for end in ("", "_lower", "_upper"))
    if value is None or lower is None or upper is None:
        return f"{value:.4g}"
    width = max(upper - value, value - lower)
    asymmetry = read("asymmetry")
    if asymmetry is not None:
        return f"{value:.4g} (not certified: products fail to be symmetric by {asymmetry:.2g} of the norm)"
    if read("certified") == 0.0:
        missed = "smaller" if name == "lambda_min" else "larger"
        return (
            f"{value:.4g} (not certified: some eigenvalue lies within {width:.2g} of it, a {missed} one may be missed)"
        )
    return f"{value:.4g} within {width:.2g}"


def _smallest(read: Callable[[str], float | None]) -> Iterator[str]:
    """Of the Hessian: that of a Gauss-Newton matrix is never negative and says nothing of the loss."""
    value, lower, upper = (read(f"lambda_min{end}") for end in ("", "_lower", "_upper"))
    if value is None or lower is None or upper is None:
        return
    if value == 0.0 and max(-lower, upper) < _NOTHING:
        yield "The smallest is zero: the loss is flat along it."
        return
    yield f"The smallest, {_with_bounds(read, 'lambda_min')}, " + (
        "says this is no minimum."
        if upper < 0.0
        else "says the loss is convex here."
        if lower > 0.0 and read("certified") != 0.0
        else "may have either sign."
    )


def _gradient(read: Callable[[str], float | None]) -> Iterator[str]:
    curvature = read("gradient_curvature")
    if curvature is None:
        return
    if curvature > 0.0:
        yield (
            f"Along the gradient the curvature is {curvature:.3g}: the loss falls most at a learning "
            f"rate of {1.0 / curvature:.3g}."
        )
    elif curvature == 0.0:
        yield "Along the gradient there is no curvature: the loss falls as the gradient says."
    else:
        yield f"Along the gradient the curvature is {curvature:.3g}: the loss falls faster than the gradient says."


def _sharpness(read: Callable[[str], float | None], settings: Settings) -> Iterator[str]:
    value, error = read("sharpness"), read("sharpness_error")
    kind, radius = settings.sharpness, settings.sharpness_radius
    if value is None:
        return
    if kind == "average":
        known = "" if error is None else f", with a standard error of {error:.2g}"
        yield f"Sharpness: at distance {radius:g} the loss rises by {value:.3g} on average{known}."
    else:
        where = f"distance {radius:g}" if kind == "ball" else f"{radius:g}, relative to each parameter's size,"
        yield f"Sharpness: within {where} the loss rises by {value:.3g} or more; that is the largest rise found."


def _cost(read: Callable[[str], float | None]) -> Iterator[str]:
    products, seconds = read("products"), read("seconds")
    if products is not None and seconds is not None:
        yield f"Measured with {products:.0f} products in {seconds:.2g} s."
