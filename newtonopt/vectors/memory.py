"""Available memory, asked before a matrix is allocated that might not fit."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_MACHINE = Path("/proc/meminfo")
# Control group of a container, version 2. A container that is given less memory than the machine has is killed, without
# an error, when it takes more; the machine's figures do not show that limit.
_CONTAINER = Path("/sys/fs/cgroup")


def check_room(entries: int, dtype: torch.dtype, device: torch.device, what: str, remedy: str) -> None:
    """Raise an error if that many numbers would not fit in the memory available now.

    Args:
        entries: Number of entries held at the same time.
        dtype: Their dtype.
        device: Device they would live on.
        what: Name of the object, for the message.
        remedy: Sentence that says what to do instead.

    Raises:
        MemoryError: They would not fit; nothing was allocated.
    """
    needed, available = entries * dtype.itemsize, available_memory(device)
    if available is not None and needed > available:
        raise MemoryError(
            f"{what} would take {needed:,} bytes ({needed / 2**30:.3g} GiB), but only {available:,} "
            f"({available / 2**30:.3g} GiB) are available on {device}. {remedy}"
        )


def fits(entries: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether that many numbers fit in the memory available now; true if that is unknown."""
    available = available_memory(device)
    return available is None or entries * dtype.itemsize <= available


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on a device; None if that is unknown."""
    if device.type == "cuda":
        # The driver counts memory that torch keeps for reuse as used.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return None
    known = [bytes_ for bytes_ in (_left_by_the_machine(), _left_by_the_container()) if bytes_ is not None]
    return min(known, default=None)


def _left_by_the_machine() -> int | None:
    try:
        return 1024 * _entry(_MACHINE, "MemAvailable:")
    except (OSError, StopIteration):
        pass
    try:
        # All memory there is, on systems that do not tell what is free.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _left_by_the_container() -> int | None:
    """Return the bytes below the container's limit; None without a limit."""
    try:
        limit, used = (int((_CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
        # The kernel frees cached files first.
        return max(0, limit - used + _entry(_CONTAINER / "memory.stat", "inactive_file"))
    except (OSError, ValueError, StopIteration):  # no such files, or the limit is "max"
        return None


def _entry(path: Path, name: str) -> int:
    """Return the number after a name in a file of lines `name number`."""
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(name))
