"""Rows of Jacobians and of Gauss-Newton matrices, against autograd's rows one by one and its products, in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from newtonopt import evaluate, gauss_newton, mark_outputs
from newtonopt.autodiff.gradients import grad
from newtonopt.closure.evaluation import Evaluation
from newtonopt.operators import rows as module
from newtonopt.operators.factors import Factors, Formed
from newtonopt.operators.rows import Rows, RowsError, jacobian_rows, residual_rows

D = torch.float64
Closure = Callable[[], Tensor]
# A closure and its parameters.
Problem = tuple[Closure, list[Tensor]]


def numbers(*shape: int, shift: float = 0.0) -> Tensor:
    """Return numbers without a pattern, between -1 and 1, the same in each run."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(1, count + 1, dtype=D) ** 2 + shift).view(shape)


def free(*shape: int, shift: float = 0.0) -> nn.Parameter:
    return nn.Parameter(numbers(*shape, shift=shift))


def network(inputs: int, outputs: int, width: int = 5, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, outputs)
    ).double()


def fitted(model: nn.Module, x: Tensor) -> Problem:
    """Return the fit of a model's outputs to numbers."""
    return lambda: (lambda z: F.mse_loss(z, numbers(*z.shape)))(model(x)), list(model.parameters())


X, Y = numbers(7, 3), numbers(7, 2, shift=1.0)
SEQUENCES = numbers(4, 5, 3, shift=2.0)
LABELS = torch.tensor([0, 2, 1, 3, 3, 0, 1])


# The truth.


def jacobian_by_rows(evaluation: Evaluation) -> Tensor:
    """Return the outputs' Jacobian, each row by a backward pass of its own."""
    rows = []
    for z in (output.tensor for output in evaluation.graph[1]):
        for unit in torch.eye(z.numel(), dtype=z.dtype).view(z.numel(), *z.shape):
            found = grad([z], evaluation.params, [unit], keep=True)
            pairs = zip(found, evaluation.params, strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs]))
    return torch.stack(rows) if rows else evaluation.gradient.new_zeros(0, evaluation.gradient.numel())


def gauss_newton_by_products(evaluation: Evaluation) -> Tensor:
    """Return the Gauss-Newton matrix, each column by a product."""
    G = gauss_newton(evaluation)
    return torch.stack([G @ unit for unit in torch.eye(G.shape[0], dtype=evaluation.gradient.dtype)])


def error(found: Tensor, true: Tensor) -> float:
    size = float(true.norm())
    return float((found - true).norm()) / size if size else float(found.norm())


def worst_row(found: Tensor, true: Tensor) -> float:
    """Return the largest error of a row, relative to the true row; small rows may be rounded like others."""
    size = true.norm(dim=1)
    return float(((found - true).norm(dim=1) / (size + 1e-6 * size.max().clamp(min=1e-300))).max())


def check(problem: Problem, tolerance: float = 1e-10) -> tuple[Evaluation, Rows]:
    """Compare all that rows give with the truth."""
    closure, params = problem
    evaluation = evaluate(closure, params)
    J, rows = jacobian_rows(evaluation), residual_rows(evaluation)
    true = jacobian_by_rows(evaluation)
    assert J.shape == true.shape
    assert worst_row(J.dense(), true) <= tolerance
    R, G = rows.dense(), gauss_newton_by_products(evaluation)
    assert R.shape == rows.shape == (rows.count, G.shape[0])
    assert error(R.T @ R, G) <= tolerance
    assert error(rows.parameter_gram(), G) <= tolerance
    assert error(rows.gram(), R @ R.T) <= tolerance
    assert error(rows.squares(), R.square().sum(1)) <= tolerance
    v, u = numbers(R.shape[1], shift=3.0).to(R.dtype), numbers(R.shape[0], shift=4.0).to(R.dtype)
    assert error(rows.push(v), R @ v) <= tolerance and error(rows.pull(u), R.T @ u) <= tolerance
    if rows.remainder is None:
        assert float((rows.pull(rows.residuals) - evaluation.data_gradient).norm()) <= 1e-6 * (
            tolerance / 1e-10 * float(R.norm()) * float(rows.residuals.norm()) + float(evaluation.data_gradient.norm())
        )
    return evaluation, rows


# Problems whose samples are independent.

PROBLEMS: dict[str, Callable[[], Problem]] = {}


def problem(build: Callable[[], Problem]) -> Callable[[], Problem]:
    """Add a problem under its function's name."""
    PROBLEMS[build.__name__.replace("_", " ")] = build
    return build


# Losses.


def of_outputs(outputs: int, loss: Callable[[Tensor], Tensor]) -> Callable[[], Problem]:
    def build() -> Problem:
        model = network(3, outputs)
        return lambda: loss(model(X)), list(model.parameters())

    return build


def soft(classes: int) -> Tensor:
    return numbers(7, classes).softmax(1)


PROBLEMS |= {
    "mse": of_outputs(2, lambda z: F.mse_loss(z, Y)),
    "mse as a sum": of_outputs(2, lambda z: F.mse_loss(z, Y, reduction="sum")),
    "mse of samples with weights": of_outputs(
        2, lambda z: (torch.linspace(0, 1, 7, dtype=D)[:, None] * F.mse_loss(z, Y, reduction="none")).mean()
    ),
    "squares by hand": of_outputs(2, lambda z: ((z - Y) ** 2).mean()),
    "squares of norms": of_outputs(2, lambda z: (z - Y).norm() ** 2),
    "products by hand": of_outputs(2, lambda z: ((z - Y) * (z - Y)).sum()),
    "zero residuals": of_outputs(2, lambda z: F.mse_loss(z, z.detach())),
    "cross entropy": of_outputs(4, lambda z: F.cross_entropy(z, LABELS)),
    "cross entropy with class weights": of_outputs(4, lambda z: F.cross_entropy(z, LABELS, soft(4)[0])),
    "cross entropy that ignores a class": of_outputs(4, lambda z: F.cross_entropy(z, LABELS, ignore_index=3)),
    "smoothed cross entropy": of_outputs(4, lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.1)),
    "cross entropy of soft targets": of_outputs(4, lambda z: F.cross_entropy(z, soft(4))),
    "confident classifier": of_outputs(4, lambda z: F.cross_entropy(50 * z, LABELS)),
    "confident classifier of two classes": of_outputs(
        1, lambda z: F.binary_cross_entropy_with_logits(200 * z, (Y[:, :1] > 0).double())
    ),
    "nll": of_outputs(4, lambda z: F.nll_loss(z.log_softmax(1), LABELS)),
    "binary cross entropy": of_outputs(2, lambda z: F.binary_cross_entropy_with_logits(z, (Y > 0).double())),
    "weighted binary cross entropy": of_outputs(
        2, lambda z: F.binary_cross_entropy_with_logits(z, (Y > 0).double(), pos_weight=Y[0].abs())
    ),
    "huber": of_outputs(2, lambda z: F.huber_loss(z, 3 * Y, delta=0.5)),
    "poisson": of_outputs(2, lambda z: F.poisson_nll_loss(z, Y.abs())),
    "marked outputs": of_outputs(2, lambda z: (mark_outputs(z) - Y).exp().mean()),
    "marked outputs of two losses": of_outputs(
        2, lambda z: (mark_outputs(z).exp() + 1).log().sum() + 0.1 * mark_outputs(z[:4]).cosh().sum()
    ),
    "one output": of_outputs(1, lambda z: F.mse_loss(z.squeeze(1), Y[:, 0])),
    "number for an output": of_outputs(1, lambda z: F.mse_loss(z.sum(), Y[0, 0])),
    "number by a product": of_outputs(1, lambda z: z.sum() ** 2),
    "outputs turned": of_outputs(2, lambda z: F.mse_loss(z.T, Y.T)),
    "outputs flattened": of_outputs(2, lambda z: F.mse_loss(z.reshape(-1), Y.reshape(-1))),
    "output and a part of it": of_outputs(2, lambda z: F.mse_loss(z, Y) + F.mse_loss(z[:4], Y[1:5])),
    "output and a function of it": of_outputs(2, lambda z: F.mse_loss(z, Y) + F.mse_loss(z.exp(), Y)),
    "losses of columns": of_outputs(3, lambda z: F.mse_loss(z[:, 0], Y[:, 0]) + F.cross_entropy(z[:, 1:], LABELS % 2)),
    "loss times zero": of_outputs(2, lambda z: F.mse_loss(z, Y) + 0.0 * F.mse_loss(z.exp(), Y)),
    "samples permuted": of_outputs(2, lambda z: F.mse_loss(z.flip(0), Y)),
    "samples masked": of_outputs(2, lambda z: F.mse_loss(z[LABELS > 0], Y[LABELS > 0])),
    "samples repeated": of_outputs(2, lambda z: F.mse_loss(z[[0, 1, 1, 2, 6]], Y[:5])),
    "samples compared in pairs": of_outputs(1, lambda z: F.mse_loss(z[::2][:3], z[1::2])),
    "samples without a gradient": of_outputs(2, lambda z: F.mse_loss(torch.where(X[:, :1] > 0, z, 0.0), Y)),
    "empty batch beside another": of_outputs(2, lambda z: F.mse_loss(z[:0], Y[:0], reduction="sum") + F.mse_loss(z, Y)),
}


# Whole networks.


def of_model(build: Callable[[], nn.Module], x: Tensor) -> Callable[[], Problem]:
    return lambda: fitted(build().double(), x)


class Part(nn.Module):
    """A module's output at the last position."""

    def __init__(self, module: nn.Module, columns: int = 1) -> None:
        super().__init__()
        self.module, self.columns = module, columns

    def forward(self, x: Tensor) -> Tensor:
        z = self.module(x)
        return (z[0] if isinstance(z, tuple) else z)[:, -1, : self.columns]


class Language(nn.Module):
    """A transformer over words: embedding tied with the output, positions, attention by `MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(8, 4))
        self.before, self.after = nn.LayerNorm(4), nn.RMSNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.words.weight
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, words: Tensor) -> Tensor:
        h = self.before(self.words(words) + self.positions[: words.shape[1]])
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return (self.out(self.after(h)) * self.scale)[:, -1]


def encoder_layer(**settings: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, **settings)


IMAGES = numbers(5, 2, 6, 6)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2, dilation=2, padding=2, padding_mode="circular"),
        nn.BatchNorm2d(4).eval(),
        nn.PReLU(4),
        nn.ConvTranspose2d(4, 3, 2, stride=2),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(27, 2),
    )


PROBLEMS |= {
    "convolutional network": of_model(convolutional, IMAGES),
    "convolutions with outputs that are images": of_model(
        lambda: nn.Sequential(nn.Conv2d(2, 2, 3), nn.Tanh(), nn.Conv2d(2, 1, 3)), IMAGES
    ),
    "convolution in one dimension": of_model(
        lambda: nn.Sequential(nn.Conv1d(5, 4, 2), nn.GELU(), nn.Flatten(), nn.Linear(8, 1)), SEQUENCES
    ),
    "convolution in three dimensions": of_model(
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1)), numbers(5, 1, 3, 3, 3)
    ),
    "sequences": of_model(lambda: network(3, 2), SEQUENCES),
    "LSTM": of_model(lambda: Part(nn.LSTM(3, 3, num_layers=2, bidirectional=True, batch_first=True)), SEQUENCES),
    "GRU": of_model(lambda: Part(nn.GRU(3, 3, batch_first=True), 2), SEQUENCES),
    "RNN": of_model(lambda: Part(nn.RNN(3, 3, batch_first=True), 2), SEQUENCES),
    "LSTM at all times": of_model(
        lambda: nn.Sequential(nn.LSTM(3, 2, batch_first=True), First(), nn.Linear(2, 1)), SEQUENCES
    ),
    "LSTM, times first": of_model(lambda: nn.Sequential(nn.LSTM(3, 2), First(), nn.Linear(2, 1)), SEQUENCES),
    "transformer": of_model(Language, torch.tensor([[1, 2, 0], [3, 3, 4], [5, 1, 2], [0, 0, 1]])),
    "encoder layer": of_model(lambda: Part(encoder_layer()), numbers(4, 3, 4)),
    "encoder layer, norm first": of_model(
        lambda: Part(encoder_layer(norm_first=True, activation="gelu")), numbers(4, 3, 4)
    ),
    "weight norm": of_model(
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)), X
    ),
    "spectral norm": of_model(
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)).eval(), X
    ),
    "orthogonal": of_model(
        lambda: nn.Sequential(
            parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley"), nn.Tanh(), nn.Linear(3, 1)
        ),
        X,
    ),
    "bilinear": of_model(lambda: Twice(nn.Bilinear(3, 3, 2)), X),
    "dead ReLU": of_model(lambda: nn.Sequential(Shift(-0.9), network(3, 2, activation=nn.ReLU)), X),
    "ReLU": of_model(lambda: network(3, 2, activation=nn.ReLU), X),
    "GLU": of_model(lambda: nn.Sequential(nn.Linear(3, 6), nn.GLU(), nn.Linear(3, 1)), X),
    "one sample": of_model(lambda: network(3, 2), X[:1]),
    "one sample and one output": of_model(lambda: network(3, 1), X[:1]),
    "two samples": of_model(lambda: network(3, 1), X[:2]),
    "two equal samples": of_model(lambda: network(3, 1), X[:1].expand(2, 3)),
    "two opposite samples": of_model(lambda: nn.Linear(3, 1, bias=False), torch.stack([X[0], -X[0]])),
    "one parameter": of_model(lambda: nn.Linear(1, 1, bias=False), X[:, :1]),
    "dropout": of_model(lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)), X),
    "integers": lambda: (lambda w: (lambda: F.mse_loss(w * torch.tensor([2.0, 5.0, 1.0], dtype=D), Y[:3, 0]), [w]))(
        free(1)
    ),
    "opposite numbers": lambda: (lambda w: (lambda: F.mse_loss(w * torch.tensor([1.0, -1.0], dtype=D), Y[:2, 0]), [w]))(
        free(1)
    ),
    "opposite numbers, one half as large again": lambda: (
        lambda w: (lambda: F.mse_loss(w * torch.tensor([2.0, -3.0], dtype=D), Y[:2, 0]), [w])
    )(free(1)),
}


class First(nn.Module):
    def forward(self, z: tuple[Tensor, Any]) -> Tensor:
        return z[0]


class Shift(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


class Twice(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, x.sin())


# Closures of their own.


@problem
def two_losses_with_different_numbers_of_samples() -> Problem:
    model = network(3, 2)
    return lambda: F.mse_loss(model(X), Y) + 0.3 * F.mse_loss(model(X[:3] + 1), Y[:3]), list(model.parameters())


@problem
def several_calls_concatenated() -> Problem:
    model = network(3, 1)

    def closure() -> Tensor:
        z = model(torch.cat([X, X[:3] + 1, X[2:4] - 1]))
        return F.mse_loss(z[:7], Y[:, :1]) + F.mse_loss(z[7:10], z[:3]) + F.mse_loss(z[10:], Y[:2, 1:])

    return closure, list(model.parameters())


@problem
def one_weight_in_two_networks() -> Problem:
    shared, a, b = nn.Linear(3, 3).double(), nn.Linear(3, 1).double(), nn.Linear(3, 2).double()

    def closure() -> Tensor:
        h = shared(shared(X).tanh()).tanh()
        return F.mse_loss(a(h), Y[:, :1]) + F.mse_loss(b(shared(h)), Y)

    return closure, [*shared.parameters(), *a.parameters(), *b.parameters()]


@problem
def tied_autoencoder() -> Problem:
    w, b = free(3, 4), free(4)
    return lambda: F.mse_loss(torch.sigmoid(X @ w + b) @ w.T, X), [w, b]


@problem
def frozen_parameters() -> Problem:
    model = network(3, 2)
    for p in (*model[0].parameters(), model[4].bias):
        p.requires_grad_(False)
    return lambda: F.mse_loss(model(X), Y), [p for p in model.parameters() if p.requires_grad]


@problem
def parameters_left_out() -> Problem:
    model = network(3, 2)
    return lambda: F.mse_loss(model(X), Y), [model[0].weight, model[4].bias]


@problem
def parameter_without_influence() -> Problem:
    model = network(3, 2)
    return lambda: F.mse_loss(model(X), Y), [*model.parameters(), free(3)]


@problem
def low_rank_adapter() -> Problem:
    model, u, v = nn.Linear(3, 4).double(), free(4, 2), free(2, 3)
    return lambda: F.mse_loss(F.linear(X, model.weight + u @ v, model.bias).tanh(), numbers(7, 4)), [u, v]


@problem
def backward_twice() -> Problem:
    model = network(3, 2)

    def closure() -> Tensor:
        first = F.mse_loss(model(X), Y)
        first.backward()
        second = F.mse_loss(model(X + 1), Y.exp())
        second.backward()
        return first.detach() + second.detach()

    return closure, list(model.parameters())


@problem
def weight_penalties() -> Problem:
    model = network(3, 2)

    def closure() -> Tensor:
        penalty = sum(((p**2).sum() for p in model.parameters()), torch.zeros((), dtype=D))
        return F.mse_loss(model(X), Y) + 0.1 * penalty

    return closure, list(model.parameters())


@problem
def parameter_for_an_output() -> Problem:
    w = free(3, 2)
    return lambda: F.mse_loss(X @ w, Y) + F.mse_loss(w, numbers(3, 2)), [w]


@problem
def curve() -> Problem:
    a, b, c = free(4), free(1), free()
    t = torch.linspace(0.1, 1, 12, dtype=D)
    return lambda: ((a[0] * torch.exp(-a[1] * t) + a[2] * torch.sin(a[3] * t) + b * t ** c.exp() - 1) ** 2).mean(), [
        a,
        b,
        c,
    ]


@problem
def curve_from_an_inner_solution() -> Problem:
    """Variable projection: the linear coefficients are those of least squares, and mix the samples."""
    a = nn.Parameter(torch.tensor([0.5, 2.0], dtype=D))
    t = torch.linspace(0.1, 1, 12, dtype=D)

    def closure() -> Tensor:
        basis = torch.exp(-a * t[:, None])
        coefficients = torch.linalg.solve(basis.T @ basis, basis.T @ t.sin())
        return F.mse_loss(basis @ coefficients, t.sin())

    return closure, [a]


@problem
def latent_code_of_each_sample() -> Problem:
    codes, decoder = nn.Embedding(7, 2, dtype=D), network(2, 3)
    return lambda: F.mse_loss(decoder(codes(torch.arange(7))), X), [codes.weight, *decoder.parameters()]


@problem
def parameter_with_an_entry_for_each_sample() -> Problem:
    w, shift = free(3, 1), free(7, 1)
    return lambda: F.mse_loss(X @ w + shift, Y[:, :1]), [w, shift]


@problem
def parameter_by_sample_and_as_a_whole() -> Problem:
    shift = free(7)
    return lambda: F.mse_loss(shift * X[:, 0] + shift.sum(), Y[:, 0]) + F.mse_loss(shift.exp(), Y[:, 1]), [shift]


@problem
def samples_beside_a_parameter_that_they_share() -> Problem:
    """A tensor that holds samples and a parameter is a mixture, whose samples are used alone too."""
    w, s = free(3, 1), free(1)

    def closure() -> Tensor:
        h = (X @ w).tanh().squeeze(1)
        c = torch.cat([h, s])
        return F.mse_loss(c[:7] * c[7] + h, Y[:, 0])

    return closure, [w, s]


@problem
def mean_over_samples_inside() -> Problem:
    model, out = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()

    def closure() -> Tensor:
        h = model(X).tanh()
        return F.mse_loss(out(h - h.mean(0)), Y[:, :1])

    return closure, [*model.parameters(), *out.parameters()]


@problem
def batch_norm_in_training() -> Problem:
    return fitted(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).double(), X)


@problem
def attention_over_the_batch() -> Problem:
    model = nn.MultiheadAttention(4, 2).double()
    x = numbers(6, 4)
    return lambda: F.mse_loss(model(x, x, x, need_weights=False)[0], x.cos()), list(model.parameters())


@problem
def contrastive() -> Problem:
    model = network(3, 2)

    def closure() -> Tensor:
        a, b = F.normalize(model(X)), F.normalize(model(X + 0.1))
        return F.cross_entropy(a @ b.T / 0.5, torch.arange(7))

    return closure, list(model.parameters())


@problem
def residuals_of_a_derivative() -> Problem:
    model = network(2, 1)
    x = numbers(9, 2).requires_grad_()

    def closure() -> Tensor:
        u = model(x)
        (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return F.mse_loss(g[:, 0] + u[:, 0] * g[:, 1], x[:, 1].detach()) + F.mse_loss(model(x[:4]), Y[:4, :1])

    return closure, list(model.parameters())


def laplacian(model: nn.Module, x: Tensor) -> Tensor:
    u = model(x)
    (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    second = [torch.autograd.grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])]
    return torch.stack(second).sum(0)


@problem
def residuals_of_a_laplacian() -> Problem:
    model, x = network(2, 1), numbers(9, 2).requires_grad_()
    return lambda: F.mse_loss(laplacian(model, x), x[:, 0].sin().detach()), list(model.parameters())


@problem
def residuals_of_a_laplacian_with_other_layers() -> Problem:
    model = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.SiLU(), nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 1))
    x = numbers(9, 2).requires_grad_()
    return lambda: F.mse_loss(laplacian(model.double(), x), x[:, 0].sin().detach()), list(model.parameters())


@problem
def residuals_of_a_laplacian_of_convolutions() -> Problem:
    model = nn.Sequential(nn.Conv1d(1, 3, 2), nn.Tanh(), nn.Conv1d(3, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 1))
    x = numbers(5, 4).requires_grad_()
    whole = nn.Sequential(nn.Unflatten(1, (1, 4)), *model).double()
    return lambda: F.mse_loss(laplacian(whole, x), x[:, 0].sin().detach()), list(model.parameters())


@problem
def forces_of_an_energy() -> Problem:
    """A molecule's forces: the outputs of a sample are the gradient of its own energy."""
    model = network(3, 1, activation=nn.SiLU)
    x = numbers(4, 3, 3).requires_grad_()

    def closure() -> Tensor:
        energy = model((x[:, :, None] - x[:, None]).flatten(1, 2).square()).sum(1)
        (forces,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return F.mse_loss(energy, numbers(4, 1)) + F.mse_loss(forces, numbers(4, 3, 3))

    return closure, list(model.parameters())


@problem
def gradient_by_forward_differences() -> Problem:
    model = network(2, 1)
    x = numbers(6, 2)
    return lambda: F.mse_loss((model(x + 0.1) - model(x - 0.1)) / 0.2, Y[:6, :1]), list(model.parameters())


@problem
def functional_call() -> Problem:
    model = network(3, 2)
    params = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    return lambda: F.mse_loss(torch.func.functional_call(model, params, (X,)), Y), list(params.values())


@problem
def vmap() -> Problem:
    model = network(3, 2)
    return lambda: F.mse_loss(torch.func.vmap(model)(X), Y), list(model.parameters())


@problem
def vmap_of_gradients() -> Problem:
    model = network(3, 1)
    gradients = torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))
    return lambda: F.mse_loss(gradients(X), X.cos()), list(model.parameters())


@problem
def vmap_of_laplacians() -> Problem:
    model = network(2, 1)
    traces = torch.func.vmap(lambda x: torch.func.hessian(lambda y: model(y).sum())(x).diagonal().sum())
    return lambda: F.mse_loss(traces(X[:, :2]), Y[:, 0]), list(model.parameters())


@problem
def vmap_of_forward_mode() -> Problem:
    model = network(2, 1)
    slopes = torch.func.vmap(torch.func.jacfwd(lambda y: model(y).sum()))
    return lambda: F.mse_loss(slopes(X[:, :2]), Y), list(model.parameters())


@problem
def ensemble_by_vmap() -> Problem:
    models = [network(3, 1) for _ in range(3)]
    params, _ = torch.func.stack_module_state(models)
    leaves = {name: nn.Parameter(p.detach()) for name, p in params.items()}
    call = torch.func.vmap(lambda p, x: torch.func.functional_call(models[0], p, (x,)), (0, None))
    return lambda: F.mse_loss(call(leaves, X), numbers(3, 7, 1)), list(leaves.values())


@problem
def checkpointed() -> Problem:
    model, out = network(3, 4), nn.Linear(4, 2).double()
    return (
        lambda: F.mse_loss(out(checkpoint(model, X, use_reentrant=False)), Y),
        [*model.parameters(), *out.parameters()],
    )


@problem
def checkpointed_attention() -> Problem:
    model = encoder_layer().double()
    x = numbers(4, 3, 4)
    return (
        lambda: F.mse_loss(checkpoint(model, x, use_reentrant=False)[:, 0], numbers(4, 4, shift=1.0)),
        list(model.parameters()),
    )


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x**3 * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return 3 * g * x**2 * w, (g * x**3).sum(0)


class Squared(torch.autograd.Function):
    """The square of the first operand; None for the gradient of the second one, which is not used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unused: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x**2 * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return 2 * g * x * w, None, (g * x**2).sum()


@problem
def custom_function() -> Problem:
    model, w = network(3, 2), free(2)
    return lambda: F.mse_loss(Cubed.apply(model(X), w), Y), [*model.parameters(), w]


@problem
def custom_function_that_returns_no_gradient() -> Problem:
    model, w = network(3, 2), free()

    def closure() -> Tensor:
        h = model(X)
        return F.mse_loss(Squared.apply(h, h.exp(), w), Y)

    return closure, [*model.parameters(), w]


@problem
def complex_arithmetic_inside() -> Problem:
    w, phases = free(3, 4), free(3, 2)

    def closure() -> Tensor:
        spectrum = torch.fft.rfft((X @ w).tanh(), dim=1) * torch.view_as_complex(phases)
        return F.mse_loss(torch.fft.irfft(spectrum, n=4), numbers(7, 4)) + F.mse_loss(spectrum.abs(), numbers(7, 3))

    return closure, [w, phases]


@problem
def outputs_of_complex_numbers() -> Problem:
    phases = free(4, 2)
    spectrum = torch.fft.rfft(numbers(7, 6))
    return lambda: F.mse_loss(torch.view_as_real(spectrum * torch.view_as_complex(phases)), numbers(7, 4, 2)), [phases]


@problem
def operations_in_place() -> Problem:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    scale = free(2)

    def closure() -> Tensor:
        z = model(X)
        z.mul_(2.0).add_(scale)
        z[:, 0] *= scale[1]
        return F.mse_loss(z, Y)

    return closure, [*model.parameters(), scale]


@problem
def outputs_written_into_a_buffer() -> Problem:
    model = network(3, 1)

    def closure() -> Tensor:
        out = torch.zeros(9, 1, dtype=D)
        out[1:8] = model(X)
        return F.mse_loss(out, numbers(9, 1))

    return closure, list(model.parameters())


@problem
def part_held_constant() -> Problem:
    model = network(3, 2)

    def closure() -> Tensor:
        z = model(X)
        with torch.no_grad():
            scale = z.std(0)
        return F.mse_loss(z / scale + z.mean(0).detach(), Y)

    return closure, list(model.parameters())


@problem
def recurrence_in_time() -> Problem:
    """An integrated equation: one weight enters many times, and outputs are a trajectory, times first."""
    a = nn.Linear(2, 2).double()

    def closure() -> Tensor:
        state, path = X[:, :2], []
        for _ in range(4):
            state = state + 0.3 * a(state).tanh()
            path.append(state)
        return F.mse_loss(torch.stack(path), numbers(4, 7, 2))

    return closure, list(a.parameters())


@problem
def radial_basis() -> Problem:
    centres, widths, out = free(5, 2), free(5), nn.Linear(5, 1).double()

    def closure() -> Tensor:
        near = torch.exp(-(X[:, None, :2] - centres).square().sum(2) * widths.exp())
        return F.mse_loss(out(near), Y[:, :1])

    return closure, [centres, widths, *out.parameters()]


@problem
def radial_basis_far_away() -> Problem:
    """Most entries of the gradient are far below one, down to underflow."""
    centres, out = free(5), nn.Linear(5, 1).double()
    x = torch.linspace(-30, 30, 40, dtype=D)[:, None]
    return lambda: F.mse_loss(out(torch.exp(-((x - centres) ** 2))), x.sin()), [centres, *out.parameters()]


@problem
def gaussian_process_of_few_samples() -> Problem:
    scale, noise = free(3), free(1)

    def closure() -> Tensor:
        x = X * scale.exp()
        K = torch.exp(-(x[:, None] - x).square().sum(2)) + noise.exp() * torch.eye(7, dtype=D)
        return F.mse_loss(K @ torch.linalg.solve(K + torch.eye(7, dtype=D), Y), Y)

    return closure, [scale, noise]


@problem
def hypernetwork() -> Problem:
    code, maker = free(2), nn.Linear(2, 6).double()
    return lambda: F.mse_loss(X @ maker(code).view(3, 2), Y), [code, *maker.parameters()]


@problem
def weights_of_a_mixture_of_experts() -> Problem:
    gate, experts = nn.Linear(3, 2).double(), free(2, 3, 2)

    def closure() -> Tensor:
        return F.mse_loss(torch.einsum("bi,eio,be->bo", X, experts, gate(X).softmax(1)), Y)

    return closure, [*gate.parameters(), experts]


@problem
def experts_chosen_by_sample() -> Problem:
    experts = free(4, 3, 2)
    return lambda: F.mse_loss(torch.bmm(X[:, None], experts[LABELS]).squeeze(1).tanh(), Y), [experts]


@problem
def graph_network() -> Problem:
    """Messages along the edges of a graph mix nodes; each graph is a sample only for its own nodes."""
    message, out = nn.Linear(3, 3).double(), nn.Linear(3, 1).double()
    start, end = torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([1, 2, 0, 4, 5, 6])

    def closure() -> Tensor:
        h = torch.zeros(7, 3, dtype=D).index_add(0, end, message(X)[start]).tanh()
        return F.mse_loss(out(h + message(X)), Y[:, :1])

    return closure, [*message.parameters(), *out.parameters()]


@problem
def badly_scaled_samples() -> Problem:
    model = network(3, 1)
    size = torch.logspace(-6, 6, 7, dtype=D)[:, None]
    return lambda: F.mse_loss(size * model(X), size * Y[:, :1]), list(model.parameters())


@pytest.mark.parametrize("name", PROBLEMS)
def test_rows_are_those_of_autograd(name: str) -> None:
    check(PROBLEMS[name]())


@pytest.mark.parametrize("name", PROBLEMS)
def test_rows_by_passes_back_from_where_samples_mix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groupings whose samples mix behind a layer are exact too, if passes back from there cost nothing."""
    monkeypatch.setattr(module, "cost_behind", lambda target, leaves: 0)
    check(PROBLEMS[name]())


# Outputs that are views.


@pytest.mark.parametrize(
    "flat", [lambda z: z.flatten(), lambda z: z.flatten(0, 1), lambda z: z.squeeze(2).T.reshape(-1)]
)
def test_sequences_flattened_for_a_loss_are_samples(flat: Callable[[Tensor], Tensor]) -> None:
    """Positions of a sequence are coupled, and there are too many outputs to take a pass for each."""
    module = nn.Sequential(nn.LSTM(2, 3, batch_first=True), First(), nn.Linear(3, 1)).double()
    x = numbers(110, 5, 2)
    problem = (lambda: (lambda z: F.mse_loss(flat(z), numbers(*flat(z).shape)))(module(x)), list(module.parameters()))
    _, rows = check(problem)
    assert rows.roots[0].index.shape == (110, 5)


# Precision.


def test_second_derivatives_use_a_weight_twice_and_once_for_each_dimension() -> None:
    model, x = network(2, 1, width=40), numbers(9, 2).requires_grad_()
    closure = lambda: F.mse_loss(laplacian(model, x), x[:, 0].sin().detach())  # noqa: E731
    _, rows = check((closure, list(model.parameters())))
    # Autograd uses a weight twice for each dimension instead, with factors that are multiples of each other.
    assert [len(part.left) for part in rows.parts if isinstance(part, Factors)] == [4]


def test_rows_in_single_precision() -> None:
    model = network(3, 2).float()
    x, y = numbers(100, 3).float(), numbers(100, 2).float()
    _, rows = check((lambda: F.mse_loss(model(x), y), list(model.parameters())), 1e-4)
    assert rows.residuals.dtype == torch.float32


def test_rows_of_outputs_in_double_precision_of_a_network_in_single() -> None:
    """Powers of two that fit in the outputs' precision would overflow inside."""
    model = network(3, 1).float()
    x, y = numbers(300, 3).float(), numbers(300, 1)
    check((lambda: F.mse_loss(model(x).double(), y), list(model.parameters())), 1e-4)


def test_numbers_that_underflow_in_single_precision_are_no_mixture() -> None:
    centres, out = nn.Parameter(numbers(5).float()), nn.Linear(5, 1)
    x = torch.linspace(-8, 8, 600)[:, None]
    closure = lambda: F.mse_loss(out(torch.exp(-((x - centres) ** 2))), x.sin())  # noqa: E731
    evaluation = evaluate(closure, [centres, *out.parameters()])
    assert residual_rows(evaluation).count == 600


@pytest.mark.parametrize("outputs", [torch.float32, torch.bfloat16])
def test_rows_under_autocast(outputs: torch.dtype) -> None:
    """The rows are those of the rounded operations: as near to the rows in double precision as these allow."""
    model = network(3, 2).float()
    params = list(model.parameters())

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = model(X.float())
        return F.mse_loss(z.to(outputs), Y.to(outputs))

    evaluation = evaluate(closure, params)
    assert worst_row(jacobian_rows(evaluation).dense(), jacobian_by_rows(evaluation)) <= 0.05


def test_rows_need_no_second_derivative() -> None:
    centres, out = free(4, 2), nn.Linear(4, 1).double()

    def closure() -> Tensor:
        return F.mse_loss(out(torch.exp(-torch.cdist(X[:, :2], centres).square())), Y[:, :1])

    evaluation = evaluate(closure, [centres, *out.parameters()])
    assert worst_row(jacobian_rows(evaluation).dense(), jacobian_by_rows(evaluation)) <= 1e-10


# Coupled samples.


def coupled(m: int) -> dict[str, Problem]:
    """Return problems whose `m` outputs cannot be told apart, by the operation that mixes samples."""
    x = numbers(m, 3)
    normed = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    mean, contrast = nn.Linear(3, 1).double(), network(3, 2)

    def of_mean() -> Tensor:
        h = mean(x).tanh()
        return F.mse_loss(h - (h * h).mean(0), x[:, :1])

    def of_contrast() -> Tensor:
        z = F.normalize(contrast(x[:40]))
        return F.cross_entropy(z @ z.T, torch.arange(40))

    return {
        "NativeBatchNormBackward0": (lambda: F.mse_loss(normed(x), x[:, :1]), list(normed.parameters())),
        "SubBackward0": (of_mean, list(mean.parameters())),
        "MmBackward0": (of_contrast, list(contrast.parameters())),
    }


@pytest.mark.parametrize("operation", coupled(40))
def test_many_coupled_samples_are_refused(operation: str) -> None:
    closure, params = coupled(4000)[operation]
    evaluation = evaluate(closure, params)
    with pytest.raises(RowsError, match=f"The operation {operation} couples samples.*HessianFree"):
        residual_rows(evaluation)


def test_a_loss_that_couples_many_outputs_is_refused() -> None:
    w = free(3, 1)
    x = numbers(600, 3)

    def closure() -> Tensor:
        z = mark_outputs(x @ w)
        return (z**2).mean() + 1e-6 * z.mean() ** 2

    evaluation = evaluate(closure, [w])
    with pytest.raises(RowsError, match="The loss couples its samples"):
        residual_rows(evaluation)


def test_few_outputs_that_the_loss_couples_weakly() -> None:
    """A small coupling counts too, for other parameters may be behind it."""
    u, w = free(3, 1), free(3, 1, shift=1.0)

    def closure() -> Tensor:
        z = mark_outputs(torch.cat([X @ u, X @ w]))
        return (z[:7] ** 2).mean() + 1e-8 * z[7:].sum() ** 2

    evaluation, rows = check((closure, [u, w]))
    G, R = gauss_newton_by_products(evaluation), rows.dense()
    assert error(R[:, 3:].T @ R[:, 3:], G[3:, 3:]) <= 1e-6


def test_a_loss_that_is_not_convex_is_refused() -> None:
    w = free(3, 1)
    evaluation = evaluate(lambda: mark_outputs(X @ w).sin().sum(), [w])
    with pytest.raises(RowsError, match=r'not convex in its outputs.*curvature="hessian"'):
        residual_rows(evaluation)


def test_losses_of_some_of_the_parameters() -> None:
    """Two losses, each of which is differentiated by a part of the parameters: their rows are zero at the others."""
    first, second = network(3, 2, width=20), network(2, 1, width=20)

    def closure() -> Tensor:
        h = first(X)
        one, two = F.mse_loss(h, Y), F.mse_loss(second(h), Y[:, :1])
        one.backward(inputs=list(first.parameters()), retain_graph=True)
        two.backward(inputs=list(second.parameters()))
        return one.detach() + two.detach()

    params = [*first.parameters(), *second.parameters()]
    evaluation = evaluate(closure, params)
    assert len(evaluation.parts) == 2
    rows, size = residual_rows(evaluation), sum(p.numel() for p in first.parameters())
    R, G = rows.dense(), gauss_newton_by_products(evaluation)
    assert error(R.T @ R, G) <= 1e-10
    assert not bool(R[:14, size:].any()) and not bool(R[14:, :size].any())
    assert error(rows.pull(rows.residuals), evaluation.gradient) <= 1e-10
    for squares, p, columns in zip(rows.column_squares(), params, R.split(rows.sizes, 1), strict=True):
        left, right = squares
        true = columns.square().sum(0).view(p.shape)
        torch.testing.assert_close(left, true.sum(1) if p.dim() == 2 else true)
        assert (right is None) == (p.dim() == 1)


# Chosen rows, residuals and the part of the gradient outside their range.


def test_chosen_rows_are_rows_weighted_up() -> None:
    model = network(3, 1)
    evaluation = evaluate(lambda: F.mse_loss(model(X), Y[:, :1]), model.parameters())
    every, some = residual_rows(evaluation), residual_rows(evaluation, most=3, seed=1)
    assert some.shape[0] == 3 and some.count == 7
    # Each of the rows is one of all, times the root of 7/3, and so is its residual.
    distance = torch.cdist((3 / 7) ** 0.5 * some.dense(), every.dense())
    assert float(distance.min(1).values.max()) <= 1e-10 * float(every.dense().norm())
    assert len(set(distance.argmin(1).tolist())) == 3
    torch.testing.assert_close((3 / 7) ** 0.5 * some.residuals, every.residuals[distance.argmin(1)])
    assert not torch.equal(residual_rows(evaluation, most=3, seed=2).residuals, some.residuals)


def test_chosen_rows_of_several_outputs_keep_samples_whole() -> None:
    model = network(3, 4)
    evaluation = evaluate(lambda: F.cross_entropy(model(X), LABELS), model.parameters())
    every, some = residual_rows(evaluation), residual_rows(evaluation, most=6)
    ranks = every.count // 7
    assert some.shape[0] == 2 * ranks and some.count == every.count
    distance = torch.cdist((2 / 7) ** 0.5 * some.dense(), every.dense())
    assert float(distance.min(1).values.max()) <= 1e-10 * float(every.dense().norm())


def test_residuals_give_the_gradient() -> None:
    model = network(3, 2)
    evaluation = evaluate(lambda: F.mse_loss(model(X), Y), model.parameters())
    rows = residual_rows(evaluation)
    assert rows.remainder is None
    assert error(rows.pull(rows.residuals), evaluation.gradient) <= 1e-12
    # A mean of squares has the residuals sqrt(2 / count) (z - y), up to their order and sign.
    true = (2 / 14) ** 0.5 * (model(X) - Y).detach().reshape(-1)
    torch.testing.assert_close(rows.residuals.abs().sort().values, true.abs().sort().values)


def test_part_of_the_gradient_is_outside_the_range_of_the_rows() -> None:
    w = free(3, 2)
    with pytest.warns(UserWarning, match="Part of the loss"):
        evaluation = evaluate(lambda: F.mse_loss(X @ w, Y) + 0.1 * w.abs().sum(), [w])
        gauss_newton(evaluation)
    remainder = residual_rows(evaluation).remainder
    assert remainder is not None
    torch.testing.assert_close(remainder, 0.1 * w.detach().sign().reshape(-1))


def test_a_freed_evaluation_is_refused() -> None:
    w = free(3, 2)
    evaluation = evaluate(lambda: F.mse_loss(X @ w, Y), [w])
    evaluation.free()
    with pytest.raises(RuntimeError, match="free"):
        residual_rows(evaluation)


# Forms.


def test_wide_layers_stay_factors_and_thin_ones_are_formed() -> None:
    model = network(3, 1, width=20)
    evaluation = evaluate(lambda: F.mse_loss(model(X), Y[:, :1]), model.parameters())
    weights = [type(part) for part in residual_rows(evaluation).parts]
    assert weights == [Factors if p.dim() == 2 and min(p.shape) > 1 else Formed for p in model.parameters()]


def test_weights_of_the_parameters_in_the_rows_inner_products() -> None:
    model = network(3, 2, width=20)
    evaluation = evaluate(lambda: F.mse_loss(model(X), Y), model.parameters())
    rows = residual_rows(evaluation)
    weights = [0.0, 1.0, 2.0, 0.5, 3.0, 1.0]
    W = torch.cat(
        [torch.full((p.numel(),), weight, dtype=D) for p, weight in zip(evaluation.params, weights, strict=True)]
    )
    R = rows.dense()
    out = torch.empty(14, 14, dtype=D)
    assert rows.gram(weights, out) is out
    assert error(out, (R * W) @ R.T) <= 1e-12


def test_a_hook_on_a_result_acts_on_every_row() -> None:
    model = network(3, 2)

    def closure() -> Tensor:
        h = model[0](X)
        h.register_hook(lambda g: 2 * g)
        return F.mse_loss(model[1:](h), Y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluation = evaluate(closure, model.parameters())
    assert worst_row(jacobian_rows(evaluation).dense(), jacobian_by_rows(evaluation)) <= 1e-10


def test_a_hook_on_a_parameter_is_refused() -> None:
    """It acts on the sum over samples, which rows do not form."""
    model = network(3, 2)
    handle = model[4].weight.register_hook(lambda g: 2 * g)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluation = evaluate(lambda: F.mse_loss(model(X), Y), model.parameters())
    with pytest.raises(RowsError, match="differ from autograd's derivatives"):
        residual_rows(evaluation)
    handle.remove()
