"""Arguments of the wrong kind, losses that are not finite, and calls where autograd is off."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from newtonopt import LinearOperator, evaluate, gauss_newton, hessian, jacobian
from newtonopt.curvature import (
    LossSlice,
    blocks,
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

N = 4


class Problem:
    """A linear classifier in float64, with everything that measurements are given."""

    def __init__(self, corrupt: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Linear(N - 1, 1, dtype=torch.float64)
        self.inputs = torch.randn(8, N - 1, generator=generator, dtype=torch.float64)
        self.targets = torch.zeros(8, 1, dtype=torch.float64)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.inputs[0, 0] += corrupt
        self.params = list(self.model.parameters())

    def closure(self) -> Tensor:
        self.model.zero_grad()
        loss = nn.functional.mse_loss(torch.tanh(self.model(self.inputs)), self.targets)
        loss.backward()
        return loss

    def hessian(self, **settings: Any) -> LinearOperator:
        return hessian(evaluate(self.closure, self.params, **settings))


Call = Callable[[Problem], object]


def _direction(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (
            lambda p: measure(p.closure, p.params, "a"),
            TypeError,
            "optimizer must be a torch.optim.Optimizer, a list of them, or None, got 'a'",
        ),
        (
            lambda p: measure(p.closure, p.params, [p.model]),
            TypeError,
            "optimizer must be a torch.optim.Optimizer, a list of them, or None, got Linear(",
        ),
        (
            lambda p: measure(p.closure, p.params, last=3),
            TypeError,
            "last must be a Measured, or None, got 3. Pass the return value",
        ),
        (
            lambda p: measure(p.closure, p.params, last={}),
            TypeError,
            "last must be a Measured, or None, got {}. Pass the return value",
        ),
        (
            lambda p: measure(p.params, p.closure),
            TypeError,
            "closure must be a function without arguments that computes the loss",
        ),
        (lambda p: measure(p.closure, p.closure), TypeError, "params must be an iterable of tensors, got a method"),
        (lambda p: measure(p.closure, p.model), TypeError, "params must be an iterable of tensors, got a Linear"),
        (
            lambda p: measure(p.closure, nn.Sequential(p.model)),
            TypeError,
            "params must be an iterable of tensors, got a Seq",
        ),
        (lambda p: measure(p.closure, p.params[0]), TypeError, "params must be an iterable of tensors, got a Par"),
        (
            lambda p: measure(p.closure, [(1, p.params[0])]),
            TypeError,
            "params must hold tensors only, got a tuple in it",
        ),
        (
            lambda p: measure(p.closure, p.params, weight="a"),
            ValueError,
            "weight must be positive and finite, or None, got",
        ),
        (
            lambda p: measure(p.closure, p.params, top=True),
            ValueError,
            "top must be a whole number and at least 1, got True",
        ),
        (
            lambda p: LossSlice(directions=True),
            ValueError,
            "directions must be a whole number and at least 1, got True",
        ),
        (
            lambda p: measure(p.closure, p.params, measurements="trace"),
            TypeError,
            "measurements must be a list, got 'trace'",
        ),
        (
            lambda p: LossSlice(radius=None),
            ValueError,
            "radius must be positive and finite, got None",
        ),
        (
            lambda p: measure(p.closure, p.params, max_seconds=True),
            ValueError,
            "max_seconds must be positive and finite, got True",
        ),
        (lambda p: measure(p.closure, p.params, tolerance="a"), ValueError, "tolerance must be in (0, 1), got 'a'"),
        (
            lambda p: evaluate(p.closure, p.params, weight=True),
            ValueError,
            "weight must be positive and finite, or None, got T",
        ),
        (
            lambda p: p.hessian() @ torch.tensor(1.0),
            ValueError,
            "v must be of shape (4,) or (4, k) for this 4 x 4 operator, got shape ().",
        ),
        (
            lambda p: critical_point(evaluate(p.closure, p.params), spectrum=3),  # type: ignore[arg-type]
            TypeError,
            "spectrum must be a Spectrum, or None, got 3. Write extreme_eigenvalues(operator)",
        ),
        (
            lambda p: critical_point(evaluate(p.closure, p.params), max_products="a"),  # type: ignore[arg-type]
            ValueError,
            "max_products must be a whole number and at least 1, got 'a'",
        ),
        (
            lambda p: critical_point(evaluate(p.closure, p.params), tolerance=True),
            ValueError,
            "tolerance must be positive and finite, got True",
        ),
        (
            lambda p: gradient_curvature(evaluate(p.closure, p.params), spectrum=3),  # type: ignore[arg-type]
            TypeError,
            "spectrum must be a Spectrum, or None, got 3. Write extreme_eigenvalues(operator)",
        ),
        (lambda p: sharpness(p.closure, p.params, seed=-1), ValueError, "seed must be a whole number from 0 to 2**64"),
        (
            lambda p: sharpness(p.closure, p.params, radius=True),
            ValueError,
            "radius must be positive and finite, got T",
        ),
        (lambda p: sharpness(p.closure, p.params, samples=True), ValueError, "samples must be a whole number and at l"),
        (
            lambda p: loss_slice(p.closure, p.params, extreme_eigenvalues(p.hessian())),
            TypeError,
            "directions must be one or two flat vectors, got a Spectrum. Write spectrum.top[0].vector",
        ),
        (
            lambda p: loss_slice(p.closure, p.params, torch.tensor(1.0)),
            ValueError,
            "directions must have the parameters' shape as a flat vector, (4,), got ().",
        ),
        (
            lambda p: loss_slice(p.closure, p.params, [_direction(1, 0, 0, 0), torch.zeros(N)]),
            ValueError,
            "directions must be finite and not zero, got",
        ),
        (lambda p: extreme_eigenvalues(p.hessian(), 0, 0), ValueError, "top + bottom must be at least 1, got"),
        (lambda p: extreme_eigenvalues(p.hessian(), start=3), TypeError, "start must be a Spectrum, or None, got 3."),
        (lambda p: trace(p.hessian(), seed=-1), ValueError, "seed must be a whole number from 0 to 2**64 - 1, got -1"),
        (
            lambda p: extreme_eigenvalues(p.hessian(), seed=2**64),
            ValueError,
            "seed must be a whole number from 0 to 2**64 - 1, got 18446744073709551616.",
        ),
        (
            lambda p: critical_point(evaluate(p.closure, p.params), seed=2**64),
            ValueError,
            "seed must be a whole number from 0 to 2**64 - 1",
        ),
        (
            lambda p: measure(p.closure, p.params, seed=2**64),
            ValueError,
            "seed must be a whole number from 0 to 2**64 - 1",
        ),
        (lambda p: frobenius_norm(p.hessian(), seed=-1), ValueError, "seed must be a whole number from 0 to 2**64"),
        (
            lambda p: diagonal(p.hessian(), seed=-1),
            ValueError,
            "seed must be a whole number from 0 to 2**64 - 1, got -1",
        ),
        (lambda p: effective_dimension(p.hessian(), 1, seed=True), ValueError, "seed must be a whole number from 0 to"),
        (lambda p: spectral_density(p.hessian(), seed="a"), ValueError, "seed must be a whole number from 0 to 2**64"),
        (
            lambda p: spectral_density(p.hessian()).density("a"),
            TypeError,
            "grid must be a tensor of points `(g,)`, or numb",
        ),
        (
            lambda p: spectral_density(p.hessian()).cumulative(3),
            ValueError,
            "grid must be points `(g,)`, none of them NaN, got 3",
        ),
        (
            lambda p: spectral_density(p.hessian()).density([math.nan]),
            ValueError,
            "grid must be points `(g,)`, none of them NaN, got [",
        ),
        (
            lambda p: blocks(p.hessian(), p.model.named_parameters(), []),
            ValueError,
            "patterns must be a list of patterns of names, or None, got []. Write ['encoder.*']",
        ),
        (
            lambda p: blocks(p.hessian(), p.model.named_parameters(), "a"),
            ValueError,
            "patterns must be a list of patterns of names, or None, got 'a'",
        ),
        (
            lambda p: blocks(p.hessian(), p.model),
            TypeError,
            "named_parameters must be an iterable of pairs, got a Linear. Write model.named_parameters()",
        ),
    ],
)
def test_errors_name_argument_value_and_remedy(call: Call, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(words)):
        call(Problem())


class Unwritten(nn.Module):
    """A module without a forward pass."""


USERS = {
    "evaluate": evaluate,
    "measure": measure,
    "sharpness": sharpness,
    "loss_slice": lambda closure, params: loss_slice(closure, params, torch.ones(N)),
}


@pytest.mark.parametrize("use", USERS.values(), ids=USERS)
def test_what_takes_arguments_is_no_closure(use: Callable[..., object]) -> None:
    problem = Problem()
    calls = (problem.model, nn.DataParallel(problem.model), nn.MSELoss(), Unwritten())
    for module in calls:
        with pytest.raises(TypeError, match=f"got the module {type(module).__name__}. Write such a function around it"):
            use(module, problem.params)
    with pytest.raises(TypeError, match=r"which takes input, target. Bind its arguments: functools.partial"):
        use(nn.functional.mse_loss, problem.params)
    with pytest.raises(TypeError, match=r"got <class 'torch.nn.modules.loss.MSELoss'>"):
        use(nn.MSELoss, problem.params)
    with pytest.raises(TypeError, match=r"got a Tensor. Give the function itself, not the loss that it returns"):
        use(problem.closure(), problem.params)


@pytest.mark.parametrize("use", USERS.values(), ids=USERS)
def test_parameters_that_are_used_up_or_of_another_kind_are_named(use: Callable[..., object]) -> None:
    problem = Problem()
    used = problem.model.parameters()
    list(used)
    with pytest.raises(
        ValueError, match=r"params must hold at least one entry, got a generator that gave none: it was empty"
    ):
        use(problem.closure, used)
    with pytest.raises(TypeError, match=r"got a dict. Write model.parameters\(\), or a list of the mapping's entries"):
        use(problem.closure, dict(problem.model.named_parameters()))
    with pytest.raises(TypeError, match=r"got a set. Write a list, which keeps its order"):
        use(problem.closure, set(problem.params))
    for entry, kind in (([1], "a list"), ({"params": [1]}, "a dict"), (None, "None")):
        with pytest.raises(TypeError, match=f"params must hold tensors only, got {kind} in it"):
            use(problem.closure, [entry])


class Penalty(nn.Module):
    """A loss of its own parameters: a module that is a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(2))

    def forward(self) -> Tensor:
        return self.theta.square().sum()


def test_a_module_or_function_that_needs_no_argument_is_a_closure() -> None:
    penalty = Penalty()
    optional = lambda scale=2.0: scale * penalty()  # noqa: E731
    for closure in (penalty, nn.DataParallel(penalty), optional, functools.partial(lambda x: x(), penalty)):
        assert hessian(evaluate(closure, penalty.parameters())).dense()[0, 0] in (2.0, 4.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda H: extreme_eigenvalues(H, confidence=99), "confidence must be in (0, 1), got 99. Write 0.99 for 99 %."),
        (lambda H: trace(H, tolerance=5), "tolerance must be in (0, 1), got 5. Write 0.05 for 5 %."),
        (lambda H: trace(H, tolerance=500), "tolerance must be in (0, 1), got 500."),
        (
            lambda H: trace(H, tolerance=torch.tensor(0.5)),
            "got tensor(0.5000). Write a Python number: .item() gives it",
        ),
        (
            lambda H: trace(H, tolerance=np.float32(0.5)),
            f"got {np.float32(0.5)!r}. Write a Python number: .item() gives it",
        ),
        (lambda H: trace(H, max_products=np.int64(9)), f"got {np.int64(9)!r}. Write a Python number: .item() gives it"),
        (lambda H: trace(H, seed=torch.tensor(3)), "got tensor(3). Write a Python number: .item() gives it."),
    ],
)
def test_a_percentage_and_a_tensor_are_told_how_to_be_written(call: Callable[[Any], object], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        call(Problem().hessian())


def test_more_eigenvalues_than_there_are_are_refused() -> None:
    H = Problem().hessian()
    for counts in ({"top": 1000}, {"bottom": 6}):
        (name, count), *_ = counts.items()
        with pytest.raises(ValueError, match=f"^{name} must be at most the number of parameters, {N}, got {count}"):
            extreme_eigenvalues(H, **counts)
    assert len(extreme_eigenvalues(H).top) == N  # the defaults ask for five
    problem = Problem()
    with pytest.raises(ValueError, match=f"top must be at most the number of parameters, {N}, got 1000"):
        measure(problem.closure, problem.params, top=1000)


@pytest.mark.parametrize("products", ["auto", "streamed", "finite_difference"])
@pytest.mark.parametrize(
    "call",
    [
        lambda p, **form: measure(p.closure, p.params, **form),
        lambda p, **form: extreme_eigenvalues(p.hessian(**form)),
        lambda p, **form: gauss_newton(evaluate(p.closure, p.params, **form)),
        lambda p, **form: critical_point(evaluate(p.closure, p.params, **form)),
        lambda p, **form: sharpness(p.closure, p.params, **form),
        lambda p, **form: loss_slice(p.closure, p.params, torch.ones(N), **form),
    ],
)
def test_a_loss_that_is_no_number_is_named(call: Callable[..., object], products: str) -> None:
    with pytest.raises(FloatingPointError, match=r"loss (is nan at|at) the parameters"):
        call(Problem(corrupt=math.nan), products=products)
    call(Problem(), products=products)


@pytest.mark.parametrize("products", ["auto", "streamed", "finite_difference"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "call",
    [
        lambda p, **form: measure(p.closure, p.params, **form)["curvature/lambda_max"],
        lambda p, **form: extreme_eigenvalues(p.hessian(**form)).top[0].value,
        lambda p, **form: float(p.hessian(**form).dense().norm()),
        lambda p, **form: float(gauss_newton(evaluate(p.closure, p.params, **form)).dense().norm()),
        lambda p, **form: float(jacobian(evaluate(p.closure, p.params, **form)).dense().norm()),
        lambda p, **form: sharpness(p.closure, p.params, **form).value,
        lambda p, **form: float(loss_slice(p.closure, p.params, torch.ones(N), points=3, **form).losses.sum()),
    ],
)
def test_autograd_may_be_off_around_a_measurement(
    call: Callable[..., float], mode: Callable[[], AbstractContextManager[None]], products: str
) -> None:
    problem = Problem()
    with mode():
        inside = call(problem, products=products)
    # Inference mode may run other kernels.
    assert inside == pytest.approx(call(problem, products=products), rel=1e-9)


def test_what_was_made_in_inference_mode_serves_outside() -> None:
    problem = Problem()
    with torch.inference_mode():
        evaluation = evaluate(problem.closure, problem.params)
        spectrum = extreme_eigenvalues(hessian(evaluation))
        last = measure(problem.closure, problem.params)
    H = hessian(evaluation)
    assert extreme_eigenvalues(H, start=spectrum).top[0].value == pytest.approx(spectrum.top[0].value)
    assert measure(problem.closure, problem.params, last=last).read("certified") == 0.0
    with torch.inference_mode():
        assert extreme_eigenvalues(H, start=spectrum).top[0].value == pytest.approx(spectrum.top[0].value)
