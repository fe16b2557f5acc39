"""Shared cases: small networks and losses in float64, with the dense truth for their derivatives."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from newtonopt import mark_outputs

T = TypeVar("T")


def unseen(value: T) -> Callable[[], T]:
    """Return a function that returns `value`, kept where newtonopt does not find it: a closure can count its runs there
    without having the count put back.
    """

    def hold() -> Iterator[T]:
        while True:
            yield value

    held = hold()
    next(held)  # a generator that has begun looks the same after each further value
    return held.__next__


class Unseen(Generic[T]):
    """An attribute that newtonopt does not find; `make` makes it for each instance."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._values = unseen(weakref.WeakKeyDictionary[Any, T]())

    def __get__(self, owner: Any, kind: type) -> T:
        return self._values().setdefault(owner, self._make())

    def __set__(self, owner: Any, value: T) -> None:
        self._values()[owner] = value


@dataclass
class Case:
    """A model, its data, and a loss on its output."""

    model: nn.Module
    inputs: Tensor
    loss: Callable[[Tensor], Tensor]
    tapped_loss: Callable[[Tensor], Tensor] | None = None

    @property
    def params(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def closure(self) -> Tensor:
        """Return the plain closure for `torch.optim.LBFGS`."""
        self.model.zero_grad()
        loss = (self.tapped_loss or self.loss)(self.model(self.inputs))
        loss.backward()
        return loss

    def outputs_at(self, flat: Tensor) -> Tensor:
        """Return the model's output as a function of the flat parameters, with fixed random numbers."""
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        pieces = flat.split([p.numel() for p in named.values()])
        values = {name: piece.view(p.shape) for (name, p), piece in zip(named.items(), pieces, strict=True)}
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        torch.manual_seed(0)
        with torch.backends.cudnn.flags(enabled=False):  # cuDNN's recurrent networks have no double backward
            return functional_call(self.model, {**values, **buffers}, (self.inputs,))

    def loss_at(self, flat: Tensor) -> Tensor:
        return self.loss(self.outputs_at(flat))

    def flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def dense_hessian(self) -> Tensor:
        return torch.autograd.functional.hessian(self.loss_at, self.flat())

    def dense_jacobian(self) -> Tensor:
        jacobian = torch.autograd.functional.jacobian(lambda flat: self.outputs_at(flat).reshape(-1), self.flat())
        return jacobian

    def dense_gauss_newton(self) -> Tensor:
        z = self.outputs_at(self.flat()).detach()
        curvature = jacrev(jacrev(lambda flat: self.loss(flat.view(z.shape))))(z.reshape(-1))
        J = self.dense_jacobian()
        return J.T @ curvature @ J


class Sequence(nn.Module):
    """An LSTM with a linear readout of its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Words(nn.Module):
    """An averaged embedding whose transpose is the readout: tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(x).mean(1))))


class Odd(nn.Module):
    """A model with a scalar, a non-contiguous, an unused and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.weight = nn.Parameter(torch.randn(3, 5).T)
        self.unused = nn.Parameter(torch.randn(2))
        self.frozen = nn.Parameter(torch.randn(5, 3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.exp() * torch.tanh(x @ self.weight) + x @ self.frozen


def models() -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    """Return builders of a model with three (or five) outputs and its inputs."""

    def of(model: nn.Module, *shape: int) -> tuple[nn.Module, Tensor]:
        return model, torch.randn(*shape)

    return {
        "linear": lambda: of(nn.Linear(4, 3), 6, 4),
        "mlp": lambda: of(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), 6, 4),
        "conv": lambda: of(
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)), 4, 1, 6, 6
        ),
        "batch_norm": lambda: of(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)), 6, 4),
        "dropout": lambda: of(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)), 6, 4),
        "lstm": lambda: of(Sequence(), 4, 3, 3),
        "transformer": lambda: of(
            nn.Sequential(
                nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, activation=F.gelu, batch_first=True),
                nn.Flatten(),
                nn.Linear(12, 3),
            ),
            4,
            3,
            4,
        ),
        "words": lambda: (Words(), torch.randint(0, 5, (6, 3))),
        "odd": lambda: of(Odd(), 6, 5),
    }


def losses(classes: int, rows: int) -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]]:
    """Return losses of `(rows, classes)` outputs: as a function, and as the closure writes it where that differs."""
    labels = torch.arange(rows) % classes
    ignored = torch.where(torch.arange(rows) == 1, -100, labels)
    soft = torch.softmax(torch.randn(rows, classes), 1)
    weights = torch.rand(classes) + 0.5
    target = torch.randn(rows, classes)
    binary = (target > 0).to(target)

    def by_hand(z: Tensor) -> Tensor:
        return torch.cosh(z - target).log().mean()

    return {
        "cross_entropy": (lambda z: F.cross_entropy(z, labels), None),
        "probabilities": (lambda z: F.cross_entropy(z, soft), None),
        "class_weights": (lambda z: F.cross_entropy(z, labels, weight=weights), None),
        "label_smoothing": (lambda z: F.cross_entropy(z, labels, label_smoothing=0.2), None),
        "ignore_index": (lambda z: F.cross_entropy(z, ignored), None),
        "mse": (lambda z: F.mse_loss(z, target), None),
        "bce_with_logits": (lambda z: F.binary_cross_entropy_with_logits(z, binary), None),
        "log_softmax_nll": (
            lambda z: F.cross_entropy(z, labels),
            lambda z: F.nll_loss(z.log_softmax(-1).reshape(rows, classes), labels),
        ),
        "huber": (lambda z: F.huber_loss(z, target, delta=0.8), None),
        "by_hand": (by_hand, lambda z: by_hand(mark_outputs(z))),
    }


def build(model: str, loss: str, seed: int = 0, device: str = "cpu") -> Case:
    """Build a case in float64."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device(device):
            network, inputs = models()[model]()
            of_output, in_closure = losses(5 if model == "words" else 3, inputs.shape[0])[loss]
    finally:
        torch.set_default_dtype(before)
    return Case(network, inputs, of_output, in_closure)


def logistic_gradient_norms(
    kind: Callable[..., Optimizer], steps: int, *, rows: int = 40, columns: int = 4, **settings: Any
) -> list[float]:
    """Return the gradient's norm before each step on a logistic regression: smooth and, with decay, strongly convex."""
    torch.manual_seed(0)
    X, y = torch.randn(rows, columns).double(), (torch.rand(rows) > 0.5).double()
    theta = torch.zeros(columns, dtype=torch.float64, requires_grad=True)
    optimizer = kind([theta], weight_decay=0.1, **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(X @ theta, y)
        loss.backward()
        return loss

    norms = []
    for _ in range(steps):
        optimizer.step(closure)
        norms.append(optimizer.last_step.gradient_norm)  # type: ignore[attr-defined]
    return norms


def error(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm().clamp_min(1e-300))


class Batches:
    """A network with BatchNorm and Dropout, trained by a closure that loops over a loader."""

    def __init__(self, dtype: torch.dtype = torch.float64, **loader: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)).to(
            dtype
        )
        self.data = TensorDataset(torch.randn(22, 4, dtype=dtype), torch.randint(0, 3, (22,)))
        self.loader = DataLoader(self.data, batch_size=8, **loader)

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def closure(self) -> Tensor:
        self.model.zero_grad()
        total = torch.zeros(())
        for x, y in self.loader:
            loss = F.cross_entropy(self.model(x), y) * len(x) / len(self.data)
            loss.backward()
            total = total + loss.detach()
        return total


class Held(torch.autograd.Function):
    """Squares its input, and saves a tensor whose memory can be watched."""

    alive: ClassVar[Callable[[], list[weakref.ref[np.ndarray]]]] = unseen([])

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        memory = np.full(x.shape, 2.0)
        Held.alive().append(weakref.ref(memory))
        ctx.save_for_backward(x, torch.from_numpy(memory))
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, two = ctx.saved_tensors
        return g * x * two

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return t  # wrong on purpose in its uses: no test looks at values


class Doubled(torch.autograd.Function):
    """A function without a second derivative, which raises an error."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return 2 * z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def distances(x: Tensor) -> Tensor:
    """Return distances whose missing double backward raises only when it runs."""
    return torch.cdist(x, torch.ones_like(x) * 0.5)
