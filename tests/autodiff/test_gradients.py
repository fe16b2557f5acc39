"""Derivatives, once and twice, and the kernels that allow it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES
from problems import Doubled
from torch import Tensor, nn
from torch.autograd import forward_ad

from newtonopt import evaluate, gauss_newton, hessian
from newtonopt.autodiff.gradients import (
    NoSecondDerivativeError,
    differentiable_kernels,
    forward_mode,
    grad,
    grad_with_graph,
    gradient_of,
)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_derivatives_in_closed_form() -> None:
    x, y = vector(1.0, 2.0), vector(3.0)
    (first, second) = gradient_of((x**3).sum() * y[0], [x, y], keep=False)
    assert first is not None and second is not None
    torch.testing.assert_close(first, 9 * x.detach() ** 2)
    torch.testing.assert_close(second, torch.tensor([9.0], dtype=torch.float64))
    (g,) = grad_with_graph((x**3).sum(), [x])
    assert g is not None
    along = torch.eye(2, dtype=torch.float64)
    (rows,) = grad([g], [x], [along], keep=True, batched=True)
    torch.testing.assert_close(rows, torch.diag(6 * x.detach()))
    assert grad((x**2).sum(), [y], keep=True) == (None,)


def test_a_graph_is_kept_or_emptied() -> None:
    x = vector(1.0, 2.0)
    loss = (x**3).sum()
    grad(loss, [x], keep=True)
    grad(loss, [x], keep=False)
    with pytest.raises(RuntimeError, match="graph of the loss was freed before the closure called"):
        grad(loss, [x], keep=False)


def test_a_tensor_changed_in_place_is_said() -> None:
    x = vector(1.0, 2.0)
    loss = (x**3).sum()
    with torch.no_grad():
        x.add_(1.0)
    with pytest.raises(RuntimeError, match="changed after this evaluation was made"):
        grad(loss, [x], keep=True)


def test_an_operation_without_a_second_derivative_is_said() -> None:
    x = vector(1.0, 2.0)
    loss = Doubled.apply(x).square().sum()
    assert gradient_of(loss, [x], keep=True)[0] is not None
    with pytest.raises(NoSecondDerivativeError, match="marked once_differentiable"):
        grad_with_graph(loss, [x])


def test_forward_mode_gives_tangents_and_leaves_the_parameters() -> None:
    x = vector(1.0, 2.0)
    before, version = x.detach().clone(), x._version
    with torch.no_grad(), forward_mode([x], torch.tensor([1.0, 10.0], dtype=torch.float64)):
        tangent = forward_ad.unpack_dual((x**2).sum()).tangent
    assert float(tangent) == 42.0  # 2 x'v
    assert torch.equal(x.detach(), before) and x._version == version


def test_kernels_are_put_back_after_an_error() -> None:
    cuda = torch.backends.cuda
    flags = (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.cudnn_sdp_enabled, cuda.math_sdp_enabled)
    before, norm = [flag() for flag in flags], torch._weight_norm
    with pytest.raises(KeyError), differentiable_kernels():
        assert [flag() for flag in flags] == [False, False, False, True]
        assert torch._weight_norm is not norm
        raise KeyError
    assert [flag() for flag in flags] == before and torch._weight_norm is norm


def test_a_weight_norm_has_its_second_derivative() -> None:
    """The double backward of `torch._weight_norm` takes the norms as constants."""
    v, g = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    with differentiable_kernels():
        assert torch.autograd.gradgradcheck(
            lambda v, g: torch._weight_norm(v, g, 0), (v.requires_grad_(), g.requires_grad_())
        )


@pytest.mark.parametrize("device", DEVICES)
def test_fused_attention_and_recurrent_networks_have_products(device: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 12, device=device)
            self.gru = nn.GRU(4, 3, batch_first=True, device=device)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.mix(x).chunk(3, -1)
            return self.gru(F.scaled_dot_product_attention(q, k, v))[0][:, -1]

    model = Attention()
    x, y = torch.randn(5, 6, 4, device=device), torch.randn(5, 3, device=device)
    evaluation = evaluate(lambda: F.mse_loss(model(x), y), model.parameters())
    v = torch.randn_like(evaluation.gradient)
    for A in (hessian(evaluation), gauss_newton(evaluation)):
        assert torch.isfinite(A @ v).all()
        torch.testing.assert_close(v @ (A @ evaluation.gradient), evaluation.gradient @ (A @ v), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_has_products_and_stays_compiled() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    compiled = torch.compile(model, backend="aot_eager")
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    F.mse_loss(compiled(x), y).backward()  # compiled by an ordinary step first
    torch._dynamo.utils.counters.clear()
    through = evaluate(lambda: F.mse_loss(compiled(x), y), model.parameters())
    direct = evaluate(lambda: F.mse_loss(model(x), y), model.parameters())
    torch.testing.assert_close(hessian(through).dense(), hessian(direct).dense())
    F.mse_loss(compiled(x), y).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0  # nothing had to be compiled again
