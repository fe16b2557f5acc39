"""Which slices are taken."""

from __future__ import annotations

from typing import Any

import pytest

from newtonopt.curvature import ExtremeEigenvalues, LossSlice


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"directions": 3}, "directions must be 1 or 2, got 3"),
        ({"radius": -1.0}, r"radius must be positive and finite, got -1\.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSlice(**settings)


def test_there_must_be_an_eigenvector_for_each_direction() -> None:
    LossSlice(2).check_list([ExtremeEigenvalues(1, 1)])
    with pytest.raises(
        ValueError, match=r"directions must be at most top \+ bottom, 1, .* got 2\. Raise top or bottom"
    ):
        LossSlice(2).check_list([ExtremeEigenvalues(1, 0)])
