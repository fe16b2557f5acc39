"""Versions, against the bounds in the metadata of the installed package, and devices."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re

import torch

from newtonopt.doctor.examination import Unavailable, Wrong
from newtonopt.vectors.memory import available_memory

# Versions.


def python() -> str:
    """Compare the running Python with the versions allowed."""
    bounds = _metadata().metadata["Requires-Python"]
    version = platform.python_version()
    if not within(version, bounds):
        raise Wrong(f"{version}, needs {bounds}", f"Make an environment with Python {bounds}.")
    return f"{version} (needs {bounds})"


def package(name: str) -> str:
    """Compare an installed package with the versions allowed.

    Args:
        name: Name of the package, one that newtonopt or an extra requires.
    """
    requirement, bounds = _requirement(name)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable("not installed", f"pip install '{requirement}'") from None
    # The metadata may say one version and the module another, where an installation was interrupted.
    if name == "torch":
        version = torch.__version__
    if not within(version, bounds):
        raise Wrong(f"{version}, needs {bounds}", f"pip install --upgrade '{requirement}'")
    return f"{version} (needs {bounds})"


def _metadata() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("newtonopt")
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable("newtonopt is not installed, so its bounds are unknown", "pip install -e .") from None


def _requirement(name: str) -> tuple[str, str]:
    """Return a requirement as pip takes it, and its bounds alone."""
    for line in _metadata().requires or ():
        requirement = line.split(";")[0].strip()
        match = re.fullmatch(r"([\w.-]+)(\[[\w,.-]+\])?\s*(.*)", requirement)
        if match and match[1].lower() == name:
            return requirement, match[3]
    raise LookupError(f"The metadata of newtonopt requires no {name}.")


_ORDER = re.compile(r"(>=|<=|==|!=|<|>)\s*([\d.]+)")


def within(version: str, bounds: str) -> bool:
    """Return whether a version is within bounds such as ">=3.10,<3.14". Only the numbers of a release count."""
    release = _numbers(version)
    for operator, bound in _ORDER.findall(bounds):
        # ">=2.8" allows 2.8 and 2.8.0 alike.
        width = max(len(release), len(_numbers(bound)))
        ours, theirs = ((*_numbers(text), *(0,) * width)[:width] for text in (version, bound))
        holds = {
            ">=": ours >= theirs,
            "<=": ours <= theirs,
            "==": ours == theirs,
            "!=": ours != theirs,
            "<": ours < theirs,
            ">": ours > theirs,
        }
        if not holds[operator]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


# Devices.


def cpu() -> str:
    """Say which processor there is, and how many threads torch uses."""
    free = available_memory(torch.device("cpu"))
    memory = "" if free is None else f", {free / 2**30:.3g} GiB of memory free"
    kind = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return f"{kind}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()}{memory}"


def cuda() -> str:
    """Say which CUDA devices there are."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            raise Unavailable(
                f"torch {torch.__version__} is built without CUDA",
                "If this machine has a GPU, install the torch for it: pytorch.org/get-started.",
            )
        raise Unavailable("torch finds no device", "If this machine has one, see what nvidia-smi says.")
    return "; ".join(_described(number) for number in range(torch.cuda.device_count()))


def _described(number: int) -> str:
    free, total = torch.cuda.mem_get_info(number)
    # Ampere, of 2020, was the first generation with bfloat16; all of AMD's that torch supports have it.
    has = torch.version.hip is not None or torch.cuda.get_device_properties(number).major >= 8
    bfloat16 = "bfloat16" if has else "no bfloat16"
    name = torch.cuda.get_device_name(number)
    return f"cuda:{number} {name}, {free / 2**30:.3g} of {total / 2**30:.3g} GiB free, {bfloat16}"


def mps() -> str:
    """Say whether there is an Apple GPU."""
    if not torch.backends.mps.is_available():
        built = torch.backends.mps.is_built()
        raise Unavailable("torch finds no device" if built else "torch is built without MPS, which only Macs have")
    return "available; float32 only"
