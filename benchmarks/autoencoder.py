"""A deep autoencoder of small digits, full batch: the Newton methods beside Adam and L-BFGS.

The encoder is 64-256-128-64-16 with sigmoid units and a linear code, the decoder its mirror image. Such networks were
the first case made for Hessian-free optimization (Martens 2010), from the same sparse initialisation.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from training import Problem

WIDTHS = (64, 256, 128, 64, 16, 64, 128, 256, 64)
CODE = 16  # width of the code; its units are linear, like the outputs, which are logits


def digits_autoencoder(seed: int) -> Problem:
    """All 1797 digits in float32; the loss is the cross-entropy of an image: 64 times the mean over its pixels.

    Args:
        seed: Seed of the weights.
    """
    torch.manual_seed(seed)
    images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    model = sigmoid_network()

    def loss() -> Tensor:
        return 64 * F.binary_cross_entropy_with_logits(model(images), images)

    @torch.no_grad()
    def error() -> float:
        return float((model(images).sigmoid() - images).square().sum(dim=1).mean())

    return Problem(model, loss, error)


def sigmoid_network() -> nn.Sequential:
    """The autoencoder; each unit starts with 15 weights from the standard normal, the others and the bias at zero."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS):
        layer = nn.Linear(inputs, outputs)
        nn.init.sparse_(layer.weight.data.t(), sparsity=1 - 15 / inputs, std=1.0)
        nn.init.zeros_(layer.bias)
        layers += [layer] if outputs == CODE else [layer, nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])


if __name__ == "__main__":
    from side_by_side import arguments, main

    main("autoencoder", digits_autoencoder, "squared error per image", arguments(__doc__).parse_args())
