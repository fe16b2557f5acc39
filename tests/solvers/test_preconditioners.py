"""Sketches and preconditioners against the dense matrices that they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from newtonopt.solvers.cg import conjugate_gradients
from newtonopt.solvers.preconditioners import Sketch, diagonal, estimated_diagonal, sketch


class Known:
    """A dense matrix that counts its products."""

    def __init__(self, dense: Tensor, psd: bool = True) -> None:
        self.dense, self.psd, self.products = dense, psd, 0

    def __matmul__(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.dense @ v


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    n = len(values)
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Q, _ = torch.linalg.qr(noise)
    A = (Q * values.double()) @ Q.T
    return (A + A.T) / 2


def decaying(n: int, rate: float = 0.7) -> Tensor:
    return symmetric(rate ** torch.arange(n, dtype=torch.float64))


def alternating(n: int) -> Tensor:
    signs = torch.tensor([1.0, -1.0]).double().repeat(n)[:n]
    return symmetric(signs * 0.5 ** torch.arange(n, dtype=torch.float64))


def sketch_of(A: Tensor, rank: int, psd: bool = True, seed: int = 0) -> Sketch:
    return sketch(Known(A, psd), rank, torch.Generator().manual_seed(seed), A[0])


def dense_inverse(of: Sketch, damping: float) -> Tensor:
    return torch.stack([of.preconditioner(damping)(e) for e in torch.eye(len(of.vectors), dtype=of.values.dtype)], 1)


def absolute(A: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(A)
    return (vectors * values.abs()) @ vectors.T


@pytest.mark.parametrize("rank", [12, 50])
@pytest.mark.parametrize("psd", [True, False])
def test_full_sketch_is_the_matrix(rank: int, psd: bool) -> None:
    A = decaying(12) if psd else alternating(12)
    full = sketch_of(A, rank, psd)
    assert full.vectors.shape == (12, 12)
    torch.testing.assert_close((full.vectors * full.values) @ full.vectors.T, absolute(A), rtol=0, atol=1e-12)


@pytest.mark.parametrize("psd", [True, False])
def test_sketch_has_orthonormal_vectors_sorted_values_and_counted_products(psd: bool) -> None:
    A = Known(decaying(40) if psd else alternating(40), psd)
    low = sketch(A, 9, torch.Generator().manual_seed(0), A.dense[0])
    torch.testing.assert_close(low.vectors.T @ low.vectors, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-12)
    assert low.values.tolist() == sorted(low.values.tolist(), reverse=True)
    assert bool((low.values >= 0).all())
    assert A.products == (9 if psd else 18)


def test_nystrom_never_exceeds_the_matrix_and_meets_the_error_bound() -> None:
    """Frangella, Tropp & Udell 2023, sec. 2: the bound on the mean error over random test matrices."""
    A, rank = decaying(60), 20
    errors = []
    for seed in range(10):
        low = sketch_of(A, rank, seed=seed)
        gap = A - (low.vectors * low.values) @ low.vectors.T
        assert torch.linalg.eigvalsh(gap)[0] >= -1e-13
        errors.append(float(torch.linalg.matrix_norm(gap, 2)))
    values = 0.7 ** torch.arange(60).double()
    bounds = [
        (1 + 2 * (rank - p) / (p - 1)) * float(values[rank - p])
        + 2 * math.e**2 * rank / (p**2 - 1) * float(values[rank - p :].sum())
        for p in range(2, rank - 1)
    ]
    assert sum(errors) / len(errors) <= min(bounds)


@pytest.mark.parametrize("psd", [True, False])
@pytest.mark.parametrize("damping", [1.0, 1e-3])
def test_preconditioner_is_the_dense_formula(psd: bool, damping: float) -> None:
    low = sketch_of(decaying(30) if psd else alternating(30), 8, psd)
    U, values = low.vectors, low.values
    P = (U * (values + damping)) @ U.T / (values[-1] + damping) + torch.eye(30, dtype=torch.float64) - U @ U.T
    torch.testing.assert_close(dense_inverse(low, damping), torch.linalg.inv(P), rtol=1e-10, atol=1e-12)
    assert torch.linalg.eigvalsh(dense_inverse(low, damping))[0] > 0


@pytest.mark.parametrize("damping", [1e-1, 1e-3, 1e-5])
def test_condition_number_drops_as_promised(damping: float) -> None:
    """One sketch for every damping; Frangella, Tropp & Udell 2023: condition <= (last value + mu + error) / mu."""
    A = decaying(60)
    low = sketch_of(A, 25)
    eye = torch.eye(60, dtype=torch.float64)
    root = torch.linalg.cholesky(dense_inverse(low, damping))
    values = torch.linalg.eigvalsh(root.T @ (A + damping * eye) @ root)
    error = float(torch.linalg.matrix_norm(A - (low.vectors * low.values) @ low.vectors.T, 2))
    condition = float(values[-1] / values[0])
    assert condition <= (float(low.values[-1]) + damping + error) / damping * (1 + 1e-9)
    assert condition < min(0.005 * (1 + damping) / damping + 1.2, 100)


def test_conjugate_gradients_need_fewer_iterations() -> None:
    A, damping = decaying(200, rate=0.9), 1e-4
    damped = A + damping * torch.eye(200, dtype=torch.float64)
    g = torch.randn(200, dtype=torch.float64)
    plain = conjugate_gradients(damped, g, residual_tolerance=1e-8, max_iterations=1000)
    better = conjugate_gradients(
        damped, g, residual_tolerance=1e-8, preconditioner=sketch_of(A, 80).preconditioner(damping)
    )
    torch.testing.assert_close(plain.step, better.step, rtol=1e-4, atol=1e-2)
    assert better.iterations < plain.iterations / 4


def test_indefinite_matrix_gives_a_definite_preconditioner_that_helps() -> None:
    A, damping = alternating(40), 1e-3
    low = sketch_of(A, 20, psd=False)
    inverse = dense_inverse(low, damping)
    torch.testing.assert_close(inverse, inverse.T)
    assert torch.linalg.eigvalsh(inverse)[0] > 0
    magnitudes = torch.linalg.eigvals(inverse @ (A + damping * torch.eye(40))).abs()
    assert float(magnitudes.max() / magnitudes.min()) < 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("psd", [True, False])
def test_zero_matrix_gives_the_identity(dtype: torch.dtype, psd: bool) -> None:
    low = sketch_of(torch.zeros(10, 10, dtype=dtype), 4, psd)
    assert float(low.values.max()) < 1e-40
    torch.testing.assert_close(dense_inverse(low, 0.1), torch.eye(10, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_matrix_is_found_exactly(dtype: torch.dtype) -> None:
    values = torch.tensor([4.0, 3.0, 2.0] + [0.0] * 27)
    A = symmetric(values).to(dtype)
    low = sketch_of(A, 10)
    tolerance = 300 * torch.finfo(dtype).eps
    torch.testing.assert_close(low.values, values[:10].to(dtype), rtol=0, atol=tolerance)
    torch.testing.assert_close((low.vectors * low.values) @ low.vectors.T, A, rtol=0, atol=tolerance)
    assert low.vectors.dtype == dtype
    # Zeros are found as rounding of either sign, and none may turn the preconditioner indefinite.
    assert all(bool((sketch_of(A, 10, seed=seed).values >= 0).all()) for seed in range(5))


@pytest.mark.parametrize(("dtype", "damping"), [(torch.float32, 1e-6), (torch.float32, 1e-16), (torch.float64, 1e-16)])
def test_damping_below_rounding_does_not_blind_conjugate_gradients(dtype: torch.dtype, damping: float) -> None:
    """The Gauss-Newton matrix of fewer residuals than the sketch's rank, and a damping that its eigenvalues swallow."""
    J = torch.randn(10, 200, dtype=torch.float64)
    exact, gradient = J.T @ J, J.T @ torch.randn(10, dtype=torch.float64)
    A, g = exact.to(dtype), gradient.to(dtype)
    solution = conjugate_gradients(
        A + damping * torch.eye(200, dtype=dtype),
        g,
        preconditioner=sketch_of(A, 30).preconditioner(damping),
        progress_tolerance=5e-3,
    )
    s = solution.step.double()
    best = float(gradient @ torch.linalg.lstsq(exact, gradient[:, None], driver="gelsd").solution[:, 0]) / 2
    assert float(-(gradient @ s + s @ exact @ s / 2)) > 0.99 * best


def test_random_numbers_are_the_seeds_own() -> None:
    A = decaying(20)
    before = torch.get_rng_state()
    first, again, other = sketch_of(A, 5, seed=3), sketch_of(A, 5, seed=3), sketch_of(A, 5, seed=4)
    assert torch.get_rng_state().equal(before)
    assert first.vectors.equal(again.vectors)
    assert first.values.equal(again.values)
    assert not first.values.equal(other.values)
    # Every precision gets the same random numbers.
    torch.testing.assert_close(sketch_of(A.float(), 5, seed=3).values.double(), first.values, rtol=1e-4, atol=0)


@pytest.mark.parametrize("psd", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_product_raises(psd: bool, value: float) -> None:
    A = decaying(6)
    A[2, 3] = value
    with pytest.raises(FloatingPointError, match="curvature product is not finite"):
        sketch_of(A, 3, psd)


@pytest.mark.parametrize("psd", [True, False])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_matrices_whose_squares_are_no_numbers_have_a_sketch(psd: bool, size: float) -> None:
    truth, found = sketch_of(decaying(6).float(), 3, psd), sketch_of(size * decaying(6).float(), 3, psd)
    torch.testing.assert_close(found.values.double() / size, truth.values.double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.vectors.abs(), truth.vectors.abs(), rtol=0, atol=1e-3)


def test_diagonal_divides_by_a_power() -> None:
    apply = diagonal(torch.tensor([15.0, 80.0]).double(), 1.0, exponent=0.75)
    torch.testing.assert_close(apply(torch.ones(2).double()), torch.tensor([1 / 8, 1 / 27]).double())
    apply = diagonal(torch.tensor([3.0]).double(), 1.0, exponent=0.5)
    torch.testing.assert_close(apply(torch.ones(1).double()), torch.tensor([0.5]).double())


def test_estimate_is_the_diagonals_size_where_there_is_nothing_else() -> None:
    values = torch.tensor([4.0, -3.0, 0.0, 1e-3]).double()
    for probes in (1, 3):
        A = Known(torch.diag(values), psd=False)
        found = estimated_diagonal(A, probes, torch.Generator().manual_seed(0), values)
        torch.testing.assert_close(found, values.abs(), rtol=1e-12, atol=0)
        assert A.products == probes


def test_estimate_tends_to_the_norms_of_the_rows() -> None:
    """Of random signs `z`, the square of `z_i (A z)_i` has the mean `sum_j A_ij^2`, and variance at most twice its
    square.
    """
    A, probes = alternating(12), 4000
    found = estimated_diagonal(Known(A, psd=False), probes, torch.Generator().manual_seed(0), A[0])
    torch.testing.assert_close(found.square(), A.square().sum(1), rtol=5 * (2 / probes) ** 0.5, atol=0)
    assert bool((found >= A.diagonal().abs() * 0.9).all())


def test_estimate_draws_the_seeds_own_numbers() -> None:
    A = decaying(20)
    before = torch.get_rng_state()

    def found(A: Tensor, seed: int) -> Tensor:
        return estimated_diagonal(A, 3, torch.Generator().manual_seed(seed), A[0])

    assert torch.equal(found(A, 3), found(A, 3)) and not torch.equal(found(A, 3), found(A, 4))
    torch.testing.assert_close(found(A.float(), 3).double(), found(A, 3), rtol=1e-4, atol=1e-7)
    assert torch.equal(torch.get_rng_state(), before)


def test_estimate_of_what_is_no_number_raises_and_of_large_numbers_does_not() -> None:
    A = decaying(6)
    A[2, 3] = math.nan
    with pytest.raises(FloatingPointError, match="curvature product is not finite"):
        estimated_diagonal(A, 2, torch.Generator(), A[0])
    for size in (1e-30, 1e30):
        found = estimated_diagonal(size * torch.eye(6), 2, torch.Generator(), torch.zeros(6))
        torch.testing.assert_close(found.double() / size, torch.ones(6).double(), rtol=1e-6, atol=0)


def test_a_sketch_takes_two_matrices_of_its_size() -> None:
    """The most that is alive at a time, beside the vector that the matrix is known by."""
    n, rank = 20_000, 20
    weights = torch.logspace(0, -6, n)

    class Diagonal:
        def __init__(self, psd: bool) -> None:
            self.psd = psd

        def __matmul__(self, v: Tensor) -> Tensor:
            return weights * v

    for psd in (True, False):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            made = sketch(Diagonal(psd), rank, torch.Generator().manual_seed(0), weights)
        assert peak(seen) <= 2.2 * made.vectors.nbytes


def peak(seen: profile) -> float:
    alive = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most
