"""The Lanczos process, and negative curvature found by it, against defining identities and dense eigenvalues."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from newtonopt.solvers.lanczos import Restarts, Tridiagonal, lanczos, negative_curvature


def _symmetric(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((matrix + matrix.T) / 2).to(dtype)


def _vector(n: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_three_term_identity_and_orthonormal_basis_across_chunks(dtype: torch.dtype, accuracy: float) -> None:
    A = _symmetric(60, dtype=dtype)
    result = lanczos(A, _vector(60, dtype=dtype), 37)
    Q, T = result.basis, result.tridiagonal.dense().to(dtype)
    coupling = torch.zeros(37, 60, dtype=dtype)
    coupling[-1] = float(result.tridiagonal.betas[-1]) * result.next_vector
    assert result.tridiagonal.size == 37
    assert T.shape == (37, 37)
    assert result.tridiagonal.alphas.dtype == torch.float64
    torch.testing.assert_close(Q @ A, T @ Q + coupling, rtol=0.0, atol=accuracy * 10)
    torch.testing.assert_close(Q @ Q.T, torch.eye(37, dtype=dtype), rtol=0.0, atol=accuracy)


def test_whole_spectrum_of_a_dense_matrix() -> None:
    A = _symmetric(40)
    result = lanczos(A, _vector(40), 100)
    assert result.tridiagonal.size == 40
    assert result.tridiagonal.invariant
    np.testing.assert_allclose(result.ritz_values(), scipy.linalg.eigvalsh(A.numpy()), atol=1e-11)


def test_residuals_and_vectors_are_those_of_the_matrix() -> None:
    A = _symmetric(50)
    result = lanczos(A, _vector(50), 20)
    values, coordinates = result.tridiagonal.ritz()
    vectors = result.vectors(coordinates)
    true = (vectors @ A - values[:, None] * vectors).norm(dim=1)
    torch.testing.assert_close(true, result.residuals(), rtol=1e-9, atol=1e-11)


def test_deflated_run_sees_the_compressed_matrix() -> None:
    A = _symmetric(30)
    U = torch.linalg.qr(_symmetric(30, seed=5)[:, :4]).Q.T.contiguous()
    P = torch.eye(30, dtype=torch.float64) - U.T @ U
    result = lanczos(A, _vector(30), 100, deflate=U)
    assert result.tridiagonal.size == 26
    # P A P has four more eigenvalues, zero, along U.
    full = np.sort(np.append(result.ritz_values().numpy(), np.zeros(4)))
    np.testing.assert_allclose(full, scipy.linalg.eigvalsh((P @ A @ P).numpy()), atol=1e-11)
    torch.testing.assert_close(result.basis @ U.T, torch.zeros(26, 4, dtype=torch.float64), rtol=0.0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_breakdown_on_few_distinct_eigenvalues(dtype: torch.dtype) -> None:
    values = torch.cat([torch.full((5,), 3.0), torch.full((20,), -1.0), torch.zeros(30)]).to(dtype)
    result = lanczos(torch.diag(values), _vector(55, dtype=dtype), 50)
    assert result.tridiagonal.size == 3
    assert result.tridiagonal.invariant
    assert not result.next_vector.any()
    np.testing.assert_allclose(result.ritz_values(), [-1.0, 0.0, 3.0], atol=1e-5 if dtype == torch.float32 else 1e-13)


def test_deflated_remainder_far_below_the_scale_counts_as_breakdown() -> None:
    u = torch.nn.functional.normalize(_vector(40, seed=3), dim=0)
    A = 1e6 * torch.outer(u, u)
    result = lanczos(A, _vector(40), 30, deflate=u[None], scale=1e6)
    assert result.tridiagonal.size == 1


@pytest.mark.parametrize("matrix", [torch.zeros(6, 6), torch.eye(6), torch.zeros(1, 1)])
def test_first_vector_can_be_all(matrix: torch.Tensor) -> None:
    result = lanczos(matrix, _vector(matrix.shape[0], dtype=torch.float32), 10)
    assert result.tridiagonal.size == 1
    assert result.tridiagonal.invariant


def test_stop_sees_every_size_and_ends_the_run() -> None:
    seen: list[int] = []

    def stop(tridiagonal: Tridiagonal) -> bool:
        seen.append(tridiagonal.size)
        return tridiagonal.size == 5

    assert lanczos(_symmetric(20), _vector(20), 15, stop=stop).tridiagonal.size == 5
    assert seen == [1, 2, 3, 4, 5]


def test_start_is_left_alone_and_memory_follows_iterations() -> None:
    start = _vector(20)
    kept = start.clone()
    result = lanczos(_symmetric(20), start, 10_000, stop=lambda t: t.size == 3)
    assert torch.equal(start, kept)
    assert sum(chunk.untyped_storage().nbytes() for chunk in result.chunks) <= 16 * 20 * 8


def test_noise_measures_what_symmetry_forbids() -> None:
    A = _symmetric(40)
    assert lanczos(A, _vector(40), 20).tridiagonal.noise < 1e-11
    skew = _symmetric(40, seed=9).triu(1)
    tilted = A + 1e-4 * (skew - skew.T)
    assert 1e-5 < lanczos(tilted, _vector(40), 20).tridiagonal.noise < 1e-2


def test_errors_name_the_remedy() -> None:
    A = _symmetric(4)
    with pytest.raises(ValueError, match="max_products must be at least 1, got 0"):
        lanczos(A, _vector(4), 0)
    with pytest.raises(ValueError, match="start must be finite and have a part outside"):
        lanczos(A, torch.zeros(4, dtype=torch.float64), 3)
    with pytest.raises(FloatingPointError, match=r"Product number 1 .* float32 or float64"):
        lanczos(A * float("nan"), _vector(4), 3)
    with pytest.raises(FloatingPointError, match="not finite"):
        lanczos(torch.diag(torch.tensor([1.0, float("inf")])), torch.ones(2), 3)


def _both_ends(values: torch.Tensor) -> list[int]:
    return [0, 1, *range(len(values) - 3, len(values))]


def test_restarts_keep_the_identity_within_few_vectors() -> None:
    A = _symmetric(80)
    seen: list[int] = []
    restarts = Restarts(12, _both_ends)
    result = lanczos(A, _vector(80), 47, stop=lambda t: seen.append(t.size) or False, restarts=restarts)  # type: ignore
    Q, T = result.basis, result.tridiagonal.dense()
    coupling = torch.zeros(len(Q), 80, dtype=torch.float64)
    coupling[-1] = float(result.tridiagonal.betas[-1]) * result.next_vector
    assert len(Q) <= 12
    assert result.tridiagonal.size == 47
    assert seen == list(range(1, 47))
    torch.testing.assert_close(Q @ A, T @ Q + coupling, rtol=0.0, atol=1e-11)
    torch.testing.assert_close(Q @ Q.T, torch.eye(len(Q), dtype=torch.float64), rtol=0.0, atol=1e-12)
    values, coordinates = result.tridiagonal.ritz()
    residuals = (result.vectors(coordinates) @ A - values[:, None] * result.vectors(coordinates)).norm(dim=1)
    torch.testing.assert_close(residuals, result.residuals(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(result.coordinates(result.basis), torch.eye(len(Q)).double(), rtol=0.0, atol=1e-12)


def test_restarts_converge_to_the_ends_nearly_as_fast() -> None:
    A = torch.diag(torch.cat([torch.linspace(0.0, 1.0, 300), torch.tensor([1.2, -0.3])]).double())

    def products(restarts: Restarts | None) -> int:
        def stop(tridiagonal: Tridiagonal) -> bool:
            coordinates = tridiagonal.ritz()[1]
            tails = tridiagonal.betas[-1] * coordinates[-1].abs()
            return float(tails[0]) < 1e-6 and float(tails[-1]) < 1e-6

        result = lanczos(A, _vector(302), 300, stop=stop, restarts=restarts)
        np.testing.assert_allclose(result.ritz_values()[[0, -1]], [-0.3, 1.2], atol=1e-9)
        return result.tridiagonal.size

    assert products(Restarts(16, _both_ends)) <= 1.5 * products(None)


def test_restarts_are_as_nothing_where_there_is_room() -> None:
    A = _symmetric(30)
    plain, roomy = (lanczos(A, _vector(30), 20, restarts=r) for r in (None, Restarts(20, _both_ends)))
    assert torch.equal(plain.tridiagonal.alphas, roomy.tridiagonal.alphas)
    assert torch.equal(plain.basis, roomy.basis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lowest", [-3.0, -1e-2])
def test_negative_curvature_is_found_and_measured(lowest: float, dtype: torch.dtype) -> None:
    values = torch.cat([torch.tensor([lowest]), torch.linspace(0.5, 2.0, 59)]).double()
    Q = torch.linalg.qr(_symmetric(60)).Q
    A = ((Q * values) @ Q.T).to(dtype)
    found = negative_curvature(A, A[0])
    assert found is not None
    direction, curvature = found
    assert direction.dtype == dtype
    assert float(direction.norm()) == pytest.approx(1.0, rel=1e-5)
    assert curvature == pytest.approx(float(direction @ A @ direction), abs=1e-5)
    # Stops once the residual is a tenth of the value.
    assert lowest * (1 + 1e-4) <= curvature <= 0.8 * lowest


def test_two_unknowns_have_their_negative_curvature_by_hand() -> None:
    """The eigenvalues of `[[0, 2], [2, 3]]` are -1 and 4, and -1 belongs to `(2, -1)`."""
    found = negative_curvature(torch.tensor([[0.0, 2.0], [2.0, 3.0]]).double(), torch.zeros(2).double())
    assert found is not None and found[1] == pytest.approx(-1.0)
    torch.testing.assert_close(found[0] / found[0][0], torch.tensor([1.0, -0.5]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_no_negative_curvature(dtype: torch.dtype) -> None:
    for values in ([0.0] * 6, [0.0, 1.0, 2.0, 3.0], [3.0]):
        A = torch.diag(torch.tensor(values, dtype=dtype))
        assert negative_curvature(A, A[0]) is None
    # Rounding is 10 sqrt(n) eps = 100 eps times the largest eigenvalue.
    A = torch.linspace(0.0, 1.0, 100, dtype=dtype).diag()
    A[0, 0] = -45 * torch.finfo(dtype).eps
    assert negative_curvature(A, A[0]) is None


def test_asymmetry_of_the_products_is_no_negative_curvature() -> None:
    """Products that are off by 1e-2 may show a lowest eigenvalue of that size, of either sign."""
    skew = _symmetric(40, seed=9).triu(1)
    values = torch.linspace(-1e-2, 2.0, 40).double()
    assert negative_curvature(torch.diag(values) + 1e-3 * (skew - skew.T), values) is None
    assert negative_curvature(torch.diag(values), values) is not None


def test_the_search_is_the_seeds_own_and_keeps_its_budget() -> None:
    products = 0

    class Counted:
        def __matmul__(self, v: torch.Tensor) -> torch.Tensor:
            nonlocal products
            products += 1
            return A @ v

    A = torch.diag(torch.linspace(0.0, 1.0, 300).double())
    before = torch.get_rng_state()
    assert negative_curvature(Counted(), A[0], max_products=11) is None
    assert products == 11
    A[0, 0] = -1.0
    first, again, other = (negative_curvature(A, A[0], seed=seed) for seed in (3, 3, 4))
    assert first is not None and again is not None and other is not None
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), before)
