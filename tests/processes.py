"""Run functions in several processes of one gloo group, which stay alive for the next test."""

from __future__ import annotations

import atexit
import importlib.util
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_SECONDS = 60
_teams: dict[int, _Team] = {}


def run(function: Callable[..., Any], *args: Any, count: int = 2) -> list[Any]:
    """Return the results of `function(rank, *args)` in `count` processes, by rank.

    The function stands at the top level of its file; arguments and results are pickled. An exception in a process
    fails the test with its traceback, and so does a process that waits for the others in vain.
    """
    if count not in _teams:
        _teams[count] = _Team(count)
    try:
        return _teams[count].run(function, args)
    except BaseException:
        # A process that still waits in a collective call would join the next test's call.
        _teams.pop(count).stop()
        raise


class _Team:
    def __init__(self, count: int) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        meeting = f"file://{self._folder.name}/meeting"
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, meeting, there), daemon=True)
            process.start()
            there.close()
            self._ends.append(here)
            self._processes.append(process)
        atexit.register(self.stop)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        file = sys.modules[function.__module__].__file__
        for end in self._ends:
            end.send((function.__module__, file, function.__qualname__, pickle.dumps(args)))
        results: list[Any] = [None] * len(self._ends)
        waiting = set(range(len(self._ends)))
        failures = {}
        deadline = time.monotonic() + _SECONDS
        while waiting and time.monotonic() < deadline:
            for rank in sorted(waiting):
                try:
                    answered = self._ends[rank].poll(0.01)
                    results[rank], failure = self._ends[rank].recv() if answered else (None, None)
                except EOFError:
                    answered, failure = True, "ended without an answer"
                if failure:
                    failures[rank] = failure
                    # Time for the others to report their errors; they may also wait for ever.
                    deadline = min(deadline, time.monotonic() + 3)
                if answered:
                    waiting.discard(rank)
        if failures or waiting:
            told = [f"process {rank}: {failure}" for rank, failure in sorted(failures.items())]
            pytest.fail("\n".join([*told, *(f"process {rank} still waits" for rank in sorted(waiting))]), pytrace=False)
        return results

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for end in self._ends:
            end.close()
        self._folder.cleanup()
        atexit.unregister(self.stop)


def _serve(rank: int, count: int, meeting: str, end: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", meeting, timedelta(seconds=_SECONDS), count, rank)
    while True:
        try:
            module, file, name, packed = end.recv()
        except EOFError:
            return
        try:
            function = getattr(_imported(module, file), name)
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", message=".*(LeafSpec|many workers|`torch.jit)")
                result, failure = function(rank, *pickle.loads(packed)), None
        except BaseException:
            result, failure = None, traceback.format_exc()
        end.send((result, failure))


def _imported(name: str, file: str) -> Any:
    # Import the file under the name that pytest gave it, so that its functions can be unpickled.
    if name not in sys.modules:
        sys.path.insert(0, str(Path(__file__).parent))
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
