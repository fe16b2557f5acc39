"""The command line: `python -m newtonopt doctor` says what works here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from newtonopt import __version__
from newtonopt.doctor.report import CHECKS, LIMIT, SECTIONS, visit

_DOCTOR = "try what newtonopt needs on this machine, in about 15 seconds, and say what works"
_STATUS = """\
Each check ends as "ok"; as "not available" where a package or a device is missing, or torch alone cannot do it; or as
"fails". The exit status is 1 if a check fails, and 0 otherwise."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    Args:
        arguments: Arguments of the command line. Default None: those of this process.
    """
    parser = argparse.ArgumentParser(
        "python -m newtonopt", description="Second-order optimizers for PyTorch, and curvature you can trust."
    )
    parser.add_argument("--version", action="version", version=f"newtonopt {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands")
    doctor = commands.add_parser("doctor", help=_DOCTOR, description=f"{_DOCTOR.capitalize()}. {_STATUS}")
    doctor.add_argument("--json", action="store_true", help="print JSON, with tracebacks, for a bug report")
    doctor.add_argument(
        "--limit", type=_seconds, default=LIMIT, metavar="SECONDS", help=f"time for one check (default {LIMIT:g})"
    )
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help()
        return 0
    return visit(CHECKS, SECTIONS, limit=given.limit, as_json=given.json)


def _seconds(text: str) -> float:
    """Return a positive number of seconds; argparse turns the ValueError into an error of the command line."""
    seconds = float(text)
    if not 0.0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
