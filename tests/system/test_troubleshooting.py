"""Every error and warning has one entry in docs/troubleshooting.md, and every entry has an error or a warning.

Messages are read from the source: the first argument of each exception, and the argument of each function in `GIVEN`. A
part that is not known before the message is made reads `...`, on the page too.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text())
    for folder in ("newtonopt", "callbacks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.parent.name != "doctor"  # which prints what fails, and raises nothing
}
# The functions that are given a message, or the part of one that says what happened, by the place of that argument.
GIVEN = {"warn": 0, "rank_zero_warn": 0, "warning": 0, "_warn": 1, "_stop": 0, "_refusal": 1}
# Arguments that hold a part of a message, and lists to which sentences are appended, by their names.
NAMED, LISTS = ("wrong", "doubt"), ("errors", "sentences")
# Functions that put a message together from all sentences in them.
BUILDERS = ("advice",)
# Expressions that stand for the text of another error, or for a message that the caller gives.
PASSED_ON = {
    *("error", "str(error)", "error.reason", "wrong.wrong", "evaluation.recording.advice", "restless(self.params)"),
    *("message", "changed", "self.unprotected", "played.isolation.unprotected", "next(iter(view.failures.values()))"),
}
# Messages that nobody meets, with the reason.
INTERNAL = {
    "The closure writes to the parameters, which changes their tangents.": "two backward passes take over",
    "The closure computes with gradients, which are not available in forward mode.": "two backward passes take over",
    "A random start needs exact products.": "the measurement is taken again with exact products",
}


def texts(node: ast.AST, names: Mapping[str, list[ast.AST]]) -> list[str]:
    """Return what an expression may read, with `...` for each part that is not known.

    Args:
        node: The expression.
        names: What names stand for.
    """
    match node:
        case ast.Constant(value=str() as text):
            return [text.replace("%s", "...")]
        case ast.JoinedStr(values=parts):
            return ["".join(choice) for choice in itertools.product(*(texts(part, names) for part in parts))]
        case ast.FormattedValue(value=ast.Name() as name):
            return texts(name, names)
        case ast.IfExp(body=body, orelse=other):
            return [*texts(body, names), *texts(other, names)]
        case ast.Name(id=name) if name in names:
            return [text for value in names[name] for text in texts(value, names)]
        case ast.Call(func=ast.Attribute(attr="format", value=template)):
            return [re.sub(r"\{[^{}]*\}", "...", text) for text in texts(template, names)]
        case ast.Call(func=ast.Attribute(attr="named"), args=[first, *_]):
            return [f"{text}..." for text in texts(first, names)]
    return ["..."]


@cache
def constants(path: str) -> dict[str, list[ast.AST]]:
    """Return what the constants of a module stand for, those that it imports from our other modules included."""
    found: dict[str, list[ast.AST]] = {}
    for node in MODULES[path].body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name.isupper():
                found[name] = [value]
            case ast.ImportFrom(module=str() as module) if (origin := f"{module.replace('.', '/')}.py") in MODULES:
                known = constants(origin) if any(one.name.isupper() for one in node.names) else {}
                found |= {one.name: known[one.name] for one in node.names if one.name in known}
    return found


def said_by(node: ast.AST) -> list[ast.AST]:
    """Return the expressions in a node that are messages."""
    if isinstance(node, ast.FunctionDef) and node.name in BUILDERS:
        lists = [one.elts for one in ast.walk(node) if isinstance(one, ast.List)]
        return [item for items in lists for item in items if not isinstance(item, ast.Starred)]
    if isinstance(node, ast.Dict) and [key and ast.unparse(key) for key in node.keys] == ["'error'"]:
        return [*node.values]
    if not isinstance(node, ast.Call):
        return []
    said: list[ast.AST] = [one.value for one in node.keywords if one.arg in NAMED]
    match node.func:
        case ast.Name(id=name) if name.endswith(("Error", "Exception")):
            said += node.args[:1]
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in GIVEN:
            said += node.args[GIVEN[name] : GIVEN[name] + 1]
        case ast.Attribute(attr="append", value=ast.Name(id=name)) if name in LISTS:
            said += node.args
        case ast.Attribute(attr="__init__", value=ast.Call(func=ast.Name(id="super"))) if node.args:
            said += node.args[:1] if isinstance(node.args[0], ast.JoinedStr) else []
    return said


def messages() -> Iterator[tuple[str, str]]:
    """Yield each message with the place where it is made."""
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            for one in said_by(node):
                values: list[ast.AST] = [one]
                if isinstance(one, ast.Name) and one.id not in constants(path) and one.id not in PASSED_ON:
                    values = [
                        other.value
                        for other in ast.walk(tree)
                        if isinstance(other, ast.Assign) and ast.unparse(other.targets[0]) == one.id
                    ]
                for text in (text for value in values for text in texts(value, constants(path))):
                    if text and (text != "..." or ast.unparse(one) not in PASSED_ON):
                        yield re.sub(r"(\.\.\.)+", "...", text), f"{path}:{getattr(one, 'lineno', 0)}"


def plain(text: str) -> str:
    """Return words without code font and without the spaces around gaps."""
    return re.sub(r"\s*(\.\.\.)+\s*", "...", text.replace("`", ""))


PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
# An entry: a heading in code font, the words of further messages that it is for, and what to do.
FOUND = re.findall(r"^### `(.+)`\n\n(?:Also: ((?:.+\n)+)\n)?((?:.+\n)+)", PAGE, re.MULTILINE)
ENTRIES = {plain(heading): [heading, *re.findall(r"`([^`]+)`", also)] for heading, also, _ in FOUND}
MESSAGES = {plain(text): place for text, place in messages()}


def entries_for(message: str) -> list[str]:
    """Return the headings of the entries for the first words of a message, before those of errors that it quotes."""
    places = {
        heading: min(place for place in (message.find(plain(one)) for one in fragments) if place >= 0)
        for heading, fragments in ENTRIES.items()
        if any(plain(one) in message for one in fragments)
    }
    return [heading for heading, place in places.items() if place == min(places.values())]


def test_messages_and_entries_are_read() -> None:
    assert len(MESSAGES) > 280
    assert len(ENTRIES) == len(FOUND) == len(re.findall("^### ", PAGE, re.MULTILINE)) > 100
    assert set(INTERNAL) <= set(MESSAGES)
    assert len(INTERNAL) <= 5


def test_each_message_has_one_entry() -> None:
    found = {(place, message): entries_for(message) for message, place in MESSAGES.items() if message not in INTERNAL}
    assert {message: entries for message, entries in found.items() if len(entries) != 1} == {}


def test_each_entry_is_for_messages() -> None:
    # The sentences of the tab's own page may have entries too.
    said = [*MESSAGES, plain(re.sub(r"\$\{.*?\}+", "...", (ROOT / "callbacks" / "tab" / "index.js").read_text()))]
    for fragments in ENTRIES.values():
        assert [one for one in fragments if not any(plain(one) in text for text in said)] == []


def test_each_entry_says_what_to_do_in_a_few_sentences() -> None:
    assert [heading for heading, _, words in FOUND if not 60 <= len(words) <= 900] == []
