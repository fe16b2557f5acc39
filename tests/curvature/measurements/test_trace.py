"""The trace of a measurement, against the sum of eigenvalues known in closed form."""

from __future__ import annotations

import pytest
import torch

from newtonopt.curvature import Trace, measure


def test_the_trace_is_the_sum_of_the_eigenvalues_and_has_an_error() -> None:
    scales = torch.linspace(-1.0, 3.0, 9, dtype=torch.float64)
    theta = torch.ones(9, dtype=torch.float64, requires_grad=True)
    found = measure(lambda: (scales * theta.square()).sum() / 2, [theta], measurements=[Trace()])
    assert found["curvature/trace"] == pytest.approx(float(scales.sum()), rel=1e-12)
    assert found["curvature/trace_error"] == 0.0  # exact: there are fewer entries than products


def test_without_time_there_is_no_trace() -> None:
    theta = torch.ones(9, dtype=torch.float64, requires_grad=True)
    found = measure(lambda: theta.square().sum(), [theta], measurements=[Trace()], max_seconds=1e-9)
    assert not [tag for tag in found if "trace" in tag]
