"""Versions are compared with the metadata's bounds, and each way in which one is missing or wrong is said."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from functools import partial

import pytest
import torch

from newtonopt.doctor import facts
from newtonopt.doctor.examination import Status, tried
from newtonopt.doctor.report import PACKAGES


@pytest.mark.parametrize(
    ("version", "bounds", "inside"),
    [
        ("3.10", ">=3.10,<3.14", True),
        ("3.10.0rc1", ">=3.10,<3.14", True),
        ("3.9.18", ">=3.10,<3.14", False),
        ("3.14.0", ">=3.10,<3.14", False),
        ("2.13.0+cpu", ">=2.8", True),
        ("2.8", ">=2.8.0", True),
        ("2.7.1", ">=2.8", False),
        ("10.0", ">=9.1", True),
        ("1.0", "==1.0.0", True),
        ("1.0", "!=1.0", False),
        ("1.0", ">1.0", False),
        ("1.1", "<=1.0", False),
        ("1.0", "", True),
        ("unknown", ">=1", False),
    ],
)
def test_versions_are_compared(version: str, bounds: str, inside: bool) -> None:
    assert facts.within(version, bounds) is inside


def test_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(facts.python).status is Status.OK
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.1")
    found = tried(facts.python)
    assert found.status is Status.FAILS
    assert found.detail.startswith("3.9.1, needs ")


@pytest.mark.parametrize("name", PACKAGES)
def test_packages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = partial(facts.package, name)
    found = tried(attempt)
    assert found.status is Status.OK, found
    assert re.fullmatch(r"\d\S+ \(needs >=\d\S*\)", found.detail)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1")
    monkeypatch.setattr(torch, "__version__", "0.1")
    found = tried(attempt)
    assert found.status is Status.FAILS
    assert re.fullmatch(r"0\.1, needs >=\S+", found.detail)
    assert re.fullmatch(rf"pip install --upgrade '{name}(\[signatures\])?>=\S+'", found.remedy)

    def raises(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", raises)
    found = tried(attempt)
    assert (found.status, found.detail) == (Status.UNAVAILABLE, "not installed")
    assert found.remedy.startswith(f"pip install '{name}")
    monkeypatch.setattr(importlib.metadata, "distribution", raises)
    found = tried(attempt)
    assert (found.status, found.remedy) == (Status.UNAVAILABLE, "pip install -e .")


def test_a_package_that_nothing_requires_is_an_error() -> None:
    found = tried(partial(facts.package, "nonesuch"))
    assert (found.status, found.detail) == (
        Status.FAILS,
        "LookupError: The metadata of newtonopt requires no nonesuch.",
    )


def test_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(facts, "available_memory", lambda device: 3 * 2**30)
    found = tried(facts.cpu)
    assert found.status is Status.OK
    assert found.detail.endswith("torch uses 7, 3 GiB of memory free")
    monkeypatch.setattr(facts, "available_memory", lambda device: None)
    assert tried(facts.cpu).detail.endswith("torch uses 7")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 / 0)
    assert tried(facts.cpu).detail == "ZeroDivisionError: division by zero"


def test_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "is built without CUDA" in tried(facts.cuda).detail
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = tried(facts.cuda)
    assert (found.status, found.detail) == (Status.UNAVAILABLE, "torch finds no device")
    assert "nvidia-smi" in found.remedy


def test_cuda_devices_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (2**30, (number + 2) * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"Card {number}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: type("P", (), {"major": 7 + 2 * number}))
    assert tried(facts.cuda).detail == (
        "cuda:0 Card 0, 1 of 2 GiB free, no bfloat16; cuda:1 Card 1, 1 of 3 GiB free, bfloat16"
    )

    def broken(number: int) -> tuple[int, int]:
        raise RuntimeError("CUDA driver error")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    found = tried(facts.cuda)
    assert (found.status, found.detail) == (Status.FAILS, "RuntimeError: CUDA driver error")


def test_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    assert "only Macs have" in tried(facts.mps).detail
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    assert tried(facts.mps).status is Status.UNAVAILABLE
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert tried(facts.mps).status is Status.OK
