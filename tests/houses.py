"""The source files of the package, and which of our modules each of them imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "newtonopt").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")])


def module_of(path: Path) -> str:
    """Return the dotted name under which a file installs."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[:2] == ["callbacks", "tab"]:
        parts = ["newtonopt_tensorboard", *parts[2:]]
    elif parts[0] == "callbacks":
        parts = ["newtonopt", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def room_of(module: str) -> str:
    """Return the package of a module: `"solvers"` for `newtonopt.solvers.cg`, `"newtonopt"` for the top, `"tab"` for
    the package that TensorBoard loads.
    """
    if module.split(".")[0] == "newtonopt_tensorboard":
        return "tab"
    return module.split(".")[1] if "." in module else module


def imports_of(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Yield the dotted names of all modules that a source imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                kept = parents[: len(parents) - node.level + is_package]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base


@cache
def rooms_imported() -> dict[str, set[str]]:
    """Return for each package the other packages that its files import."""
    found: dict[str, set[str]] = {room_of(module): set() for module in MODULES}
    for path in FILES:
        module = module_of(path)
        for imported in imports_of(path.read_text(), module, path.name == "__init__.py"):
            if imported.split(".")[0] == "newtonopt":
                found[room_of(module)].add(room_of(imported))
    return {room: imported - {room} for room, imported in found.items()}


PUBLIC = ["newtonopt", "newtonopt.optimizers", "newtonopt.curvature", "newtonopt.callbacks"]


def public_names() -> list[str]:
    """Every name in an `__all__`, read from the source so that collecting the tests needs no Lightning."""
    found = []
    for module in PUBLIC:
        path = ROOT / "callbacks" if module.endswith("callbacks") else ROOT.joinpath(*module.split("."))
        for node in ast.parse((path / "__init__.py").read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                found += [f"{module}.{name}" for name in ast.literal_eval(node.value)]
    return found
