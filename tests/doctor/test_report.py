"""The table and the JSON of findings, and the exit status."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ailing
import pytest

import newtonopt
from newtonopt.doctor import report
from newtonopt.doctor.examination import Check, Finding, Status

ROOT = Path(__file__).parents[2]
GOOD = ((Check("A", "first", ailing.fine), Check("B", "second", ailing.missing)),)
BAD = (*GOOD, (Check("A", "third", ailing.wrong),))


def test_the_table_names_each_check_in_its_section(capfd: pytest.CaptureFixture[str]) -> None:
    assert report.visit(BAD, ("A", "B"), 60.0, as_json=False) == 1
    printed = capfd.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0].startswith(f"newtonopt {newtonopt.__version__}, Python 3.")
    assert lines[1:-1] == [
        "",
        "A",
        "  ok             first               works",
        "  fails          third               two and two are five. Count again.",
        "",
        "B",
        "  not available  second              no such device. Buy one.",
        "",
    ]
    assert re.fullmatch(r"1 ok, 1 not available, 1 fails; \d+ s\.", lines[-1])


def test_json_holds_everything(capfd: pytest.CaptureFixture[str]) -> None:
    assert report.visit(BAD, ("A", "B"), 60.0, as_json=True) == 1
    found = json.loads(capfd.readouterr().out)
    assert found["newtonopt"] == newtonopt.__version__
    checks = {check["name"]: check for check in found["checks"]}
    assert set(checks) == {"first", "second", "third"}
    assert set(checks["first"]) == {"section", "name", "status", "detail", "remedy", "seconds", "log"}
    assert (checks["first"]["section"], checks["first"]["status"]) == ("A", "ok")
    assert checks["third"]["remedy"] == "Count again."
    assert "Traceback" in checks["third"]["log"]


def test_the_exit_status_is_zero_where_nothing_fails(capfd: pytest.CaptureFixture[str]) -> None:
    assert report.visit(GOOD, ("A", "B"), 60.0, as_json=False) == 0


def test_long_lines_are_folded_under_their_beginning() -> None:
    check = Check("A", "first", ailing.fine)
    lines = report.line(check, Finding(Status.FAILS, "word " * 40 + "end.", "Do it.")).splitlines()
    assert len(lines) > 1
    assert all(len(line) <= 100 for line in lines)
    assert all(line.startswith(" " * 37 + "word") for line in lines[1:])
    assert lines[-1].endswith("end. Do it.")


def test_each_check_has_a_name_and_a_section_of_the_table() -> None:
    checks = [check for lane in report.CHECKS for check in lane]
    assert len({check.name for check in checks}) == len(checks)
    assert {check.section for check in checks} == set(report.SECTIONS)


def test_the_packages_are_those_that_users_install() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    lines = [text.split("\ndependencies = ")[1].splitlines()[0]]
    lines += [re.search(rf"^{extra} = (.*)$", text, re.MULTILINE)[1] for extra in ("lightning", "plots", "cli")]  # type: ignore[index]
    assert set(re.findall(r'"([\w-]+)(?:\[\w+\])?>=', " ".join(lines))) == set(report.PACKAGES)


def test_the_page_names_every_check() -> None:
    text = (ROOT / "docs" / "doctor.md").read_text()
    assert [check.name for lane in report.CHECKS for check in lane if f" {check.name}  " not in text] == []
