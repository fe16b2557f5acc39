"""Imports point one way, and docstrings say what signatures say."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from houses import FILES, MODULES, ROOT, imports_of, module_of, public_names, room_of
from torch import Tensor

# Packages from the ground up: each may import those before it. "newtonopt" stands for its public names.
LAYERS = (
    "checks",
    "progress",
    "lightning",
    "vectors",
    "autodiff",
    "closure",
    "operators",
    "solvers",
    "optimizers",
    "curvature",
    "newtonopt",
    "callbacks",
    "tab",
    "doctor",
    "__main__",
)
# Beyond the order: solvers know nothing but `A @ v`, and optimizers and measurements nothing of each other.
KNOWS_ONLY = {
    "checks": set(),
    "progress": set(),
    "lightning": set(),
    "solvers": {"vectors"},
    "callbacks": {*LAYERS[: LAYERS.index("callbacks")]} - {"solvers"},
    "curvature": {*LAYERS[: LAYERS.index("solvers") + 1]},
    "tab": set(),
    # It loads the tab by its entry point, as TensorBoard does.
    "doctor": {*LAYERS[: LAYERS.index("tab")]},
}
MAY_IMPORT = {package: KNOWS_ONLY.get(package, {*LAYERS[:number]}) for number, package in enumerate(LAYERS)}
PURE = {"newtonopt.optimizers.rules"}
CALLBACKS_ONLY = {"lightning", "lightning_utilities", "tensorboard"}
# TensorBoard loads the tab without a guard, so that it may import only what TensorBoard itself requires.
TAB_ONLY = {"tensorboard", "werkzeug"}
# What may import matplotlib, and only when a figure is asked for.
DRAWERS = {f"newtonopt.curvature.{name}" for name in ("drawing", "density", "gauss_newton_spectra", "slices")}
DRAWERS |= {"newtonopt.curvature.dashboard", "newtonopt.curvature.eigenvalues.extreme"}
DRAWERS |= {
    f"newtonopt.curvature.measurements.{name}"
    for name in ("measurement", "alignment", "density", "gauss_newton", "loss_slice")
}
# Modules that may import tensorboard, and only when event files are read or a record is written.
READERS = {"newtonopt.curvature.event_files", "newtonopt.curvature.records"}
# What may import SciPy, and only when an operator is handed to it.
SCIPY = {"newtonopt.operators.linear_operator"}

PROGRAMS = [path for folder in ("examples", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    room = room_of(module)
    found = []
    for imported in imports_of(source, module, is_package):
        top = imported.split(".")[0]
        if top in ("newtonopt", "newtonopt_tensorboard"):
            target = room_of(imported)
            if module in PURE or (target != room and target not in MAY_IMPORT[room]):
                found.append(f"{module} imports {imported}")
            continue
        allowed = {"torch"} if room == "solvers" or module in PURE else {"torch", "numpy"}
        if room in ("callbacks", "doctor"):
            allowed |= CALLBACKS_ONLY
        if room == "tab":
            allowed = TAB_ONLY
        if module in DRAWERS:
            allowed = {*allowed, "matplotlib"}
        if module in SCIPY:
            allowed = {*allowed, "scipy"}
        if module in READERS:
            allowed = {*allowed, "tensorboard"}
        if top not in allowed and top not in sys.stdlib_module_names:
            found.append(f"{module} imports {imported}")
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    module = module_of(path)
    assert room_of(module) in MAY_IMPORT, f"{name_of(path)} is a new room: say in MAY_IMPORT what it may import"
    assert not violations(path.read_text(), module, path.name == "__init__.py")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("newtonopt.closure.objective", "from newtonopt.operators.matrices import hessian"),
        ("newtonopt.closure.objective", "from ..operators.matrices import hessian"),
        ("newtonopt.closure.objective", "from .. import operators"),
        ("newtonopt.operators.matrices", "import newtonopt.optimizers.newton"),
        ("newtonopt.curvature.density", "from newtonopt.optimizers import HessianFree"),
        ("newtonopt.curvature.density", "from newtonopt import hessian"),
        ("newtonopt.optimizers.newton", "def f():\n    from newtonopt.curvature import trace"),
        ("newtonopt.optimizers.newton", "from ..callbacks import StepMonitor"),
        ("newtonopt.optimizers.newton", "import lightning"),
        ("newtonopt.solvers.cg", "from newtonopt.operators.matrices import LinearOperator"),
        ("newtonopt.solvers.cg", "import numpy as np"),
        ("newtonopt.optimizers.rules", "from newtonopt.solvers import secular"),
        ("newtonopt.curvature.density", "import scipy.linalg"),
        ("newtonopt.callbacks.tensorboard", "import matplotlib"),
        ("newtonopt.curvature.histories", "import tensorboard"),
        ("newtonopt.callbacks.tensorboard", "from newtonopt.solvers.cg import conjugate_gradients"),
        ("newtonopt.callbacks.tensorboard", "from newtonopt_tensorboard.records import VERSION"),
        ("newtonopt.callbacks.tensorboard", "from newtonopt.doctor import report"),
        ("newtonopt.doctor.facts", "import newtonopt_tensorboard"),
        ("newtonopt_tensorboard.plugin", "import newtonopt"),
        ("newtonopt_tensorboard.plugin", "def f():\n    from newtonopt.checks import shown"),
        ("newtonopt_tensorboard.plugin", "import torch"),
        ("newtonopt_tensorboard.plugin", "import numpy as np"),
    ],
)
def test_import_against_the_direction_is_seen(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of modules that import one another, the first one again at its end; empty if there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for imported in sorted(graph[module]):
            if found := walk(imported, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


def graph_of_modules() -> dict[str, set[str]]:
    """Return the modules of ours that each file imports; packages' own files only pass on names defined elsewhere."""
    files = {module_of(path): path for path in FILES if path.name != "__init__.py"}
    return {
        module: {imported for imported in imports_of(path.read_text(), module, False) if imported in files}
        for module, path in files.items()
    }


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert circle(graph_of_modules()) == []


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_module_is_hidden_by_a_function_of_its_name() -> None:
    for package in sorted({m.rpartition(".")[0] for m in MODULES if "." in m}):
        names = vars(importlib.import_module(package))
        for module in MODULES:
            parent, _, name = module.rpartition(".")
            if parent == package and name in names:
                assert inspect.ismodule(names[name]), f"{module} is hidden by {names[name]!r}"


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=name_of)
def test_a_package_opens_with_a_map_that_names_its_files(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    inside = [other.stem for other in path.parent.glob("*.py") if other.name != "__init__.py"]
    inside += [other.parent.name for other in path.parent.glob("*/__init__.py")]
    assert [name for name in inside if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("newtonopt.optimizers.newton", "from newtonopt.optimizers import rules"),
        ("newtonopt.optimizers.newton", "from . import report"),
        ("newtonopt.solvers.cg", "import math, torch\nfrom .solution import Solution"),
        ("newtonopt.callbacks.tensorboard", "from newtonopt import hessian\nfrom lightning.pytorch import Trainer"),
    ],
)
def test_import_along_the_direction_passes(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_package_imports_without_lightning_and_matplotlib() -> None:
    program = (
        "import sys\n"
        "for name in ('lightning', 'pytorch_lightning', 'lightning_utilities', 'tensorboard', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import newtonopt\n"
        "assert newtonopt.optimizers.HessianFree and newtonopt.curvature.extreme_eigenvalues\n"
        "assert 'newtonopt.callbacks' not in sys.modules\n"
        "assert not hasattr(newtonopt, 'callbacks')\n"
        "for statement in ('newtonopt.callbacks', 'from newtonopt.callbacks import StepMonitor'):\n"
        "    try:\n"
        "        exec(statement)\n"
        "    except (AttributeError, ImportError) as error:\n"
        "        assert 'lightning is not installed: pip install lightning tensorboard' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError(statement)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_callbacks_are_an_attribute_that_is_imported_when_asked_for() -> None:
    package = importlib.import_module("newtonopt")
    assert package.__getattr__("callbacks") is importlib.import_module("newtonopt.callbacks")
    with pytest.raises(AttributeError, match="module 'newtonopt' has no attribute 'callback'"):
        _ = package.callback


def documented(thing: Any) -> dict[str, str]:
    """The entries of the Args section, and for a data class of Attributes, as `{name: text}`."""
    sections = ("Args", "Attributes") if dataclasses.is_dataclass(thing) else ("Args",)
    entries: dict[str, list[str]] = {}
    section = ""
    for line in inspect.cleandoc(thing.__doc__ or "").splitlines():
        if line and not line.startswith(" "):
            section = line[:-1] if re.fullmatch(r"\w+:", line) else ""
        elif section in sections:
            start = re.match(r" {4}\*{0,2}(\w+)(?: \([^)]*\))?: (.*)", line)
            if start:
                entries[start[1]] = [start[2]]
            elif line.strip() and entries:
                entries[list(entries)[-1]].append(line.strip())
    return {name: " ".join(lines) for name, lines in entries.items()}


def named_default(text: str) -> str | None:
    """The default that a description names, as written: `Default 3/2`, `Default 1e-16: why`, `"auto" (default)`."""
    match = re.search(r"\bDefault (\S+?)[.,:;]*(?=\s|$)", text) or re.search(r'("[^"]*"|[\w./+-]+) \(default\b', text)
    return match[1] if match else None


def value_of(written: str) -> Any:
    if written in ("None", "True", "False") or written[0] in "\"'":
        return ast.literal_eval(written)
    return {"zero": 0, "one": 1, "inf": math.inf}.get(written) if written.isalpha() else float(Fraction(written))


def disagreements(thing: Callable[..., Any]) -> list[str]:
    """Where docstring and signature part ways."""
    entries = documented(thing)
    parameters = {n: p for n, p in inspect.signature(thing).parameters.items() if n not in ("self", "cls")}
    found = [f"{name} is not documented" for name in parameters if name not in entries]
    fields = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
    known = {*parameters, *(field.name for field in fields)}
    found += [f"{name} is documented and does not exist" for name in entries if name not in known]
    for name, text in entries.items():
        written = named_default(text)
        if written is None:
            if re.search(r"\bdefault(?!ed)", text.replace("source of the default", ""), re.IGNORECASE):
                found.append(f"{name}: the default is not written as 'Default X' or 'X (default)'")
        elif name in parameters and parameters[name].default != value_of(written):
            found.append(f"{name}: the docstring says {written}, the signature {parameters[name].default!r}")
    return found


@pytest.mark.parametrize("qualified", public_names())
def test_docstring_agrees_with_the_signature(qualified: str) -> None:
    module, _, name = qualified.rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    assert (thing.__doc__ or "").strip(), f"{name} has no docstring"
    assert not (dataclasses.is_dataclass(thing) and thing.__doc__.startswith(f"{name}(")), "dataclass wrote its own"
    assert disagreements(thing) == []
    for method_name, method in vars(thing).items() if inspect.isclass(thing) else ():
        if inspect.isfunction(method) and documented(method):
            assert disagreements(method) == [], method_name


def test_docstrings_do_name_defaults() -> None:
    """Guards the parser: were it blind, the comparison above would pass."""
    optimizer = importlib.import_module("newtonopt").HessianFree
    named = {name: named_default(text) for name, text in documented(optimizer).items()}
    assert sum(default is not None for default in named.values()) >= 10
    assert named["damping_factor"] == "3/2"
    assert named["products"] == '"auto"'


@pytest.mark.parametrize(
    ("text", "default", "agrees"),
    [
        ("Scales. Default 1: the whole step.", 1.0, True),
        ("Scales. Default 2: the whole step.", 1.0, False),
        ("Of the rule. Default 3/2 (Martens 2010).", 1.5, True),
        ("Stop. Default 5e-3, see\n            elsewhere.", 5e-3, True),
        ("Stop. Default 5e-4, see elsewhere.", 5e-3, False),
        ("Radius. Default 0.05.", 0.05, True),
        ('How, "auto" (default) or "cached".', "auto", True),
        ('How, "cached" or\n            "auto" (default; as in the paper).', "cached", False),
        ("Which; None (default): none.", None, True),
        ("Which; None (default): none.", 3, False),
        ("Which, by default three.", 3, False),
        ("Which. Default 3.", inspect.Parameter.empty, False),
    ],
)
def test_comparison_of_defaults(text: str, default: object, agrees: bool) -> None:
    def function(argument: object) -> None: ...

    function.__doc__ = f"Do it.\n\n        Args:\n            argument: {text}\n\n        Returns:\n            It."
    parameter = inspect.Parameter("argument", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
    function.__signature__ = inspect.Signature([parameter])  # type: ignore[attr-defined]
    assert (disagreements(function) == []) is agrees
    function.__signature__ = inspect.Signature([parameter.replace(name="other")])  # type: ignore[attr-defined]
    assert "other is not documented" in disagreements(function)
    assert "argument is documented and does not exist" in disagreements(function)


def refusals(source: str) -> Iterator[str]:
    """Messages of the TypeErrors and ValueErrors that a source raises, with `{}` for each value that is shown."""
    for node in ast.walk(ast.parse(source)):
        call = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("TypeError", "ValueError") and call.args:
            parts = call.args[0].values if isinstance(call.args[0], ast.JoinedStr) else call.args[:1]
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)


def is_in_the_dialect(message: str) -> bool:
    """Whether it is `{name} must be {range}, got {value}.`, then perhaps a sentence that says what to write."""
    if message.startswith("This state "):  # of a checkpoint, and no argument
        return message.endswith(".")
    ends, remedy_inside = re.search(r"\.( ?\{\})*$", message), re.search(r"[:;] (choose|give|take|write)\b", message)
    return bool(ends and not remedy_inside and re.search(r"(?s) (must|takes no) .*\bgot ", message))


@pytest.mark.parametrize("path", [*FILES, *PROGRAMS], ids=name_of)
def test_errors_about_arguments_speak_one_dialect(path: Path) -> None:
    assert [message for message in refusals(path.read_text()) if not is_in_the_dialect(message)] == []


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        ('f"step must be a name, got {step!r}."', True),
        ('f"step must be a name, got {step!r}. Write one."', True),
        ('f"step must be a name, got {step!r}.{remedy}"', True),
        ('f"step must be a name, got {step!r}"', False),
        ('f"step must be a name, got {step!r}: give one."', False),
        ('f"step is {step!r}: give a name."', False),
        ('f"step is a {type(step).__name__}: give a name."', False),
        ('"step has no name."', False),
    ],
)
def test_another_dialect_is_heard(error: str, passes: bool) -> None:
    (message,) = refusals(f"def f(step, remedy):\n    raise ValueError({error})")
    assert is_in_the_dialect(message) is passes


def dataclasses_of_the_package() -> list[type]:
    """Return every dataclass that a module of the package defines."""
    modules = [importlib.import_module(name) for name in sorted(MODULES - {"newtonopt.__main__"})]
    return [
        thing
        for module in modules
        for thing in vars(module).values()
        if isinstance(thing, type) and dataclasses.is_dataclass(thing) and thing.__module__ == module.__name__
    ]


def holding_arrays(classes: list[type]) -> list[type]:
    """Return the dataclasses with a tensor or an array in a field, or with another such dataclass in one."""
    kinds = {"Tensor", "ndarray"}
    while True:
        held = re.compile(rf"\b({'|'.join(sorted(kinds))})\b")
        found = [
            cls
            for cls in classes
            if any(held.search(str(f.type)) for f in dataclasses.fields(cls) if not str(f.type).startswith("Callable"))
        ]
        if kinds >= {cls.__name__ for cls in found}:
            return found
        kinds |= {cls.__name__ for cls in found}


def comparing_arrays(classes: list[type]) -> list[type]:
    """Return the dataclasses that compare their fields, tensors or arrays among them, or inherit such a comparison."""
    return [cls for cls in holding_arrays(classes) if cls.__eq__ is not object.__eq__]


def test_a_dataclass_with_tensors_is_compared_by_identity() -> None:
    """`==` between fields that are tensors has no truth value, and whether it is asked for one depends on the Python:
    up to 3.12 a dataclass takes a field to be equal where both sides hold the same object, from 3.13 on it does not.
    """
    classes = dataclasses_of_the_package()
    assert len(holding_arrays(classes)) > 40
    assert comparing_arrays(classes) == []


def test_a_comparison_of_tensors_is_seen() -> None:
    @dataclasses.dataclass(frozen=True)
    class Base:
        count: int

    @dataclasses.dataclass(frozen=True)
    class Compares(Base):
        values: tuple[Tensor, ...]

    @dataclasses.dataclass(frozen=True, eq=False)
    class Inherits(Base):
        values: Tensor | None

    @dataclasses.dataclass(frozen=True, eq=False)
    class Identity:
        values: Tensor

    @dataclasses.dataclass(frozen=True)
    class Nested:
        held: Identity

    @dataclasses.dataclass(frozen=True)
    class Calls:
        scale: Callable[[Tensor], Tensor]

    classes = [Nested, Base, Compares, Inherits, Identity, Calls]
    assert comparing_arrays(classes) == [Nested, Compares, Inherits]


def place_of(path: Path) -> Path:
    """Where a file stands in the installed package, without that package's own folder."""
    package = ROOT / "newtonopt"
    return path.relative_to(package if path.is_relative_to(package) else ROOT)


def test_tests_mirror_the_tree_name_for_name() -> None:
    # A package's own file gives names that are defined, and tested, elsewhere.
    modules = {place_of(path) for path in FILES if path.name != "__init__.py"}
    written = {
        path.relative_to(ROOT / "tests").with_name(path.name.removeprefix("test_"))
        for path in (ROOT / "tests").rglob("test_*.py")
        if path.relative_to(ROOT / "tests").parts[0] != "system"
    }
    assert sorted(str(path) for path in modules - written) == [], "modules without a test file of their name"
    assert sorted(str(path) for path in written - modules) == [], "test files without a module of their name"
