"""The picture of the packages in CONTRIBUTING.md shows the imports that the code has."""

from __future__ import annotations

import re

import pytest
from houses import ROOT, rooms_imported

REACH = {"|": (0,), "/": (-1, -2, -3), "\\": (1, 2, 3)}  # columns by which a line may move from one row to the next
Graph = dict[str, set[str]]


def picture() -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return text.split("## The house")[1].split("```text\n")[1].split("```")[0]


def arrows(drawing: str) -> Graph:
    r"""Follow each line of `|`, `/` and `\` from a word down to the next. At an X lines cross without a bend."""
    rows = drawing.splitlines()
    words = [(row, m) for row, text in enumerate(rows) for m in re.finditer(r"[a-z]+", text)]
    found: Graph = {m[0]: set() for _, m in words}
    for row, word in words:
        below = rows[row + 1] if row + 1 < len(rows) else ""
        for line in re.finditer(r"[|/\\]", below):
            # A slanted line may start beside the word, on the side that it comes from.
            left, right = word.start() - 3 * (line[0] == "/"), word.end() + 3 * (line[0] == "\\")
            if left <= line.start() < right:
                found[word[0]].add(_end_of(rows, row + 1, line.start(), line[0]))
    return found


def _end_of(rows: list[str], row: int, column: int, line: str) -> str:
    """The word at the lower end of a line, which may bend."""
    for text in rows[row + 1 :]:
        columns = [column + move for move in REACH[line]]
        for word in re.finditer(r"[a-z]+", text):
            if any(word.start() <= place < word.end() for place in columns):
                return word[0]
        column = next((c for c in columns if text[c : c + 1].strip()), -1)
        assert column >= 0, f"a line breaks off above {text!r}"
        line = line if text[column] == "X" else text[column]
    raise AssertionError("a line leads nowhere")


def reachable(graph: Graph, start: str) -> set[str]:
    """All packages below `start`, over one or several arrows."""
    return {end for step in graph[start] for end in {step} | reachable(graph, step)}


def shortest(graph: Graph) -> Graph:
    """The arrows that are left when one that other arrows already imply is taken away."""
    return {a: {b for b in ends if not any(b in reachable(graph, c) for c in ends - {b})} for a, ends in graph.items()}


def packages() -> Graph:
    """The packages in the picture, each with the packages in the picture that it imports."""
    drawn = set(arrows(picture()))
    return {room: imported & drawn for room, imported in rooms_imported().items() if room in drawn}


def test_the_picture_shows_the_imports() -> None:
    assert arrows(picture()) == shortest(packages())


def test_modules_beside_the_picture_import_nothing_of_ours() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().split("Beside the picture stand ")[1].split("They import nothing")[0]
    others = {*packages(), "newtonopt", "__main__"}
    beside = {room: imported for room, imported in rooms_imported().items() if room not in others}
    assert {"checks", "progress"} <= set(beside) <= set(re.findall(r"`(\w+)`", text))
    assert not any(beside.values())


@pytest.mark.parametrize("package", sorted(packages()))
def test_every_package_is_described(package: str) -> None:
    assert f"\n- `{package}`: " in (ROOT / "CONTRIBUTING.md").read_text().split("## A new optimizer")[0]


def test_lines_are_followed() -> None:
    cross = "  a     b\n  | \\ / |\n  |  X  |\n  | / \\ |\n  c     d\n   \\   /\n     e\n"
    assert arrows(cross) == {"a": {"c", "d"}, "b": {"c", "d"}, "c": {"e"}, "d": {"e"}, "e": set()}
    with pytest.raises(AssertionError, match="a line breaks off above"):
        arrows("a\n|\n\nb\n")
    assert shortest({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}
