"""Tensors of users' own classes: as data, outputs, losses, buffers and parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newtonopt import HessianFree, LevenbergMarquardt, NewtonCG, evaluate, gauss_newton, hessian, jacobian
from newtonopt.vectors.subclasses import alike, copied, detached, is_wrapper, plain

PRODUCTS = ("cached", "streamed", "finite_difference")


class Labelled(Tensor):
    """Has labels, which its methods require and most results lack, as PINA's LabelTensor."""

    labels: list[str]

    def detach(self) -> Tensor:
        return labelled(super().detach(), self.labels)

    def clone(self, *args: Any, **kwargs: Any) -> Tensor:
        return labelled(super().clone(*args, **kwargs), list(self.labels))

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return labelled(super().to(*args, **kwargs), self.labels)

    def reshape(self, *shape: Any) -> Tensor:
        return labelled(super().reshape(*shape), self.labels)


def labelled(t: Tensor, labels: list[str] | None = None) -> Tensor:
    result = t.as_subclass(Labelled)
    result.labels = ["u"] if labels is None else labels
    return result


class Unwrapping(Tensor):
    """A class in which only copies stay, as in torchvision's tv_tensors."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if func in (Tensor.clone, Tensor.detach) else result


class Guarded(Tensor):
    """Refuses what its author did not think of."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.view_as, Tensor.reshape, Tensor.clone, torch.zeros_like, torch.autograd.grad, torch.cat):
            raise TypeError(f"a Guarded tensor has no {func.__name__}")
        return super().__torch_function__(func, types, args, kwargs)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "labelled": labelled,
    "unwrapping": lambda t: t.as_subclass(Unwrapping),
    "guarded": lambda t: t.as_subclass(Guarded),
}
PLACES = ("input", "target", "output", "loss", "buffer", "attribute")
CASES = [(kind, place) for kind in KINDS for place in PLACES]
FAST = [("labelled", place) for place in PLACES] + [("guarded", "output"), ("unwrapping", "loss")]


class Model(nn.Module):
    """A small network that makes what it is told to an instance of another class."""

    def __init__(self, make: Callable[[Tensor], Tensor], place: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        at = lambda where, t: make(t) if place == where else t  # noqa: E731
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        x, y = torch.randn(8, 2, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
        self.x, self.y, self.at = at("input", x), at("target", y), at
        self.register_buffer("scale", at("buffer", torch.ones(1, dtype=torch.float64)))
        self.shift = at("attribute", torch.ones(1, dtype=torch.float64))

    def loss(self) -> Tensor:
        with torch.no_grad():
            self.scale.add_(1)
        z = self.layers(self.x) * self.scale + self.shift
        return self.at("loss", F.mse_loss(self.at("output", z), self.y))

    def closure(self) -> Tensor:
        self.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss


@pytest.mark.parametrize(
    ("kind", "place"), [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES]
)
def test_products_and_steps_are_those_of_plain_tensors(kind: str, place: str) -> None:
    plain = Model(lambda t: t, "nowhere")
    for products in PRODUCTS:
        own = Model(KINDS[kind], place)
        params, v = list(own.parameters()), torch.randn(17, dtype=torch.float64)
        found = evaluate(own.closure, params, products=products)
        wanted = evaluate(plain.closure, plain.parameters(), products=products)
        torch.testing.assert_close(found.gradient, wanted.gradient, rtol=1e-12, atol=1e-14)
        for operator in (hessian, gauss_newton, jacobian):
            product = operator(found) @ v
            assert type(product) is Tensor
            torch.testing.assert_close(product, operator(wanted) @ v, rtol=1e-8, atol=1e-9)
    assert type(own.scale) is type(Model(KINDS[kind], place).scale)
    for kind_of_step in (HessianFree, LevenbergMarquardt):
        losses = []
        for model in (plain, own):
            optimizer = kind_of_step(model.parameters())
            losses.append([float(optimizer.step(model.closure)) for _ in range(3)])
        assert losses[1] == pytest.approx(losses[0], rel=1e-9)


class Scaled(nn.Parameter):
    """A parameter of a class of its own, whose results are of that class too."""

    __torch_function__ = Tensor.__dict__.get("__torch_function__", Tensor.__torch_function__)


@pytest.mark.parametrize("optimizer", [HessianFree, NewtonCG])
@pytest.mark.parametrize("products", PRODUCTS)
def test_parameters_of_a_class_of_their_own(optimizer: Any, products: Any) -> None:
    losses = []
    for kind in (nn.Parameter, Scaled):
        model = Model(lambda t: t, "nowhere")
        layer: Any = model.layers[0]
        layer.weight = kind(layer.weight.detach().clone())
        trained = optimizer(model.parameters(), products=products)
        losses.append([float(trained.step(model.closure)) for _ in range(3)])
        assert type(layer.weight) is kind
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


def test_a_parameter_as_output() -> None:
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    evaluation = evaluate(lambda: F.mse_loss(w, torch.zeros(3, dtype=torch.float64)), [w])
    assert torch.equal(gauss_newton(evaluation).dense(), torch.eye(3, dtype=torch.float64) * 2 / 3)


def test_a_subclass_becomes_plain_and_comes_back() -> None:
    t = labelled(torch.ones(2, requires_grad=True) * 2, ["u", "v"])
    found = plain(t)
    assert type(found) is Tensor and found.data_ptr() == t.data_ptr() and found.grad_fn is not None
    back = alike(found, t)
    assert isinstance(back, Labelled) and back.labels == ["u", "v"]
    for made in (detached(t), copied(t)):
        assert isinstance(made, Labelled) and made.labels == ["u", "v"] and not made.requires_grad
    assert plain(detached(t)).data_ptr() == t.data_ptr() != plain(copied(t)).data_ptr()
    assert plain(None) is None


def test_tensors_without_methods_of_their_own_and_wrappers_stay_as_they_are() -> None:
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)
    for t in (torch.ones(1), nn.Parameter(torch.ones(1)), nested):
        assert plain(t) is t
        assert alike(found := torch.zeros(1), t) is found
    assert is_wrapper(nested)
    assert not is_wrapper(labelled(torch.ones(1)))
