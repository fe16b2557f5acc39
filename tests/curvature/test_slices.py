"""Loss slices against closed forms and the loss itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import Batches
from torch import Tensor, nn

from newtonopt import evaluate, hessian
from newtonopt.curvature import extreme_eigenvalues, loss_slice


def test_a_slice_of_a_quadratic_is_its_model() -> None:
    H = torch.tensor([[2.0, 0.5], [0.5, -1.0]]).double()
    theta = torch.tensor([0.3, -0.2]).double().requires_grad_()
    axes = torch.eye(2).double()
    found = loss_slice(lambda: 0.5 * theta @ H @ theta, [theta], [axes[0], axes[1]], radius=2.0, points=9)
    torch.testing.assert_close(found.losses, found.model, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.curvatures, H)
    torch.testing.assert_close(found.slopes, H @ theta.detach())
    corner = torch.tensor([2.3, -2.2], dtype=torch.float64)
    assert float(found.losses[8, 0]) == pytest.approx(float(0.5 * corner @ H @ corner))
    assert found.coordinates.tolist() == torch.linspace(-2, 2, 9).double().tolist()
    assert (found.products, found.losses.shape) == (2, (9, 9))


def test_a_slice_follows_the_loss_and_leaves_no_trace() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2))
    x, y = torch.randn(32, 4), torch.randint(0, 2, (32,))

    def closure() -> Tensor:
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    H = hessian(evaluate(closure, model.parameters()))
    top = extreme_eigenvalues(H, top=1, bottom=0).top[0]
    found = loss_slice(closure, model.parameters(), top.vector, radius=0.5, points=5)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert float(found.losses[2]) == found.loss
    assert float(found.curvatures) == pytest.approx(top.value, rel=1e-3)
    torch.set_rng_state(random)
    with torch.no_grad():
        for p, piece in zip(model.parameters(), top.vector.split([p.numel() for p in model.parameters()]), strict=True):
            p.add_(0.25 * piece.view(p.shape))
    assert float(found.losses[3]) == pytest.approx(closure().item(), rel=1e-5)
    assert float(found.model[3]) == pytest.approx(
        found.loss + 0.25 * float(found.slopes) + 0.03125 * top.value, rel=1e-4
    )


def test_a_slice_of_a_whole_data_set() -> None:
    data, whole = Batches(), Batches()
    direction = torch.ones(sum(p.numel() for p in data.params)).double()
    streamed = loss_slice(data.closure, data.params, direction, points=3, products="streamed")
    cached = loss_slice(whole.closure, whole.params, direction, points=3)
    torch.testing.assert_close(streamed.losses, cached.losses)
    torch.testing.assert_close(streamed.model, cached.model)


def test_figures_of_slices() -> None:
    theta = torch.tensor([0.3, -0.2]).double().requires_grad_()
    axes = torch.eye(2).double()
    line = loss_slice(lambda: (theta**4).sum(), [theta], axes[0], points=5).plot()
    assert [text.get_text() for text in line.axes[0].get_legend().get_texts()] == ["loss", "quadratic model"]
    square = loss_slice(lambda: (theta**4).sum(), [theta], axes, points=5).plot()
    assert [panel.get_title() for panel in square.axes[:2]] == ["loss", "quadratic model"]
    assert [line.axes[0].get_xlabel(), square.axes[0].get_ylabel()] == [
        "step along the direction",
        "step along the second direction",
    ]
    assert loss_slice(lambda: 0 * theta.sum(), [theta], axes, points=3).plot().axes


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"directions": []}, ValueError, "directions must be one or two flat vectors, got 0"),
        ({"directions": torch.eye(3)}, ValueError, "directions must be one or two flat vectors, got 3"),
        ({"directions": torch.ones(2)}, ValueError, r"a flat vector, \(3,\), got \(2,\)"),
        ({"directions": [[1.0, 2.0, 3.0]]}, TypeError, "directions must hold flat tensors only, got \\[1.0"),
        ({"radius": 0.0}, ValueError, "radius must be positive and finite, got 0.0"),
        ({"points": 2}, ValueError, "points must be a whole number and at least 3, got 2"),
        ({"products": "all"}, ValueError, "products must be 'auto' or .*, got 'all'"),
    ],
)
def test_slices_check_their_arguments(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    theta = torch.ones(3, requires_grad=True)
    with pytest.raises(kind, match=message):
        loss_slice(lambda: (theta**2).sum(), [theta], **{"directions": torch.ones(3), **arguments})


def test_a_slice_of_a_closure_that_takes_other_data_each_time_is_refused() -> None:
    p, data = torch.ones(3, requires_grad=True), iter(torch.randn(50, 3))
    with pytest.raises(RuntimeError, match="the same data"):
        loss_slice(lambda: (p * next(data)).square().sum(), [p], torch.ones(3))


def test_a_slice_prints_without_its_losses() -> None:
    theta, ones = torch.linspace(0.5, 1.5, 100).double().requires_grad_(), torch.ones(2, 100).double()
    for directions in (ones[0], ones):
        assert len(repr(loss_slice(lambda: (theta**4).sum(), [theta], directions, points=5))) < 500
