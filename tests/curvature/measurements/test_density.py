"""The histogram of all eigenvalues counts each."""

from __future__ import annotations

import pytest
import torch

from newtonopt.curvature import Density, measure


def test_the_histogram_counts_every_eigenvalue() -> None:
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 1.0, 1.0, 61.0])
    found = measure(lambda: 0.5 * (weights * w**2).sum(), [w], measurements=[Density()])
    (histogram,) = Density().histograms(found.of(Density)).values()
    counts = 10**histogram.heights - 1
    assert (histogram.low, histogram.high) == (pytest.approx(1.0), pytest.approx(61.0))
    assert float(counts[0]) == pytest.approx(3.0) and float(counts[-1]) == pytest.approx(1.0)
    assert float(counts.sum()) == pytest.approx(4.0)
    assert set(Density().figures(found.of(Density))) == {"spectral_density"}
