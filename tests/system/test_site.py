"""The site's extension that sees a page which a browser would fill from the network."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from houses import ROOT

pytest.importorskip("sphinx", reason="the site's tools are in the extra docs")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(ROOT / "docs" / "extensions")
    yield importlib.import_module("offline")
    sys.modules.pop("offline")


@pytest.mark.parametrize(
    ("file", "text", "fetched"),
    [
        ("index.html", '<img alt="a plot" src="https://example.org/a.png">', "https://example.org/a.png"),
        ("a/b.html", '<link rel="stylesheet" href="//cdn.example.org/a.css">', "//cdn.example.org/a.css"),
        ("a.html", '<script async\n src="https://example.org/a.js"></script>', "https://example.org/a.js"),
        ("a.css", "@import 'https://example.org/a.css';", "https://example.org/a.css"),
        ("a.css", 'body { background: url("//example.org/a.png") }', "//example.org/a.png"),
        ("a.html", '<a href="https://example.org">a link that readers follow</a>', None),
        ("a.html", '<img src="../_images/a.png">', None),
        ("a.css", "body { background: url(a.png) }", None),
    ],
)
def test_what_a_browser_would_fetch_is_warned_of(
    offline: Any, file: str, text: str, fetched: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    told: list[str] = []
    warning = lambda message, *values: told.append(message % values)  # noqa: E731
    monkeypatch.setattr(offline.logging, "getLogger", lambda name: SimpleNamespace(warning=warning))
    app = SimpleNamespace(builder=SimpleNamespace(format="html"), outdir=tmp_path)
    offline.warn_of_fetches(app, None)
    assert told == ([] if fetched is None else [f"{file} fetches {fetched}"])
