"""Products that are wrong, or that nobody can vouch for, are not given out as right."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newtonopt import Evaluation, HessianFree, NewtonCG, evaluate, gauss_newton, hessian, jacobian, mark_outputs
from newtonopt.closure.evaluation import Manner
from newtonopt.curvature import critical_point, extreme_eigenvalues, measure
from newtonopt.operators.verification import examine_hessian, examine_one_sided

FORMS = ("auto", "cached", "streamed", "finite_difference")
EXACT = ("auto", "cached", "streamed")


class Constant(torch.autograd.Function):
    """The square, whose saved derivative is a constant to a second differentiation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward((2 * x).detach())
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


class Right(torch.autograd.Function):
    """The cube, differentiated as often as one likes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 3 * ctx.saved_tensors[0] ** 2


class Detached(torch.autograd.Function):
    """An identity whose backward pass hides from differentiation, as an adjoint method's does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.detach()


class StraightThrough(torch.autograd.Function):
    """Rounds, and calls that the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Reversed(torch.autograd.Function):
    """A gradient reversal layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class Fused(torch.autograd.Function):
    """Cross-entropy with the gradient computed beforehand, as fused kernels do it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward((torch.softmax(z, 1) - F.one_hot(y, z.shape[1])) / len(y))
        return F.cross_entropy(z, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.saved_tensors[0], None


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


class Net:
    """A small network in float64 with its data."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        self.x, self.y = torch.randn(12, 3).double(), torch.randint(0, 4, (12,))
        self.t = torch.randn(12, 4).double()
        self.model = nn.Sequential(nn.Linear(3, 5), activation or nn.Tanh(), nn.Linear(5, 4)).double()
        self.params = list(self.model.parameters())

    @property
    def z(self) -> Tensor:
        out: Tensor = self.model(self.x)
        return out


def far(A: Tensor, B: Tensor) -> float:
    return float((A - B).abs().max() / B.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize(
    ("loss", "truth"),
    [
        (lambda w: Constant.apply(w).sum(), lambda w: (w * w).sum()),
        (lambda w: Constant.apply(w).square().sum() + w.sum() ** 3, lambda w: (w**4).sum() + w.sum() ** 3),
        (lambda w: (Detached.apply(w) ** 3).sum(), lambda w: (w**3).sum()),
        # PyTorch's own formula does not hold where the gradient of the output is zero.
        (lambda w: torch.logcumsumexp(w, 0).square().sum(), lambda w: _logcumsumexp(w).square().sum()),
    ],
    ids=["constant", "mixed", "detached", "logcumsumexp"],
)
def test_a_hessian_that_autograd_gets_wrong_is_formed_by_differences(
    loss: Callable[[Tensor], Tensor], truth: Callable[[Tensor], Tensor]
) -> None:
    w = vector(0.0, 1.2, 0.3)
    exact = torch.autograd.functional.hessian(truth, w.detach())
    with pytest.warns(UserWarning, match=r"second derivative .*is not the derivative.*finite differences") as caught:
        evaluation = evaluate(lambda: loss(w), [w])
        H = hessian(evaluation).dense()
    assert far(H, exact) < 1e-6 and evaluation.form == "finite_difference"
    assert len(caught) == 1
    for form in ("cached", "streamed"):
        with pytest.raises(RuntimeError, match=r'is not the derivative.*products="finite_difference"'):
            hessian(evaluate(lambda: loss(w), [w], products=form)) @ w.detach()  # type: ignore[arg-type]
    differenced = hessian(evaluate(lambda: loss(w), [w], products="finite_difference"))
    assert far(differenced.dense(), exact) < 1e-6 and not differenced.trust.doubt


def _logcumsumexp(w: Tensor) -> Tensor:
    return torch.stack([torch.logsumexp(w[: i + 1], 0) for i in range(len(w))])


def test_the_warning_names_the_function() -> None:
    w = vector(0.5, 1.2)
    with pytest.warns(UserWarning, match="through Constant is not the derivative"):
        hessian(evaluate(lambda: Constant.apply(w).sum(), [w])) @ w.detach()


def test_optimizers_and_measurements_take_differences_too() -> None:
    def closure() -> Tensor:
        return Constant.apply(w).sum()

    w = vector(0.5, 1.2)
    with pytest.warns(UserWarning, match="finite differences") as caught:
        optimizer = NewtonCG([w])
        for _ in range(2):
            optimizer.step(closure)
    assert len(caught) == 1 and optimizer.last_step is not None
    assert optimizer.last_step.form == "finite_difference" and float(w.detach().abs().max()) < 1e-6
    w = vector(0.5, 1.2)
    with pytest.warns(UserWarning, match="finite differences"):
        found = measure(closure, [w], sharpness=None)
    assert found["curvature-bookkeeping/certified"] == 1.0
    assert found["curvature/lambda_max_lower"] <= 2.0 <= found["curvature/lambda_max_upper"]
    assert found["curvature/lambda_max"] == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_function_that_is_right_is_left_alone(form: Any) -> None:
    net = Net()
    for operator in (hessian, gauss_newton):
        evaluation = evaluate(lambda: F.mse_loss(Right.apply(net.z), net.t), net.params, products=form)
        plain = operator(evaluate(lambda: F.mse_loss(net.z**3, net.t), net.params)).dense()
        A = operator(evaluation)
        assert far(A.dense(), plain) < 1e-7 and not A.trust.doubt
        assert A.psd == (operator is gauss_newton)


def test_a_jacobian_hidden_by_a_backward_pass_is_formed_by_differences() -> None:
    net = Net()
    truth = gauss_newton(evaluate(lambda: F.mse_loss(net.z, net.t), net.params)).dense()
    with pytest.warns(UserWarning, match="do not belong to one Jacobian.*finite differences"):
        G = gauss_newton(evaluate(lambda: F.mse_loss(Detached.apply(net.z), net.t), net.params))
        product = G @ net_gradient(net)
    assert far(product, truth @ net_gradient(net)) < 1e-6
    # Rows need no second differentiation.
    rows = gauss_newton(evaluate(lambda: F.mse_loss(Detached.apply(net.z), net.t), net.params)).dense()
    assert far(rows, truth) < 1e-12
    with pytest.raises(RuntimeError, match="through Detached do not belong to one Jacobian"):
        closure = lambda: F.mse_loss(Detached.apply(net.z), net.t)  # noqa: E731
        jacobian(evaluate(closure, net.params, products="cached")) @ torch.ones(44, dtype=torch.float64)


def test_a_loss_with_a_gradient_computed_beforehand() -> None:
    net = Net()
    truth = gauss_newton(evaluate(lambda: F.cross_entropy(net.z, net.y), net.params)).dense()

    def closure() -> Tensor:
        return Fused.apply(mark_outputs(net.z), net.y)

    with pytest.warns(UserWarning, match="through Fused is not the derivative"):
        G = gauss_newton(evaluate(closure, net.params)).dense()
    assert far(G, truth) < 1e-6
    for form in ("cached", "streamed"):
        with pytest.raises(RuntimeError, match="through Fused is not the derivative"):
            gauss_newton(evaluate(closure, net.params, products=form)) @ net_gradient(net)  # type: ignore[arg-type]
    differenced = gauss_newton(evaluate(closure, net.params, products="finite_difference")).dense()
    assert far(differenced, truth) < 1e-6


def net_gradient(net: Net) -> Tensor:
    return torch.ones(sum(p.numel() for p in net.params), dtype=torch.float64)


def test_gauss_newton_products_at_outputs_without_a_gradient() -> None:
    """`J'u` is linear in u, and some formulas of PyTorch do not hold at zero."""
    w, t = vector(0.1, 1.2, 0.3), torch.tensor([0.5, 0.1, -1.0], dtype=torch.float64)
    J = torch.autograd.functional.jacobian(_logcumsumexp, w.detach())
    for form in FORMS:
        G = gauss_newton(evaluate(lambda: F.mse_loss(torch.logcumsumexp(w, 0), t), [w], products=form))  # type: ignore[arg-type]
        assert far(G.dense(), 2 / 3 * J.T @ J) < 1e-7, form


def test_forward_mode_without_its_tangents_gives_way_to_two_backward_passes() -> None:
    w, t = vector(0.4, 1.2, -0.3, 0.8), torch.tensor([0.5, -1.0], dtype=torch.float64)
    index = torch.tensor([0, 1, 0, 1])

    def closure() -> Tensor:
        start = torch.ones(2, dtype=torch.float64)
        return F.mse_loss(start.scatter_reduce(0, index, w, reduce="prod"), t)

    truth = torch.zeros(2, 4, dtype=torch.float64)
    truth[0, 0], truth[0, 2], truth[1, 1], truth[1, 3] = w.detach()[[2, 0, 3, 1]]
    G = gauss_newton(evaluate(closure, [w], products="streamed"))
    assert far(G.dense(), truth.T @ truth) < 1e-12


def held(net: Net) -> Tensor:
    """A loss with a scale that is held constant."""
    z = net.z
    with torch.no_grad():
        scale = z.std() + 0.5
    return F.mse_loss(z / scale, net.t)


def detached(net: Net) -> Tensor:
    z = net.z
    return F.mse_loss(z / (z.std() + 0.5).detach(), net.t)


@pytest.mark.parametrize("loss", [held, detached])
@pytest.mark.parametrize("operator", [hessian, gauss_newton])
def test_what_is_held_constant_is_meant(loss: Callable[[Net], Tensor], operator: Any) -> None:
    net = Net()
    scale = (net.z.std() + 0.5).detach()
    truth = operator(evaluate(lambda: F.mse_loss(net.z / scale, net.t), net.params)).dense()
    for form in EXACT:
        A = operator(evaluate(lambda: loss(net), net.params, products=form))  # type: ignore[arg-type]
        assert far(A.dense(), truth) < 1e-10 and not A.trust.doubt
        found = extreme_eigenvalues(A, 1, 1)
        eigenvalues = torch.linalg.eigvalsh(truth)
        assert found.certified and found.top[0].lower <= float(eigenvalues[-1]) <= found.top[0].upper
    evaluation = evaluate(lambda: loss(net), net.params, products="finite_difference")
    with pytest.warns(UserWarning, match="do not respect what backward holds constant") as caught:
        A = operator(evaluation)
        found = extreme_eigenvalues(A, 1, 1)
    assert len(caught) == 1 and A.trust.doubt
    assert not found.certified and found.top[0].upper == math.inf and found.bottom[0].lower == -math.inf


def clamped(net: Net) -> Tensor:
    z = net.z
    z.register_hook(lambda g: g.clamp(-0.01, 0.01))
    return F.mse_loss(z, net.t)


def straight_through(net: Net) -> Tensor:
    w = StraightThrough.apply(3 * net.params[0])
    return F.mse_loss(F.linear(F.linear(net.x, w).tanh(), net.params[2]), net.t)


def reversal(net: Net) -> Tensor:
    return F.mse_loss(net.model[2](Reversed.apply(net.model[0](net.x).tanh())), net.t)


@pytest.mark.parametrize("loss", [clamped, straight_through, reversal])
@pytest.mark.parametrize("operator", [hessian, gauss_newton])
@pytest.mark.parametrize("form", FORMS)
def test_what_backward_changes_is_said_once_and_nothing_is_certified(
    loss: Callable[[Net], Tensor], operator: Any, form: Any
) -> None:
    net = Net()
    evaluation = evaluate(lambda: loss(net), net.params, products=form)
    with pytest.warns(UserWarning, match="is not the gradient of the loss|do not respect what backward") as caught:
        A = operator(evaluation)
        found = extreme_eigenvalues(A, 1, 1)
        A @ evaluation.gradient
    assert len(caught) == 1
    assert A.trust.doubt and not A.psd and not found.certified


HOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "scale": lambda g: 2 * g,
    "mask": lambda g: g * (torch.arange(g.numel()).view(g.shape) % 2),
    "zero": lambda g: 0 * g,
    "clamp": lambda g: g.clamp(-0.01, 0.01),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hooks_on_a_parameter_are_said(hook: str, number: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 5)).to(dtype)
    x, y = torch.randn(64, 10, dtype=dtype), torch.randint(0, 5, (64,))
    model[number].weight.register_hook(HOOKS[hook])
    for operator in (hessian, gauss_newton):
        for form in EXACT:
            evaluation = evaluate(lambda: F.cross_entropy(model(x), y), model.parameters(), products=form)  # type: ignore[arg-type]
            with pytest.warns(UserWarning, match="is not the gradient of the loss"):
                assert operator(evaluation).trust.doubt
    with pytest.warns(UserWarning, match="is not the gradient of the loss"):
        HessianFree(model.parameters()).step(lambda: F.cross_entropy(model(x), y))


class Mask(torch.autograd.Function):
    """Lets a half of the gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (torch.arange(g.numel()).view(g.shape) % 2)


@pytest.mark.parametrize("seed", range(4))
def test_functions_that_leave_out_parts_of_gradients_are_said(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 5)).double()
    x, y = torch.randn(64, 10).double(), torch.randint(0, 5, (64,))

    def closure() -> Tensor:
        weight = Mask.apply(model[0].weight)
        return F.cross_entropy(model[2](F.linear(x, weight, model[0].bias).tanh()), y)

    for operator in (hessian, gauss_newton):
        with pytest.warns(UserWarning, match="is not the (gradient of the loss|derivative of the gradient)"):
            assert operator(evaluate(closure, model.parameters())).trust.doubt


def test_hooks_on_a_parameter_that_only_look_are_let_alone() -> None:
    net = Net()
    net.params[0].register_hook(lambda g: None)
    net.params[1].register_hook(lambda g: g.clone())
    for operator in (hessian, gauss_newton):
        assert not operator(evaluate(lambda: F.cross_entropy(net.z, net.y), net.params)).trust.doubt


def test_hooks_that_only_look_are_let_alone() -> None:
    net, seen = Net(), []

    def closure() -> Tensor:
        z = net.z
        z.register_hook(lambda g: seen.append(g.norm()))  # type: ignore[func-returns-value]
        return F.mse_loss(z, net.t)

    for operator in (hessian, gauss_newton):  # the constant hides the loss's slope, so that a doubt would stay
        assert not operator(evaluate(lambda: closure() + 1e12, net.params)).trust.doubt
    net.model[2].register_full_backward_hook(lambda *_: None)
    for operator in (hessian, gauss_newton):
        for form in FORMS:
            assert not operator(evaluate(closure, net.params, products=form)).trust.doubt  # type: ignore[arg-type]
    assert seen


def test_sparse_products_with_trained_values() -> None:
    """PyTorch's second derivative of `torch.sparse.mm` is wrong."""
    indices = torch.tensor([[0, 1, 2, 3], [1, 2, 0, 1]])
    values, u = vector(0.3, -0.4, 1.1, 0.7), torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def loss(values: Tensor, u: Tensor, sparse: bool) -> Tensor:
        if sparse:
            return torch.sparse.mm(torch.sparse_coo_tensor(indices, values, (5, 3)), u).square().mean()
        return (torch.zeros(5, 3, dtype=torch.float64).index_put(tuple(indices), values) @ u).square().mean()

    truth = hessian(evaluate(lambda: loss(values, u, False), [values, u])).dense()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        H = hessian(evaluate(lambda: loss(values, u, True), [values, u])).dense()
    assert any("finite differences instead" in str(w.message) for w in caught)
    assert far(H, truth) < 1e-6


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for form in FORMS:
        with pytest.raises(FloatingPointError, match="gradient is not finite"):
            measure(lambda: (w + 1).square().sum() + w.square().sum().sqrt(), [w], products=form)  # type: ignore[arg-type]


def test_curvature_of_zero_is_no_rough_difference() -> None:
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for operator in (hessian, gauss_newton):
        found = operator(evaluate(lambda: F.mse_loss(w.prod(), w.new_ones(())), [w], products="finite_difference"))
        assert not found.trust.doubt and float(found.dense().abs().max()) < 1e-6


def test_slopes_that_do_not_exist_are_marked() -> None:
    """PReLU at exact zeros: its Jacobian's products and those of its transpose take different slopes."""
    net = Net(nn.PReLU())
    with torch.no_grad():
        net.params[0].zero_(), net.params[1].zero_()
    with pytest.warns(UserWarning, match="do not belong to one Jacobian"):
        G = gauss_newton(evaluate(lambda: F.mse_loss(net.z, net.t), net.params))
        assert G.trust.doubt and not extreme_eigenvalues(G, 1, 1).certified


@pytest.mark.parametrize(
    "loss",
    [
        lambda w: F.mse_loss(w.sum(0), torch.ones(2).double()) + 0.1 * w.norm(dim=1).sum(),
        lambda w: F.mse_loss(w.sum(0), torch.ones(2).double()) + torch.linalg.vector_norm(w),
    ],
    ids=["group lasso", "vector norm"],
)
def test_a_second_derivative_that_is_not_finite_is_differenced(loss: Callable[[Tensor], Tensor]) -> None:
    w = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="not finite, although loss and gradient are.*finite differences"):
        H = hessian(evaluate(lambda: loss(w), [w])).dense()
    assert bool(torch.isfinite(H).all())


def test_a_second_derivative_that_differences_have_not_either_is_said() -> None:
    """The loss jumps at zero on the scale of 1e-12, by which `F.normalize` guards its division."""
    w = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="not finite, although loss and gradient are") as caught:
        H = hessian(evaluate(lambda: F.mse_loss(F.normalize(w, dim=1) + w, torch.ones(3, 2).double()), [w]))
        assert H.trust.doubt
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=r'products="finite_difference", which is finite there'):
        evaluation = evaluate(lambda: (w + 1).square().sum() + w.norm(dim=1).sum(), [w], products="cached")
        assert hessian(evaluation).trust.doubt


def test_a_later_point_without_a_finite_second_derivative_is_differenced() -> None:
    """Weights reach zero, where a norm has no second derivative, in a later step than the first one."""
    w = vector(1.0, 2.0)

    def closure() -> Tensor:
        return (w - 0.1).square().sum() + w.norm()

    optimizer = NewtonCG([w])
    optimizer.step(closure)
    with torch.no_grad():
        w.zero_()
    with pytest.warns(UserWarning, match="not finite, although loss and gradient are"):
        optimizer.step(closure)
    assert optimizer.last_step is not None and "not finite" not in optimizer.last_step.reason


def test_a_parameter_that_has_run_off_does_not_make_differences_too_long_for_the_others() -> None:
    """The length scale of a Gaussian process that the data do not determine does that."""
    theta = torch.tensor([0.5, 0.5, 1e9], dtype=torch.float64, requires_grad=True)

    def closure() -> Tensor:
        return 0.5 * theta[1] ** 2 - torch.exp(-0.5 * theta[0] ** 2) + 1e-12 * theta[2]

    H = hessian(evaluate(closure, [theta]))
    assert (H.trust.doubt, H.trust.error) == ("", 0.0)
    assert float(H.dense()[0, 0]) == pytest.approx(0.75 * math.exp(-0.125), rel=1e-12)


def test_differences_choose_their_length_and_state_their_error() -> None:
    """A stiff direction in float32 bends the gradient within the usual length."""
    torch.manual_seed(0)
    w = torch.randn(200, requires_grad=True)
    stiff = torch.zeros(200)
    stiff[0] = 1.0

    def closure() -> Tensor:
        return (w.square().sum() + torch.cosh(30 * (w @ stiff - w[0].detach())) + 10 * torch.sin(40 * w[0])) / 200

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        A = hessian(evaluate(lambda: 10 * torch.sin(40 * w[0]) + w.square().sum(), [w], products="finite_difference"))
        exact = float(-16000 * torch.sin(40 * w[0].detach()) + 2)
    assert float((A @ stiff)[0]) == pytest.approx(exact, rel=2e-2)
    assert 0.0 < A.trust.error < 0.05


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differences_at_any_scale_of_the_parameters(scale: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(30, 3, dtype=dtype), torch.randn(30, 1, dtype=dtype)
    w = (scale * torch.randn(3, 1, dtype=dtype)).requires_grad_()
    for operator in (hessian, gauss_newton):
        A, B = (
            operator(evaluate(lambda: F.mse_loss((x @ w / scale).tanh(), y), [w], products=form))
            for form in ("finite_difference", "cached")
        )
        assert far(A.dense(), B.dense()) < (3e-2 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_intervals_by_differences_hold(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(40, 4), torch.randint(0, 3, (40,))
    exact = copy.deepcopy(model).double()
    truth = hessian(evaluate(lambda: F.cross_entropy(exact(x.double()), y), exact.parameters())).dense()
    values = torch.linalg.eigvalsh(truth)
    H = hessian(evaluate(lambda: F.cross_entropy(model(x), y), model.parameters(), products="finite_difference"))
    found = extreme_eigenvalues(H, 1, 1)
    assert found.certified
    assert found.top[0].lower <= float(values[-1]) <= found.top[0].upper
    assert found.bottom[0].lower <= float(values[0]) <= found.bottom[0].upper


class Swish(torch.autograd.Function):
    """A right activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * (s + x * s * (1 - s))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_right_functions_in_networks_with_kinks_raise_no_alarm(dtype: torch.dtype, scale: float) -> None:
    """Pre-activations of exactly zero, weights that are tiny or saturate the softmax."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).to(dtype)
    x, y = torch.randn(8, 1, 6, 6, dtype=dtype), torch.randint(0, 3, (8,))
    x[:, :, :4] = 0.0
    with torch.no_grad():
        model[0].bias.zero_()
        for p in model.parameters():
            p.mul_(scale)
    for operator in (hessian, gauss_newton):
        for form in EXACT:
            A = operator(evaluate(lambda: F.cross_entropy(Swish.apply(model(x)), y), model.parameters(), products=form))  # type: ignore[arg-type]
            A @ torch.ones(A.shape[1], dtype=dtype)


def test_coarse_parameters_are_no_error() -> None:
    """There are no differences in bfloat16, so that hooks and Functions are marked at most."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4).bfloat16()
    model.weight.register_hook(lambda g: None)
    x, y = torch.randn(8, 3).bfloat16(), torch.randint(0, 4, (8,))
    for closure in (
        lambda: F.cross_entropy(model(x).float(), y),
        lambda: Fused.apply(mark_outputs(model(x).float()), y),
    ):
        evaluation = evaluate(closure, model.parameters())
        for operator in (hessian, gauss_newton):
            assert bool(torch.isfinite(operator(evaluation) @ torch.ones(16)).all())
    assert gauss_newton(evaluation).trust.doubt


def test_saturated_outputs_are_no_error() -> None:
    w = vector(50.0, -50.0, 0.0)
    for form in ("cached", "streamed"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            closure = lambda: F.mse_loss(torch.softmax(w, 0), torch.ones(3).double())  # noqa: E731
            G = gauss_newton(evaluate(closure, [w], products=form))  # type: ignore[arg-type]
            assert float(G.dense().abs().max()) < 1e-20


@pytest.mark.parametrize("change", [torch.sign, lambda g: g.clamp(-0.01, 0.01)], ids=["sign", "clamp"])
def test_functions_that_change_gradients_are_said(change: Callable[[Tensor], Tensor]) -> None:
    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return change(g)

    net = Net()
    for form in EXACT:
        for operator in (hessian, gauss_newton):
            evaluation = evaluate(lambda: F.mse_loss(Changed.apply(net.z.tanh()), net.t), net.params, products=form)  # type: ignore[arg-type]
            with pytest.warns(UserWarning, match="is not the gradient|do not belong to one Jacobian"):
                assert operator(evaluation).trust.doubt


def test_the_padding_of_an_embedding_is_held_constant() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 3, padding_idx=0), nn.Flatten(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        model[0].weight[0] = 1.0
    x, y = torch.tensor([[0, 1], [2, 0], [3, 1]]), torch.tensor([0, 1, 1])
    for operator in (hessian, gauss_newton):
        for form in EXACT:
            assert not operator(
                evaluate(lambda: F.cross_entropy(model(x), y), model.parameters(), products=form)
            ).trust.doubt  # type: ignore[arg-type]


def test_products_that_are_not_their_transposes_are_marked() -> None:
    w = vector(1.0, 2.0)
    A = torch.tensor([[2.0, 0.1], [0.0, 2.0]], dtype=torch.float64)
    evaluation = Evaluation.from_loss(w.square().sum(), [w])  # without a closure there is nothing to compare with
    assert not examine_hessian(evaluation, Manner("cached"), lambda _: lambda v: 2 * v).doubt
    found = examine_hessian(evaluation, Manner("cached"), lambda _: lambda v: A @ v)
    assert "with its transpose differ" in found.doubt


def test_no_minimum_is_said_of_products_with_a_doubt() -> None:
    w = vector(0.0, 0.0)
    w.register_hook(lambda g: 2 * g)
    with pytest.warns(UserWarning, match="No measurement of this curvature is certified"):
        point = critical_point(evaluate(lambda: w.square().sum() + w.sum() ** 4, [w]))
    assert point.kind == "degenerate"


@pytest.mark.parametrize("form", FORMS)
def test_ordinary_networks_raise_no_alarm(form: Any) -> None:
    for activation in (nn.ReLU(), nn.Tanh(), nn.GELU(), nn.Hardswish(), nn.LeakyReLU(), nn.Softplus()):
        net = Net(activation)
        with torch.no_grad():
            net.params[1].zero_()
            net.x[:4] = 0.0  # pre-activations of exactly zero
        for loss in (lambda net=net: F.mse_loss(net.z, net.t), lambda net=net: F.cross_entropy(net.z, net.y)):
            for operator in (hessian, gauss_newton):
                if form == "finite_difference" and isinstance(activation, (nn.ReLU, nn.LeakyReLU, nn.Hardswish)):
                    continue  # there is no second derivative, and differences tell
                assert not operator(evaluate(loss, net.params, products=form)).trust.doubt


def test_checks_are_counted_and_made_once_by_an_optimizer() -> None:
    net = Net()
    optimizer = HessianFree(net.params)
    checks = []
    for _ in range(3):
        optimizer.step(lambda: F.mse_loss(net.z, net.t))
        assert optimizer.last_step is not None
        checks.append(optimizer.last_step.checks)
    assert checks[0] > 0 and checks[1:] == [0, 0]


def test_one_sided_differences_pass_where_they_agree_with_exact_products() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    directions = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])]
    # A kink just beside the point is no part of the Hessian.
    for kink, passes in ((0.0, True), (1e-3, False), (10.0, False)):
        evaluation = evaluate(lambda kink=kink: w.pow(3).sum() + kink * (w[0] - 1.000001).relu(), [w])
        H = hessian(evaluation)
        found = examine_one_sided(evaluation, H, directions, 5e-3)
        assert (found is not None) == passes
        if found is not None:
            assert found.manner == Manner("finite_difference", central=False)
            assert 0.0 < found.error <= 5e-3
            assert examine_one_sided(evaluation, H, directions, 0.5 * found.error) is None


def test_one_sided_differences_are_refused_beside_products_that_keep_no_graph() -> None:
    w = nn.Parameter(torch.tensor([0.5, 1.0]))
    evaluation = evaluate(lambda: w.square().sum(), [w], products="streamed")
    assert examine_one_sided(evaluation, hessian(evaluation), [torch.ones(2)], 5e-3) is None
