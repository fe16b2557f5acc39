"""How much memory there is, before a matrix is made that might not fit."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def check_room(entries: int, dtype: torch.dtype, device: torch.device, what: str, remedy: str) -> None:
    """Refuse what would not fit in the memory that is available now.

    Args:
        entries: Numbers that must be held at the same time.
        dtype: Theirs.
        device: Where.
        what: It is, for the message.
        remedy: What to do instead, for the message.

    Raises:
        MemoryError: It would not fit; nothing was allocated.
    """
    needed, available = entries * dtype.itemsize, available_memory(device)
    if available is not None and needed > available:
        raise MemoryError(
            f"{what} would take {needed:,} bytes ({needed / 2**30:.3g} GiB), and {available:,} "
            f"({available / 2**30:.3g} GiB) are available on {device}. {remedy}"
        )


def fits(entries: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether that many numbers fit in the memory that is available now, as far as that can be told."""
    available = available_memory(device)
    return available is None or entries * dtype.itemsize <= available


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None if that cannot be told."""
    if device.type == "cuda":
        # What torch keeps for reuse counts as used for the driver.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return None
    known = [bytes_ for bytes_ in (_of_the_machine(), _of_the_container()) if bytes_ is not None]
    return min(known, default=None)


def _of_the_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        # All there is, where what is free cannot be told.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _of_the_container() -> int | None:
    """What a control group leaves, whose limit the machine's figures do not show: version 2, else 1."""
    for limit, usage, cache in _CONTROL_GROUPS:
        try:
            allowed, used = int(Path(limit).read_text()), int(Path(usage).read_text())
            counts = dict(line.split() for line in Path(usage).with_name("memory.stat").read_text().splitlines())
            return max(0, allowed - used + int(counts.get(cache, 0)))
        except (OSError, ValueError):  # there is none, or its limit is "max"
            continue
    return None


_ROOT = "/sys/fs/cgroup/"
# Limit, usage, and the part of the usage that is cache of files, which the kernel lets go first.
_CONTROL_GROUPS = (
    (f"{_ROOT}memory.max", f"{_ROOT}memory.current", "inactive_file"),
    (f"{_ROOT}memory/memory.limit_in_bytes", f"{_ROOT}memory/memory.usage_in_bytes", "total_inactive_file"),
)
