"""Products formed in every way: cached, streamed, by finite differences, several at once."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from optimizer_db import OPTIMIZERS
from problems import Batches, Doubled, Held, build, distances, error, models, unseen
from torch import Tensor, nn

from newtonopt import (
    Evaluation,
    HessianFree,
    LinearOperator,
    Objective,
    evaluate,
    gauss_newton,
    hessian,
    jacobian,
    mark_outputs,
)
from newtonopt.closure.losses import Output, own_view
from newtonopt.operators import matrices as _matrices
from newtonopt.operators import products as _products

Operator = Callable[[Evaluation], LinearOperator]
SYMMETRIC = pytest.mark.parametrize("operator", [hessian, gauss_newton], ids=lambda f: f.__name__)
PRODUCTS = pytest.mark.parametrize("products", ["cached", "streamed", "finite_difference"])
ALL = pytest.mark.parametrize("operator", [hessian, gauss_newton, jacobian], ids=lambda f: f.__name__)


@pytest.mark.parametrize("loss", ["cross_entropy", "by_hand"])
@pytest.mark.parametrize("model", models())
@ALL
def test_streamed_equals_cached(operator: Operator, model: str, loss: str) -> None:
    case = build(model, loss)
    torch.manual_seed(1)
    cached, streamed = (operator(evaluate(case.closure, case.params, products=way)) for way in ("cached", "streamed"))  # type: ignore[arg-type]
    v = torch.randn(cached.shape[1], dtype=torch.float64)
    assert streamed.shape == cached.shape
    assert error(streamed @ v, cached @ v) < 1e-12
    u = torch.randn(cached.shape[0], dtype=torch.float64)
    assert error(streamed.T @ u, cached.T @ u) < 1e-12


@pytest.mark.parametrize("shuffle", [False, True])
@ALL
def test_streamed_over_a_loader_is_the_whole_data_sets(operator: Operator, shuffle: bool) -> None:
    problem = Batches(shuffle=shuffle)
    torch.manual_seed(3)
    cached = operator(evaluate(problem.closure, problem.params, products="cached"))
    torch.manual_seed(3)
    streamed = operator(evaluate(problem.closure, problem.params, products="streamed"))
    v = torch.randn(cached.shape[1], dtype=torch.float64)
    expected = cached @ v
    # More than one product, with the user's random numbers drawn between them.
    for _ in range(2):
        assert error(streamed @ v, expected) < 1e-12
        torch.rand(5)


@pytest.mark.parametrize("products", ["streamed", "finite_difference"])
def test_passes_over_a_loader_leave_no_trace(products: Any) -> None:
    problem = Batches(shuffle=True, generator=torch.Generator().manual_seed(5))
    problem.closure()
    buffers = [b.clone() for b in problem.model.buffers()]
    gradients = [p.grad.clone() for p in problem.params if p.grad is not None]
    values = [p.detach().clone() for p in problem.params]
    generators = problem.loader.generator.get_state(), torch.get_rng_state()
    H = hessian(evaluate(problem.closure, problem.params, products=products))
    first = H @ torch.ones(H.shape[1], dtype=torch.float64)
    assert error(H @ torch.ones(H.shape[1], dtype=torch.float64), first) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(problem.model.buffers(), buffers, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(problem.params, gradients, strict=True))
    assert all(torch.equal(p, v) for p, v in zip(problem.params, values, strict=True))
    assert torch.equal(problem.loader.generator.get_state(), generators[0])
    assert torch.equal(torch.get_rng_state(), generators[1])


@pytest.mark.parametrize("action", ["trial", "gradient", "hessian", "gauss_newton"])
def test_each_micro_batch_is_let_go_before_the_next(action: str) -> None:
    """In a closure that leaves its last loss and output in scope, as loops do."""
    problem = Batches()
    alive: Callable[[], list[int]] = unseen([])

    def closure() -> None:
        Held.alive().clear()
        for x, y in problem.loader:
            alive().append(sum(ref() is not None for ref in Held.alive()))
            z = Held.apply(problem.model(x))
            loss = F.cross_entropy(z, y)
            loss.backward()

    objective = Objective(closure, problem.params, products="streamed")
    evaluation = objective.evaluate()
    v = torch.ones_like(evaluation.gradient)
    alive().clear()
    if action == "trial":
        objective.loss_at(v)
    elif action == "gradient":
        objective.gradient_at(v)
    else:
        (hessian if action == "hessian" else gauss_newton)(evaluation) @ v
    assert len(alive()) >= 3
    assert max(alive()) == 0


def test_two_losses_built_before_their_backwards_are_both_whole() -> None:
    """Letting one graph go must leave the other, with which it may share nothing or, retained, a part."""
    problem = Batches()
    (x, y), (other_x, other_y), *_ = problem.loader

    def closure() -> None:
        z = problem.model[0](x).tanh()
        first, second = F.mse_loss(z, torch.ones_like(z)), F.cross_entropy(problem.model(other_x), other_y)
        third = F.cross_entropy(problem.model[4](z), y)
        second.backward()
        first.backward(retain_graph=True)
        third.backward()

    for operator in (hessian, gauss_newton):
        cached, streamed = (operator(evaluate(closure, problem.params, products=way)) for way in ("cached", "streamed"))  # type: ignore[arg-type]
        v = torch.randn(cached.shape[1], dtype=torch.float64)
        assert error(streamed @ v, cached @ v) < 1e-12
        assert error(streamed @ v, cached @ v) < 1e-12


@pytest.mark.parametrize("products", ["streamed", "finite_difference"])
@SYMMETRIC
def test_a_closure_that_draws_new_batches_is_an_error(operator: Operator, products: Any) -> None:
    problem = Batches()
    batches = itertools.cycle(problem.loader)

    def closure() -> Tensor:
        x, y = next(batches)
        return F.cross_entropy(problem.model(x), y)

    A = operator(evaluate(closure, problem.params, products=products))
    before = [p.detach().clone() for p in problem.params]
    with pytest.raises(RuntimeError, match=r"The closure computed .* Start its data loader from the beginning"):
        A @ torch.ones(A.shape[1], dtype=torch.float64)
    assert all(torch.equal(p, b) for p, b in zip(problem.params, before, strict=True))


@pytest.mark.parametrize("products", ["cached", "streamed", "finite_difference"])
def test_a_first_step_with_new_batches_is_an_error(products: Any) -> None:
    problem = Batches()
    batches = itertools.cycle(problem.loader)

    def closure() -> Tensor:
        x, y = next(batches)
        return F.cross_entropy(problem.model(x), y)

    before = [p.detach().clone() for p in problem.params]
    with pytest.raises(RuntimeError, match=r"The closure computed .* Start its data loader from the beginning"):
        HessianFree(problem.params, rank=2, products=products).step(closure)
    assert all(torch.equal(p, b) for p, b in zip(problem.params, before, strict=True))


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-5), (torch.float32, 1e-2)])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "by_hand"])
@pytest.mark.parametrize("model", models())
@ALL
def test_finite_differences_are_close(
    operator: Operator, model: str, loss: str, dtype: torch.dtype, allowed: float
) -> None:
    case = build(model, loss)
    torch.manual_seed(1)
    exact = operator(evaluate(case.closure, case.params))
    v = torch.randn(exact.shape[1], dtype=torch.float64)
    expected = exact @ v
    case.model.to(dtype)
    inputs = case.inputs.to(dtype) if case.inputs.is_floating_point() else case.inputs

    def closure() -> Tensor:
        return (case.tapped_loss or case.loss)(case.model(inputs).double())

    torch.manual_seed(1)
    differenced = operator(evaluate(closure, case.params, products="finite_difference"))
    assert error(differenced @ v.to(dtype), expected) < allowed


@pytest.mark.parametrize("products", ["streamed", "finite_difference"])
def test_a_closure_that_raises_leaves_all_as_it_was(products: Any) -> None:
    problem = Batches()
    calls: Callable[[], list[int]] = unseen([])

    def closure() -> Tensor:
        calls().append(1)
        loss = problem.closure()
        if len(calls()) > 1:
            raise OverflowError("in the closure")
        return loss

    problem.closure()
    H = hessian(evaluate(closure, problem.params, products=products))
    before = [*(p.detach().clone() for p in problem.params), *(b.clone() for b in problem.model.buffers())]
    with pytest.raises(OverflowError, match="in the closure"):
        H @ torch.ones(H.shape[1], dtype=torch.float64)
    after = [*problem.params, *problem.model.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("last", [Doubled.apply, distances], ids=["once_differentiable", "not_implemented"])
@ALL
def test_without_second_derivative_auto_warns_once_and_differences(operator: Operator, last: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 5).double(), torch.randn(5, 4, dtype=torch.float64)
    y = torch.randn(5, 5, dtype=torch.float64)

    def closure() -> Tensor:
        return F.mse_loss(last(model(x)), y)

    params = list(model.parameters())
    v = torch.randn(25, dtype=torch.float64)
    evaluation = evaluate(closure, params)
    with pytest.warns(UserWarning, match=r"no second derivative.*finite differences") as caught:
        A = operator(evaluation)
        product = A @ v
    assert len(caught) == 1
    assert evaluation.form == "finite_difference"
    assert error(product, operator(evaluate(closure, params, products="finite_difference")) @ v) < 1e-6
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        A @ v
        for other in (hessian, gauss_newton, jacobian):
            other(evaluation) @ v
    for products in ("cached", "streamed"):
        with pytest.raises(RuntimeError, match=r'no second derivative.*Write products="finite_difference"'):
            operator(evaluate(closure, params, products=products)) @ v  # type: ignore[arg-type]


def test_an_optimizer_falls_back_once_and_reports_it() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(20, 4)
    y = torch.randint(0, 3, (20,))
    optimizer = HessianFree(model.parameters(), rank=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(Doubled.apply(model(x)), y)
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="finite differences") as caught:
        losses = [float(optimizer.step(closure)) for _ in range(4)]
    assert len(caught) == 1
    assert optimizer.last_step is not None
    assert optimizer.last_step.form == "finite_difference"
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("products", ["streamed", "finite_difference"])
@pytest.mark.parametrize("name", ["hessian_free", "newton_cg", "trust_region", "trust_region_lanczos", "cubic_newton"])
def test_steps_with_other_products_follow_the_cached_ones(name: str, products: Any) -> None:
    def train(way: Any) -> tuple[list[float], str]:
        problem = Batches()
        more = {"rank": 4} if name == "hessian_free" else {}
        optimizer = OPTIMIZERS[name](problem.params, products=way, max_iterations=5, **more)
        found = []
        for _ in range(3):
            found.append(float(optimizer.step(problem.closure)))
        assert optimizer.last_step is not None
        return found, optimizer.last_step.form

    reference, form = train("cached")
    assert form == "cached"
    found, form = train(products)
    assert form == products
    assert found == pytest.approx(reference, rel=1e-10 if products == "streamed" else 1e-4)


def test_parameters_of_two_precisions() -> None:
    """Vectors take the wider one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3).double())
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))

    def closure() -> Tensor:
        return F.cross_entropy(model[2](model[1](model[0](x)).double()), y)

    exact = hessian(evaluate(closure, model.parameters()))
    assert exact.dtype == torch.float64
    v = torch.randn(exact.shape[1], dtype=torch.float64)
    expected = exact @ v
    double = copy.deepcopy(model).double()
    truth = hessian(evaluate(lambda: F.cross_entropy(double(x.double()), y), double.parameters())) @ v
    assert error(expected, truth) < 1e-5
    for products, allowed in (("streamed", 1e-6), ("finite_difference", 1e-2)):
        H = hessian(evaluate(closure, model.parameters(), products=products))  # type: ignore[arg-type]
        assert error(H @ v, expected) < allowed
    optimizer = HessianFree(model.parameters(), rank=4)
    losses = [float(optimizer.step(closure)) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert [p.dtype for p in model.parameters()] == [torch.float32] * 2 + [torch.float64] * 2


def test_bfloat16_parameters_are_too_coarse_for_differences() -> None:
    model = nn.Linear(3, 2).bfloat16()
    evaluation = evaluate(lambda: model(torch.ones(4, 3).bfloat16()).square().mean(), model.parameters(), "streamed")
    assert evaluation.gradient.dtype == torch.float32
    assert torch.isfinite(hessian(evaluation) @ evaluation.gradient).all()
    evaluation = evaluate(
        lambda: model(torch.ones(4, 3).bfloat16()).square().mean(), model.parameters(), "finite_difference"
    )
    with pytest.raises(RuntimeError, match=r"bfloat16 parameters are too coarse .* float32"):
        hessian(evaluation)


class Bar:
    """Stands in for tqdm's bar."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, total: int | None, **settings: Any) -> None:
        self.total, self.settings, self.parts = total, settings, 0
        Bar.made.append(self)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def update(self) -> None:
        self.parts += 1


def test_long_passes_show_their_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm")
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    problem = Batches()
    H = hessian(evaluate(problem.closure, problem.params, products="streamed"))
    assert Bar.made == []  # of the first pass nobody knows how long it is
    H @ torch.ones(H.shape[1], dtype=torch.float64)  # checked
    Bar.made.clear()
    H @ torch.ones(H.shape[1], dtype=torch.float64)
    assert [(bar.total, bar.parts) for bar in Bar.made] == [(3, 3)]
    assert Bar.made[0].settings["disable"] is None  # none where the output is no terminal
    Bar.made.clear()
    single = hessian(evaluate(lambda: F.mse_loss(problem.model[0].weight, torch.ones(6, 4).double()), problem.params))
    single @ torch.ones(single.shape[1], dtype=torch.float64)
    assert Bar.made == []


@PRODUCTS
def test_products_with_zero_are_zero(products: Any) -> None:
    problem = Batches()
    evaluation = evaluate(problem.closure, problem.params, products=products)
    for operator in (hessian, gauss_newton, jacobian):
        A = operator(evaluation)
        assert torch.equal(A @ torch.zeros(A.shape[1], dtype=A.dtype), torch.zeros(A.shape[0], dtype=A.dtype))


@PRODUCTS
def test_marked_and_recognised_add_up(products: Any) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(6, 4).double(), torch.randn(6, 3).double()

    def closure() -> Tensor:
        return mark_outputs(model(x)).square().mean() + F.mse_loss(model(2 * x), y)

    evaluation = evaluate(closure, model.parameters(), products=products)
    assert error(gauss_newton(evaluation).dense(), hessian(evaluate(closure, model.parameters())).dense()) < 1e-5
    assert sum(evaluation.output_sizes.values()) == 36


def test_differences_in_proportion_to_large_parameters() -> None:
    torch.manual_seed(0)
    theta = nn.Parameter(1e4 * torch.randn(20))
    H = hessian(evaluate(lambda: (theta / 1e4).pow(4).sum(), [theta], products="finite_difference"))
    v = torch.randn(20)
    assert error(H @ v, 12e-8 * (theta.detach() / 1e4).square() * v) < 3e-2


def test_differences_at_a_minimum_are_the_same_function() -> None:
    target = torch.randn(5, dtype=torch.float64)
    theta = nn.Parameter(target + 1e-8)
    H = hessian(evaluate(lambda: F.mse_loss(theta, target), [theta], products="finite_difference"))
    v = torch.randn(5, dtype=torch.float64)
    assert error(H @ v, 0.4 * v) < 1e-5


def test_streamed_gauss_newton_pushes_without_a_graph() -> None:
    problem, graphs = Batches(), unseen([])

    def closure() -> Tensor:
        graphs().append(torch.is_grad_enabled())
        return problem.closure()

    G = gauss_newton(evaluate(closure, problem.params, products="streamed"))
    G @ torch.ones(G.shape[1], dtype=torch.float64)  # checked
    graphs().clear()
    G @ torch.ones(G.shape[1], dtype=torch.float64)
    assert graphs() == [False, True]


def test_forward_mode_is_tried_once() -> None:
    torch.manual_seed(0)
    model, x, y, runs = nn.Linear(4, 3).double(), torch.randn(6, 4).double(), torch.randn(6, 3).double(), unseen([])

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            ctx.save_for_backward(z)
            return z * z

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g * ctx.saved_tensors[0]

    def closure() -> Tensor:
        runs().append(1)
        return F.mse_loss(Square.apply(model(x)), y)

    G = gauss_newton(evaluate(closure, model.parameters(), products="streamed"))
    G @ torch.ones(G.shape[1], dtype=torch.float64)  # checked, and forward mode tried in vain
    counts = []
    for _ in range(2):
        runs().clear()
        G @ torch.ones(G.shape[1], dtype=torch.float64)
        counts.append(len(runs()))
    assert counts == [2, 2]


@pytest.mark.parametrize("keep", ["retain_graph", "create_graph"])
def test_a_graph_that_is_kept_stays_whole(keep: str) -> None:
    problem = Batches()
    x, y = next(iter(problem.loader))

    def closure() -> None:
        z = problem.model[0](x).tanh()
        F.mse_loss(z, torch.ones_like(z)).backward(**{keep: True})
        F.cross_entropy(problem.model[4](z), y).backward()

    for operator in (hessian, gauss_newton):
        cached, streamed = (operator(evaluate(closure, problem.params, products=way)) for way in ("cached", "streamed"))  # type: ignore[arg-type]
        v = torch.randn(cached.shape[1], dtype=torch.float64)
        assert error(streamed @ v, cached @ v) < 1e-12


def test_two_operators_warn_once() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 5).double(), torch.randn(5, 4).double(), torch.randn(5, 5).double()
    evaluation = evaluate(lambda: F.mse_loss(distances(model(x)), y), model.parameters())
    operators = [operator(evaluation) for operator in (hessian, gauss_newton)]
    with pytest.warns(UserWarning, match="finite differences") as caught:
        for A in operators:
            A @ torch.ones(25, dtype=torch.float64)
    assert len(caught) == 1


def test_an_output_of_no_parameter() -> None:
    torch.manual_seed(0)
    model, fixed = nn.Linear(4, 3).double(), nn.Parameter(torch.randn(6, 3).double())
    x = torch.randn(6, 4).double()

    def closure() -> Tensor:
        return F.mse_loss(model(x), fixed)

    G = gauss_newton(evaluate(closure, model.parameters()))
    S = gauss_newton(evaluate(closure, model.parameters(), products="streamed"))
    v = torch.randn(15).double()
    assert error(S @ v, G @ v) < 1e-12


def test_products_asked_for_are_not_remembered() -> None:
    problem = Batches()
    optimizer = HessianFree(problem.params, rank=4, products="finite_difference", max_iterations=3)
    optimizer.step(problem.closure)
    optimizer.param_groups[0]["products"] = "cached"
    optimizer.step(problem.closure)
    assert optimizer.last_step is not None
    assert optimizer.last_step.form == "cached"


def crossed(problem: Batches) -> Any:
    """A closure that calls `backward` in another order than it computes the losses."""
    (x, y), (other_x, other_y), *_ = problem.loader

    def closure() -> None:
        first, second = F.cross_entropy(problem.model(x), y), F.cross_entropy(problem.model(other_x), other_y)
        second.backward()
        first.backward()

    return closure


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("products", ["streamed", "finite_difference"])
@pytest.mark.parametrize("make", [lambda problem: problem.closure, crossed], ids=["loop", "crossed"])
def test_rows_of_the_jacobian_are_in_the_order_of_production(make: Any, products: Any, transposed: bool) -> None:
    problem = Batches()
    closure = make(problem)
    cached, other = (jacobian(evaluate(closure, problem.params, products=way)) for way in ("cached", products))
    if transposed:
        cached, other = cached.T, other.T
    v = torch.randn(cached.shape[1], dtype=torch.float64)
    assert error(other @ v, cached @ v) < 1e-5


def test_a_streamed_penalty_outside_the_outputs_is_pointed_out() -> None:
    problem = Batches()
    x, y = next(iter(problem.loader))

    def closure() -> Tensor:
        return F.cross_entropy(problem.model(x), y) + 0.1 * problem.params[0].abs().sum()

    with pytest.warns(UserWarning, match="leaves that part out"):
        gauss_newton(evaluate(closure, problem.params, products="streamed"))


class Picky(torch.autograd.Function):
    """Squares its input, with derivatives that no batch of tensors can pass: they go through NumPy."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        Picky.calls += 1
        torch.from_numpy(g.detach().numpy())
        return 2 * g * x


@pytest.mark.parametrize("at_once", [1, 3, 128])
@pytest.mark.parametrize("of", [hessian, gauss_newton])
def test_products_of_any_size_give_the_same_matrix(of: Any, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build("mlp", "cross_entropy")
    A = of(evaluate(case.closure, case.params))
    n = A.shape[0]
    singly = torch.stack([A @ unit for unit in torch.eye(n, dtype=torch.float64)])
    sizes = []
    plain = _products.flatten_rows

    def seen(tensors: Any, like: Any, count: int) -> Tensor:
        sizes.append(count)
        return plain(tensors, like, count)

    monkeypatch.setattr(_products, "flatten_rows", seen)
    monkeypatch.setattr(_matrices, "_WIDEST", 0)  # rows would form the matrix without products
    monkeypatch.setattr(_products, "_MOST_ROWS", at_once)
    A = of(evaluate(case.closure, case.params))
    assert error(A.dense(), (singly + singly.T) / 2) < 1e-12
    assert A.products - 1 == n == 43  # and one that checks them
    assert sizes == {1: [], 3: [3] * 14 + [1], 128: [43]}[at_once]


def test_products_are_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many bytes at once, by what the gradients in both passes of a product take."""
    sizes: list[int] = []
    plain = _products.flatten_rows
    monkeypatch.setattr(
        _products, "flatten_rows", lambda t, like, count: [sizes.append(count), plain(t, like, count)][1]
    )
    model = nn.Linear(10, 1).double()
    for rows in (100, 1000):
        x = torch.randn(rows, 10).double()
        monkeypatch.setattr(_products, "_BATCH_BYTES", 100 * 8 * 40)
        hessian(evaluate(lambda x=x: model(x).square().mean(), model.parameters())).dense()  # type: ignore[misc]
    assert 1 < max(sizes) < 11
    assert sum(sizes) == 11  # of the larger batch one by one


def test_operations_that_allow_no_products_are_passed_one_by_one() -> None:
    theta = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    H = hessian(evaluate(lambda: Picky.apply(theta).square().sum(), [theta]))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(H.dense(), torch.diag(12 * theta.detach().square()))
    assert H.products == 4  # one of them checks the others


def test_an_error_of_the_products_is_not_taken_for_one_of_products() -> None:
    theta = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            if g.grad_fn is None and g.requires_grad is False and Broken.armed:
                raise ZeroDivisionError("of the user's")
            return g * 1.0

        armed = False

    H = hessian(evaluate(lambda: Broken.apply(theta).pow(3).sum(), [theta]))  # type: ignore[no-untyped-call]
    Broken.armed = True
    with pytest.raises(ZeroDivisionError, match="of the user's"):
        H.dense()


LABELS = torch.tensor([0, 2, 1, -100, 2])
CHANCES = torch.linspace(0.1, 2.0, 15, dtype=torch.float64).view(5, 3)
SOFTMAX_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "labels": lambda z: F.cross_entropy(z, LABELS),
    "weights": lambda z: F.cross_entropy(z, LABELS, torch.tensor([1.0, 0.5, 2.0]).double(), reduction="sum"),
    "smoothed": lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.2),
    "probabilities": lambda z: F.cross_entropy(z, CHANCES),
    "classes first": lambda z: -F.log_softmax(z, 0)[2].sum(),
    "log-softmax": lambda z: F.nll_loss(F.log_softmax(z, -1), LABELS) / 3,
    "divergence": lambda z: F.kl_div(F.log_softmax(z, 1), CHANCES, reduction="batchmean"),
}
OTHER_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "logits used twice": lambda z: F.cross_entropy(z, LABELS) + 0.1 * z.logsumexp(1).square().mean(),
    "square": lambda z: F.cross_entropy(z, LABELS).square(),
    "entropy": lambda z: (F.log_softmax(z, 1).exp() * F.log_softmax(z, 1)).sum(),
    "perplexity": lambda z: F.cross_entropy(z, LABELS).exp(),
}


@pytest.mark.parametrize("name", [*SOFTMAX_LOSSES, *OTHER_LOSSES])
def test_a_loss_curves_along_its_logits_as_its_dense_hessian(name: str) -> None:
    loss = {**SOFTMAX_LOSSES, **OTHER_LOSSES}[name]
    generator = torch.Generator().manual_seed(0)
    values, t, u = torch.randn(3, 5, 3, dtype=torch.float64, generator=generator)
    dense = torch.func.hessian(loss)(values)
    z = own_view(values.requires_grad_())
    value, output = loss(z), Output(z, 0)
    assert bool(_products._softmaxes(value, [output])) == (name in SOFTMAX_LOSSES)
    curve = _products.curve_of(value, [output])
    (curved,) = curve([t])
    assert error(curved, torch.einsum("abcd,cd->ab", dense, t)) < 1e-12
    (rows,) = curve([torch.stack([t, u])])
    assert error(rows[1], torch.einsum("abcd,cd->ab", dense, u)) < 1e-12


def test_one_sided_differences_are_products_with_the_hessian() -> None:
    for model in ("mlp", "batch_norm"):
        case = build(model, "cross_entropy")
        evaluation = evaluate(case.closure, case.params)
        H, product = hessian(evaluation), _products.one_sided_hessian(evaluation)
        torch.manual_seed(1)
        v = torch.randn(H.shape[1], dtype=torch.float64)
        assert error(product(v), H @ v) < 1e-6
        assert error(product(3.0 * v), 3.0 * (H @ v)) < 1e-6
        assert not product(torch.zeros_like(v)).any()
