"""The command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import newtonopt
from newtonopt import __main__ as command
from newtonopt.doctor.report import CHECKS, LIMIT


def test_without_a_command_it_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: python -m newtonopt ")
    assert "doctor" in printed


def test_the_version() -> None:
    done = subprocess.run([sys.executable, "-m", "newtonopt", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"newtonopt {newtonopt.__version__}\n"


@pytest.mark.parametrize("given", ["0", "-1", "inf", "nan", "soon"])
def test_a_limit_out_of_range_is_an_error(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["doctor", f"--limit={given}"])
    assert "argument --limit: " in capsys.readouterr().err


def test_options_reach_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(command, "visit", lambda *args, **options: seen.append((*args, options)) or 7)
    assert command.main(["doctor"]) == 7
    assert command.main(["doctor", "--json", "--limit", "2.5"]) == 7
    assert [call[-1] for call in seen] == [{"limit": LIMIT, "as_json": False}, {"limit": 2.5, "as_json": True}]


@pytest.mark.slow
def test_the_doctor_finds_nothing_wrong_here() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "newtonopt", "doctor", "--json", "--limit=300"], capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert len(found["checks"]) == sum(len(lane) for lane in CHECKS)
    assert [check for check in found["checks"] if check["status"] == "fails"] == []
    assert {check["status"] for check in found["checks"] if check["section"] == "Core"} == {"ok"}
    assert done.returncode == 0
    assert done.stderr == ""
