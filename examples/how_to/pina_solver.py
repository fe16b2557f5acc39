"""PINA's solver trained by Levenberg-Marquardt steps, Adam and L-BFGS: `python examples/how_to/pina_solver.py`.

Poisson's equation on the unit square from PINA's own collection. The problem, the model and the solver are written as
in PINA's tutorials; `TorchOptimizer` takes the optimizer. PINA's `Trainer` is Lightning's, so that `CurvatureMonitor`
is one of its callbacks. Each method gets the same processor time. Needs `pip install pina-mathlab`.
"""

from __future__ import annotations

import time

import torch
from lightning.pytorch import Callback
from pina import Trainer
from pina.model import FeedForward
from pina.optim import TorchOptimizer
from pina.problem.zoo import Poisson2DSquareProblem
from pina.solver import PhysicsInformedSingleModelSolver

from newtonopt import LevenbergMarquardt
from newtonopt.callbacks import CurvatureMonitor


class Budget(Callback):
    """Stop training after so many seconds of processor time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer, solver) -> None:
        self.end = time.process_time() + self.seconds

    def on_train_batch_end(self, trainer, *args) -> None:
        trainer.should_stop = time.process_time() > self.end


def train(optimizer: TorchOptimizer, callbacks: list[Callback]) -> tuple[Trainer, float]:
    """Train a new network; return the trainer and the relative error of the solution."""
    torch.manual_seed(0)
    problem = Poisson2DSquareProblem()
    problem.discretise_domain(300, "random", domains=["D"])
    problem.discretise_domain(100, "grid", domains=["boundary"])
    model = FeedForward(input_dimensions=2, output_dimensions=1, layers=[20, 20], func=torch.nn.Tanh)
    solver = PhysicsInformedSingleModelSolver(problem, model, optimizer=optimizer)
    trainer = Trainer(
        solver, max_epochs=100_000, accelerator="cpu", callbacks=callbacks, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, logger=False,
    )  # fmt: skip
    trainer.train()
    points = problem.domains["D"].sample(2000, "random")
    exact = problem.solution(points).tensor
    return trainer, float((solver(points).tensor - exact).norm().detach() / exact.norm())


def main(seconds: float = 5.0) -> dict[str, float]:
    """Train by each optimizer and return the relative errors of the solutions."""
    optimizers = {
        "Adam": TorchOptimizer(torch.optim.Adam, lr=1e-3),
        "L-BFGS": TorchOptimizer(torch.optim.LBFGS, line_search_fn="strong_wolfe"),
        "LevenbergMarquardt": TorchOptimizer(LevenbergMarquardt),
    }
    errors = {}
    for name, optimizer in optimizers.items():
        trainer, errors[name] = train(optimizer, [Budget(seconds)])
        print(f"{name:20s} relative error {errors[name]:.1e} after {trainer.current_epoch} steps")
    trainer, _ = train(optimizers["Adam"], [Budget(seconds / 5), CurvatureMonitor(every_n_train_steps=20)])
    for tag in ("lambda_max", "lambda_min", "stability_ratio"):
        print(f"{tag} of Adam's run: {float(trainer.callback_metrics[f'curvature/{tag}']):.3g}")
    return errors


if __name__ == "__main__":
    main()
