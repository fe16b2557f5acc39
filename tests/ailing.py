"""Checks for the doctor that end in every way there is, in a file that other processes import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from newtonopt.doctor.examination import Unavailable, Wrong


def fine() -> str:
    print("not on the table")
    return "works"


def missing() -> str:
    raise Unavailable("no such device", "Buy one.")


def wrong() -> str:
    raise Wrong("two and two are five", "Count again.")


def raises() -> str:
    raise KeyError("a name\nand a second line")


def ends() -> str:
    os._exit(3)


def dies() -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return ""


def hangs(note: str) -> str:
    """Start a process that would outlive this one, note its number in a file, and hang."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(note).write_text(str(child.pid))
    time.sleep(600)
    return ""
