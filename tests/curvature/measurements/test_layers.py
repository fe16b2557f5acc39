"""Which patterns of layers are taken."""

from __future__ import annotations

from typing import Any

import pytest

from newtonopt.curvature import Layers


@pytest.mark.parametrize("patterns", [[], "encoder", [3]])
def test_what_is_no_list_of_patterns_is_refused(patterns: Any) -> None:
    with pytest.raises(ValueError, match="patterns must be a list of patterns of parameters' names, or None, got"):
        Layers(patterns)


def test_a_pattern_that_fits_no_name_is_refused_before_training() -> None:
    Layers(["encoder.*"]).check_model(["encoder.weight"], 3)
    Layers().check_model([], None)
    with pytest.raises(
        ValueError, match=r"patterns must each match .*, got 'decoder\.\*'\. Choose from encoder\.weight"
    ):
        Layers(["decoder.*"]).check_model(["encoder.weight"], 3)
