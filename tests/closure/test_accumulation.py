"""Closures that work on `.grad` between their losses, against dense matrices of the losses left in it at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import build, error, unseen
from torch import Tensor, nn

from newtonopt import HessianFree, NewtonCG, evaluate, gauss_newton, hessian, jacobian
from newtonopt.closure.objective import Objective

FORMS = ("cached", "streamed", "finite_difference")
REAL, FAKE = torch.ones(4, 1).double(), torch.zeros(4, 1).double()


class Game:
    """A generator and a critic."""

    def __init__(self) -> None:
        self.g = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        self.d = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        self.noise, self.data = torch.randn(4, 2).double(), torch.randn(4, 2).double()
        self.of_g, self.of_d = list(self.g.parameters()), list(self.d.parameters())
        self.params = [*self.of_g, *self.of_d]

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def generator_loss(self) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.d(self.g(self.noise)), REAL)

    def critic_loss(self) -> Tensor:
        fake = self.d(self.g(self.noise).detach())
        real = self.d(self.data)
        return F.binary_cross_entropy_with_logits(fake, FAKE) + F.binary_cross_entropy_with_logits(real, REAL)

    def inputs(self) -> Tensor:
        """Each loss differentiated by its own player's parameters."""
        self.zero_grad()
        first, second = self.critic_loss(), self.generator_loss()
        first.backward(inputs=self.of_d)
        second.backward(inputs=self.of_g)
        return first.detach() + second.detach()

    def cleared(self) -> Tensor:
        """Call backward through both players, and `zero_grad` of the critic after it."""
        self.zero_grad()
        second = self.generator_loss()
        second.backward()
        self.d.zero_grad()
        first = self.critic_loss()
        first.backward()
        return first.detach() + second.detach()


def flat(gradients: Any, params: list[nn.Parameter]) -> Tensor:
    pairs = zip(gradients, params, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])


def dense_hessian(loss: Tensor, params: list[nn.Parameter]) -> Tensor:
    gradient = flat(torch.autograd.grad(loss, params, create_graph=True, allow_unused=True), params)
    rows = [torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True) for entry in gradient]
    return torch.stack([flat(row, params) for row in rows])


def block_diagonal(game: Game) -> Tensor:
    blocks = dense_hessian(game.generator_loss(), game.of_g), dense_hessian(game.critic_loss(), game.of_d)
    return torch.block_diag(*blocks)


def grads(params: list[nn.Parameter]) -> Tensor:
    return flat([p.grad for p in params], params)


@pytest.mark.parametrize("products", FORMS)
@pytest.mark.parametrize("kind", ["inputs", "cleared"])
def test_each_players_loss_counts_for_its_own_parameters(kind: str, products: Any) -> None:
    game = Game()
    closure: Callable[[], Tensor] = getattr(game, kind)
    closure()
    left = grads(game.params)
    for p in game.params:
        p.grad = torch.full_like(p, 3.0)
    evaluation = evaluate(closure, game.params, products=products)
    assert all(bool((p.grad == 3).all()) for p in game.params if p.grad is not None)
    assert error(evaluation.gradient, left) < 1e-12
    truth = block_diagonal(game)
    v, u = torch.randn(len(left)).double(), torch.randn(12).double()
    assert error(hessian(evaluation) @ v, truth @ v) < 1e-6
    G = gauss_newton(evaluation)
    assert G.psd
    J = jacobian(evaluation)
    assert J.shape == (12, len(left))
    assert abs(float(u @ (J @ v) - v @ (J.T @ u))) < 1e-5
    n = sum(p.numel() for p in game.of_g)
    z = game.d(game.g(game.noise)).flatten()
    slopes = torch.stack([flat(torch.autograd.grad(entry, game.of_g, retain_graph=True), game.of_g) for entry in z])
    bends = torch.sigmoid(z.detach()) * (1 - torch.sigmoid(z.detach())) / 4
    v[n:] = 0
    assert error((G @ v)[:n], slopes.T @ (slopes * bends[:, None]) @ v[:n]) < 1e-6
    assert not (G @ v)[n:].any()


@pytest.mark.parametrize("products", FORMS)
def test_a_trial_moves_the_parameters_that_a_loss_counts_for(products: Any) -> None:
    game = Game()
    objective = Objective(game.inputs, game.params, decay=0.1, products=products)
    evaluation = objective.record()
    assert not evaluation.clipped
    assert error(evaluation.gradient, grads(game.params) + 0.1 * objective.point) < 1e-12
    objective.check_replay(evaluation)
    zero, step = torch.zeros_like(objective.point), 0.1 * torch.randn_like(objective.point)
    assert objective.loss_at(zero) == float(evaluation.loss)
    loss, gradient = objective.gradient_at(zero)
    assert loss == float(evaluation.loss)
    assert error(gradient, evaluation.gradient) < 1e-12
    point = objective.point.clone()
    n = sum(p.numel() for p in game.of_g)
    by_d = torch.cat([torch.zeros(n).double(), step[n:]])
    by_g = step - by_d
    total = 0.05 * float((point + step).square().sum())
    for loss_of, moved in ((game.generator_loss, by_g), (game.critic_loss, by_d)):
        nn.utils.vector_to_parameters(point + moved, game.params)
        total += float(loss_of().detach())
    nn.utils.vector_to_parameters(point, game.params)
    assert abs(objective.loss_at(step) - total) < 1e-12


@pytest.mark.parametrize("optimizer", [HessianFree, NewtonCG])
@pytest.mark.parametrize("products", FORMS)
def test_an_optimizer_of_one_player_steps_on_its_loss(optimizer: Any, products: Any) -> None:
    both, alone = Game(), Game()
    alone.g.load_state_dict(both.g.state_dict())
    alone.d.load_state_dict(both.d.state_dict())
    alone.noise, alone.data = both.noise, both.data

    def generator() -> Tensor:
        alone.zero_grad()
        loss = alone.generator_loss()
        loss.backward()
        return loss

    frozen = [p.detach().clone() for p in both.of_d]
    for game, closure in ((both, both.inputs), (alone, generator)):
        steps = optimizer(game.of_g, products=products)
        for _ in range(2):
            steps.step(closure)
    for p, q in zip(both.of_g, alone.of_g, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(p, q) for p, q in zip(frozen, both.of_d, strict=True))


@pytest.mark.parametrize("products", FORMS)
def test_players_in_one_optimizer_approach_what_each_wants(products: Any) -> None:
    """`u` falls to `v / 2` and `v` to `u + 1`: both at once at (1, 2)."""
    u, v = (nn.Parameter(torch.tensor(start).double()) for start in (3.0, -2.0))

    def closure() -> Tensor:
        u.grad = v.grad = None
        first, second = F.mse_loss(u, v / 2), F.mse_loss(v, u + 1)
        first.backward(inputs=[u])
        second.backward(inputs=v)
        return first.detach() + second.detach()

    optimizer = HessianFree([u, v], products=products)
    for _ in range(25):
        optimizer.step(closure)
    torch.testing.assert_close(torch.stack([u, v]).detach(), torch.tensor([1.0, 2.0]).double(), rtol=0, atol=0.05)


def test_inputs_that_leave_the_parameters_nothing_are_an_error() -> None:
    game = Game()

    def closure() -> Tensor:
        loss = game.generator_loss()
        loss.backward(inputs=game.of_g)
        return loss

    with pytest.raises(RuntimeError, match=r"backward\(inputs=\.\.\.\) without the given parameters"):
        evaluate(closure, game.of_d)


class Regression:
    """A network, two batches for it, and closures that go through both in two phases."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        self.x, self.y = torch.randn(2, 5, 2).double().unbind(0)
        self.params = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(self.params)

    def loss(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.model(x), self.y)

    def phases(self, clear: Callable[[Regression], None]) -> Tensor:
        self.optimizer.zero_grad()
        first = F.mse_loss(self.model(self.x.flip(0)), 2 * self.y)
        first.backward()
        clear(self)
        loss = self.loss(self.x)
        loss.backward()
        return loss.detach()


def each(change: Callable[[Any], None]) -> Callable[[Regression], None]:
    def clear(problem: Regression) -> None:
        for p in problem.params:
            change(p)

    return clear


def assigned(p: nn.Parameter) -> None:
    p.grad = torch.zeros_like(p)


def removed(p: nn.Parameter) -> None:
    del p.grad


def scaled(p: Any) -> None:
    p.grad *= 0


def overwritten(p: Any) -> None:
    p.grad[...] = 0.0


CLEARED: dict[str, Callable[[Regression], None]] = {
    "zero_grad of the optimizer": lambda problem: problem.optimizer.zero_grad(),
    "zero_grad of the model": lambda problem: problem.model.zero_grad(),
    "zero_grad in place": lambda problem: problem.optimizer.zero_grad(set_to_none=False),
    "zero_grad, one tensor after the other": lambda problem: problem.model.zero_grad(set_to_none=False),
    "assigned": each(assigned),
    "removed": each(removed),
    "zero_": each(lambda p: p.grad.zero_()),
    "zero_ of the data": each(lambda p: p.grad.data.zero_()),
    "zero_ of what was detached": each(lambda p: p.grad.detach().zero_()),
    "fill_": each(lambda p: p.grad.fill_(0)),
    "copy_": each(lambda p: p.grad.copy_(torch.zeros_like(p))),
    "times zero": each(scaled),
    "set by index": each(overwritten),
    "other data": each(lambda p: setattr(p.grad, "data", torch.zeros_like(p))),
    "zeros_": each(lambda p: nn.init.zeros_(p.grad)),
    "all at once": lambda problem: torch._foreach_zero_([p.grad for p in problem.params]),
    "after clipping": lambda problem: (
        nn.utils.clip_grad_norm_(problem.params, 1e-3),
        problem.optimizer.zero_grad(),
    )[1],
}


@pytest.mark.parametrize("how", CLEARED)
def test_only_what_was_not_cleared_counts(how: str) -> None:
    problem = Regression()
    closure = lambda: problem.phases(CLEARED[how])  # noqa: E731
    truth = dense_hessian(problem.loss(problem.x), problem.params)
    plain = torch.autograd.grad(problem.loss(problem.x), problem.params)
    for products in FORMS:
        evaluation = evaluate(closure, problem.params, products=products)
        assert error(evaluation.gradient, flat(plain, problem.params)) < 1e-12
        assert float(evaluation.loss) == float(problem.loss(problem.x).detach())
        v = torch.randn_like(evaluation.gradient)
        assert error(hessian(evaluation) @ v, truth @ v) < 1e-6
        objective = Objective(closure, problem.params, products=products)
        assert not objective.record().clipped
        assert objective.loss_at(torch.zeros_like(v)) == float(evaluation.loss)
        assert error(objective.gradient_at(torch.zeros_like(v))[1], evaluation.gradient) < 1e-12
    torch.testing.assert_close(gauss_newton(evaluation).shape, jacobian(evaluation).T.shape[:1] * 2)


def test_gradients_that_are_views_of_one_buffer_are_cleared_through_it() -> None:
    problem = Regression()
    buffer = torch.zeros(sum(p.numel() for p in problem.params)).double()

    def closure() -> Tensor:
        buffer.zero_()
        for p, piece in zip(problem.params, buffer.split([p.numel() for p in problem.params]), strict=True):
            p.grad = piece.view_as(p)
        problem.loss(problem.y).backward()
        buffer.zero_()
        loss = problem.loss(problem.x)
        loss.backward()
        buffer.mul_(0.1 / buffer.norm())  # clipped
        return loss

    plain = flat(torch.autograd.grad(problem.loss(problem.x), problem.params), problem.params)
    for products in FORMS:
        assert error(evaluate(closure, problem.params, products=products).gradient, plain) < 1e-12
        assert Objective(closure, problem.params, products=products).record().clipped


def test_an_optimizer_takes_the_step_of_the_last_phase() -> None:
    two, one = Regression(), Regression()
    one.model.load_state_dict(two.model.state_dict())
    one.x, one.y = two.x, two.y
    first, second = HessianFree(two.params), HessianFree(one.params)
    for _ in range(3):
        first.step(lambda: two.phases(lambda problem: problem.optimizer.zero_grad()))
        second.step(lambda: one.loss(one.x))
    assert all(torch.equal(p, q) for p, q in zip(two.params, one.params, strict=True))


def test_gradients_cleared_after_the_last_backward_are_an_error() -> None:
    problem = Regression()

    def closure() -> Tensor:
        loss = problem.loss(problem.x)
        loss.backward()
        problem.optimizer.zero_grad()
        return loss

    before = [p.detach().clone() for p in problem.params]
    for attempt in (lambda: evaluate(closure, problem.params), lambda: HessianFree(problem.params).step(closure)):
        with pytest.raises(
            RuntimeError, match=r"clears the gradients after its last backward.* zero_grad\(\) at the start"
        ):
            attempt()
    assert all(torch.equal(p, q) for p, q in zip(before, problem.params, strict=True))


def test_gradients_that_the_closure_puts_together_itself_are_an_error() -> None:
    problem = Regression()

    def closure() -> Tensor:
        problem.optimizer.zero_grad()
        problem.loss(problem.y).backward()
        kept = [p.grad.clone() for p in problem.params if p.grad is not None]
        problem.optimizer.zero_grad()
        loss = problem.loss(problem.x)
        loss.backward()
        for p, g in zip(problem.params, kept, strict=True):
            p.grad.add_(g)  # type: ignore[union-attr]
        return loss

    for products in FORMS:
        with pytest.raises(RuntimeError, match=r"writes others to \.grad itself \(add_\).* Call backward once"):
            evaluate(closure, problem.params, products=products)


def fast_gradient_sign(problem: Regression, x: Tensor, *, clear: bool) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        problem.optimizer.zero_grad()
        if x.grad is not None:
            x.grad.zero_()
        first = problem.loss(x)
        first.backward()
        assert x.grad is not None
        attacked = (x + 0.1 * x.grad.sign()).detach()
        x.grad.zero_()
        if clear:
            problem.optimizer.zero_grad()
        loss = problem.loss(attacked)
        loss.backward()
        return loss.detach()

    return closure


@pytest.mark.parametrize("products", FORMS)
@pytest.mark.parametrize("clear", [False, True])
def test_data_perturbed_by_the_sign_of_a_gradient(clear: bool, products: Any) -> None:
    problem = Regression()
    x = problem.x.clone().requires_grad_()
    closure = fast_gradient_sign(problem, x, clear=clear)
    closure()
    left = grads(problem.params)
    x.grad = kept = torch.full_like(x, 5.0)
    evaluation = evaluate(closure, problem.params, products=products)
    assert x.grad is kept and bool((kept == 5).all())
    assert error(evaluation.gradient, left) < 1e-12
    sign = torch.autograd.grad(problem.loss(x), x)[0].sign()
    attacked = problem.loss((x + 0.1 * sign).detach())
    truth = dense_hessian(attacked if clear else attacked + problem.loss(x), problem.params)
    v = torch.randn_like(left)
    assert error(hessian(evaluation) @ v, truth @ v) < 1e-6
    assert gauss_newton(evaluation).psd
    x.grad = None
    objective = Objective(closure, problem.params, products=products)
    recorded = objective.record()
    assert not recorded.clipped
    assert objective.loss_at(torch.zeros_like(left)) == float(recorded.loss) == float(evaluation.loss)
    optimizer = HessianFree(problem.params, products=products)
    losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("products", FORMS)
def test_weights_of_losses_computed_from_gradients_are_constants(products: Any) -> None:
    problem = Regression()

    def closure() -> Tensor:
        problem.optimizer.zero_grad()
        problem.loss(problem.x).backward()
        weight = sum(p.grad.norm() for p in problem.params if p.grad is not None)
        problem.optimizer.zero_grad()
        loss = weight * problem.loss(problem.y)
        loss.backward()
        return loss.detach()

    closure()
    left = grads(problem.params)
    evaluation = evaluate(closure, problem.params, products=products)
    assert error(evaluation.gradient, left) < 1e-12
    weight = float(closure()) / float(problem.loss(problem.y).detach())
    if products != "finite_difference":  # which see the weight change
        truth = dense_hessian(weight * problem.loss(problem.y), problem.params)
        v = torch.randn_like(left)
        assert error(hessian(evaluation) @ v, truth @ v) < 1e-10
    assert Objective(closure, problem.params).loss_at(torch.zeros_like(left)) > 0


@pytest.mark.parametrize("products", FORMS)
def test_gradients_of_hidden_outputs_and_from_hooks_are_there_in_every_run(products: Any) -> None:
    problem = Regression()
    first, second = problem.model[0], problem.model[2]

    def closure() -> Tensor:
        problem.optimizer.zero_grad()
        seen: list[Tensor] = []
        hidden = first(problem.x)
        hidden.retain_grad()
        hidden.register_hook(seen.append)
        loss = F.mse_loss(second(hidden.tanh()), problem.y)
        loss.backward(retain_graph=True)
        moved = hidden + 0.1 * hidden.grad.sign() + 0.1 * seen[0].sign()
        problem.optimizer.zero_grad()
        loss = F.mse_loss(second(moved.tanh()), problem.y)
        loss.backward()
        return loss.detach()

    closure()
    evaluation = evaluate(closure, problem.params, products=products)
    assert error(evaluation.gradient, grads(problem.params)) < 1e-12
    objective = Objective(closure, problem.params, products=products)
    recorded = objective.record()
    assert objective.loss_at(torch.zeros_like(objective.point)) == float(recorded.loss) == float(evaluation.loss)


def test_gradients_with_a_graph_enter_the_loss() -> None:
    problem = Regression()
    x = problem.x.clone().requires_grad_()

    def closure() -> Tensor:
        problem.optimizer.zero_grad()
        x.grad = None
        problem.loss(x).backward(create_graph=True)
        problem.optimizer.zero_grad()
        loss = problem.loss(problem.x) + x.grad.square().sum()  # type: ignore[attr-defined]
        loss.backward()
        x.grad = None
        return loss.detach()

    slope = torch.autograd.grad(problem.loss(x), x, create_graph=True)[0]
    loss = problem.loss(problem.x) + slope.square().sum()
    for products in FORMS:
        evaluation = evaluate(closure, problem.params, products=products)
        assert (
            error(
                evaluation.gradient, flat(torch.autograd.grad(loss, problem.params, retain_graph=True), problem.params)
            )
            < 1e-12
        )
        v = torch.randn_like(evaluation.gradient)
        assert error(hessian(evaluation) @ v, dense_hessian(loss, problem.params) @ v) < 1e-6


TWO_STAGES: dict[str, Callable[[Tensor, Tensor], None]] = {
    "handed on": lambda z, cut: z.backward(cut.grad),
    "copied": lambda z, cut: z.backward(cut.grad.clone()),  # type: ignore[union-attr]
    "scalar product": lambda z, cut: (z * cut.grad).sum().backward(),
}


@pytest.mark.parametrize("how", TWO_STAGES)
def test_a_backward_in_two_stages_says_what_to_do(how: str) -> None:
    problem = Regression()

    def closure() -> Tensor:
        problem.optimizer.zero_grad()
        z = problem.model(problem.x)
        cut = z.detach().requires_grad_()
        loss = F.mse_loss(cut, problem.y)
        loss.backward()
        TWO_STAGES[how](z, cut)
        return loss

    for attempt in (
        *(lambda form=form: evaluate(closure, problem.params, products=form) for form in FORMS),
        lambda: HessianFree(problem.params).step(closure),
    ):
        with pytest.raises(RuntimeError, match=r"loss in two stages.* without detach, and call backward once"):
            attempt()


def derivative(problem: Regression) -> Tensor:
    z = problem.model(problem.x)
    loss = F.mse_loss(z, problem.y)
    (slope,) = torch.autograd.grad(loss, z, retain_graph=True)
    z.backward(slope)
    return loss


def policy(problem: Regression) -> Tensor:
    z = problem.model(problem.x)
    cut = z.detach().clone().requires_grad_()
    value = (cut - problem.y).cos().sum()
    (slope,) = torch.autograd.grad(value, cut)
    z.backward(-slope / 5)
    return value


def cached_by_rows(problem: Regression) -> Tensor:
    """Differentiate in two stages, as one does for a contrastive loss of more rows than fit in memory."""
    with torch.no_grad():
        z = problem.model(problem.x)
    loss = F.mse_loss(z.requires_grad_(), problem.y)
    loss.backward()
    for rows, slope in zip(problem.x.split(2), z.grad.split(2), strict=True):  # type: ignore[union-attr]
        (problem.model(rows) * slope).sum().backward()
    return loss


@pytest.mark.parametrize("stages", [derivative, policy, cached_by_rows])
def test_derivatives_handed_on_by_hand_say_what_to_do(stages: Callable[[Regression], Tensor]) -> None:
    problem = Regression()
    for products in FORMS:
        problem.optimizer.zero_grad()
        with pytest.raises(RuntimeError, match="loss in two stages"):
            evaluate(lambda: stages(problem), problem.params, products=products)


def ascent(problem: Regression) -> Callable[[], Tensor]:
    """The loss at the end of a short step up the gradient (SAM, Foret et al. 2021)."""

    def closure() -> Tensor:
        problem.optimizer.zero_grad()
        problem.loss(problem.x).backward()
        start = [p.detach().clone() for p in problem.params]
        with torch.no_grad():
            for p in problem.params:
                p.add_(p.grad, alpha=0.05)  # type: ignore[arg-type]
        problem.optimizer.zero_grad()
        loss = problem.loss(problem.x)
        loss.backward()
        with torch.no_grad():
            for p, before in zip(problem.params, start, strict=True):
                p.copy_(before)
        return loss.detach()

    return closure


@pytest.mark.filterwarnings("ignore:Finite differences do not respect")  # and see the ascent move with the parameters
@pytest.mark.parametrize("products", ["auto", *FORMS])
def test_a_loss_at_other_parameters_than_the_closure_leaves(products: Any) -> None:
    problem = Regression()
    closure = ascent(problem)
    closure()
    left, point = grads(problem.params), nn.utils.parameters_to_vector(problem.params).detach()
    if products == "cached":
        for attempt in (
            lambda: evaluate(closure, problem.params, products=products),
            lambda: HessianFree(problem.params, products=products).step(closure),
        ):
            with pytest.raises(RuntimeError, match=r'as SAM does.*Use products="streamed" or "auto"'):
                attempt()
    else:
        evaluation = evaluate(closure, problem.params, products=products)
        assert error(evaluation.gradient, left) < 1e-12
        recorded = Objective(closure, problem.params, products=products).record()
        assert not recorded.clipped
        assert error(recorded.gradient, left) < 1e-12
        optimizer = HessianFree(problem.params, products=products)
        losses = [float(optimizer.step(closure)) for _ in range(3)]
        assert losses[-1] < losses[0]
        nn.utils.vector_to_parameters(point, problem.params)
    assert torch.equal(nn.utils.parameters_to_vector(problem.params).detach(), point)
    if products in ("auto", "streamed"):
        found = hessian(evaluate(closure, problem.params, products=products)).dense()
        up = flat(torch.autograd.grad(problem.loss(problem.x), problem.params), problem.params)
        nn.utils.vector_to_parameters(point + 0.05 * up, problem.params)
        assert error(found, dense_hessian(problem.loss(problem.x), problem.params)) < 1e-10


def test_hooks_that_step_or_change_gradients_inside_backward_are_named() -> None:
    def clears(p: Tensor) -> None:
        p.grad = None

    def steps(p: Tensor) -> None:
        with torch.no_grad():
            p.sub_(0.1 * p.grad)
        p.grad = None

    def adds(p: Tensor) -> None:
        p.grad.add_(1.0)  # type: ignore[union-attr]

    for hook in (clears, steps, adds):
        problem = Regression()
        handles = [p.register_post_accumulate_grad_hook(hook) for p in problem.params]
        before = [p.detach().clone() for p in problem.params]

        def closure(problem: Regression = problem) -> Tensor:
            problem.optimizer.zero_grad()
            loss = problem.loss(problem.x)
            loss.backward()
            return loss

        optimizer = HessianFree(problem.params)
        with pytest.raises(RuntimeError, match=r"register_post_accumulate_grad_hook.* Remove the hook"):
            optimizer.step(closure)
        assert all(torch.equal(p, q) for p, q in zip(before, problem.params, strict=True))
        for handle in handles:
            handle.remove()
        optimizer.step(closure)
        assert optimizer.last_step is not None and optimizer.last_step.accepted


def test_what_the_closure_writes_to_gradients_is_not_called_an_earlier_closures() -> None:
    problem = Regression()

    def closure() -> Tensor:
        problem.optimizer.zero_grad()
        loss = problem.loss(problem.x)
        loss.backward()
        for p in problem.params:
            p.grad.add_(1.0)  # type: ignore[union-attr]
        return loss

    with pytest.raises(RuntimeError, match=r"wrote something else there, such as noise"):
        HessianFree(problem.params).step(closure)


def test_frozen_networks_keep_their_gradients_through_trials() -> None:
    game = Game()

    def closure() -> Tensor:
        game.g.zero_grad()
        loss = game.generator_loss()
        loss.backward()
        game.d.zero_grad(set_to_none=False)
        return loss

    closure()
    for p in game.of_d:
        p.grad = torch.full_like(p, 2.0)
    kept = [p.grad for p in game.of_d]
    hessian(evaluate(closure, game.of_g, products="streamed")).dense()
    assert all(p.grad is g and bool((p.grad == 2).all()) for p, g in zip(game.of_d, kept, strict=True))


def test_closures_that_read_gradients_work_in_replays() -> None:
    case = build("mlp", "mse")
    norms = unseen([])

    def closure() -> Tensor:
        loss = case.closure()
        norms().append(float(torch.nn.utils.get_total_norm([p.grad for p in case.params])))
        return loss

    objective = Objective(closure, case.params)
    objective.record()
    objective.loss_at(torch.zeros_like(objective.point))
    assert norms()[0] > 0 and len(norms()) == 2
