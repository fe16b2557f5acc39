"""Records are read as untrusted input, and arranged by columns."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from newtonopt_tensorboard.records import RecordError, read_record, scalar_series, series


def record(**changes: Any) -> bytes:
    """A record as the monitor writes it."""
    return json.dumps(
        {"version": 1, "values": {"lambda_max": 2.0}, "words": ["Two."], "certified": True, **changes}
    ).encode()


def test_a_record_is_read_whole() -> None:
    found = read_record(record(density={"edges": [0, 1, 2.5], "heights": [3, 0.5]}, layers={"encoder": 4}))
    assert found.values == {"lambda_max": 2.0}
    assert found.words == ["Two."]
    assert found.certified is True
    assert found.density == ([0.0, 1.0, 2.5], [3.0, 0.5])
    assert found.layers == {"encoder": 4.0}


def test_numbers_that_are_not_finite_may_be_strings_or_what_python_writes() -> None:
    values = read_record(record(values={"a": "Infinity", "b": "-Infinity", "c": math.inf, "d": 10**400})).values
    assert values == {"a": math.inf, "b": -math.inf, "c": math.inf, "d": math.inf}
    assert math.isnan(read_record(record(values={"a": "NaN"})).values["a"])


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (None, "not text"),
        (3.5, "not text"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (record()[:-5], "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"{}", "another version"),
        (record(version=2), "another version"),
        (record(values=None), "values"),
        (record(values=[1.0]), "values"),
        (record(values={"a": True}), "not a number"),
        (record(values={"a": "3"}), "not a number"),
        (record(values={"a": None}), "not a number"),
        (record(values={"a" * 301: 1.0}), "letters"),
        (record(values={str(k): 1.0 for k in range(2001)}), "at most 2000"),
        (record(words="Two."), "words"),
        (record(layers=[1.0]), "layers"),
        (record(density=[1.0]), "edges and heights"),
        (record(density={"edges": [0.0, 1.0]}), "edges and heights"),
        (record(density={"edges": [0.0, 1.0], "heights": [1.0, 2.0]}), "number of edges"),
        (record(density={"edges": [0.0], "heights": []}), "number of edges"),
        (record(density={"edges": list(range(502)), "heights": [1.0] * 501}), "number of edges"),
        (record(density={"edges": [1.0, 0.0], "heights": [1.0]}), "ascend"),
        (record(density={"edges": [0.0, "NaN"], "heights": [1.0]}), "ascend"),
        (record(words=["x" * (1 << 20)]), "bytes"),
    ],
)
def test_what_is_no_record_is_refused_with_a_reason(raw: object, why: str) -> None:
    with pytest.raises(RecordError, match=why):
        read_record(raw)


def test_words_are_bounded_and_only_text() -> None:
    assert read_record(record(words=["x" * 5000, 3, *(["y"] * 100)])).words == ["x" * 2000, *(["y"] * 38)]


def test_certified_is_a_flag_or_unknown() -> None:
    assert read_record(record(certified=False)).certified is False
    assert read_record(record(certified="<b>")).certified is None


def test_a_state_is_a_known_one_and_its_remark_is_text() -> None:
    found = read_record(record(state="diverged", remark="Measured on the training loss."))
    assert (found.state, found.remark) == ("diverged", "Measured on the training loss.")
    for state in (None, "<b>", 3, ["failed"]):
        assert read_record(record(state=state, remark=state)).state is None
    assert read_record(record(remark=3)).remark == ""
    assert read_record(record(remark="x" * 5000)).remark == "x" * 2000
    assert (read_record(record()).state, read_record(record()).remark) == (None, "")


def test_a_failure_needs_neither_values_nor_words() -> None:
    failed = json.dumps({"version": 1, "state": "failed"}).encode()
    found = series([(10, 1.0, failed)])
    assert (found["steps"], found["values"], found["words"]) == ([10], {}, [])
    assert (found["state"], found["remark"]) == ("failed", "")


def test_a_series_has_the_state_of_its_last_record() -> None:
    found = series([(20, 2.0, record(state="edge", remark="Loss.")), (10, 1.0, record(state="beyond"))])
    assert (found["state"], found["remark"]) == ("edge", "Loss.")
    assert series([])["state"] is None


def test_a_series_has_a_column_for_each_value_and_none_where_it_is_missing() -> None:
    found = series(
        [
            (20, 2.0, record(values={"lambda_max": 3.0, "sharpness": math.nan}, words=["Three."], certified=False)),
            (10, 1.0, record(values={"lambda_max": 2.0, "lambda_max_of/encoder": 1.0})),
            (30, 3.0, b"nonsense"),
        ]
    )
    assert found["steps"] == [10, 20]
    assert found["values"] == {"lambda_max": [2.0, 3.0], "sharpness": [None, "NaN"]}
    assert found["certified"] == [True, False]
    assert found["words"] == ["Three."]
    assert (found["unread"], found["why"]) == (1, "it is not JSON")
    assert found["density"] is None
    assert found["layers"] is None
    json.dumps(found, allow_nan=False)


def test_of_two_records_of_one_step_the_later_one_counts() -> None:
    resumed = [(10, 9.0, record(values={"a": 2.0})), (10, 1.0, record(values={"a": 1.0}))]
    assert series(resumed)["values"] == {"a": [2.0]}


def test_what_a_run_left_behind_when_it_was_resumed_is_left_out() -> None:
    """The second part begins at step 15, with steps of its own between those of the first."""
    wrote = [(step, float(k), record(values={"a": float(k)})) for k, step in enumerate((0, 10, 20, 30, 15, 25))]
    found = series(reversed(wrote))
    assert found["steps"] == [0, 10, 15, 25]
    assert found["values"] == {"a": [0.0, 1.0, 4.0, 5.0]}
    scalars = scalar_series([(step, wall_time, wall_time) for step, wall_time, _ in wrote])
    assert scalars == {"steps": [0, 10, 15, 25], "values": [0.0, 1.0, 4.0, 5.0]}


def test_no_points_are_an_empty_series() -> None:
    found = series([])
    assert (found["steps"], found["values"], found["words"], found["unread"]) == ([], {}, [], 0)


def test_layers_and_densities_are_columns_of_the_steps_that_have_them() -> None:
    found = series(
        [
            (1, 1.0, record(layers={"a": 1.0})),
            (2, 2.0, record(density={"edges": [0.0, 1.0], "heights": [2.0]})),
            (3, 3.0, record(layers={"b": 2.0, "a": math.inf})),
        ]
    )
    assert found["layers"] == {"steps": [1, 3], "names": ["a", "b"], "values": [[1.0, None], ["Infinity", 2.0]]}
    assert found["density"] == {"steps": [2], "edges": [[0.0, 1.0]], "heights": [[2.0]]}


def test_heat_maps_keep_at_most_400_columns_with_both_ends() -> None:
    points = [(step, float(step), record(layers={"a": 1.0})) for step in range(1001)]
    steps = series(points)["layers"]["steps"]
    assert len(steps) == 400
    assert (steps[0], steps[-1]) == (0, 1000)
    assert len(series(points)["steps"]) == 1001


def test_scalars_are_sorted_and_what_json_can_hold() -> None:
    assert scalar_series([(2, 2.0, math.inf), (1, 1.0, 0.5)]) == {"steps": [1, 2], "values": [0.5, "Infinity"]}
