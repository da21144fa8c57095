"""One run: the chosen groups of comparisons, one after the other, shown and written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import coordinator, machine, report
from benchmarks.cases import Comparison, MemoryComparison
from benchmarks.coordinator import Options

Groups = Mapping[str, Callable[[], Iterable[Comparison | MemoryComparison]]]


def parser(description: str, groups: Iterable[str]) -> argparse.ArgumentParser:
    """Returns the command line that both commands share."""
    known = list(groups)
    command = argparse.ArgumentParser(description=description)
    command.add_argument(
        "cases", nargs="*", metavar="case", help=f"of {', '.join(known)}; default all"
    )
    command.add_argument("--rounds", type=int, default=7, help="timings of each step")
    command.add_argument(
        "--output",
        type=Path,
        default=Path("dist/benchmarks"),
        help="folder for results.json, results.md and the plots",
    )
    command.add_argument(
        "--threads", type=int, default=machine.cores(), help="of each contender"
    )
    command.add_argument(
        "--timeout", type=float, default=1800.0, help="seconds a step may take"
    )
    command.add_argument(
        "--smoke", action="store_true", help="tiny shapes: does everything run?"
    )
    return command


def checked(
    command: argparse.ArgumentParser, groups: Iterable[str]
) -> argparse.Namespace:
    """Reads the command line; exits if an argument is out of range."""
    arguments = command.parse_args()
    unknown = sorted(set(arguments.cases) - set(groups))
    if unknown:
        command.error(f"no such case: {', '.join(unknown)}; known: {', '.join(groups)}")
    for name in ("rounds", "threads", "timeout"):
        if getattr(arguments, name) <= 0:
            command.error(f"--{name} must be above 0")
    return arguments


def thread_environment(threads: int) -> dict[str, str]:
    """Limits TensorFlow, oneDNN and PyTorch to that many threads."""
    names = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
    return dict.fromkeys(names, str(threads))


def run(
    groups: Groups, options: Options, described: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Runs `groups`, prints each table as it is there, and writes all to `folder`."""
    results: dict[str, Any] = {
        "machine": described,
        "rounds": options.rounds,
        "reference": {
            "label": options.reference.label,
            "operations": options.reference_operations,
        },
        "times": [],
        "memory": [],
    }
    print(machine.in_words(described), flush=True)
    for name, comparisons in groups.items():
        with coordinator.Workers(options) as workers:
            for comparison in comparisons():
                if isinstance(comparison, MemoryComparison):
                    measured = coordinator.run_memory(comparison, options, _progress)
                    table = report.memory_table(measured)
                    results["memory"].append({"case": name, **measured})
                else:
                    measured = coordinator.run_times(
                        comparison, workers, options, _progress
                    )
                    table = report.times_table(measured, results["reference"])
                    results["times"].append({"case": name, **measured})
                print(f"\n{table}", flush=True)
                # A run takes long; written now, its results survive an interruption.
                report.write_json(results, folder)
    report.write(results, folder)
    return results


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
