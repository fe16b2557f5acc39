"""The list of checks, and their findings as a table in plain text or as JSON."""

from __future__ import annotations

import json
import platform
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial

import newtonopt
from newtonopt import HessianFree, LevenbergMarquardt
from newtonopt.doctor import facts, trials
from newtonopt.doctor.examination import Check, Finding, Status, examine

LIMIT = 60.0
"""Seconds for one check: four times what compiling takes on one core that is free."""

PACKAGES = ("torch", "numpy", "lightning", "tensorboard", "matplotlib", "jsonargparse")
"""Packages that newtonopt, or an extra for users, requires."""

_VERSIONS, _DEVICES, _CORE, _SETUPS, _LIGHTNING = SECTIONS = (
    "Versions",
    "Devices",
    "Core",
    "Set-ups",
    "Lightning and TensorBoard",
)

# Each list runs in a process of its own, one check after another; the longest is first.
CHECKS: tuple[tuple[Check, ...], ...] = (
    (Check(_SETUPS, "torch.compile", trials.compiled),),
    (
        Check(_VERSIONS, "Python", facts.python),
        *(Check(_VERSIONS, name, partial(facts.package, name)) for name in PACKAGES),
        Check(_DEVICES, "CPU", facts.cpu),
        Check(_DEVICES, "CUDA", facts.cuda),
        Check(_DEVICES, "MPS", facts.mps),
        Check(_CORE, "HessianFree", partial(trials.steps, HessianFree)),
        Check(_CORE, "LevenbergMarquardt", partial(trials.steps, LevenbergMarquardt)),
        Check(_CORE, "eigenvalues", trials.eigenvalue),
        Check(_SETUPS, "steps on CUDA", partial(trials.device_steps, "cuda")),
        Check(_SETUPS, "steps on MPS", partial(trials.device_steps, "mps")),
        Check(_SETUPS, "attention", trials.attention),
        Check(_SETUPS, "LSTM", trials.recurrent),
        Check(_SETUPS, "bfloat16 autocast", trials.autocast),
    ),
    (
        Check(_SETUPS, "DDP", trials.data_parallel),
        Check(_SETUPS, "FSDP2", trials.sharded),
    ),
    (
        Check(_LIGHTNING, "CurvatureMonitor", trials.monitor),
        Check(_LIGHTNING, "Curvature tab", trials.tab),
    ),
)


def visit(lanes: Sequence[Sequence[Check]], sections: Sequence[str], limit: float, as_json: bool) -> int:
    """Run checks and print what comes of them; return 1 if one fails, else 0.

    Args:
        lanes: The checks, as for `examine`.
        sections: Headings, in the order in which they are printed.
        limit: Seconds for one check.
        as_json: Whether to print JSON instead of a table.
    """
    began = time.perf_counter()
    findings: dict[Check, Finding] = {}
    waiting = [check for section in sections for lane in lanes for check in lane if check.section == section]
    last = ""
    if not as_json:
        print(heading())
    for one, finding in examine(lanes, limit):
        findings[one] = finding
        # Lines come in their order, each as soon as those before it are known.
        while not as_json and waiting and waiting[0] in findings:
            check = waiting.pop(0)
            if check.section != last:
                print(f"\n{check.section}")
                last = check.section
            print(line(check, findings[check]), flush=True)
    seconds = time.perf_counter() - began
    print(document(findings, seconds) if as_json else f"\n{summary(list(findings.values()), seconds)}")
    return int(any(finding.status is Status.FAILS for finding in findings.values()))


def heading() -> str:
    """Return the versions and the machine, in one line."""
    machine = f"{platform.system()} {platform.machine()}"
    return f"newtonopt {newtonopt.__version__}, Python {platform.python_version()}, {machine}"


_STATUS, _NAME, _WIDTH = 15, 20, 100


def line(check: Check, finding: Finding) -> str:
    """Return the line of a check: how it ended, its name, and the details with the remedy, which may be folded."""
    start = f"  {finding.status.value:{_STATUS}}{check.name:{_NAME}}"
    remedy = f". {finding.remedy}" if finding.remedy else ""
    words = f"{finding.detail.removesuffix('.') if remedy else finding.detail}{remedy}"
    return textwrap.fill(words, _WIDTH, initial_indent=start, subsequent_indent=" " * len(start))


def summary(findings: Sequence[Finding], seconds: float) -> str:
    """Return how many checks ended in which way."""
    counts = [sum(finding.status is status for finding in findings) for status in Status]
    parts = [f"{count} {status.value}" for count, status in zip(counts, Status, strict=True)]
    return f"{', '.join(parts)}; {seconds:.0f} s."


def document(findings: Mapping[Check, Finding], seconds: float) -> str:
    """Return the findings as JSON, in the order in which they came."""
    checks = [
        {"section": check.section, "name": check.name, **asdict(finding), "status": finding.status.value}
        for check, finding in findings.items()
    ]
    return json.dumps(
        {"newtonopt": newtonopt.__version__, "machine": platform.platform(), "seconds": seconds, "checks": checks},
        indent=2,
    )
