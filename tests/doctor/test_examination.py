"""Every way in which a check may end is one finding, and the checks after it go on."""

from __future__ import annotations

import io
import sys
import threading
import time
from functools import partial
from pathlib import Path

import ailing
import psutil
import pytest

from newtonopt.doctor import examination
from newtonopt.doctor.examination import Check, Finding, Status, examine, first_line, tried

# Long enough for an answer that is there at once, on a machine however busy.
LIMIT = 5.0


def lane(*attempts: object) -> tuple[Check, ...]:
    return tuple(Check("A", str(number), attempt) for number, attempt in enumerate(attempts))  # type: ignore[arg-type]


def test_a_check_is_tried() -> None:
    log = io.StringIO()
    assert tried(ailing.fine, log) == Finding(Status.OK, "works")
    assert tried(ailing.missing, log) == Finding(Status.UNAVAILABLE, "no such device", "Buy one.")
    assert log.getvalue() == ""
    assert tried(ailing.wrong, log) == Finding(Status.FAILS, "two and two are five", "Count again.")
    found = tried(ailing.raises, log)
    assert (found.status, found.remedy) == (Status.FAILS, examination.REPORT)
    assert found.detail == r"KeyError: 'a name\nand a second line'"
    assert log.getvalue().count("Traceback") == 2
    assert first_line(RuntimeError("one\ntwo")) == "RuntimeError: one"
    assert first_line(RuntimeError()) == "RuntimeError"


def test_checks_that_hang_or_crash_end_with_a_sentence_and_the_others_go_on(tmp_path: Path) -> None:
    note = tmp_path / "child"
    first = lane(ailing.fine, partial(ailing.hangs, str(note)), ailing.fine)
    second = lane(ailing.ends, ailing.raises, ailing.missing)
    found = dict(examine([first, second], LIMIT))
    assert len(found) == 6
    fine, hung, after = (found[check] for check in first)
    assert fine.status is after.status is Status.OK
    assert (hung.status, hung.detail) == (Status.FAILS, "no answer within 5 s")
    assert "--limit 10" in hung.remedy
    assert "in hangs" in hung.log, "the log does not say where it hung"
    assert not psutil.pid_exists(int(note.read_text())) or _is_gone(int(note.read_text()))
    ended, raised, missing = (found[check] for check in second)
    assert (ended.status, ended.detail) == (Status.FAILS, "the process ended, with exit status 3")
    assert raised.status is Status.FAILS
    assert "Traceback" in raised.log
    assert (missing.status, missing.log) == (Status.UNAVAILABLE, "")


def _is_gone(number: int) -> bool:
    """Whether a process ends soon, or has ended and only waits for its parent."""
    for _ in range(100):
        if not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(sys.platform == "win32", reason="there are no signals")
def test_a_signal_is_named() -> None:
    ((_, found),) = examine([lane(ailing.dies)], LIMIT)
    assert found.detail == "the process ended, by signal 11 (Segmentation fault)"
    assert "in dies" in found.log


def test_an_examination_that_is_given_up_leaves_no_process(tmp_path: Path) -> None:
    before = threading.active_count()
    running = examine([lane(ailing.fine, partial(ailing.hangs, str(tmp_path / "child")))], 600.0)
    assert next(running)[1].status is Status.OK
    running.close()
    assert threading.active_count() == before
    assert [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())] == []
