"""`measure`: the measurements that `CurvatureMonitor` takes, for any training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from newtonopt.checks import (
    check_choice,
    check_closure,
    check_flag,
    check_instance,
    check_weight,
    kind_of,
    listed,
    shown,
)
from newtonopt.closure.evaluation import Products
from newtonopt.curvature.ascent import Kind
from newtonopt.curvature.diagonal_blocks import is_named
from newtonopt.curvature.measurements.eigenvalues import ExtremeEigenvalues
from newtonopt.curvature.measurements.gradient import AlongGradient
from newtonopt.curvature.measurements.measurement import (
    COST_TAGS,
    Chart,
    Matrix,
    Measured,
    Measurement,
    Plan,
    Tag,
    take,
    training,
)
from newtonopt.curvature.measurements.preconditioned import Preconditioned
from newtonopt.curvature.measurements.sharpness import Sharpness
from newtonopt.curvature.measurements.stability import Stability
from newtonopt.curvature.stability import adapts
from newtonopt.vectors.flat import trained_parameters

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]]


@torch.inference_mode(False)
def measure(
    closure: Callable[[], Any],
    params: Params,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    top: int = 3,
    bottom: int = 1,
    sharpness: Kind | Sharpness | None = "ball",
    measurements: Sequence[Measurement[Any]] = (),
    gradient: bool = True,
    curvature: Matrix = "hessian",
    products: Products = "auto",
    tolerance: float = 1e-2,
    max_products: int = 100,
    max_seconds: float | None = None,
    seed: int = 0,
    weight: float | None = None,
    prefix: str = "curvature",
    last: Measured | None = None,
    certify: bool = False,
    step_losses: Sequence[float] | None = None,
) -> Measured:
    """Measure the curvature of a loss: the values that `CurvatureMonitor` logs, for any training loop.

    Write them to TensorBoard by `add_to_tensorboard(writer, measured, step)`, for the Curvature tab.

    Parameters, `.grad`, buffers, random state and logs are as before afterwards.

    Args:
        closure: Computes the loss, as for `evaluate`.
        params: The parameters, or pairs of their names and them; those without `requires_grad` are left alone.
        optimizer: The optimizer that trains them, or several, for `stability_threshold`; None (default): no threshold.
            For one that adapts, such as Adam, and for SGD with several learning rates `Preconditioned` is measured
            too.
        top: How many of the largest eigenvalues, one or more. Default 3.
        bottom: How many of the smallest eigenvalues, zero or more. Default 1.
        sharpness: "ball" (default), "adaptive_ball" or "average", at a radius of 0.05; for another radius a
            `Sharpness`; None: not measured. Where eigenvalues are tracked (see `last`) it is left out, unless you give
            `Sharpness(always=True)`.
        measurements: Further measurements: `Layers`, `Trace`, `Density`, `GaussNewtonSpectrum`, `Alignment`,
            `RelativeSharpness`, `LossSlice`, or one of your own.
        gradient: Whether to measure the curvature along the gradient, for one product. Default True.
        curvature: The matrix that is measured: "hessian" (default) or "gauss_newton".
        products: How curvature products are formed, "auto" (default) or as for `evaluate`.
        tolerance: Relative width that an eigenvalue's interval must reach, between 0 and 1. Default 1e-2: a chart shows
            no more.
        max_products: Bound on the eigenvalues' products, one or more. Default 100. The extreme eigenvalues' intervals
            are as wide as they are then, and `converged` is 0; a further eigenvalue, shown without one, is
            left out unless it is known to a tenth.
        max_seconds: How long measuring may take, roughly: the time of the first product tells how many more there may
            be. Measurements that do not fit are left out. None (default): no bound.
        seed: Seed of the random start vectors. Default 0.
        weight: Weight of this process in the mean over several, as for `evaluate`; None (default): found from the
            losses.
        prefix: Prefix of the tags. Default "curvature".
        last: The return value of the last call in this run, whose eigenvectors to track, until the largest eigenvalue
            is known to `tolerance` and the others to a tenth, both by estimates. Eigenvalues that these vectors know
            nothing of may be missed: `certified` is 0 then, and `_upper` and `_lower` enclose some
            eigenvalue, perhaps not the extreme one. It is certified again only where tracking is seen to fail, and by
            `certify`. It also carries the losses and the highest stability ratio, which the words use. With "auto"
            products are differences of gradients where the last measurement from random starts found these accurate to
            half the tolerance. None (default): from random starts, with bounds that hold for the extreme ones.
        certify: Whether to start at random in spite of `last`. Default False; do it now and then.
        step_losses: Training losses of the steps since `last`, in their order, from which the words tell of spikes, of
            bad batches and of a loss that does not fall; an empty list before the first step. None (default): the
            measured loss counts instead.

    Returns:
        The values by tag, such as `curvature/lambda_max`.

    Raises:
        TypeError: `closure`, `params`, `optimizer`, `measurements`, `last` or `step_losses` is of another kind.
        ValueError: A setting is out of its range, an optimizer trains none of `params`, or a measurement lacks the
            optimizer or the parameters' names.
        RuntimeError: As `evaluate`, or the closure has changed something that cannot be put back, such as an iterator.
        FloatingPointError: The loss or a product is not finite.

    Example:
        >>> import torch
        >>> from newtonopt.curvature import measure
        >>> w = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> found = measure(lambda: w[0] ** 2 - 3 * w[1] ** 2, [w], sharpness=None)
        >>> round(found["curvature/lambda_max"], 6), round(found["curvature/lambda_min"], 6)
        (2.0, -6.0)
        >>> print(found.in_words().splitlines()[0])
        In short: not at a minimum.

    See Also:
        - `Measured`: the result.
        - `add_to_tensorboard()`: writes it to TensorBoard.
        - `CurvatureMonitor`: does the same during a Lightning run.
        - `plot_history()`: draws the results of many steps.
        - `docs/read_your_curvature.md`: what the values say, and what to do.
    """
    listing = list_of(top, bottom, sharpness, gradient, measurements)
    plan = Plan(listing, curvature, products, tolerance, max_products, max_seconds, seed, prefix)
    check_closure(closure)
    check_weight(weight)
    if last is not None:
        check_instance("last", last, Measured, "a Measured, or None", "Pass the return value of the last call.")
    check_flag("certify", certify)
    losses = None
    if step_losses is not None:
        losses = [_number(loss) for loss in listed("step_losses", step_losses, "numbers", "[0.7, 0.6]")]
    given = listed("params", params, "tensors", "model.parameters()")
    named = [pair for pair in given if is_named(pair)]
    tensors = [pair[1] if is_named(pair) else pair for pair in given]
    optimizers = _optimizers(optimizer)
    if optimizers and not training(optimizers, tensors):
        raise ValueError("optimizer must train some of params, got one that trains none. Pass another one, or None.")
    plan = for_optimizers(plan, optimizers, tensors)
    names = named if len(named) == len(given) else ()
    return take(closure, tensors, optimizers, plan, weight, names, last, certify=certify, step_losses=losses)


def list_of(
    top: int, bottom: int, sharpness: Kind | Sharpness | None, gradient: bool, measurements: Sequence[Measurement[Any]]
) -> tuple[Measurement[Any], ...]:
    """Return the list of measurements that arguments ask for: the usual ones, then the further ones.

    Raises:
        TypeError: `measurements` is no list of measurements.
        ValueError: An argument is out of its range, or there are two measurements of one class.
    """
    usual: list[Measurement[Any]] = [ExtremeEigenvalues(top, bottom)]
    check_flag("gradient", gradient)
    usual += [AlongGradient()] if gradient else []
    usual += [Stability()]
    if isinstance(sharpness, Sharpness):
        usual.append(sharpness)
    else:
        check_choice("sharpness", sharpness, (*get_args(Kind), None))
        usual += [] if sharpness is None else [Sharpness(sharpness)]
    if not isinstance(measurements, (list, tuple)):
        raise TypeError(f"measurements must be a list, got {shown(measurements)}. Write [Trace()], for example.")
    for measurement in measurements:
        if not isinstance(measurement, Measurement):
            raise TypeError(
                f"measurements must hold measurements only, got {shown(measurement)} in it. Write [Trace()], for "
                "example."
            )
    listing = (*usual, *measurements)
    kinds = [type(measurement) for measurement in listing]
    for measurement in measurements:
        if kinds.count(type(measurement)) > 1:
            raise ValueError(
                f"measurements must hold at most one {type(measurement).__name__}, counting those of the other "
                f"arguments, got {shown(measurement)} as a second one."
            )
    # `for_optimizers` may add this one.
    _check_tags(listing if Preconditioned in kinds else (*listing, Preconditioned()))
    return listing


def for_optimizers(plan: Plan, optimizers: Sequence[Optimizer], params: Sequence[Tensor]) -> Plan:
    """Return a plan with `Preconditioned` in it where an adaptive optimizer trains, whose threshold is for that matrix.

    Args:
        plan: Measurements that were asked for.
        optimizers: Optimizers that train some of the parameters.
        params: Parameters that are measured.
    """
    trained = trained_parameters(params)
    asked = any(isinstance(measurement, Preconditioned) for measurement in plan.measurements)
    if asked or not any(adapts(optimizer, trained) for optimizer in training(optimizers, trained)[:1]):
        return plan
    # Before the ratio to the threshold, which is computed from it.
    at = next(i for i, measurement in enumerate(plan.measurements) if isinstance(measurement, Stability))
    return replace(plan, measurements=(*plan.measurements[:at], Preconditioned(), *plan.measurements[at:]))


def _check_tags(measurements: Sequence[Measurement[Any]]) -> None:
    """Raise an error if a measurement has no tags, or if two would write the same one."""
    owners = {tag.name: "every list of measurements" for tag in COST_TAGS}
    for measurement in measurements:
        kind = type(measurement).__name__
        for name, holds in (("tags", Tag), ("charts", Chart)):
            entries = getattr(measurement, name, None)
            if not isinstance(entries, tuple) or not all(isinstance(entry, holds) for entry in entries):
                raise TypeError(f"{name} must be a tuple of {holds.__name__} in {kind}, got {shown(entries)}.")
        for tag in measurement.tags:
            if tag.name in owners:
                raise ValueError(
                    f"tags must differ between measurements, got {tag.name!r} in {kind} and in {owners[tag.name]}. "
                    "Rename one."
                )
            owners[tag.name] = kind


def _number(loss: object) -> float:
    """Return a loss as a number; a tensor with one entry is one."""
    try:
        if isinstance(loss, (bool, str)) or (isinstance(loss, Tensor) and loss.is_complex()):
            raise TypeError
        return float(loss.detach() if isinstance(loss, Tensor) else loss)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):  # of other kinds, several entries, or no value
        raise TypeError(f"step_losses must hold numbers only, got {kind_of(loss)} in it. Write [0.7, 0.6].") from None


def _optimizers(given: Any) -> list[Optimizer]:
    several = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
    for one in several:
        what = "a torch.optim.Optimizer, a list of them, or None"
        check_instance("optimizer", one, Optimizer, what, "Write torch.optim.SGD(params, lr=0.1), for example.")
    return list(several)
