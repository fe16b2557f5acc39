"""Measurements beside other implementations: dense `eigh`, SciPy's `eigsh`, and curvlinops where it is installed."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.autograd.functional import hessian as dense_hessian
from torch.autograd.functional import jacobian as dense_jacobian
from torch.func import functional_call

from newtonopt import LinearOperator, evaluate, gauss_newton, hessian
from newtonopt.curvature import extreme_eigenvalues, frobenius_norm, spectral_density, trace

BATCHES = (7, 4, 11)
MATRICES = {"hessian": hessian, "gauss_newton": gauss_newton}


class Problem:
    """A small classifier whose loss is the mean over batches of unequal size."""

    def __init__(self, network: str) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (5,) if network == "mlp" else (1, 6, 6)
        layers = {
            "mlp": lambda: [nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)],
            "conv": lambda: [nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)],
        }
        self.model = nn.Sequential(*layers[network]()).double()
        self.params = list(self.model.parameters())
        with torch.no_grad():
            for p in self.params:
                p.copy_(0.7 * torch.randn(p.shape, generator=generator))
        inputs = [torch.randn(b, *shape, generator=generator, dtype=torch.float64) for b in BATCHES]
        self.data = [(x, torch.randint(3, (len(x),), generator=generator)) for x in inputs]

    def closure(self) -> Tensor:
        self.model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for x, y in self.data:
            loss = nn.functional.cross_entropy(self.model(x), y) * len(x) / sum(BATCHES)
            loss.backward()
            total += loss.detach()
        return total

    def operator(self, matrix: str) -> LinearOperator:
        return MATRICES[matrix](evaluate(self.closure, self.params))

    def dense(self, matrix: str) -> Tensor:
        """By torch's own derivatives, of the mean over all data at once."""
        x, y = (torch.cat(pieces) for pieces in zip(*self.data, strict=True))
        names = [name for name, _ in self.model.named_parameters()]
        sizes, point = [p.numel() for p in self.params], nn.utils.parameters_to_vector(self.params).detach()

        def outputs(flat: Tensor) -> Tensor:
            pieces = [piece.view(p.shape) for piece, p in zip(flat.split(sizes), self.params, strict=True)]
            return functional_call(self.model, dict(zip(names, pieces, strict=True)), (x,)).reshape(-1)

        def loss(z: Tensor) -> Tensor:
            return nn.functional.cross_entropy(z.view(len(x), -1), y)

        if matrix == "hessian":
            return dense_hessian(lambda flat: loss(outputs(flat)), point)
        J = dense_jacobian(outputs, point)
        return J.T @ dense_hessian(loss, outputs(point).detach()) @ J


CASES = pytest.mark.parametrize(("network", "matrix"), [*itertools.product(["mlp", "conv"], MATRICES)])


@CASES
def test_ends_of_the_spectrum_are_those_of_scipy_and_of_the_dense_matrix(network: str, matrix: str) -> None:
    problem = Problem(network)
    A, dense = problem.operator(matrix), torch.linalg.eigvalsh(problem.dense(matrix))
    ours = extreme_eigenvalues(A, top=3, bottom=1, tolerance=1e-6)
    scipy_operator = ScipyOperator(A.shape, lambda v: (A @ torch.from_numpy(v).reshape(-1)).numpy(), dtype=np.float64)
    largest = eigsh(scipy_operator, k=3, which="LA", return_eigenvectors=False, tol=1e-12)
    assert [e.value for e in ours.top] == pytest.approx(sorted(largest, reverse=True), rel=1e-9)
    assert [e.value for e in ours.top] == pytest.approx(dense[-3:].flip(0).tolist(), rel=1e-9)
    assert ours.bottom[0].value == pytest.approx(float(dense[0]), abs=1e-9 * float(dense[-1]))
    for entry, exact in zip((*ours.top, *ours.bottom), (*dense[-3:].flip(0), dense[0]), strict=True):
        doubt = 1e-12 * float(dense[-1])
        assert entry.lower - doubt <= float(exact) <= entry.upper + doubt


@CASES
def test_moments_of_the_density_are_traces_of_the_powers(network: str, matrix: str) -> None:
    problem = Problem(network)
    A, dense = problem.operator(matrix), problem.dense(matrix)
    found = spectral_density(A, steps=200)
    assert found.exact
    power = dense
    for degree in (1, 2, 3):
        moment = float((found.weights * found.nodes**degree).sum())
        assert A.shape[0] * moment == pytest.approx(float(power.trace()), rel=1e-10)
        power = power @ dense
    assert trace(A).value == pytest.approx(float(dense.trace()), rel=1e-12)
    assert frobenius_norm(A).value == pytest.approx(float(dense.norm()), rel=1e-12)


@CASES
def test_products_are_those_of_curvlinops(network: str, matrix: str) -> None:
    # Installed by hand, for it brings torchvision: pip install curvlinops-for-pytorch
    curvlinops = pytest.importorskip("curvlinops")
    problem = Problem(network)
    A = problem.operator(matrix)
    kinds: dict[str, Callable[..., object]] = {
        "hessian": curvlinops.HessianLinearOperator,
        "gauss_newton": curvlinops.GGNLinearOperator,
    }
    theirs = kinds[matrix](problem.model, nn.CrossEntropyLoss(), problem.params, problem.data)
    columns = torch.eye(A.shape[0], dtype=torch.float64)
    torch.testing.assert_close(A @ columns, theirs @ columns, rtol=1e-11, atol=1e-14)
