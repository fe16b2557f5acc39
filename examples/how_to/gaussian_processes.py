"""A Gaussian process of GPyTorch fitted by Newton steps: `python examples/how_to/gaussian_processes.py`.

Exact regression on 150 noisy values of a function of six variables, of which it uses two: a length scale for each
variable, an output scale, the noise and a mean. Model and closure are those of GPyTorch's tutorial. Adam, L-BFGS with
and without a line search, and DampedNewton fit it from the same start. Needs `pip install gpytorch`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import gpytorch
import torch
from torch import Tensor

from newtonopt import DampedNewton, evaluate, hessian

OPTIMIZERS = {
    "Adam, lr=0.1": (lambda params: torch.optim.Adam(params, lr=0.1), 200),
    "L-BFGS": (lambda params: torch.optim.LBFGS(params), 10),
    "L-BFGS, strong_wolfe": (lambda params: torch.optim.LBFGS(params, line_search_fn="strong_wolfe"), 10),
    "DampedNewton": (lambda params: DampedNewton(params), 30),
}


class ExactGPModel(gpytorch.models.ExactGP):
    def __init__(self, train_x, train_y, likelihood):
        super().__init__(train_x, train_y, likelihood)
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=train_x.shape[1]))

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def problem() -> tuple[ExactGPModel, Callable[[], Tensor]]:
    """Return a new model and its loss, the negative log marginal likelihood for each point."""
    torch.manual_seed(0)
    train_x = torch.rand(150, 6, dtype=torch.float64)
    noise = 0.1 * torch.randn(150, dtype=torch.float64)
    train_y = torch.sin(2 * math.pi * train_x[:, 0]) + train_x[:, 1] ** 2 + noise
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    model = ExactGPModel(train_x, train_y, likelihood).double()
    model.train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    return model, lambda: -mll(model(train_x), train_y)


def main() -> dict[str, float]:
    """Fit by each optimizer, and return the losses."""
    losses = {}
    for name, (make, steps) in OPTIMIZERS.items():
        model, loss_of = problem()
        optimizer, start = make(model.parameters()), time.process_time()

        def closure() -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            loss = loss_of()  # noqa: B023
            loss.backward()
            return loss

        try:
            for _ in range(steps):
                optimizer.step(closure)
            losses[name] = closure().item()
            slope = max(p.grad.abs().max().item() for p in model.parameters())
        except gpytorch.utils.errors.NanError:
            losses[name] = slope = math.nan
        seconds = time.process_time() - start
        print(f"{name:22s} loss {losses[name]:.5f}, gradient {slope:.0e} after {steps} steps, {seconds:.2f} s")

    # 150 times the Hessian at the minimum is the inverse covariance of the hyperparameters (Laplace's approximation).
    covariance = torch.linalg.pinv(150 * hessian(evaluate(closure, model.parameters())).dense(), hermitian=True)
    errors = covariance.diagonal().clamp(min=0).sqrt()
    scales = model.covar_module.base_kernel.raw_lengthscale.flatten().tolist()
    for variable, (scale, error) in enumerate(zip(scales, errors[-6:].tolist(), strict=True)):
        print(f"variable {variable}: raw length scale {scale:.2f} +- {error:.2g}")
    return losses


if __name__ == "__main__":
    main()
