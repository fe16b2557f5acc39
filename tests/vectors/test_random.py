"""Random vectors mean the same for every dtype and kind of `like`; unit vectors are the identity's columns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from newtonopt.vectors.random import direction, normals, signs, unit_vectors

N = 37


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("like", [torch.empty(N), torch.empty(0, N), torch.empty(3, N)], ids=["vector", "none", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_seed_means_the_same_numbers_everywhere(like: Tensor, dtype: torch.dtype) -> None:
    expected = torch.randn(N, generator=_generator(), dtype=torch.float64)
    before = torch.get_rng_state()
    found = normals(like.to(dtype), _generator())
    assert torch.equal(found, expected.to(dtype))
    assert torch.equal(signs(like.to(dtype), _generator()), expected.sign().to(dtype))
    assert torch.equal(direction(like.to(dtype), _generator()), (expected / expected.norm()).to(dtype))
    assert torch.equal(before, torch.get_rng_state())


def test_a_generator_goes_on_from_vector_to_vector() -> None:
    generator = _generator()
    first, second = (normals(torch.empty(N).double(), generator) for _ in range(2))
    assert not torch.equal(first, second)
    generator = _generator()
    directions = torch.stack([direction(torch.empty(3).double(), generator) for _ in range(2000)])
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(2000).double())
    torch.testing.assert_close(directions.T @ directions / 2000, torch.eye(3).double() / 3, rtol=0, atol=0.03)


def test_unit_vectors_are_the_identity() -> None:
    assert torch.equal(torch.stack(list(unit_vectors(torch.empty(0, N)))), torch.eye(N))
