"""The parts of a measurement, each of which enters its values."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD, Optimizer

from newtonopt.closure.objective import Objective
from newtonopt.curvature.density import spectral_density
from newtonopt.curvature.diagonal_blocks import blocks
from newtonopt.curvature.eigenvalues.bounds import ASYMMETRIC
from newtonopt.curvature.eigenvalues.extreme import Eigenvalue, Spectrum, extreme_eigenvalues, follow
from newtonopt.curvature.measurement import Measurement, Settings
from newtonopt.curvature.sharpness import ascent, average, ball_around
from newtonopt.curvature.slices import loss_slice
from newtonopt.curvature.stability import preconditioned, stability_threshold
from newtonopt.curvature.traces import trace
from newtonopt.operators.linear_operator import LinearOperator
from newtonopt.vectors.scaling import InRange, dot, norm, scale_of, times_power

# Gradients for the sharpest point: that many at most, and no search with fewer; losses for the average sharpness.
_GRADIENTS, _LEAST_GRADIENTS, _SAMPLES = 20, 8, 64
# Products for trace and density each, more where the eigenvalues may have more, and none with fewer; and a run's steps
# for the density, of which there are as many runs as fit, at least 2.
_WHOLE_PRODUCTS, _LEAST_PRODUCTS, _STEPS = 100, 10, 50
# Products for following: a quarter of what a measurement from a random start may have; more if that is too few, but
# no more than some, and some for each eigenvalue: to a tolerance a GPT's tiny smallest one took a hundred, at three
# training steps each.
_FOLLOWED_PART, _FOLLOWED_BASE, _FOLLOWED_EACH = 4, 4, 2
# What TensorBoard's writer allows in no tag.
_OUTSIDE_TAGS = re.compile(r"[^-/\w.]")
# Losses along each direction of a slice.
_POINTS = 21


class Clock:
    """What is left of the time, in products; the same on all processes.

    Args:
        limit: Seconds; None: no limit.
        device: On which processes exchange what they have left.
    """

    def __init__(self, limit: float | None, device: torch.device) -> None:
        self._limit, self._device = limit, device
        self._began = time.perf_counter()
        self.product = 0.0

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self._limit is not None

    def elapsed(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._began

    def affordable(self, most: int) -> int:
        """How many products there may be, `most` at most."""
        if self._limit is None:
            return most
        left = torch.tensor((self._limit - self.elapsed()) / self.product, dtype=torch.float64, device=self._device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(left, dist.ReduceOp.MIN)
        return max(0, min(most, int(left)))


@dataclass(frozen=True)
class Look:
    """One measurement being taken.

    Attributes:
        values: What is entered into.
        settings: What was asked for.
        clock: What it may take.
        last: The measurement to follow, if any.
    """

    values: Measurement
    settings: Settings
    clock: Clock
    last: Measurement | None

    def spectrum(self, name: str, A: LinearOperator, top: int, bottom: int, start: bool = True) -> Spectrum | None:
        """The extreme eigenvalues, from where the last measurement found those of this name; None without time."""
        budget = self.clock.affordable(self.settings.max_products)
        if budget < 1:
            return None
        old = self.last.spectra.get(name) if self.last is not None and start else None
        if old is not None and any(e.vector.shape[0] != A.shape[0] for e in (*old.top, *old.bottom)):
            old = None  # other parameters are trained now
        tolerance, seed = self.settings.tolerance, self.settings.seed
        found = None
        if old is not None:
            least = min(budget, self.settings.max_products // _FOLLOWED_PART)
            most = max(least, min(budget, _FOLLOWED_BASE + _FOLLOWED_EACH * (top + bottom)))
            found = follow(A, old, top, bottom, tolerance, least, most, seed)
        if found is None:
            found = extreme_eigenvalues(A, top, bottom, tolerance, max_products=budget, seed=seed)
        self.values.spectra[name] = found
        return found

    def enter(self, name: str, found: Sequence[Eigenvalue]) -> None:
        """An extreme eigenvalue with its bounds; those of an eigenvalue, where nothing bounds the extreme one."""
        for e in found:
            self.values.add(name, e.value)
            self.values.add(f"{name}_lower", e.lower if math.isfinite(e.lower) else e.value - e.residual)
            self.values.add(f"{name}_upper", e.upper if math.isfinite(e.upper) else e.value + e.residual)


def along_gradient(look: Look, A: LinearOperator, gradient: Tensor) -> float | None:
    """The quotient g'Ag / g'g, and how long its product took; None where it is not needed or g is zero."""
    if not look.settings.gradient and not look.clock.limited:
        return None
    began = time.perf_counter()
    matrix, direction = InRange(A), times_power(gradient, -scale_of(gradient))
    along, square = dot(direction, matrix @ direction), dot(direction, direction)
    look.clock.product = time.perf_counter() - began
    return matrix.back(along / square) if square > 0.0 else None


def enter_eigenvalues(look: Look, A: LinearOperator, quotient: float | None) -> None:
    """The extreme one of each end with its bounds, the further ones (`lambda_2`, or `lambda_min_2`) without.

    Args:
        look: The measurement.
        A: The matrix.
        quotient: A Rayleigh quotient, which no largest eigenvalue is below: one that was followed and is has been lost.
    """
    settings = look.settings
    spectrum = look.spectrum("lambda", A, settings.top, settings.bottom)
    followed = spectrum is not None and not spectrum.certified and spectrum.top
    if followed and quotient is not None and followed[0].value < quotient - settings.tolerance * abs(quotient):
        spectrum = look.spectrum("lambda", A, settings.top, settings.bottom, start=False)
    if spectrum is None:
        return
    look.values.add("certified", float(spectrum.certified))
    if spectrum.asymmetry > ASYMMETRIC:
        look.values.add("asymmetry", spectrum.asymmetry)
    for first, others, found in (("lambda_max", "lambda", spectrum.top), ("lambda_min", "lambda_min", spectrum.bottom)):
        look.enter(first, found[:1])
        for rank, eigenvalue in enumerate(found[1:], start=2):
            if _is_known(eigenvalue):
                look.values.add(f"{others}_{rank}", eigenvalue.value)


def _is_known(eigenvalue: Eigenvalue) -> bool:
    """Whether a value that is shown without its bounds can be: an eigenvalue is within a tenth of it."""
    width = eigenvalue.upper - eigenvalue.lower
    return (width if math.isfinite(width) else eigenvalue.residual) <= 0.1 * abs(eigenvalue.value)


def those_that_train(optimizers: Sequence[Optimizer], params: Sequence[Tensor]) -> list[Optimizer]:
    """The optimizers that have any of the parameters."""
    own = {id(p) for p in params}
    return [o for o in optimizers if any(id(p) in own for group in o.param_groups for p in group["params"])]


def _train_all(optimizers: Sequence[Optimizer], params: Sequence[Tensor]) -> bool:
    trained = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    return all(id(p) in trained for p in params)


def enter_stability(look: Look, A: LinearOperator, params: Sequence[Tensor], optimizers: Sequence[Optimizer]) -> None:
    """The threshold, and the eigenvalue that it is for over it: that of the matrix itself for SGD alone."""
    training = those_that_train(optimizers, params)
    try:
        if not training:
            raise ValueError("optimizer must train some of these parameters, got none that does.")
        threshold = min(map(stability_threshold, training))
        operator = preconditioned(A, training[0], params) if look.settings.preconditioned else None
    except (TypeError, ValueError) as error:  # none with a threshold, or never stable, or without a step so far
        look.values.lack = str(error) if look.settings.preconditioned else None
        return
    name = "lambda_max"
    if operator is not None:
        name = "preconditioned_lambda_max"
        spectrum = look.spectrum(name, operator, 1, 0)
        look.enter(name, spectrum.top if spectrum is not None else ())
    elif not all(isinstance(optimizer, SGD) for optimizer in training):
        return
    largest = look.values.read(name)
    # A learning rate of zero, as in a warm-up, has no finite threshold; and where the optimizers train a part of the
    # parameters, theirs is that part's.
    if largest is not None and math.isfinite(threshold) and _train_all(training, params):
        look.values.add("stability_threshold", threshold)
        look.values.add("stability_ratio", largest / threshold)


def enter_gradient(look: Look, quotient: float | None, gradient: Tensor) -> None:
    """The curvature along the gradient, and what share of its square the top eigenvectors hold."""
    if not look.settings.gradient or quotient is None:
        return
    look.values.add("gradient_curvature", quotient)
    if look.values.spectrum is not None:
        length = norm(gradient)
        cosines = [(dot(e.vector, gradient) / length) ** 2 for e in look.values.spectrum.top]
        look.values.add("gradient_alignment", math.fsum(cosines))


def enter_layers(look: Look, A: LinearOperator, named: Sequence[tuple[str, Tensor]]) -> None:
    """The largest eigenvalue of each diagonal block that was asked for."""
    layers = look.settings.layers
    if layers is None:
        return
    for part, block in blocks(A, named, None if layers == "parts" else layers).items():
        name = f"lambda_max_of/{_OUTSIDE_TAGS.sub('_', part.removesuffix('.*'))}"
        spectrum = look.spectrum(name, block, 1, 0)
        if spectrum is not None and _is_known(spectrum.top[0]):
            look.values.add(name, spectrum.top[0].value)


def enter_whole_spectrum(look: Look, A: LinearOperator) -> None:
    """Trace, with its standard error, and density."""
    settings, most = look.settings, max(_WHOLE_PRODUCTS, look.settings.max_products)
    if settings.trace and (budget := look.clock.affordable(most)) >= _LEAST_PRODUCTS:
        found = trace(A, tolerance=settings.tolerance, max_products=budget, seed=settings.seed)
        look.values.add("trace", found.value)
        look.values.add("trace_error", found.standard_error)
    if settings.density and (budget := look.clock.affordable(most)) >= _LEAST_PRODUCTS:
        starts = max(2, budget // _STEPS)
        look.values.density = spectral_density(A, steps=budget // starts, starts=starts, seed=settings.seed)


def enter_sharpness(look: Look, objective: Objective, loss: float, gradient: Tensor) -> None:
    """In a ball by an ascent from where the gradient and the top eigenvalues say that the loss rises most, or from the
    last measurement's point where the loss is higher.

    On four networks for digits that stays below a whole `sharpness` by 0.7 % at most at radius 0.05, for a tenth of the
    work (by a fifth at radius 0.5); without the mirror image it would be by a fifth at 0.05.
    """
    settings, values = look.settings, look.values
    kind = settings.sharpness
    budget = look.clock.affordable(_GRADIENTS)
    if kind is None or budget < _LEAST_GRADIENTS:
        return
    ball = ball_around(objective, kind, settings.sharpness_radius, settings.tolerance, loss)
    if kind == "average":
        found = average(ball, _SAMPLES, settings.seed)
        values.add("sharpness_error", found.standard_error)
    else:
        places = ball.summits(ball.scale * gradient, values.spectrum.top if values.spectrum is not None else ())
        if look.last is not None and look.last.sharpest is not None:
            places += ball.towards(look.last.sharpest)
        if not places:
            return  # a zero gradient, and no time for eigenvalues
        found = ascent(ball, kind, places, budget, ascents=1)
        values.sharpest = found.step
    values.add("sharpness", found.value)


def enter_slice(look: Look, closure: Callable[[], Any], params: Sequence[Tensor], weight: float | None) -> None:
    """The loss along the top eigenvector, and the bottom one."""
    spectrum, count = look.values.spectrum, look.settings.loss_slice
    if count == 0 or spectrum is None:
        return
    ends = {"top": spectrum.top[:1], "bottom": spectrum.bottom[:1], "second": spectrum.top[1:]}
    named = [(f"the {end} eigenvector", e.vector) for end, found in ends.items() for e in found][:count]
    losses = _POINTS**count
    if len(named) == count and look.clock.affordable(losses) == losses:
        radius, form = look.settings.slice_radius, look.values.form
        names, directions = zip(*named, strict=True)
        found = loss_slice(closure, params, directions, radius, _POINTS, products=form, weight=weight)
        look.values.slice = replace(found, names=names)
