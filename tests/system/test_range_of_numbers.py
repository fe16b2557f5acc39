"""Numbers whose squares leave the range of their dtype: solvers and every measurement, over the whole range."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from powers import POWERS, WHOLE, matrix, times
from torch import Tensor, nn
from torch.func import functional_call

from newtonopt import LinearOperator, evaluate, hessian
from newtonopt.curvature import (
    Spectrum,
    critical_point,
    diagonal,
    effective_dimension,
    extreme_eigenvalues,
    frobenius_norm,
    gradient_curvature,
    loss_slice,
    measure,
    sharpness,
    spectral_density,
    trace,
)
from newtonopt.solvers import secular
from newtonopt.solvers.cg import conjugate_gradients, shortened
from newtonopt.solvers.dense import solve_ball
from newtonopt.solvers.krylov import krylov_space, minimise_in
from newtonopt.solvers.lanczos import lanczos, negative_curvature


def operator(A: Tensor, psd: bool = False) -> LinearOperator:
    return LinearOperator(lambda v: A @ v, (len(A), len(A)), A[0], psd=psd)


def holds(spectrum: Spectrum, eigenvalues: Tensor, power: int) -> None:
    """Each interval holds its eigenvalue, `eigenvalues` being those of the matrix before it was scaled."""
    room = 1e-13 * float(eigenvalues.abs().max())  # rounding of the truth itself
    for found, truths in ((spectrum.top, eigenvalues.flip(0)), (spectrum.bottom, eigenvalues)):
        for e, truth in zip(found, truths.tolist(), strict=False):
            assert e.lower <= math.ldexp(truth + room, power)
            assert e.upper >= math.ldexp(truth - room, power)
            assert math.isfinite(e.upper - e.lower) or not spectrum.converged


@pytest.mark.parametrize(("dtype", "power"), POWERS)
@pytest.mark.parametrize(("top", "bottom", "budget"), [(3, 2, 300), (1, 1, 8)])
def test_intervals_hold(dtype: torch.dtype, power: int, top: int, bottom: int, budget: int) -> None:
    truth = torch.linalg.eigvalsh(matrix())
    spectrum = extreme_eigenvalues(operator(times(matrix().to(dtype), power)), top, bottom, max_products=budget)
    holds(spectrum, truth, power)
    if (dtype, power) in WHOLE:
        assert spectrum.converged == (budget == 300)


@pytest.mark.parametrize(("dtype", "power"), POWERS)
def test_repeated_eigenvalues_are_counted(dtype: torch.dtype, power: int) -> None:
    """These take several runs, whose bounds must be in the same units."""
    values = torch.tensor([4.0, 4.0, 4.0, 2.0, 2.0, 1.0, 0.0, 0.0, -1.0] + 40 * [0.5], dtype=torch.float64)
    spectrum = extreme_eigenvalues(operator(times(values.to(dtype), power).diag()), 4, 2)
    holds(spectrum, values.sort().values, power)


@pytest.mark.parametrize(("dtype", "power"), WHOLE)
@pytest.mark.parametrize("budget", [12, 300])
def test_sums_over_the_spectrum(dtype: torch.dtype, power: int, budget: int) -> None:
    """They scale with the matrix."""
    A = matrix(lowest=0.1).to(dtype)
    plain, scaled = operator(A, psd=True), operator(times(A, power), psd=True)
    close = {"rel": 1e3 * torch.finfo(dtype).eps}
    for of in (trace, frobenius_norm):
        one, other = of(plain, max_products=budget), of(scaled, max_products=budget)
        assert math.ldexp(other.value, -power) == pytest.approx(one.value, **close)
        assert math.ldexp(other.standard_error, -power) == pytest.approx(one.standard_error, **close)
        assert other.converged == one.converged
    entries, others = diagonal(plain, max_products=budget), diagonal(scaled, max_products=budget)
    torch.testing.assert_close(times(others.values, -power), entries.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(times(others.standard_errors, -power), entries.standard_errors, rtol=1e-3, atol=1e-5)
    # A diagonal matrix, for which the order of rounding does not matter.
    d = torch.linspace(0.25, 1.0, 24, dtype=dtype)
    plain, scaled = operator(d.diag(), psd=True), operator(times(d, power).diag(), psd=True)
    one, other = (
        effective_dimension(A, math.ldexp(0.5, k), max_products=budget).value for A, k in ((plain, 0), (scaled, power))
    )
    assert other == pytest.approx(one, rel=1e-3)
    nodes, others = (spectral_density(A, steps=5, starts=3).nodes for A in (plain, scaled))
    torch.testing.assert_close(times(others, -power), nodes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "power"), [(dtype, k) for dtype, k in POWERS if (dtype, k) not in WHOLE])
def test_what_underflow_may_take_is_in_the_errors(dtype: torch.dtype, power: int) -> None:
    A = times(matrix().to(dtype), power)
    found, size = trace(operator(A)), frobenius_norm(operator(A))
    assert abs(found.value - math.ldexp(float(matrix().trace()), power)) <= found.standard_error
    assert abs(size.value - math.ldexp(float(matrix().norm()), power)) <= size.standard_error
    assert found.standard_error > 0.0
    assert size.standard_error > 0.0
    assert bool((diagonal(operator(A)).standard_errors > 0.0).all())


@pytest.mark.parametrize(("dtype", "power"), WHOLE)
@pytest.mark.parametrize("moved", [True, False])
def test_solvers(dtype: torch.dtype, power: int, moved: bool) -> None:
    """The minimiser of `2^p g's + 2^a s'As / 2` is `2^(p - a)` times that of `g's + s'As / 2`, whatever bounds it."""
    p = 0 if moved else power
    far = p - power

    def solutions(A: Tensor, g: Tensor, far: int) -> list[Tensor]:
        radius = math.ldexp(3.0, far)
        ball = functools.partial(secular.ball, radius=radius)
        path = conjugate_gradients(A, g, radius=radius, rounding=1e-6, keep_path=True)
        space = krylov_space(A, g, ball, residual_tolerance=1e-3, max_products=24)
        exact = solve_ball(*torch.linalg.eigh(A), g, radius)
        return [path.step, shortened(path, g, radius / 2).step, minimise_in(space, g, ball).step, exact.step]

    gradient = torch.linspace(1, 2, 24, dtype=dtype)
    for lowest in (0.1, -1.0):
        A = matrix(lowest=lowest).to(dtype)
        expected = solutions(A, gradient, 0)
        for one, other in zip(expected, solutions(times(A, power), times(gradient, p), far), strict=True):
            torch.testing.assert_close(times(other, -far), one, rtol=1e-2, atol=1e-2)
    start = torch.linspace(0, 1, 24, dtype=dtype)
    A, settings = matrix(lowest=0.1).to(dtype), {"residual_tolerance": 1e-4}
    plain = conjugate_gradients(A, gradient, start=start, **settings)
    found = conjugate_gradients(times(A, power), times(gradient, p), start=times(start, far), **settings)
    torch.testing.assert_close(times(found.step, -far), plain.step, rtol=1e-2, atol=1e-2)
    if abs(p + far) < 1000:
        assert math.ldexp(found.decrease, -p - far) == pytest.approx(plain.decrease, rel=1e-3)


@pytest.mark.parametrize(("dtype", "power"), WHOLE)
def test_cubic_models(dtype: torch.dtype, power: int) -> None:
    """The minimiser scales by `2^(a - w)` if eigenvalues do by `2^a`, sigma by `2^w` and slopes by `2^(2a - w)`."""
    values, slopes = torch.linspace(-1, 2, 9, dtype=torch.float64), torch.linspace(1, 2, 9, dtype=torch.float64)
    expected, reason = secular.cubic(values, slopes, 0.5)
    y, same = secular.cubic(times(values, power), times(slopes, power), math.ldexp(0.5, power))
    assert same == reason
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "power"), WHOLE)
def test_the_lanczos_process_and_negative_curvature(dtype: torch.dtype, power: int) -> None:
    A, start = matrix().to(dtype), torch.linspace(1, 2, 24, dtype=dtype)
    plain, scaled = lanczos(A, start, 12), lanczos(times(A, power), times(start, -power // 2), 12)
    torch.testing.assert_close(times(scaled.ritz_values(), -power), plain.ritz_values(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(times(scaled.residuals(), -power), plain.residuals(), rtol=1e-2, atol=1e-3)
    found = negative_curvature(times(A, power), start)
    assert found is not None
    assert math.ldexp(found[1], -power) == pytest.approx(float(torch.linalg.eigvalsh(matrix())[0]), rel=0.2)


class Classifier:
    """A small network for three classes, with the dense Hessian of its float64 copy."""

    def __init__(self, dtype: torch.dtype, sharpness: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
        inputs = torch.randn(400, 3, generator=generator, dtype=torch.float64).to(dtype)
        with torch.no_grad():
            for p in self.net.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
            best = self.net(inputs).sort(1).values
            self.inputs = inputs[(best[:, 2] - best[:, 1]).argsort(descending=True)[:10]]
            self.targets = self.net(self.inputs).argmax(1)
            for p in self.net[2].parameters():
                p *= sharpness
        self.params = list(self.net.parameters())

    def closure(self, power: int = 0) -> Callable[[], Tensor]:
        """Return a closure of the loss times `2^power`."""

        def closure() -> Tensor:
            self.net.zero_grad()
            loss = times(F.cross_entropy(self.net(self.inputs), self.targets), power)
            loss.backward()
            return loss

        return closure

    def dense(self) -> tuple[Tensor, Tensor]:
        """Gradient and Hessian."""
        net = copy.deepcopy(self.net).double()
        names, sizes = zip(*[(name, p.numel()) for name, p in net.named_parameters()], strict=True)
        shapes = [p.shape for p in net.parameters()]
        flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])

        def loss(v: Tensor) -> Tensor:
            pieces = [piece.view(shape) for piece, shape in zip(v.split(sizes), shapes, strict=True)]
            outputs = functional_call(net, dict(zip(names, pieces, strict=True)), (self.inputs.double(),))
            return F.cross_entropy(outputs, self.targets)

        return torch.func.grad(loss)(flat), torch.func.jacrev(torch.func.jacrev(loss))(flat)


@pytest.mark.parametrize(("dtype", "power"), POWERS)
def test_measurements_of_a_network_whose_loss_is_scaled(dtype: torch.dtype, power: int) -> None:
    case = Classifier(dtype)
    gradient, H = case.dense()
    truth = torch.linalg.eigvalsh(H)
    # Rounding of the network in its own dtype.
    assert truth[0] < -1e-3
    evaluation = evaluate(case.closure(power), case.params)
    spectrum = extreme_eigenvalues(hessian(evaluation), 2, 1)
    holds(spectrum, truth, power)
    point = critical_point(evaluation, tolerance=math.ldexp(1.0, power + 2))
    assert point.kind == ("saddle" if (dtype, power) in WHOLE else point.kind)
    assert point.kind not in ("minimum", "maximum")
    along = gradient_curvature(evaluation, spectrum)
    if (dtype, power) in WHOLE:
        quotient = float(gradient @ H @ gradient / gradient.square().sum())
        assert math.ldexp(along.curvature, -power) == pytest.approx(quotient, rel=1e-4)
        assert math.ldexp(along.gradient_norm, -power) == pytest.approx(float(gradient.norm()), rel=1e-5)
        assert math.ldexp(point.gradient_norm, -power) == pytest.approx(float(gradient.norm()), rel=1e-5)
        cosine = float(spectrum.top[0].vector.double() @ gradient / gradient.norm())
        assert along.alignments[0] == pytest.approx(cosine**2, rel=1e-3)
        values = measure(case.closure(power), case.params)
        assert math.ldexp(values["curvature-more/gradient_curvature"], -power) == pytest.approx(quotient, rel=1e-4)
        plain = sharpness(case.closure(), case.params, radius=0.5)
        found = sharpness(case.closure(power), case.params, radius=0.5)
        assert math.ldexp(found.value, -power) == pytest.approx(plain.value, rel=1e-2)
        short = torch.full_like(evaluation.gradient, 2.0**-66)
        found = loss_slice(case.closure(power), case.params, short, points=3)
        curvature = math.ldexp(float(H.sum()), power - 132)
        assert float(found.curvatures) == pytest.approx(curvature, rel=1e-3)


@pytest.mark.parametrize("sharp", [6.0, 10.0, 16.0, 20.0, 26.0, 30.0, 60.0])
def test_classifiers_whose_loss_prints_zero(sharp: float) -> None:
    """Their softmax has saturated: products of float32 are those of no symmetric matrix, which is what shows."""
    case = Classifier(torch.float32, sharp)
    truth = torch.linalg.eigvalsh(case.dense()[1])
    evaluation = evaluate(case.closure(), case.params)
    assert float(evaluation.loss) < 1e-3
    spectrum = extreme_eigenvalues(hessian(evaluation), 2, 2)
    holds(spectrum, truth, 0)
    assert critical_point(evaluation).kind not in ("minimum", "maximum")
    if 10.0 <= sharp <= 26.0:
        assert spectrum.asymmetry > 3e-3
        assert not spectrum.certified
        assert not spectrum.converged
        values = measure(case.closure(), case.params, sharpness=None)
        assert values["curvature-bookkeeping/certified"] == values["curvature-bookkeeping/converged"] == 0.0
        assert values["curvature-bookkeeping/asymmetry"] > 3e-3
        assert "not certified: the asymmetry of the products is" in values.in_words()


def test_what_is_not_symmetric_is_not_certified() -> None:
    A = torch.randn(20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectrum = extreme_eigenvalues(operator(matrix(20) + 0.01 * A), 2, 1)
    assert not spectrum.certified
    assert not spectrum.converged
    assert spectrum.asymmetry > 3e-3
    assert all(math.isinf(e.upper) for e in spectrum.top)
    assert all(math.isinf(e.lower) for e in spectrum.bottom)
    spectrum = extreme_eigenvalues(operator(matrix(20)), 2, 1)
    assert spectrum.certified
    assert spectrum.converged
    assert spectrum.asymmetry < 1e-13
