"""One measurement of a loss's curvature, as numbers under the tags of a log."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from newtonopt.checks import check_closure, check_instance, check_weight, listed, shown
from newtonopt.closure.evaluation import Products
from newtonopt.closure.objective import Objective
from newtonopt.curvature.diagonal_blocks import is_named
from newtonopt.curvature.measurement import Layers, Matrix, Measurement, Settings
from newtonopt.curvature.parts import (
    Clock,
    Look,
    along_gradient,
    enter_eigenvalues,
    enter_gradient,
    enter_layers,
    enter_sharpness,
    enter_slice,
    enter_stability,
    enter_whole_spectrum,
    those_that_train,
)
from newtonopt.curvature.sharpness import Kind
from newtonopt.operators.matrices import gauss_newton, hessian
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
    curvature: Matrix = "hessian",
    gradient: bool = True,
    preconditioned: bool = False,
    layers: Layers = None,
    trace: bool = False,
    density: bool = False,
    sharpness: Kind | None = "ball",
    sharpness_radius: float = 0.05,
    loss_slice: int = 0,
    slice_radius: float = 1.0,
    products: Products = "auto",
    tolerance: float = 1e-2,
    max_products: int = 100,
    max_seconds: float | None = None,
    seed: int = 0,
    weight: float | None = None,
    prefix: str = "curvature",
    last: Measurement | None = None,
) -> Measurement:
    """The values that `CurvatureMonitor` logs, for any training loop.

        for tag, value in measure(closure, model.parameters(), optimizer).items():
            writer.add_scalar(tag, value, step)

    Parameters, `.grad`, buffers, random state and logs are as before afterwards.

    Args:
        closure: Computes the loss, as for `evaluate`.
        params: The parameters, or pairs of their names and them; those without `requires_grad` are left alone.
        optimizer: The one that trains them, or several, for `stability_threshold`; None (default): no threshold.
        top: How many of the largest eigenvalues, one or more. Default 3.
        bottom: How many of the smallest eigenvalues, zero or more. Default 1.
        curvature: Of which matrix: "hessian" (default) or "gauss_newton".
        gradient: Whether to measure the curvature along the gradient, for one product. Default True.
        preconditioned: Whether to measure the largest eigenvalue of the `preconditioned` matrix too, which is the one
            that the threshold of Adam and its kin is for, from the optimizer's first step on. Default False.
        layers: Patterns of names, as for `blocks`: the largest eigenvalue of each such diagonal block, under
            `lambda_max_of/`; "parts": of each of the model's parts. `params` are pairs then. None (default): none.
        trace: Whether to measure the trace, with its standard error. Default False.
        density: Whether to measure the density of all eigenvalues, for `.density`. Default False.
        sharpness: "ball" (default), "adaptive_ball" or "average", as for `newtonopt.curvature.sharpness`; None: not
            measured.
        sharpness_radius: Above zero. Default 0.05 (Foret et al. 2021).
        loss_slice: Along how many eigenvectors to take the loss, for `.slice`: none (0), the top one (1), or the top
            one and the bottom one (2), which takes 441 losses. Default 0.
        slice_radius: Above zero. Default 1.
        products: How curvature products are formed, "auto" (default) or as for `evaluate`.
        tolerance: Relative width that an eigenvalue's interval must reach, between 0 and 1. Default 1e-2: a chart shows
            no more.
        max_products: Bound on the eigenvalues' products, one or more. Default 100. The extreme eigenvalues' intervals
            are as wide as they are then, and `curvature/converged` is 0; a further eigenvalue, shown without one, is
            left out unless it is known to a tenth.
        max_seconds: How long the measurement may take, roughly: from the time of its first product it is told how many
            more there may be. What does not fit is left out. None (default): no bound.
        seed: Of the random start vectors. Default 0.
        weight: Of this process in the mean over several, as for `evaluate`; None (default): found from the losses.
        prefix: The tags' group. Default "curvature".
        last: The last measurement of this run, whose eigenvectors to follow, until the largest is known to `tolerance`
            and the others to a tenth. What they know nothing of may be missed: `curvature/certified` is 0 then, and
            `_upper` and `_lower` enclose some eigenvalue, perhaps not the extreme one. It is certified again
            only where following is seen to fail: leave `last` out now and then. None (default): from random starts,
            with bounds that hold for the extreme ones.

    Returns:
        The values by tag: `curvature/lambda_max` and so on.

    Raises:
        TypeError: `closure`, `params`, `optimizer` or `last` is of another kind.
        ValueError: A setting out of its range, or an optimizer that trains none of `params`.
        RuntimeError: As `evaluate`, or the closure has changed something that cannot be put back, such as an iterator.
        FloatingPointError: The loss or a product is not finite.
    """
    settings = Settings(
        top,
        bottom,
        curvature,
        gradient,
        preconditioned,
        layers,
        trace,
        density,
        sharpness,
        sharpness_radius,
        loss_slice,
        slice_radius,
        products,
        tolerance,
        max_products,
        max_seconds,
        seed,
        prefix,
    )
    check_closure(closure)
    check_weight(weight)
    if last is not None:
        check_instance("last", last, Measurement, "a Measurement, or None", "Give the return value of the last call.")
    given = listed("params", params, "tensors", "model.parameters()")
    named = [pair for pair in given if is_named(pair)]
    if layers is not None and len(named) < len(given):
        raise ValueError(
            f"layers must be None for parameters without names, got {shown(layers)}. Give model.named_parameters() as "
            "params."
        )
    tensors = [pair[1] if is_named(pair) else pair for pair in given]
    optimizers = _optimizers(optimizer)
    if preconditioned and not optimizers:
        raise ValueError("preconditioned must be False without an optimizer, got True. Give the one that trains.")
    if optimizers and not those_that_train(optimizers, tensors):
        raise ValueError("optimizer must train some of params, got one that trains none. Give another, or None.")
    return take(closure, tensors, optimizers, settings, weight, named, last)


def _optimizers(given: Any) -> list[Optimizer]:
    several = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
    for one in several:
        what = "an optimizer of torch's kind, a list of them, or None"
        check_instance("optimizer", one, Optimizer, what, "Write torch.optim.SGD(params, lr=0.1), for example.")
    return list(several)


def take(
    closure: Callable[[], Any],
    params: Iterable[Tensor],
    optimizers: Sequence[Optimizer],
    settings: Settings,
    weight: float | None = None,
    named: Sequence[tuple[str, Tensor]] = (),
    last: Measurement | None = None,
) -> Measurement:
    """`measure` by settings that were checked before."""
    values, params = Measurement(settings), trained_parameters(params)
    look = Look(values, settings, Clock(settings.max_seconds, params[0].device), last)
    verdicts = None if last is None else last.verdicts
    objective = Objective(closure, params, products=settings.products, weight=weight, verdicts=verdicts)
    evaluation = objective.evaluate()
    if last is None:
        objective.check_replay(evaluation)
    gradient = evaluation.gradient
    A = hessian(evaluation) if settings.curvature == "hessian" else gauss_newton(evaluation)
    if not math.isfinite(float(gradient.abs().max())):
        raise FloatingPointError(
            "The gradient is not finite at the parameters, so there is no curvature: look for a norm, a root or a "
            "logarithm at zero."
        )
    quotient = along_gradient(look, A, gradient)
    enter_eigenvalues(look, A, quotient)
    enter_gradient(look, quotient, gradient)
    enter_stability(look, A, params, optimizers)
    enter_layers(look, A, named)
    if values.spectra:
        values.add("converged", float(all(spectrum.converged for spectrum in values.spectra.values())))
    enter_whole_spectrum(look, A)
    values.add("products", A.products + evaluation.checks)
    values.verdicts, values.doubt = evaluation.verdicts, A.trust.doubt
    del A
    evaluation.free()
    # What has no second derivative now has none the next time.
    values.form = "finite_difference" if evaluation.form == "finite_difference" else settings.products
    enter_sharpness(look, objective, float(evaluation.loss), gradient)
    enter_slice(look, closure, params, weight)
    objective.settle()
    objective.check_restored()
    values.add("seconds", look.clock.elapsed())
    return values
