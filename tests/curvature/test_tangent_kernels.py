"""Neural tangent kernels against `torch.func.jacrev`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import build
from torch import Tensor

from newtonopt import evaluate, jacobian
from newtonopt.curvature import neural_tangent_kernel
from newtonopt.vectors import memory


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("model", ["linear", "mlp", "conv", "lstm", "words", "odd"])
def test_it_is_the_product_of_the_dense_jacobian(model: str, loss: str) -> None:
    case = build(model, loss)
    J = torch.func.jacrev(lambda flat: case.outputs_at(flat).reshape(-1))(case.flat())
    kernel = neural_tangent_kernel(evaluate(case.closure, case.params))
    torch.testing.assert_close(kernel, J @ J.T, rtol=1e-12, atol=1e-12)
    assert torch.equal(kernel, kernel.T)


def test_several_outputs_follow_each_other() -> None:
    case = build("mlp", "mse")

    def closure() -> Tensor:
        z = case.model(case.inputs)
        more = case.model(2 * case.inputs[:2])
        return F.cross_entropy(z, torch.arange(6) % 3) + F.mse_loss(more[:, 0], torch.zeros(2).double())

    evaluation = evaluate(closure, case.params)
    J = jacobian(evaluation)
    expected = torch.stack([J.T @ unit for unit in torch.eye(20).double()])
    assert J.shape == (20, 43)
    torch.testing.assert_close(neural_tangent_kernel(evaluation), expected @ expected.T, rtol=1e-12, atol=1e-12)


def test_arguments_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = build("linear", "mse")
    evaluation = evaluate(case.closure, case.params)
    with pytest.raises(TypeError, match="evaluation must be an Evaluation"):
        neural_tangent_kernel(jacobian(evaluation))  # type: ignore[arg-type]
    monkeypatch.setattr(memory, "available_memory", lambda device: 2000)
    with pytest.raises(MemoryError, match=r"A 18 x 18 kernel would take .*Use products with jacobian\(evaluation\)"):
        neural_tangent_kernel(evaluation)
