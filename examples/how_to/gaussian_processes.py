"""A Gaussian process of GPyTorch fitted by Newton steps: `python examples/how_to/gaussian_processes.py`.

Exact regression on 150 noisy values of a function of six variables, of which it uses two: a length scale for each
variable, an output scale, the noise and a mean. Model and closure are those of GPyTorch's tutorial. Adam, L-BFGS with
and without a line search, and DampedNewton fit it from the same start. Needs `pip install gpytorch`.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Callable

import gpytorch
import torch
from torch import Tensor

from newtonopt import DampedNewton, evaluate, hessian
from newtonopt.curvature import critical_point

OPTIMIZERS = {
    "Adam, lr=0.1": (lambda params: torch.optim.Adam(params, lr=0.1), 200),
    "L-BFGS": (lambda params: torch.optim.LBFGS(params), 10),
    "... strong_wolfe": (lambda params: torch.optim.LBFGS(params, line_search_fn="strong_wolfe"), 10),
    "DampedNewton": (lambda params: DampedNewton(params), 60),
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

        step = 0
        try:
            for step in range(1, steps + 1):  # noqa: B007
                optimizer.step(closure)
                if isinstance(optimizer, DampedNewton) and optimizer.last_step.gradient_norm < 1e-6:
                    break
            losses[name] = closure().item()
        except gpytorch.utils.errors.NanError:
            losses[name] = math.nan
        seconds = time.process_time() - start
        print(f"{name:16s} {losses[name]:.5f}, {step} steps, {seconds:.1f} s")

    evaluation = evaluate(closure, model.parameters())
    print(textwrap.fill(str(critical_point(evaluation)), 42))
    # The loss is divided by the number of points, so 150 times its Hessian is that of the log likelihood.
    H = 150 * hessian(evaluation).dense()
    # Parameters that the data hardly determine have tiny entries: with a unit diagonal none is lost to rounding.
    d = H.diagonal().rsqrt()
    covariance = d[:, None] * torch.linalg.inv(d[:, None] * H * d) * d
    errors = iter(covariance.diagonal().sqrt().tolist())
    for name, p in model.named_parameters():
        for value in p.flatten().tolist():
            print(f"{name.rpartition('.')[2]:16s} {value:.2f} +- {next(errors):.2g}")
    return losses


if __name__ == "__main__":
    main()
