"""Stability thresholds and preconditioned spectra against the optimizers' own steps on quadratics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import build
from torch import Tensor
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from newtonopt import LinearOperator, evaluate, hessian
from newtonopt.curvature import extreme_eigenvalues, preconditioned, stability_threshold


def _settings() -> st.SearchStrategy[dict[str, Any]]:
    rate = st.floats(1e-3, 10.0)
    decay = st.sampled_from([0.0, 0.01, 0.1])
    plain = st.fixed_dictionaries({"lr": rate, "weight_decay": decay, "dampening": st.sampled_from([0.0, 0.5])})
    momentum = st.floats(0.05, 0.95)
    ball = st.fixed_dictionaries(
        {"lr": rate, "weight_decay": decay, "momentum": momentum, "dampening": st.floats(-0.5, 0.9)}
    )
    nesterov = st.fixed_dictionaries(
        {"lr": rate, "weight_decay": decay, "momentum": momentum, "nesterov": st.just(True)}
    )
    return st.one_of(plain, ball, nesterov)


def _growth(arguments: dict[str, Any], curvature: float, steps: int = 1000) -> float:
    """Return the growth of log |theta| over the second half of a run of torch.optim.SGD on curvature * theta^2 / 2."""
    theta = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], **arguments)
    sizes = []
    for _ in range(steps):
        theta.grad = curvature * theta.detach()
        optimizer.step()
        sizes.append(theta.abs().item())
        if not 1e-100 < sizes[-1] < 1e100:
            break
    half = len(sizes) // 2
    return math.log(max(sizes[half:])) - math.log(max(sizes[: max(half, 1)]))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(_settings())
def test_sgd_contracts_below_and_diverges_above(arguments: dict[str, Any]) -> None:
    threshold = stability_threshold(torch.optim.SGD([torch.zeros(1)], **arguments))
    total = threshold + arguments["weight_decay"]
    assert _growth(arguments, total * 0.99 - arguments["weight_decay"]) < 0.0
    assert _growth(arguments, total * 1.01 - arguments["weight_decay"]) > 0.0


@pytest.mark.parametrize(
    ("arguments", "threshold"),
    [
        ({"lr": 0.1}, 20.0),
        ({"lr": 0.1, "dampening": 0.5}, 20.0),
        ({"lr": 0.1, "momentum": 0.9}, 38.0),
        ({"lr": 0.1, "momentum": 0.9, "dampening": 0.9}, 380.0),
        ({"lr": 0.1, "momentum": 0.9, "nesterov": True}, 38.0 / 2.8),
        ({"lr": 0.1, "weight_decay": 3.0}, 17.0),
        ({"lr": 1.0, "weight_decay": 3.0}, -1.0),
        ({"lr": 0.0}, math.inf),
        ({"lr": 0.1, "momentum": 0.5, "dampening": 1.0}, math.inf),
        ({"lr": torch.tensor(0.5)}, 4.0),
    ],
)
def test_closed_forms(arguments: dict[str, Any], threshold: float) -> None:
    assert stability_threshold(torch.optim.SGD([torch.zeros(1)], **arguments)) == pytest.approx(threshold)


@pytest.mark.parametrize(
    ("kind", "arguments", "threshold"),
    [
        (torch.optim.Adam, {"lr": 0.1}, 380.0),
        (torch.optim.Adam, {"lr": 0.1, "betas": (0.5, 0.9), "weight_decay": 3.0}, 60.0),
        (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 1.0}, 361.0),
        (torch.optim.NAdam, {"lr": 0.1}, 380.0 / 2.8),
        (torch.optim.NAdam, {"lr": 0.1, "weight_decay": 1.0, "decoupled_weight_decay": True}, 361.0 / 2.8),
        (torch.optim.RAdam, {"lr": 0.1}, 380.0),
        (torch.optim.Adamax, {"lr": 0.1}, 380.0),
        (torch.optim.RMSprop, {"lr": 0.1}, 20.0),
        (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9}, 38.0),
        (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.5}, 20.0),
    ],
)
def test_closed_forms_of_adaptive_optimizers(
    kind: type[torch.optim.Optimizer], arguments: dict[str, Any], threshold: float
) -> None:
    assert stability_threshold(kind([torch.zeros(1)], **arguments)) == pytest.approx(threshold)


def test_smallest_of_several_groups_is_sufficient() -> None:
    groups = [
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.3, "momentum": 0.2, "weight_decay": 0.1},
        {"lr": 0.2, "momentum": 0.5, "dampening": 0.5},
    ]
    make = [{"params": [torch.zeros(1)], **group} for group in groups]
    threshold = stability_threshold(torch.optim.SGD(make, lr=1.0))
    singles = [stability_threshold(torch.optim.SGD([torch.zeros(1)], **group)) for group in groups]
    assert threshold == min(singles)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        Q = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
        H = Q @ torch.diag(threshold * torch.tensor([0.97, 0.5, 0.2], dtype=torch.float64)) @ Q.T
        thetas = [torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in groups]
        optimizer = torch.optim.SGD([{"params": [p], **g} for p, g in zip(thetas, groups, strict=True)], lr=1.0)
        for _ in range(800):
            for p, g in zip(thetas, H @ torch.cat(thetas).detach(), strict=True):
                p.grad = g[None]
            optimizer.step()
        assert torch.cat(thetas).norm().item() < 1e-3


def test_learning_rate_schedules_are_followed() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    schedule.step()
    assert stability_threshold(optimizer) == pytest.approx(40.0)


class _Sharpened(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class _Renamed(torch.optim.SGD):
    pass


def test_other_optimizers_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"optimizer must have .* SGD, RMSprop, Adagrad, AdamW, Adam, NAdam.* type Adadelta"
    ):
        stability_threshold(torch.optim.Adadelta([torch.zeros(1)]))
    with pytest.raises(TypeError, match="got a value of type _Sharpened"):
        stability_threshold(_Sharpened([torch.zeros(1)], lr=0.1))
    assert stability_threshold(_Renamed([torch.zeros(1)], lr=0.1)) == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"maximize": True}, "maximize must be False"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\) for a stable iteration, got 1.0"),
        ({"momentum": 0.5, "dampening": 1.5}, "dampening must be at most 1, got 1.5"),
    ],
)
def test_groups_without_a_threshold(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stability_threshold(torch.optim.SGD([torch.zeros(1)], lr=0.1, **arguments))


WARM = 8


MAKERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adam": (Adam, {"lr": 0.01}),
    "adam_betas": (Adam, {"lr": 0.03, "betas": (0.6, 0.97), "eps": 0.1}),
    "adam_amsgrad": (Adam, {"lr": 0.01, "amsgrad": True}),
    "adam_decay": (Adam, {"lr": 0.01, "weight_decay": 0.7}),
    "adamw": (AdamW, {"lr": 0.05, "weight_decay": 3.0}),
    "nadam": (NAdam, {"lr": 0.02}),
    "nadam_decoupled": (NAdam, {"lr": 0.05, "betas": (0.8, 0.99), "weight_decay": 2.0, "decoupled_weight_decay": True}),
    "radam": (RAdam, {"lr": 0.02}),
    "radam_early": (RAdam, {"lr": 0.02, "betas": (0.9, 0.7)}),
    "adamax": (Adamax, {"lr": 0.02, "weight_decay": 0.1}),
    "rmsprop": (RMSprop, {"lr": 0.02}),
    "rmsprop_momentum": (RMSprop, {"lr": 0.02, "momentum": 0.7, "weight_decay": 0.3}),
    "rmsprop_centered": (RMSprop, {"lr": 0.02, "centered": True, "alpha": 0.9}),
    "adagrad": (Adagrad, {"lr": 0.1, "lr_decay": 0.2}),
    "sgd": (SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.2}),
}


MOMENTUM = ("exp_avg", "momentum_buffer")


def _params() -> list[Tensor]:
    torch.manual_seed(1)
    return [
        torch.randn(2, 2, dtype=torch.float64).requires_grad_(),
        torch.randn(3, dtype=torch.float64).requires_grad_(),
    ]


def _warm(optimizer: Optimizer, params: list[Tensor]) -> None:
    """Take steps along gradients of every size, which leave a state behind."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(WARM):
        for p in params:
            scale = torch.linspace(-1.0, 1.0, p.numel(), dtype=torch.float64).exp().view(p.shape)
            p.grad = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()


def _operator(matrix: Tensor) -> LinearOperator:
    return LinearOperator(lambda v: matrix @ v, tuple(matrix.shape), matrix)


def _matrix(n: int = 7) -> Tensor:
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return root @ root.T


def _log_growth(optimizer: Optimizer, params: list[Tensor], H: Tensor, steps: int = 1000) -> float:
    """Return the growth of log |theta| over the second half of a run with the preconditioner held still.

    The parameters are tiny, so that their gradients add nothing to the second moments, of which each step's decay is
    undone beforehand.
    """
    frozen = {p: {k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)} for p in params}
    torch.manual_seed(5)
    with torch.no_grad():
        for p in params:
            p.copy_(1e-30 * torch.randn_like(p))
    for state in optimizer.state.values():
        for name in MOMENTUM:
            if name in state and state[name] is not None:
                state[name].zero_()
    sizes = []
    for _ in range(steps):
        flat = torch.cat([p.detach().reshape(-1) for p in params])
        gradient = H @ flat
        for p, piece in zip(params, gradient.split([p.numel() for p in params]), strict=True):
            p.grad = piece.view(p.shape).clone()
            _hold(optimizer, p, frozen[p])
        optimizer.step()
        sizes.append(float(torch.cat([p.detach().reshape(-1) for p in params]).norm()))
        if not 1e-60 < sizes[-1] < 1e-15:
            break
    half = len(sizes) // 2
    return math.log(max(sizes[half:])) - math.log(max(sizes[:half]))


def _hold(optimizer: Optimizer, p: Tensor, frozen: dict[str, Tensor]) -> None:
    state = optimizer.state[p]
    group = next(g for g in optimizer.param_groups if any(q is p for q in g["params"]))
    decay = group.get("alpha", group.get("betas", (0.0, 1.0))[1])
    for name, value in frozen.items():
        if name in ("exp_avg_sq", "square_avg", "exp_inf", "grad_avg"):
            state[name].copy_(value / decay)
        elif name in ("sum", "max_exp_avg_sq"):
            state[name].copy_(value)
        elif name == "step":
            state[name].copy_(value - 1)
        elif name == "mu_product":
            t, beta = float(frozen["step"]), group["betas"][0]
            state[name].copy_(value / (beta * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"]))))


def _largest(optimizer: Optimizer, params: list[Tensor], H: Tensor) -> float:
    return float(torch.linalg.eigvalsh(preconditioned(_operator(H), optimizer, params).dense())[-1])


@pytest.mark.parametrize("name", MAKERS)
def test_preconditioned_contracts_below_and_diverges_above(name: str) -> None:
    kind, arguments = MAKERS[name]
    params = _params()
    optimizer = kind(params, **arguments)
    _warm(optimizer, params)
    _check_threshold(optimizer, params)


@pytest.mark.parametrize("name", ["adam_decay", "adamw", "rmsprop_momentum", "adagrad"])
def test_one_number_decides_with_several_groups(name: str) -> None:
    kind, arguments = MAKERS[name]
    params = _params()
    other = {"lr": 0.3 * arguments["lr"], "weight_decay": 0.4}
    if kind in (Adam, AdamW):
        other["betas"] = (0.5, 0.9)
    optimizer = kind([{"params": params[:1]}, {"params": params[1:], **other}], **arguments)
    _warm(optimizer, params)
    _check_threshold(optimizer, params)


def _check_threshold(optimizer: Optimizer, params: list[Tensor]) -> None:
    H, threshold = _matrix(), stability_threshold(optimizer)
    # Decay in the gradient makes the eigenvalue affine in H's scale: bisect for the scale at which it is the threshold.
    low, high = 0.0, 1e6
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _largest(optimizer, params, middle * H) < threshold else (low, middle)
    assert 0.0 < low < 9e5
    assert _log_growth(optimizer, params, 0.97 * low * H) < 0.0
    assert _log_growth(optimizer, params, 1.03 * low * H) > 0.0


@pytest.mark.parametrize("decay", [0.0, 2.0])
def test_adam_against_its_formula(decay: float) -> None:
    params = _params()
    optimizer = Adam(params, lr=1e-3, betas=(0.8, 0.9), eps=1e-2, weight_decay=decay)
    _warm(optimizer, params)
    H = _matrix()
    state = [optimizer.state[p] for p in params]
    v = torch.cat([s["exp_avg_sq"].reshape(-1) for s in state])
    P = (1 - 0.8**WARM) * ((v / (1 - 0.9**WARM)).sqrt() + 1e-2)
    operator = _operator(H)
    view = preconditioned(operator, optimizer, params)
    torch.testing.assert_close(view.dense(), P.rsqrt()[:, None] * (H + decay * torch.eye(7)) * P.rsqrt())
    assert operator.products == view.products == 7


def test_order_of_the_groups_does_not_matter() -> None:
    params = _params()
    optimizer = Adam([{"params": params[1:]}, {"params": params[:1]}], lr=1e-3)
    plain = _params()
    other = Adam(plain, lr=1e-3)
    _warm(optimizer, params)
    _warm(other, plain)
    found, expected = (
        preconditioned(_operator(_matrix()), o, p).dense() for o, p in ((optimizer, params), (other, plain))
    )
    torch.testing.assert_close(found, expected)


def test_a_group_at_rest_takes_no_part() -> None:
    params = _params()
    optimizer = Adam([{"params": params[:1]}, {"params": params[1:], "lr": 0.0}], lr=1e-3)
    _warm(optimizer, params)
    matrix = preconditioned(_operator(_matrix()), optimizer, params).dense()
    assert not matrix[4:].any()
    assert matrix[:4, :4].any()


def test_threshold_of_a_network_under_adam() -> None:
    case = build("mlp", "mse")
    optimizer = Adam(case.params, lr=1e-2)
    for _ in range(3):
        case.closure()
        optimizer.step()
    H = hessian(evaluate(case.closure, case.params))
    view = preconditioned(H, optimizer, case.params)
    spectrum = extreme_eigenvalues(view, top=2, bottom=1)
    truth = torch.linalg.eigvalsh(view.dense())
    assert spectrum.top[0].value == pytest.approx(float(truth[-1]), rel=1e-3)
    assert spectrum.bottom[0].value == pytest.approx(float(truth[0]), rel=1e-3)
    assert stability_threshold(optimizer) == pytest.approx(38.0 / 1e-2)


def test_errors_of_preconditioned_name_the_remedy() -> None:
    params, H = _params(), _operator(_matrix())
    with pytest.raises(ValueError, match=r"must have a state \(exp_avg_sq\) .*Take a step"):
        preconditioned(H, Adam(params), params)
    with pytest.raises(ValueError, match=r"must have a state \(sum\) .*Take a step"):
        preconditioned(H, Adagrad(params), params)
    with pytest.raises(TypeError, match=r"optimizer must have a known stability threshold, .* type Adadelta"):
        preconditioned(H, Adadelta(params), params)
    with pytest.raises(TypeError, match=r"operator must be a LinearOperator, got (tensor|a Tensor)"):
        preconditioned(torch.eye(7), Adam(params), params)  # type: ignore[arg-type]
    optimizer = Adam(params[:1])
    _warm(optimizer, params[:1])
    with pytest.raises(
        ValueError, match=r"params must be the parameters passed to evaluate, with 7 entries .* got 4 entries"
    ):
        preconditioned(H, optimizer, params[:1])
    with pytest.raises(ValueError, match=r"params must belong to the optimizer, got one of shape \(3,\) that does not"):
        preconditioned(H, optimizer, params)
    unstable = AdamW(params, lr=1.0, weight_decay=2.5)
    with pytest.raises(ValueError, match="weight decay alone makes it unstable"):
        preconditioned(H, unstable, params)
    bare = Adam(params, lr=1.0, eps=0.0)
    for p in params:
        p.grad = torch.zeros_like(p)
        bare.state[p] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    with pytest.raises(ValueError, match="Give it an eps above zero"):
        preconditioned(H, bare, params)


def test_a_parameter_without_gradients_is_named() -> None:
    params = _params()
    optimizer = RMSprop(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    with pytest.raises(
        ValueError, match=r"must have a state \(square_avg\) .* got none for a parameter of shape \(3,\)"
    ):
        preconditioned(_operator(_matrix()), optimizer, params)
