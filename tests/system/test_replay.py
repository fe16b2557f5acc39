"""Closures that compute another function when they run again: noticed by the gradient, for losses may be equal."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from problems import unseen
from torch import Tensor, nn

from newtonopt import evaluate, gauss_newton, hessian, jacobian
from newtonopt.closure.evaluation import Products
from newtonopt.closure.objective import Objective
from newtonopt.curvature import extreme_eigenvalues, loss_slice, measure, sharpness
from newtonopt.optimizers import CubicNewton, DampedNewton, HessianFree, LevenbergMarquardt, NewtonCG, TrustRegionNewton

OPTIMIZERS = [CubicNewton, DampedNewton, HessianFree, LevenbergMarquardt, NewtonCG, TrustRegionNewton]
FORMS = [form for form in get_args(Products) if form != "auto"]
OTHER = "computed (another gradient|the loss .*) at the same parameters.*do not call next.. on an iterator made outside"


class Fresh:
    """A classifier at initialisation, of which all batches have nearly the same loss."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)
        with torch.no_grad():
            for p in self.model[2].parameters():
                p.mul_(1e-3)
        self.inputs = torch.randn(160, 6, dtype=dtype)
        self.targets = torch.randint(0, 4, (160,))
        self.params = list(self.model.parameters())

    def loss(self, rows: Any = slice(None), temperature: float = 1.0, shift: float = 0.0) -> Tensor:
        self.model.zero_grad()
        loss = F.cross_entropy(self.model(self.inputs[rows] + shift) * temperature, self.targets[rows])
        loss.backward()
        return loss


def _batches(case: Fresh) -> Callable[[], Tensor]:
    rows = itertools.cycle(torch.arange(160).split(32))
    return lambda: case.loss(next(rows))


def _loader(case: Fresh) -> Callable[[], Tensor]:
    """The usual mistake: the loader's iterator outside of the closure."""
    data = torch.utils.data.TensorDataset(torch.arange(160))
    batches = iter(torch.utils.data.DataLoader(data, batch_size=4))
    return lambda: case.loss(next(batches)[0])


def _counter(case: Fresh) -> Callable[[], Tensor]:
    count = itertools.count()
    return lambda: case.loss(slice(32 * (next(count) % 5), None, 5))


def _temperature(case: Fresh) -> Callable[[], Tensor]:
    count = itertools.count(1)
    return lambda: case.loss(temperature=1.0 + 0.1 / next(count))


def _centre(case: Fresh) -> Callable[[], Tensor]:
    means = itertools.accumulate(itertools.repeat(1.0), lambda mean, new: 0.9 * mean + 0.1 * new, initial=0.0)
    return lambda: case.loss(shift=next(means))


CLOSURES = [_batches, _loader, _counter, _temperature, _centre]


@pytest.mark.parametrize("make", CLOSURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("products", FORMS)
def test_no_step_is_taken(make: Any, dtype: torch.dtype, products: Any) -> None:
    for kind in OPTIMIZERS:
        if kind is LevenbergMarquardt and products not in ("auto", "cached"):
            continue  # it takes rows from the graph alone
        case = Fresh(dtype)
        before = [p.detach().clone() for p in case.params]
        optimizer = kind(case.params, products=products)
        with pytest.raises(RuntimeError, match=OTHER):
            optimizer.step(make(case))
        assert all(torch.equal(p, q) for p, q in zip(case.params, before, strict=True))
        assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("make", CLOSURES)
@pytest.mark.parametrize("products", FORMS)
def test_nothing_is_measured(make: Any, products: Any) -> None:
    case = Fresh()
    for take in (measure, sharpness):
        with pytest.raises(RuntimeError, match=OTHER):
            take(make(case), case.params, products=products)
    with pytest.raises(RuntimeError, match=OTHER):
        loss_slice(make(case), case.params, torch.ones(sum(p.numel() for p in case.params)), products=products)


@pytest.mark.parametrize("make", CLOSURES)
@pytest.mark.parametrize("products", ["streamed", "finite_difference"])
@pytest.mark.parametrize("of", [hessian, gauss_newton, jacobian])
def test_no_product_is_formed_by_running_it_again(make: Any, products: Any, of: Any) -> None:
    case = Fresh()
    A = of(evaluate(make(case), case.params, products=products))
    with pytest.raises(RuntimeError, match=OTHER):
        A @ torch.ones(A.shape[1])


def test_streamed_hessian_products_see_each_gradient() -> None:
    """A closure that goes on to other data only after some calls."""
    case, goes_on = Fresh(), [False]
    H = hessian(evaluate(lambda: case.loss(slice(80 * goes_on[0], None)), case.params, products="streamed"))
    ones = torch.ones(H.shape[0])
    first = H @ ones
    assert torch.equal(H @ ones, first)
    goes_on[0] = True
    with pytest.raises(RuntimeError, match=OTHER):
        H @ ones


def test_the_cached_products_are_those_of_the_one_run() -> None:
    case = Fresh()
    H = hessian(evaluate(_batches(case), case.params, products="cached"))
    assert extreme_eigenvalues(H, 1, 0).converged
    case = Fresh()
    torch.testing.assert_close(H.dense(), hessian(evaluate(lambda: case.loss(slice(32)), case.params)).dense())


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("steps", [0, 200])
def test_rounding_is_the_same_function(precision: str, steps: int) -> None:
    """Sums in another order, as kernels of a GPU may take them: at the start, and at a minimum where terms cancel."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    case, generator = Fresh(dtype), torch.Generator().manual_seed(0)
    orders = itertools.cycle([torch.randperm(160, generator=generator) for _ in range(7)])

    def closure() -> Tensor:
        rows = next(orders)
        case.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = F.cross_entropy(case.model(case.inputs[rows]), case.targets[rows])
        loss = loss + 1e-2 * sum(p.square().sum() for p in case.params)
        loss.backward()
        return loss

    if steps:
        torch.optim.LBFGS(case.params, max_iter=steps, line_search_fn="strong_wolfe").step(closure)
    objective = Objective(closure, case.params)
    for _ in range(5):
        evaluation = objective.evaluate()
        objective.replay(evaluation)
        assert evaluation.standing.replayed


def test_the_check_costs_one_run_for_an_optimizer() -> None:
    """In the first step only, and of a new optimizer again."""
    case = Fresh(torch.float64)
    runs: Callable[[], list[int]] = unseen([])

    def closure() -> Tensor:
        runs().append(1)
        return case.loss()

    optimizer = HessianFree(case.params)
    counts = []
    for _ in range(3):
        runs().clear()
        optimizer.step(closure)
        assert optimizer.last_step is not None
        counts.append(len(runs()) - 1 - optimizer.last_step.trials)
    assert counts[0] >= 1 and counts[1:] == [0, 0]  # with those that compare products


def test_differences_say_that_the_loss_jumps() -> None:
    """The closure replays the same function, in which torch rounds the diagonal to whole numbers."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="householder").double()
    evaluation = evaluate(lambda: F.mse_loss(layer(inputs), targets), layer.parameters(), products="finite_difference")
    H = hessian(evaluation)
    with pytest.warns(UserWarning, match="differ by .* of their size at best|do not respect what backward"):
        assert H.trust.doubt
    with pytest.raises(RuntimeError, match=r"Close to the parameters the loss is .* may jump.*Use products="):
        H.dense()


def test_differences_tell_other_data_from_a_jump() -> None:
    """A closure that goes on to other data only after some calls."""
    case, goes_on = Fresh(torch.float64), [False]

    def closure() -> Tensor:
        return case.loss(temperature=300.0 if goes_on[0] else 1.0)

    H = hessian(evaluate(closure, case.params, products="finite_difference"))
    ones = torch.ones(H.shape[0], dtype=torch.float64)
    H @ ones
    goes_on[0] = True
    with pytest.raises(RuntimeError, match=OTHER):
        H @ ones
