"""The league table of physics-informed networks: `python benchmarks/pinn.py`.

Every method trains the same networks on the same points, each run in a process and on one thread of its own, for so
many seconds of processor time. The default, 60 seconds, with three seeds on the two convection equations and one on
the others, takes about two hours on one core; `--jobs 2` halves that. Each run is written to a JSON file when it
ends, with the machine and the versions; tables and plots are drawn from that file.

    --output mine.json              all methods on all equations
    --output mine.json --resume     go on after an interruption, or add more runs
    --draw                          draw tables and plots of the committed file, without running
    --spurious                      how often LevenbergMarquardt ends on a wrong solution, and what helps
    --device cuda --seconds 600     on a GPU, by the wall clock; what is asked for at later times is extrapolated
    --equations convection-30 --methods HessianFree Adam --seeds 0 --seconds 150 --output x.json

Methods from other packages: `pip install -e .[benchmarks]`. What is not installed is left out.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from equations import EQUATIONS, HORIZONS, ON_A_GPU, REMEDIES
from league import OURS, Entry, League, commit, machine, markdown, spurious, write_pictures
from peers import METHODS, versions
from side_by_side import race
from training import Run, on_device, train

RESULTS = Path(__file__).parent / "results"
SEEDS = {"convection-30": (0, 1, 2), "convection-50": (0, 1, 2)}  # the other equations have seed 0
ALL = {**EQUATIONS, **REMEDIES, **ON_A_GPU}
Task = tuple[str, str, int]  # equation, method, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="time of a run (default: 60, or 40 with --spurious)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu, by processor time")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2 for convection, 0 for the others")
    parser.add_argument("--equations", nargs="+", choices=ALL, metavar="NAME", help=f"default: {' '.join(EQUATIONS)}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"some of {', '.join(METHODS)}")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/pinn.json)")
    parser.add_argument("--resume", action="store_true", help="add to the file and skip the runs that it has")
    parser.add_argument("--draw", action="store_true", help="only draw tables and plots from the file")
    parser.add_argument("--spurious", action="store_true", help=f"{OURS} on convection, seeds 0 to 9, and remedies")
    args = parser.parse_args()
    args.seconds = args.seconds or (40.0 if args.spurious else 60.0)
    path = args.output or RESULTS / _NAMES[args.spurious, args.device]
    if not args.draw:
        _run(args, path)
    league = League.load(path)
    text = spurious(league) if args.spurious else markdown(league)
    path.with_suffix(".md").write_text(text)
    print(text)
    if not args.spurious:
        write_pictures(league, path)


# Names of the records: of spurious solutions or not, and by device.
_NAMES = {
    (False, "cpu"): "pinn.json",
    (True, "cpu"): "pinn_spurious.json",
    (False, "cuda"): "pinn_gpu.json",
    (True, "cuda"): "pinn_spurious_gpu.json",
}


def _run(args: argparse.Namespace, path: Path) -> None:
    wanted = (
        spurious_tasks(args)
        if args.spurious
        else tasks(args.equations or _usual(args.device), args.methods, args.seeds)
    )
    methods = list(dict.fromkeys(method for _, method, _ in wanted))
    left_out = {method: reason for method in methods if (reason := METHODS[method].missing)}
    for method, reason in left_out.items():
        print(f"{method} is left out: {reason}", file=sys.stderr)
    league = _open(path, args.seconds, args.resume, args.device)
    clock: Literal["wall", "processor"] = "processor" if args.device == "cpu" else "wall"
    kept = {method: reason for method, reason in league.left_out.items() if method not in methods}
    league = replace(
        league,
        formulas={name: equation.formula for name, equation in ALL.items()},
        settings={name: method.setting for name, method in METHODS.items()},
        left_out={**kept, **left_out},
        horizons=HORIZONS if args.device == "cuda" else {},
    )
    league.save(path)
    present = {entry.key for entry in league.entries}
    work = {}
    for name, method, seed in wanted:
        for contender in () if method in left_out else METHODS[method].contenders:
            if (name, contender.name, seed) not in present:
                problem = partial(on_device, ALL[name].problem, args.device)
                label = f"{name}, {contender.name}, seed {seed}"
                work[label] = name, partial(train, problem, contender, seed, args.seconds, clock)
    here, failures = commit(), []
    for label, outcome in race(path.stem, {label: run for label, (_, run) in work.items()}, args.jobs):
        if isinstance(outcome, Run):
            league = league.with_entry(Entry(work[label][0], here, outcome))
            league.save(path)
        else:
            failures.append(f"{label} failed: {outcome!r}")
    if failures:
        print("\n".join(failures), file=sys.stderr)


def _usual(device: str) -> list[str]:
    """Return the equations of a run, unless others are chosen."""
    return list(EQUATIONS) if device == "cpu" else list(HORIZONS)


def _open(path: Path, seconds: float, resume: bool, device: str) -> League:
    """Return the record at `path`, or a new one; end the program where the two do not fit together."""
    new = League(machine(device), versions(), seconds)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return new
    if not resume:
        sys.exit(f"{path} exists. Add --resume to complete it, or choose another file with --output.")
    old = League.load(path)
    # A package that is missing now, or was then, changes nothing about the runs that the file has.
    updated = [name for name in old.versions if new.versions.get(name, old.versions[name]) != old.versions[name]]
    if (old.machine, old.seconds) != (new.machine, new.seconds) or updated:
        sys.exit(
            f"The runs in {path} were made under other conditions ({old.machine}, {old.versions}, {old.seconds:g} s). "
            "Choose another file with --output."
        )
    return replace(old, versions={**old.versions, **new.versions})


def tasks(equations: Sequence[str] | None, methods: Sequence[str] | None, seeds: Sequence[int] | None) -> list[Task]:
    """Return the runs in an order that makes early results useful: first seed 0 of each equation, all its methods."""
    wanted = {name: seeds or SEEDS.get(name, (0,)) for name in equations or EQUATIONS}
    found = []
    for name, some in wanted.items():
        usual = [m for m, it in METHODS.items() if it.by_default or (it.for_new_points and ALL[name].anew)]
        found += [(name, method, seed) for method in methods or usual for seed in some]
    first = {name: some[0] for name, some in wanted.items()}
    return sorted(found, key=lambda task: task[2] != first[task[0]])


def spurious_tasks(args: argparse.Namespace) -> list[Task]:
    """Return the runs seed by seed, so that early results compare the remedies on the same seeds."""
    names = args.equations or ["convection-30", "convection-50", *REMEDIES]
    return [(name, OURS, seed) for seed in args.seeds or range(10) for name in names]


if __name__ == "__main__":
    main()
