"""The library on a CUDA device, in at most ten minutes: `make gpu`, or `python benchmarks/gpu.py`.

    tests             the tests that are marked `gpu`
    products          time of curvature products relative to a gradient, and their memory, for six models, up to the
                      sizes of ResNet-18 and GPT-2 small
    levenberg_marquardt
                      loss and error against time of LevenbergMarquardt and HessianFree on two physics-informed networks
    hessian_free      loss and error against time of HessianFree on an autoencoder
    lightning         bf16-mixed runs of Adam and of HessianFree, with and without the monitors
    monitor           time that the monitor adds to training of a GPT of 124 million parameters in bf16-mixed
    billion           largest eigenvalue of a GPT of a billion parameters, with its interval
    synchronisations  how often, and where, the host waits for the device in an iteration of conjugate gradients, in a
                      step of HessianFree and in a measurement

Each part runs in a process of its own with a time limit: a part that fails or hangs is recorded, with its traceback,
and the others still run. Figures are written as they come, to one JSON file named after the card. The script needs a
Python with a CUDA build of torch, with Lightning, TensorBoard and pytest; the library itself is taken from this
source tree, installed or not. `--device cpu --small` tries the whole script without a card.
"""

import argparse
import contextlib
import datetime
import faulthandler
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_parts import (
    ROOT,
    Note,
    Where,
    billion,
    hessian_free,
    levenberg_marquardt,
    lightning,
    monitor,
    products,
    synchronisations,
    tests,
)

RESULTS = ROOT / "benchmarks" / "results"
# Seconds that a part gets to write its traceback when its time is up.
GRACE = 5.0
# Characters that are kept of a part's printed text.
KEPT = 8000


@dataclass(frozen=True)
class Part:
    """A part of the script, and its time limit in seconds."""

    run: Callable[[Where, Note], None]
    limit: float


# Ten minutes, together with the grace.
PARTS = {
    "tests": Part(tests, 100.0),
    "products": Part(products, 60.0),
    "levenberg_marquardt": Part(levenberg_marquardt, 140.0),
    "hessian_free": Part(hessian_free, 25.0),
    "lightning": Part(lightning, 45.0),
    "monitor": Part(monitor, 55.0),
    "billion": Part(billion, 90.0),
    "synchronisations": Part(synchronisations, 45.0),
}


class Callbacks:
    """Finder that imports the folder callbacks/ under the name that it installs as."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Called by `import`."""
        if name != "newtonopt.callbacks":
            return None
        return importlib.util.spec_from_file_location(name, ROOT / "callbacks" / "__init__.py")


def use_the_source_tree() -> None:
    """Import the library from this source tree, whether or not one is installed."""
    sys.path.insert(0, str(ROOT))
    sys.meta_path.insert(0, Callbacks)


def work(name: str, where: Where, limit: float, found: Path) -> None:
    """Run one part in this process and write its figures to a file."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(limit, exit=True)
    use_the_source_tree()
    noted: dict[str, Any] = {}

    def note(key: str, value: Any) -> None:
        noted[key] = value
        write(found, noted)

    PARTS[name].run(where, note)


def write(path: Path, content: Any) -> None:
    """Write JSON so that a reader never sees half of it."""
    written = path.with_name(f"{path.name}.tmp")
    written.write_text(json.dumps(content, indent=1) + "\n")
    written.replace(path)


@dataclass(frozen=True)
class Outcome:
    """The end of a process: "passed", "failed" or "timed out", the seconds it took, and the end of its printed text."""

    status: str
    seconds: float
    output: str


def run_apart(command: Sequence[str], limit: float, grace: float, each_second: Callable[[], None]) -> Outcome:
    """Run a command in a process of its own, and end it and its children when its time is up.

    Args:
        command: The command line.
        limit: Seconds after which the process is expected to end itself, with a traceback.
        grace: Further seconds after which it is ended.
        each_second: Called every second while it runs.
    """
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT)
        try:
            while (elapsed := time.perf_counter() - began) < limit + grace:
                try:
                    process.wait(min(1.0, limit + grace - elapsed))
                    break
                except subprocess.TimeoutExpired:
                    each_second()
        finally:
            # Its children may still be running.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.perf_counter() - began
        printed.seek(0)
        output = printed.read()[-KEPT:]
    status = "passed" if process.returncode == 0 else "timed out" if seconds >= limit else "failed"
    return Outcome(status, round(seconds, 1), output)


def machine(device: str) -> dict[str, str]:
    """Return the machine and the versions of the software."""
    if device == "cuda":
        card = torch.cuda.get_device_name()
        driver = said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        card, driver = "CPU", ""
    return {
        "card": card,
        "driver": driver.splitlines()[0] if driver else "unknown",
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "lightning": version_of("lightning"),
        "python": platform.python_version(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """Return NEWTONOPT_COMMIT, for copies without history, or the tree's commit, marked if files were changed."""
    if os.environ.get("NEWTONOPT_COMMIT"):
        return os.environ["NEWTONOPT_COMMIT"]
    git = partial(said_by, "git", "-C", str(ROOT))
    if Path(git("rev-parse", "--show-toplevel") or "/") != ROOT:
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + (", with changes" if changed else "")


def said_by(*command: str) -> str:
    """Return the output of a command; an empty string if the command fails or is missing."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def summary(name: str, found: dict[str, Any]) -> list[str]:
    """Return a part's figures in a few lines."""
    if name == "tests":
        counts = ", ".join(f"{count} {outcome}" for outcome, count in found.get("counts", {}).items())
        return [counts, *(f"failed: {test}" for test in found.get("failures", {}))]
    lines = []
    for title, figures in found.items():
        if isinstance(figures, str):
            lines.append(f"{title}: {figures}")
        elif name == "products":
            ratios = ", ".join(f"{k} {r:.2f}" for k, r in figures["by gradient"].items() if k != "gradient")
            lines.append(f"{title}: gradient {1e3 * figures['gradient']['seconds']:.3g} ms; in gradients: {ratios}")
        elif name in ("hessian_free", "levenberg_marquardt") and "loss" in figures:
            seconds, losses, errors = figures["seconds"], figures["loss"], figures["error"]
            shown = [f"{seconds[i]:.3g} s {losses[i]:.2g} ({errors[i]:.2g})" for i in (0, 5, 10, 20)]
            lines.append(f"{title}: {figures['steps']} steps, loss (error) at {', '.join(shown)}")
            if "horizon" in figures:
                later = figures["error there, extrapolated"]
                lines.append(f"{title}: extrapolated to {figures['horizon']:g} s, not measured: error {later:.2g}")
        elif name == "monitor":
            measured = f"{figures['tracked'] / figures['step']:.1f} and {figures['certified'] / figures['step']:.1f}"
            lines.append(
                f"{title}: a step {1e3 * figures['step']:.3g} ms; a tracked measurement and a certified one take "
                f"{measured} steps; every {figures['every']} steps, {figures['certified share']:.0%} certified: "
                f"{figures['overhead']:.1%} more time"
            )
        elif name == "billion" and "value" in figures:
            peak = f", peak {figures['bytes'] / 2**30:.1f} GiB beside the model" if "bytes" in figures else ""
            lines.append(
                f"{title}, {figures['parameters']:,} parameters: {figures['value']:.5g} in [{figures['lower']:.5g}, "
                f"{figures['upper']:.5g}] after {figures['products']} products in {figures['seconds']:.1f} s{peak}"
            )
        elif name == "lightning":
            plain, monitored = figures["seconds"], figures["seconds, monitored"]
            bits = figures["monitors change no bit"], figures["two runs without monitors agree to the bit"]
            lines.append(
                f"{title}: {figures['steps']} steps in {plain:.2f} s, with {figures['measurements']} measurements "
                f"{monitored:.2f} s; monitored to the bit as without: {bits[0]} (two runs without: {bits[1]})"
            )
        elif name == "synchronisations":
            step, each = figures["a step of HessianFree"], [f"{figures[f'{k}, an iteration']:g}" for k in _MATRICES]
            lines.append(
                f"{title}: {' and '.join(each)} an iteration (Gauss-Newton, Hessian); {step['waits']} in a step of "
                f"{step['iterations']} iterations and {step['products']} products"
            )
    return lines


_MATRICES = ("gauss_newton", "hessian")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: cuda")
    parser.add_argument("--small", action="store_true", help="small problems, to try the script")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the figures (default: benchmarks/results)")
    for hidden, kind in (("--work", str), ("--limit", float), ("--found", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    where = Where(args.device, args.small)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            f"torch {torch.__version__} of {sys.executable} sees no CUDA device; --device cpu --small tries the rest"
        )
    if args.work:
        work(args.work, where, args.limit, args.found)
        return
    record: dict[str, Any] = {**machine(args.device), "small": args.small, "parts": {}}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{re.sub('[^a-z0-9]+', '-', record['card'].lower()).strip('-')}.json"
    print(", ".join(f"{key} {value}" for key, value in record.items() if isinstance(value, str)), flush=True)
    for name in args.parts:
        outcome = run_part(name, where, record, path)
        print(f"{name}: {outcome.status} after {outcome.seconds:.0f} s", flush=True)
    print()
    for name, part in record["parts"].items():
        print(f"{name} ({part['status']}, {part['seconds']:.0f} s)")
        print("".join(f"  {line}\n" for line in summary(name, part["found"])), end="")
        if part["status"] != "passed":
            print("".join(f"  | {line}\n" for line in part["output"].splitlines()[-15:]), end="")
    print(f"\nAll figures: {path}")
    if any(part["status"] != "passed" for part in record["parts"].values()):
        sys.exit(1)


def run_part(name: str, where: Where, record: dict[str, Any], path: Path) -> Outcome:
    """Run a part in a process of its own; write the record to `path` again whenever the part notes a figure."""
    # A processor that others use too takes long.
    limit = PARTS[name].limit * (1.0 if where.device == "cuda" else 4.0)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        write(found, {})
        worker = [sys.executable, __file__, "--work", name, "--limit", str(limit), "--found", str(found)]
        options = ["--device", where.device, *(["--small"] if where.small else [])]

        def keep(outcome: Outcome) -> None:
            record["parts"][name] = {**asdict(outcome), "limit": limit, "found": json.loads(found.read_text())}
            write(path, record)

        outcome = run_apart([*worker, *options], limit, GRACE, lambda: keep(Outcome("running", 0.0, "")))
        keep(outcome)
    return outcome


if __name__ == "__main__":
    warnings.simplefilter("default")
    main()
