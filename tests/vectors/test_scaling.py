"""Norms, inner products and scaled matrices by hand, over the whole range of both dtypes."""

from __future__ import annotations

import math

import pytest
import torch
from powers import WHOLE, matrix, times

from newtonopt.vectors.scaling import InRange, dot, exponent, lost, norm, scale_of, shifted, times_power


@pytest.mark.parametrize(("dtype", "power"), WHOLE)
def test_norms_and_inner_products(dtype: torch.dtype, power: int) -> None:
    v = torch.tensor([3.0, -4.0, 0.0], dtype=dtype)
    assert norm(times(v, power)) == math.ldexp(5.0, power)
    assert dot(times(v, power), times(v, -power // 2)) == math.ldexp(25.0, power + -power // 2)
    assert dot(times(v, power), torch.zeros_like(v)) == norm(torch.zeros_like(v)) == 0.0


def test_norms_of_what_is_not_finite() -> None:
    assert norm(torch.tensor([1.0, math.inf])) == math.inf
    assert math.isnan(norm(torch.tensor([1.0, math.nan])))
    assert norm(torch.full((4,), 2.0**1023, dtype=torch.float64)) == math.inf


def test_powers_of_two_by_hand() -> None:
    v = torch.tensor([0.0, -6.0, 1.0])
    assert exponent(v) == 3 and exponent(2.0**-140 * v) == -137
    assert exponent(torch.zeros(2)) is None and exponent(torch.tensor([1.0, math.inf])) is None
    assert exponent(torch.empty(0)) is None
    assert [scale_of(2.0**k * v) for k in (-20, -19, 13, 14)] == [-17, 0, 0, 17]
    # Factors that are themselves out of range.
    tiny = torch.tensor([2.0**-149])
    assert times_power(tiny, 200).tolist() == [2.0**51]
    assert times_power(times_power(v, -140), 140).tolist() == v.tolist()
    assert times_power(v, 0) is v
    assert [shifted(3.0, 2), shifted(-1.0, 2000), shifted(1.0, -2000)] == [12.0, -math.inf, 0.0]
    assert lost(torch.float32, 4) == 2 * torch.finfo(torch.float32).tiny


def test_the_first_product_that_is_not_zero_decides() -> None:
    scaled = InRange(torch.tensor([2.0**600, 2.0**700], dtype=torch.float64).diag())
    zero = scaled @ torch.zeros(2).double()
    assert not zero.any() and scaled.exponent == 0
    assert (scaled @ torch.tensor([3.0, 0.0]).double()).tolist() == [3.0, 0.0]
    assert scaled.exponent == 600
    assert (scaled @ torch.tensor([0.0, 1.0]).double()).tolist() == [0.0, 2.0**100]
    assert scaled.exponent == 600
    assert scaled.back(1.0) == 2.0**600 and scaled.back(1.0, degree=-1) == 2.0**-600
    settled = InRange(2.0**600 * torch.eye(2).double())
    settled.settle()
    assert (settled @ torch.tensor([3.0, 0.0]).double()).tolist() == [3.0 * 2.0**600, 0.0]


def test_a_matrix_of_ordinary_size_is_left_as_it_is() -> None:
    A = matrix()
    v = torch.ones(len(A), dtype=torch.float64)
    assert torch.equal(InRange(A) @ v, A @ v)
    scaled = InRange(2.0**600 * A)
    assert not (scaled @ torch.zeros_like(v)).any()
    product = scaled @ v
    assert 0.25 <= float(product.abs().max()) <= 4.0
    torch.testing.assert_close(product * 2.0**scaled.exponent, 2.0**600 * (A @ v), rtol=0, atol=0)
