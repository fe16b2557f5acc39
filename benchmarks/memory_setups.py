"""The models of `memory.py`, each with random data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Setup:
    """A classifier with one batch."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def count(self) -> int:
        """Return the number of parameters."""
        return sum(p.numel() for p in self.parameters)

    def closure(self, optimizer: Optimizer, parts: int) -> Callable[[], Tensor]:
        """Return a user's closure: the mean over the batch, from `parts` micro-batches of one size."""

        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), device=self.targets.device)
            for inputs, targets in zip(self.inputs.chunk(parts), self.targets.chunk(parts), strict=True):
                loss = F.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten()) / parts
                loss.backward()
                total += loss.detach()
                del loss  # its graph would outlive the forward pass of the next micro-batch
            return total

        return closure


class Block(nn.Module):
    """Causal attention and a perceptron, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.project = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        split = self.project(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*split.unbind(0), is_causal=True)
        x = x + self.join(attended.transpose(1, 2).flatten(2))
        return x + self.perceptron(self.norms[1](x))


class GPT(nn.Module):
    """A GPT whose last layer is its token embedding."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)), nn.LayerNorm(width))
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.blocks(self.tokens(tokens) + self.places[: tokens.shape[1]])
        return F.linear(hidden, self.tokens.weight)


class Residual(nn.Module):
    """Two convolutions with batch norms, beside the identity or a convolution that changes the shape."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        changed = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.beside = nn.Identity() if stride == 1 and inputs == outputs else changed

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convolutions(x) + self.beside(x))


class ResNet(nn.Sequential):
    """The residual network of 18 layers (He et al. 2016), with 11.7 million parameters if `width` is 64."""

    def __init__(self, width: int, classes: int) -> None:
        entry = [nn.Conv2d(3, width, 7, 2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers: list[nn.Module] = [*entry, nn.MaxPool2d(3, 2, padding=1)]
        inputs = width
        for level in range(4):
            outputs = width * 2**level
            layers += [Residual(inputs, outputs, 1 if level == 0 else 2), Residual(outputs, outputs, 1)]
            inputs = outputs
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def perceptron(widths: Sequence[int], batch: int) -> Setup:
    """Tanh units; the last width is the number of classes."""
    torch.manual_seed(0)
    layers = [layer for inputs, outputs in pairwise(widths) for layer in (nn.Linear(inputs, outputs), nn.Tanh())]
    data = torch.randn(batch, widths[0]), torch.randint(widths[-1], (batch,))
    return Setup(f"perceptron {'-'.join(map(str, widths))}, batch {batch}", nn.Sequential(*layers[:-1]), *data)


def convolutional(batch: int = 128) -> Setup:
    """Four convolutions that classify 3 x 32 x 32 images into 10 classes."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((3, 32, 64, 64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers[-1] = nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))
    data = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    return Setup(f"convolutional network, batch {batch}", model, *data)


def resnet(batch: int, width: int = 64, size: int = 224, classes: int = 1000) -> Setup:
    """A residual network of 18 layers on random images of `size` x `size`."""
    torch.manual_seed(0)
    data = torch.randn(batch, 3, size, size), torch.randint(classes, (batch,))
    return Setup(f"ResNet of 18 layers, {batch} images of {size} x {size}", ResNet(width, classes), *data)


def gpt(layers: int, width: int, heads: int, vocabulary: int, batch: int, length: int) -> Setup:
    """A GPT on random tokens; each token's target is the next token."""
    torch.manual_seed(0)
    tokens = torch.randint(vocabulary, (batch, length + 1))
    model = GPT(layers, width, heads, vocabulary, length)
    return Setup(f"GPT of {layers} layers, {batch} x {length} tokens", model, tokens[:, :-1], tokens[:, 1:])


def small_setups() -> list[Callable[[], Setup]]:
    return [
        lambda: perceptron((2, 32, 32, 10), 256),
        lambda: perceptron((784, 512, 512, 10), 512),
        convolutional,
        lambda: gpt(4, 128, 4, 64, batch=16, length=64),
    ]


def large_setup() -> Setup:
    """A GPT of 100 million parameters on two short sequences, so that the graph is small beside the parameters."""
    return gpt(12, 768, 12, 20_000, batch=2, length=32)
