"""A bar is drawn for several parts, and everything works without tqdm."""

from __future__ import annotations

import io
import sys

import pytest

from newtonopt import progress as module
from newtonopt.progress import progress


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("total", [4, None])
def test_a_bar_counts_the_parts_on_a_terminal(total: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(module, "_DELAY", 0.0)
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with progress(total, "of some kind") as update:
        update()
        update(3)
        bar = update.__self__
        assert (bar.n, bar.total) == (4, total)
    assert "newtonopt: of some kind" in screen.getvalue()


def test_no_bar_where_the_output_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(module, "_DELAY", 0.0)
    monkeypatch.setattr(sys, "stderr", screen := io.StringIO())
    with progress(4) as update:
        update(4)
    assert screen.getvalue() == ""


def test_no_bar_during_the_first_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(module, "_DELAY", 3600.0)
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with progress(4) as update:
        update(2)
    assert "newtonopt" not in screen.getvalue()


@pytest.mark.parametrize(("total", "installed"), [(1, True), (4, False), (None, False)])
def test_no_bar_for_a_single_part_nor_without_tqdm(
    total: int | None, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setattr(module, "_DELAY", 0.0)
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress(total) as update:
        update()
        update(3)
    assert screen.getvalue() == ""
