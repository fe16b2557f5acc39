"""Checks, run in processes of their own, so that one that hangs or crashes costs a line and not the whole report."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

# Lanes that run at the same time. Two cores are what a small machine has.
_AT_ONCE = 2
# Characters of a worker's output that a finding keeps.
_KEPT = 4000
# Seconds in which a process must start and import torch, however busy the machine is.
_START = 120.0
# Seconds in which a process that has answered may end by itself.
_GRACE = 2.0
# How often a waiting thread looks whether the examination was given up, in seconds.
_LOOK = 0.1


class Status(Enum):
    """How a check ends."""

    OK = "ok"
    UNAVAILABLE = "not available"
    FAILS = "fails"


class Unavailable(Exception):
    """Raised by a check where a package or a device is missing, or torch alone cannot do what is tried.

    Args:
        reason: Words that say what is missing.
        remedy: Words that say what to do about it; empty (default) if there is nothing to do.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.remedy = remedy


class Wrong(Exception):
    """Raised by a check where something that ought to work does not.

    Args:
        reason: Words that say what is wrong.
        remedy: Words that say what to do about it. Default: report it.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.remedy = remedy or REPORT


REPORT = "Please report it with the output of: python -m newtonopt doctor --json"


@dataclass(frozen=True)
class Check:
    """Something to try.

    Attributes:
        section: Heading under which its line stands.
        name: What is tried, in a few words.
        attempt: A function at the top level of a module, or a `functools.partial` of one, which returns what it found
            in words. It raises `Unavailable`, or any other error if what it tries fails.
    """

    section: str
    name: str
    attempt: Callable[[], str]


@dataclass(frozen=True)
class Finding:
    """The outcome of a check.

    Attributes:
        status: How it ended.
        detail: What was found, or the reason, in words.
        remedy: What to do about it; empty: nothing.
        seconds: Wall time that it took.
        log: End of what the process wrote, with the traceback; empty unless the check failed.
    """

    status: Status
    detail: str
    remedy: str = ""
    seconds: float = 0.0
    log: str = ""


def examine(lanes: Sequence[Sequence[Check]], limit: float) -> Iterator[tuple[Check, Finding]]:
    """Run checks and yield each with its finding, as they end.

    Args:
        lanes: Lists of checks. The checks of a list run one after another in one process, two lists at a time.
        limit: Seconds of wall time that a check may take.
    """
    waiting: queue.SimpleQueue[Sequence[Check]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Check, Finding]] = queue.SimpleQueue()
    given_up = threading.Event()
    for lane in lanes:
        waiting.put(lane)

    def work() -> None:
        while not given_up.is_set():
            try:
                lane = waiting.get_nowait()
            except queue.Empty:
                return
            for check, finding in _in_order(lane, limit, given_up):
                done.put((check, finding))

    threads = [threading.Thread(target=work) for _ in range(_AT_ONCE)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(sum(len(lane) for lane in lanes)):
            yield done.get()
    finally:
        # Also after Ctrl-C, which the workers, in sessions of their own, do not see.
        given_up.set()
        for thread in threads:
            thread.join()


def _in_order(lane: Sequence[Check], limit: float, given_up: threading.Event) -> Iterator[tuple[Check, Finding]]:
    """Run the checks of a lane in one process, and in a new one after a check that ended the process."""
    left = list(lane)
    while left and not given_up.is_set():
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "log")
            here, there = _CONTEXT.Pipe()
            worker = _CONTEXT.Process(target=_serve, args=([check.attempt for check in left], there, str(log), limit))
            worker.start()
            there.close()
            try:
                started, is_alive = _next(here, worker, _START, given_up)
                for check in list(left):
                    began = time.perf_counter()
                    finding, is_alive = _next(here, worker, limit, given_up) if is_alive else (started, False)
                    if given_up.is_set():
                        return
                    left.remove(check)
                    seconds = time.perf_counter() - began
                    kept = _end_of(log) if finding.status is Status.FAILS else ""
                    yield check, replace(finding, seconds=seconds, log=kept)
                    if not is_alive:
                        break
                worker.join(_GRACE)
            finally:
                _stop(worker)
                here.close()


# Only a new interpreter is safe in a process that has started threads, or initialised CUDA.
_CONTEXT = multiprocessing.get_context("spawn")


def _next(here: Connection, worker: Any, limit: float, given_up: threading.Event) -> tuple[Finding, bool]:
    """Wait for the next finding of a worker; return it, and whether the worker can go on."""
    deadline = time.monotonic() + limit
    while not here.poll(_LOOK):
        if given_up.is_set() or time.monotonic() > deadline:
            reason = f"no answer within {limit:g} s"
            return Finding(Status.FAILS, reason, f"On a busy machine give it more time: --limit {2 * limit:g}."), False
    try:
        finding: Finding = here.recv()
    except EOFError:
        worker.join(limit)
        return Finding(Status.FAILS, f"the process ended, {_ending(worker.exitcode)}", REPORT), False
    return finding, True


def _ending(code: int | None) -> str:
    """Return how a process ended, in words: by a signal if its exit status is negative."""
    if code is not None and code < 0:
        return f"by signal {-code} ({signal.strsignal(-code)})"
    return f"with exit status {code}"


def _stop(worker: Any) -> None:
    """End a worker and all processes that it has started, such as compilers."""
    if os.name == "posix":
        try:
            os.killpg(worker.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended, or has no session of its own yet
            worker.kill()
    else:
        worker.kill()
    worker.join()


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-_KEPT:] if log.exists() else ""


# In the worker.


def _serve(attempts: Sequence[Callable[[], str]], end: Connection, log: str, limit: float) -> None:
    """Run each attempt, and send its finding."""
    if os.name == "posix":
        os.setsid()
    with open(log, "w", buffering=1) as written:
        # Libraries in C and child processes write to the descriptors.
        for descriptor in (1, 2):
            os.dup2(written.fileno(), descriptor)
        sys.stdout = sys.stderr = written
        faulthandler.enable(written)
        end.send(Finding(Status.OK, "started"))
        for attempt in attempts:
            # A process that hangs says where, shortly before it is ended.
            faulthandler.dump_traceback_later(0.9 * limit, file=written)
            finding = tried(attempt, written)
            faulthandler.cancel_dump_traceback_later()
            end.send(finding)
        faulthandler.disable()


def tried(attempt: Callable[[], str], log: IO[str] | None = None) -> Finding:
    """Return what comes of one attempt, in this process.

    Args:
        attempt: The attempt, as in `Check`.
        log: Where to write the traceback of an error. Default None: standard error.
    """
    try:
        return Finding(Status.OK, attempt())
    except Unavailable as missing:
        return Finding(Status.UNAVAILABLE, str(missing), missing.remedy)
    except Exception as error:
        traceback.print_exc(file=log)
        if isinstance(error, Wrong):
            return Finding(Status.FAILS, str(error), error.remedy)
        return Finding(Status.FAILS, first_line(error), REPORT)


def first_line(error: BaseException) -> str:
    """Return the class of an error and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
