"""Reference pages: which members and signatures they show, and which names in the text become links."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import matplotlib.axes
import matplotlib.figure
import scipy.sparse.linalg
import torch
from docutils import nodes
from lightning.pytorch import Callback, LightningModule
from sphinx import addnodes
from sphinx.domains.python import PyObject
from sphinx.transforms import SphinxTransform
from torch.utils.tensorboard import SummaryWriter

from newtonopt.curvature import Measurement

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

MODULES = ("newtonopt", "newtonopt.curvature", "newtonopt.callbacks")
# Each public name with its dotted name: "trace" is "newtonopt.curvature.trace".
PUBLIC = {name: f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).__all__}
THINGS = {full: getattr(importlib.import_module(full.rpartition(".")[0]), name) for name, full in PUBLIC.items()}
# Dataclasses that have attributes and are written by users all the same. The library makes all others.
WRITTEN_BY_USERS = ("Chart", "Histogram", "Tag")
# Names that annotations use and modules import for type checkers alone.
LATE = {
    "Axes": matplotlib.axes.Axes,
    "Figure": matplotlib.figure.Figure,
    "ScipyOperator": scipy.sparse.linalg.LinearOperator,
    "SummaryWriter": SummaryWriter,
}
# Classes by the names under which their own documentation has them.
DOCUMENTED_AS = {
    torch.optim.Optimizer: "torch.optim",
    LightningModule: "lightning.pytorch.core",
    matplotlib.axes.Axes: "matplotlib.axes",
    scipy.sparse.linalg.LinearOperator: "scipy.sparse.linalg",
}
# Members by which a new optimizer tells its base class about itself.
FOR_THE_BASE = {"control", "state_type"}
# Measurements that show what every measurement has only on the page of `Measurement`.
PROTOCOL = set(vars(Measurement))


def words_with_another_meaning() -> set[str]:
    """Return the arguments and properties of public names: `trace` is both a function and a property."""
    found: set[str] = set()
    for thing in THINGS.values():
        found.update(inspect.signature(thing).parameters)
        if isinstance(thing, type):
            found.update(name for name, value in vars(thing).items() if isinstance(value, property))
    return found


# Names of other projects that the local inventories know.
FOREIGN = {
    line.split()[0]
    for inventory in (Path(__file__).parents[1] / "inventories").glob("*.txt")
    for line in inventory.read_text().splitlines()
    if "." in line.split()[0] and not line.startswith("#")
}


AMBIGUOUS = words_with_another_meaning()


def resolve_types() -> None:
    """Replace the annotations of public functions and methods, which are text, by types, so that these become links."""
    for kind, module in DOCUMENTED_AS.items():
        kind.__module__ = module
    for thing in THINGS.values():
        functions = [thing] if not isinstance(thing, type) else [*members(thing)]
        for function in functions:
            for layer in {function, inspect.unwrap(function)}:
                hints = get_type_hints(layer, localns=LATE)
                layer.__annotations__ = {name: literals_behind(hint) for name, hint in hints.items()}


def literals_behind(hint: Any) -> Any:
    """Move choices in words behind the classes of a union: Sphinx links no class behind a `Literal`."""
    if not isinstance(hint, types.UnionType) and get_origin(hint) is not Union:
        return hint
    return Union[tuple(sorted(get_args(hint), key=lambda kind: get_origin(kind) is Literal))]  # noqa: UP007


def members(kind: type) -> list[Any]:
    """Return the functions that a class of ours and its bases define."""
    ours = [base for base in kind.__mro__ if base.__module__.startswith("newtonopt")]
    values = [value for base in ours for value in vars(base).values()]
    functions = [getattr(value, "fget", getattr(value, "__func__", value)) for value in values]
    return [function for function in functions if inspect.isfunction(function)]


def skip_member(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Tell autodoc to hide a member, or leave the choice to it."""
    return True if is_hidden(name, obj) else None


def is_hidden(name: str, member: Any) -> bool:
    """Return whether a member is a hook, as in torch's optimizers, a check of ours, or as in all measurements."""
    owner = getattr(getattr(member, "fget", member), "__qualname__", "").rpartition(".")[0]
    if hasattr(Callback, name) or name in FOR_THE_BASE:
        return True
    if owner == "NewtonOptimizer":
        return name != "step"
    if owner == "Measurement":
        return False
    return name.startswith("check_") or (name in PROTOCOL and issubclass(class_of(owner), Measurement))


def class_of(name: str) -> type:
    """Return the public class of that name; `object` if there is none."""
    thing = THINGS.get(PUBLIC.get(name, ""), object)
    return thing if isinstance(thing, type) else object


def shorten_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Leave out the signature of a class that users are given and do not make."""
    is_given = what == "class" and "Attributes:" in obj.__doc__ and "Args:" not in obj.__doc__
    return ("", None) if is_given and obj.__name__ not in WRITTEN_BY_USERS else None


def add_tags(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """List the tags of a measurement before its example."""
    if what != "class" or not issubclass(obj, Measurement) or obj is Measurement:
        return
    rows = [".. rubric:: Tags", ""]
    for tag in obj.tags:
        unit = f" ({tag.unit})" if tag.unit else ""
        rows.append(f"- ``{tag.folder('curvature')}/{tag.name}``{unit}: {tag.description}")
    place = next((number for number, line in enumerate(lines) if line.startswith(".. rubric:: Example")), len(lines))
    lines[place:place] = [*rows, ""]


def leave_unlinked(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    """Name a class of ours that has no page, because users neither make nor read it, by its name alone."""
    module, _, name = node["reftarget"].rpartition(".")
    if node["refdomain"] != "py" or not module.startswith("newtonopt.") or name in PUBLIC:
        return None
    return addnodes.literal_emphasis(name, name) if hasattr(sys.modules.get(module), name) else None


class LinkNames(SphinxTransform):
    """Make code that is a public name, or the path of a page, a link, once in each section."""

    default_priority = 5  # before references are looked up

    def apply(self, **options: Any) -> None:
        """Replace the code by references to it."""
        seen: set[tuple[int, str]] = set()
        for node in list(self.document.findall(nodes.literal)):
            if within(node, nodes.reference, addnodes.pending_xref, nodes.title, addnodes.desc_signature):
                continue
            reference = self.reference_to(node)
            key = (id(enclosing(node)), reference["reftarget"] if reference is not None else "")
            if reference is not None and key not in seen:
                seen.add(key)
                node.replace_self(reference)

    def reference_to(self, node: nodes.literal) -> addnodes.pending_xref | None:
        """Return a reference around the code; None if it is not a public name or a page, or the page's own."""
        text, docname = node.astext(), self.env.docname
        common = {"refdoc": docname, "refexplicit": True, "refwarn": True}
        if page := re.fullmatch(r"docs/([\w/]+)\.md", text):
            file = Path(self.env.srcdir, f"{page[1]}.md")
            if not file.exists() or page[1] == docname:
                return None
            title = re.findall(r"^# (.*)$", file.read_text(), re.MULTILINE)[0]
            shown_as = nodes.inline("", f"{title}, the guide" if title in PUBLIC else title)
            return addnodes.pending_xref(
                text, shown_as, refdomain="std", reftype="doc", reftarget=f"/{page[1]}", **common
            )
        if text in FOREIGN:
            code = nodes.literal(text, text, classes=["xref", "py", "py-obj"])
            kind = "mod" if text in sys.modules else "obj"
            return addnodes.pending_xref(text, code, refdomain="py", reftype=kind, reftarget=text, **common)
        name, _, member = text.partition("(")[0].partition(".")
        full = PUBLIC.get(name)
        if full is None or docname == f"reference/generated/{self.config.autosummary_filename_map.get(full, full)}":
            return None
        called = text.endswith(")") or bool(member) or within(node, addnodes.seealso)
        if name.islower() and not called and (name in AMBIGUOUS or hasattr(self.own(), name)):
            return None
        if member and not hasattr(THINGS[full], member):
            return None
        code = nodes.literal(text, text, classes=["xref", "py", "py-obj"])
        target = full if not member or not shown(THINGS[full], member) else f"{full}.{member}"
        return addnodes.pending_xref(text, code, refdomain="py", reftype="obj", reftarget=target, **common)

    def own(self) -> Any:
        """Return the thing that the page is about; None for other pages."""
        name = self.env.docname.rpartition("/")[2].removesuffix("-function")
        return THINGS.get(name) if self.env.docname.startswith("reference/generated/") else None


def shown(thing: type, member: str) -> bool:
    """Return whether the page of a class has an entry for that member."""
    value = getattr(thing, member)
    return bool(inspect.getdoc(value)) and not is_hidden(member, value)


def within(node: nodes.Node, *kinds: type[nodes.Node]) -> bool:
    """Return whether a node stands within a node of those kinds."""
    while node.parent is not None:
        node = node.parent
        if isinstance(node, kinds):
            return True
    return False


def enclosing(node: nodes.Node) -> nodes.Node:
    """Return the section, the description or the list of links that a node stands in."""
    while node.parent is not None and not isinstance(node, (nodes.section, addnodes.desc, addnodes.seealso)):
        node = node.parent
    return node


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect all of this."""
    resolve_types()
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", add_tags, priority=900)  # after napoleon
    app.connect("missing-reference", leave_unlinked)
    app.add_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
