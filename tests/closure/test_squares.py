"""Squares written by hand: the same Gauss-Newton matrix as with `mse_loss`, or a request for a mark."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import Held, error, unseen
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from newtonopt import HessianFree, evaluate, gauss_newton, jacobian

Loss = Callable[[Tensor], Tensor]


class Net:
    """A network with five rows of two outputs, data for it, and its dense Gauss-Newton matrix for any loss."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.x = torch.randn(5, 3, dtype=torch.float64)

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def closure(self, loss: Loss) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.model.zero_grad()
            value = loss(self.model(self.x))
            value.backward()
            return value

        return closure

    def dense_gauss_newton(self, loss: Loss) -> Tensor:
        z = self.model(self.x)
        rows = [torch.autograd.grad(entry, self.params, retain_graph=True) for entry in z.reshape(-1)]
        J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        H = torch.autograd.functional.hessian(loss, z.detach()).reshape(z.numel(), z.numel())
        return J.T @ H @ J


torch.manual_seed(1)
Y, W, Q = torch.randn(5, 2).double(), torch.rand(5, 2).double(), torch.rand(5).double()


def c(z: Tensor) -> Tensor:
    return torch.view_as_complex(z)


SUMS_OF_SQUARES: dict[str, Loss] = {
    "power": lambda z: ((z - Y) ** 2).mean(),
    "square": lambda z: torch.mean(torch.square(Y - z)),
    "product": lambda z: (lambda d: (d * d).sum() / 5)(z - Y),
    "product of two differences": lambda z: ((z - Y) * (z - Y)).sum(),
    "pow, over dimensions": lambda z: (z - Y).pow(2).sum(1).mean(),
    "tensor exponent": lambda z: torch.pow(z - Y, torch.tensor(2.0)).mean(),
    "keywords": lambda z: torch.pow(input=z - Y, exponent=np.int64(2)).mean(),
    "float_power": lambda z: ((z - Y) / W).float_power(2).mean(),
    "norm": lambda z: (z - Y).norm() ** 2,
    "norms of rows": lambda z: torch.norm(z - Y, dim=1).pow(2).sum(),
    "linalg.norm": lambda z: torch.linalg.norm(z - Y) ** 2,
    "linalg.vector_norm, kept": lambda z: torch.linalg.vector_norm(z - Y, dim=-1, keepdim=True).square().mean(),
    "linalg.matrix_norm": lambda z: torch.linalg.matrix_norm(z - Y) ** 2,
    "norm times norm": lambda z: (lambda n: n * n)((z - Y).norm()),
    "dist": lambda z: torch.dist(z, Y) ** 2,
    "pairwise_distance": lambda z: F.pairwise_distance(z, Y).pow(2).mean(),
    "abs": lambda z: torch.sum(torch.square(torch.abs(z - Y)), dim=-1).mean(),
    "weights": lambda z: 0.5 * (W * (z - Y).square()).mean(),
    "quadrature": lambda z: Q @ ((z - Y) ** 2)[:, 0] + 2 * ((z - Y) ** 2)[:, 1].mean(),
    "trapezoid": lambda z: torch.trapezoid((z - Y) ** 2, dim=0).sum(),
    "relative": lambda z: torch.sum((z - Y) ** 2) / torch.sum(Y**2),
    "mask": lambda z: ((z - Y) ** 2)[W > 0.3].mean(),
    "where": lambda z: torch.where(Y > 0, (z - Y) ** 2, 2 * (z - Y) ** 2).mean(),
    "negated twice": lambda z: -(-((z - Y) ** 2)).mean(),
    "stacked terms": lambda z: torch.stack([((z - Y) ** 2).mean(), (z**2).sum()]).sum(),
    "beside mse_loss": lambda z: F.mse_loss(z[:2], Y[:2]) + ((z[2:] - Y[2:]) ** 2).mean(),
    "built-in sum": lambda z: sum(((z - Y) ** 2).unbind(0), torch.zeros(2)).sum(),
    "dot": lambda z: torch.dot((z - Y).flatten(), (z - Y).flatten()),
    "matmul of a vector": lambda z: (lambda d: d @ d)((z - Y).flatten()),
    "matmul of a column": lambda z: (lambda d: d.T @ d)((z - Y).reshape(-1, 1)).squeeze(),
    "trace": lambda z: torch.trace((z - Y).T @ (z - Y)),
    "bmm": lambda z: (lambda d: torch.bmm(d.unsqueeze(1), d.unsqueeze(2)).mean())(z - Y),
    "einsum": lambda z: torch.einsum("ij,ij->i", z - Y, z - Y).mean(),
    "tensordot": lambda z: torch.tensordot(z - Y, z - Y, dims=2),
    "vecdot": lambda z: torch.linalg.vecdot(z - Y, z - Y).mean(),
    "complex modulus": lambda z: (c(z) - c(Y)).abs().pow(2).mean(),
    "complex norm": lambda z: torch.linalg.norm(c(z) - c(Y)) ** 2,
    "complex conjugate": lambda z: (c(z) * c(z).conj()).real.mean(),
    "complex vdot": lambda z: torch.vdot(c(z) - c(Y), c(z) - c(Y)).real,
    "real and imaginary part": lambda z: (lambda d: d.real**2 + d.imag**2)(c(z) - c(Y)).mean(),
}


@pytest.mark.parametrize("name", SUMS_OF_SQUARES)
def test_a_sum_of_squares_needs_no_mark(name: str) -> None:
    net, loss = Net(), SUMS_OF_SQUARES[name]
    truth = net.dense_gauss_newton(loss)
    for products in ("cached", "streamed", "finite_difference"):
        evaluation = evaluate(net.closure(loss), net.params, products=products)
        assert torch.equal(evaluation.loss, loss(net.model(net.x)).detach())
        G = gauss_newton(evaluation)
        assert error(G.dense(), truth) < (1e-6 if products == "finite_difference" else 1e-10)
        assert G.psd


OTHERS: dict[str, Loss] = {
    "root": lambda z: ((z - Y) ** 2).mean().sqrt(),
    "norm": lambda z: (z - Y).norm(),
    "logarithm": lambda z: torch.log1p((z - Y) ** 2).sum(),
    "largest": lambda z: ((z - Y) ** 2).max(),
    "negative weight": lambda z: 1 - ((z - Y) ** 2).mean(),
    "one negative weight": lambda z: ((W - 0.9) * (z - Y) ** 2).mean(),
    "weight that depends on the output": lambda z: (z.abs() * (z - Y) ** 2).mean(),
    "quotient of two": lambda z: ((z - Y) ** 2).sum() / (z**2).sum(),
    "product of two": lambda z: ((z - Y) ** 2).mean() * (z**2).mean(),
    "also under a root": lambda z: (lambda s: s + s.sqrt())(((z - Y) ** 2).mean()),
    "other powers": lambda z: ((z - Y) ** 4).mean() + ((z - Y) ** 3).mean(),
    "cube of a modulus": lambda z: (z - Y).abs().pow(3).mean(),
    "product of different factors": lambda z: ((z - Y) * (z + Y)).mean(),
    "in place on a part": lambda z: (lambda s: s[:, 0].log_().sum() + s.sum())((z - Y) ** 2),
    "inner products of matrices": lambda z: torch.inner(z[None], z[None])[0, 1, 0, 0],
    "entries beside the diagonal": lambda z: (z.T @ z).sum(),
    "conjugate left out": lambda z: (c(z) * c(z)).real.mean(),
    "in place": lambda z: (z - Y).pow_(2).mean(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_sum_of_squares_asks_for_a_mark(name: str) -> None:
    net = Net()
    with pytest.raises(RuntimeError, match="mark_outputs"):
        gauss_newton(evaluate(net.closure(OTHERS[name]), net.params))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda z: z[0], lambda z: z[1]),  # equal by chance, where all entries are
        (lambda z: z[:, 0], lambda z: z[:, 1]),
        (lambda z: z**2, lambda z: z**3),
        (lambda z: z.clamp(max=2.0), lambda z: z.clamp(max=3.0)),
        (lambda z: z.mT, lambda z: z.mT.flip(0)),
    ],
)
def test_factors_that_are_equal_by_chance_are_no_square(first: Loss, second: Loss) -> None:
    z = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="mark_outputs"):
        gauss_newton(evaluate(lambda: (first(z * 1.0) * second(z * 1.0)).sum(), [z]))


def test_norms_of_exactly_zero_keep_their_curvature() -> None:
    theta = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    for loss in (
        lambda: theta.norm() ** 2,
        lambda: theta.norm(dim=1).square().sum(),
        lambda: theta.abs().pow(2).sum(),
        lambda: torch.view_as_complex(theta).abs().square().sum(),
    ):
        G = gauss_newton(evaluate(loss, [theta])).dense()
        torch.testing.assert_close(G, 2 * torch.eye(6, dtype=torch.float64))


def test_an_explicit_l2_term_is_part_of_the_matrix() -> None:
    net = Net()
    labels = torch.arange(5) % 2

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, labels)

    def penalised(z: Tensor) -> Tensor:
        return loss(z) + 0.5 * sum((p.pow(2).sum() for p in net.params), torch.zeros(()))

    G = gauss_newton(evaluate(net.closure(penalised), net.params))
    truth = net.dense_gauss_newton(loss)
    assert error(G.dense(), truth + torch.eye(len(truth), dtype=torch.float64)) < 1e-10
    assert G.psd


def test_a_weight_that_is_trained_itself_is_taken_as_constant_with_a_warning() -> None:
    net, s = Net(), nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    closure = net.closure(lambda z: torch.exp(-s) * ((z - Y) ** 2).mean() + s)
    with pytest.warns(UserWarning, match="leaves that part out"):
        G = gauss_newton(evaluate(closure, [*net.params, s])).dense()
    truth = net.dense_gauss_newton(lambda z: torch.exp(-s).detach() * ((z - Y) ** 2).mean())
    assert error(G[:-1, :-1], truth) < 1e-10
    assert not G[-1].any()


def test_an_outer_square_is_the_one_that_counts() -> None:
    net = Net()
    closure = net.closure(lambda z: ((z**2 - Y) ** 2).mean())
    J = jacobian(evaluate(closure, net.params)).dense()
    z = net.model(net.x).detach().reshape(-1)
    plain = jacobian(evaluate(net.closure(lambda z: F.mse_loss(z, Y)), net.params)).dense()
    assert error(J, 2 * z[:, None] * plain) < 1e-12


def test_a_recognised_loss_under_a_concave_function_is_not_called_convex() -> None:
    net, labels = Net(), torch.arange(5) % 2
    entropy = lambda z: F.cross_entropy(z, labels, reduction="none")  # noqa: E731
    assert gauss_newton(evaluate(net.closure(lambda z: (Q * entropy(z)).mean()), net.params)).psd
    for loss in (lambda z: entropy(z).sqrt().mean(), lambda z: -entropy(z).mean()):
        assert not gauss_newton(evaluate(net.closure(loss), net.params)).psd


def test_squares_seen_only_as_metrics_keep_no_graph_alive() -> None:
    net = Net()
    alive: Callable[[], list[int]] = unseen([])

    def closure() -> None:
        net.model.zero_grad()
        for rows in net.x.split(1):
            z = Held.apply(net.model(rows))
            metric = ((z - 1) ** 2).mean()  # for a log
            F.mse_loss(z, torch.zeros_like(z)).backward()
            del z, metric
            alive().append(sum(ref() is not None for ref in Held.alive()))

    Held.alive().clear()
    G = gauss_newton(evaluate(closure, net.params, products="streamed"))
    assert G.shape == (26, 26)
    assert alive() == [0] * 5


def test_hessian_free_takes_squares_as_it_takes_mse_loss() -> None:
    by_hand, built_in = Net(), Net()
    built_in.model.load_state_dict(by_hand.model.state_dict())
    built_in.x = by_hand.x
    for net, loss in ((by_hand, lambda z: ((z - Y) ** 2).mean()), (built_in, lambda z: F.mse_loss(z, Y))):
        optimizer = HessianFree(net.params)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(4):
                optimizer.step(net.closure(loss))
    for p, q in zip(by_hand.params, built_in.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_squares_of_a_users_own_class_keep_its_attributes() -> None:
    net = Net()
    seen: Callable[[], list[str]] = unseen([])

    class Labelled(Tensor):
        label: str

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.square:
                seen().append(args[0].label)
            return super().__torch_function__(func, types, args, kwargs)

    def loss(z: Tensor) -> Tensor:
        residual = (z - Y).as_subclass(Labelled)
        residual.label = "u"
        return residual.square().mean().as_subclass(Tensor)

    G = gauss_newton(evaluate(net.closure(loss), net.params)).dense()
    assert error(G, net.dense_gauss_newton(lambda z: (z - Y).square().mean())) < 1e-10
    assert seen() == ["u"]


def test_calls_made_in_one_run_only_move_no_number() -> None:
    net = Net()
    truth = net.dense_gauss_newton(lambda z: F.mse_loss(z, Y))
    for products in ("cached", "streamed", "finite_difference"):
        runs = itertools.count()

        def loss(z: Tensor, runs: Iterator[int] = runs) -> Tensor:
            if next(runs) == 0:
                _ = (z * z).norm().square(), F.mse_loss(z, Y)  # for a log, in the first run
            return F.mse_loss(z, Y)

        G = gauss_newton(evaluate(net.closure(loss), net.params, products=products))
        assert error(G.dense(), truth) < 1e-6


def test_norms_squared_twice_scaled_and_contracted_are_the_sums_of_squares_they_are() -> None:
    net = Net()
    for loss in (
        lambda z: (lambda n: (n**2).mean() + (3 * n**2).sum())((z - Y).norm(dim=1)),
        lambda z: ((z - Y).norm() / Y.norm()) ** 2,
        lambda z: (lambda n: n @ n)((z - Y).norm(dim=1)),
        lambda z: torch.einsum("ij,ij->i", (z - Y).abs(), (z - Y).abs()).mean(),
        lambda z: (z - Y).norm()[None].double() ** 2,
        lambda z: (z - Y).norm() * (z - Y).norm(),
    ):
        G = gauss_newton(evaluate(net.closure(lambda z, loss=loss: loss(z).sum()), net.params))
        assert error(G.dense(), net.dense_gauss_newton(lambda z, loss=loss: loss(z).sum())) < 1e-10
        assert G.psd


def test_a_norm_changed_in_place_since_is_no_norm_any_more() -> None:
    net = Net()

    def loss(z: Tensor) -> Tensor:
        e = (z - Y).abs()
        with torch.no_grad():
            e.clamp_(max=0.5)
        return (e**2).mean()

    evaluation = evaluate(net.closure(loss), net.params)
    plain = torch.autograd.grad(loss(net.model(net.x)), net.params)
    assert error(evaluation.gradient, torch.cat([g.reshape(-1) for g in plain])) < 1e-12
    assert error(gauss_newton(evaluation).dense(), net.dense_gauss_newton(lambda z: F.mse_loss(z, Y))) < 1e-10


@pytest.mark.parametrize("products", ["cached", "streamed", "finite_difference"])
def test_squares_inside_a_checkpoint_change_nothing(products: Any) -> None:
    net = Net()
    body: Loss = lambda z: z / (1 + z.abs() ** 2 + z.norm(dim=1, keepdim=True) ** 2)  # noqa: E731
    plain = evaluate(net.closure(lambda z: F.mse_loss(body(z), Y)), net.params)
    inside = net.closure(lambda z: F.mse_loss(checkpoint(body, z, use_reentrant=False), Y))
    evaluation = evaluate(inside, net.params, products=products)
    assert error(evaluation.gradient, plain.gradient) < 1e-12
    assert error(gauss_newton(evaluation).dense(), gauss_newton(plain).dense()) < 1e-6


def test_long_recurrences_and_grids_take_no_time() -> None:
    net = Net()

    def discounted(z: Tensor) -> Tensor:
        total = torch.zeros(())
        for _ in range(1500):
            total = 0.99 * total + ((z - Y) ** 2).mean()
        return total

    def grid(z: Tensor) -> Tensor:
        costs = [[((z - Y) ** 2).mean()] * 15 for _ in range(15)]
        for i in range(1, 15):
            for j in range(1, 15):
                costs[i][j] = 0.5 * costs[i - 1][j] + 0.5 * costs[i][j - 1] + costs[0][0]
        return costs[-1][-1]

    for loss in (discounted, grid):
        assert gauss_newton(evaluate(net.closure(loss), net.params)).psd


def test_a_weight_may_depend_on_an_input_that_is_differentiated_by() -> None:
    net = Net()
    x = net.x.clone().requires_grad_()
    closure = lambda: (torch.exp(-x[:, :1]) * x[:, 1:2] ** 2 * (net.model(x) - Y) ** 2).mean()  # noqa: E731
    truth = net.dense_gauss_newton(lambda z: (torch.exp(-net.x[:, :1]) * net.x[:, 1:2] ** 2 * (z - Y) ** 2).mean())
    assert error(gauss_newton(evaluate(closure, net.params)).dense(), truth) < 1e-10


def test_a_weight_that_changes_its_sign_nearby_does_not_disturb_differences() -> None:
    net, weight = Net(), nn.Parameter(torch.zeros((), dtype=torch.float64))
    closure = net.closure(lambda z: F.mse_loss(z, Y) + weight * ((z[:, 0] - 1) ** 2).mean())
    for products in ("cached", "streamed", "finite_difference"):
        with pytest.warns(UserWarning, match="leaves that part out"):
            G = gauss_newton(evaluate(closure, [*net.params, weight], products=products)).dense()
        assert error(G[:-1, :-1], net.dense_gauss_newton(lambda z: F.mse_loss(z, Y))) < 1e-6


@pytest.mark.parametrize("products", ["cached", "streamed"])
def test_a_loss_taken_twice_is_convex_only_if_both_are(products: Any) -> None:
    net = Net()

    def closure() -> None:
        loss = ((net.model(net.x) - Y) ** 2).mean()
        loss.backward(retain_graph=True)
        (-0.5 * loss).backward()

    evaluation = evaluate(closure, net.params, products=products)
    assert gauss_newton(evaluation).psd == (products == "cached")  # half the loss as a sum, of which streaming sees two
    assert torch.linalg.eigvalsh(gauss_newton(evaluation).dense())[0] > -1e-12


def test_a_loop_over_rows_has_the_same_outputs_in_every_run() -> None:
    net = Net()
    closure = net.closure(lambda z: sum((((z[i] - Y[i]) ** 2).sum() for i in range(5)), torch.zeros(())))
    truth = net.dense_gauss_newton(lambda z: ((z - Y) ** 2).sum())
    assert error(gauss_newton(evaluate(closure, net.params, products="streamed")).dense(), truth) < 1e-10


@pytest.mark.parametrize("products", ["streamed", "finite_difference"])
def test_outputs_that_a_later_run_does_not_meet_are_an_error(products: Any) -> None:
    net, runs = Net(), itertools.count()

    def loss(z: Tensor) -> Tensor:
        if next(runs) == 0:
            return F.mse_loss(z, Y)
        return F.mse_loss(z, Y)

    G = gauss_newton(evaluate(net.closure(loss), net.params, products=products))
    with pytest.raises(RuntimeError, match=r"a different code path .* or use products=\"cached\""):
        _ = G @ torch.ones(26, dtype=torch.float64)
