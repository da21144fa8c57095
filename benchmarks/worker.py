"""A process that holds one contender and times it when asked.

    python -m benchmarks.worker

Requests and answers are lines of JSON on the standard input and output. A contender
that fails ends the process with its traceback: the coordinator reports the last line.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from benchmarks.contenders.step import Step

# One timing takes at least this long, so that a short step is called several times.
SECONDS = 0.1
MOST_CALLS = 10_000


def build(builder: str, settings: Mapping[str, Any]) -> Step:
    """Calls the builder with that dotted path."""
    module, _, name = builder.rpartition(".")
    return getattr(importlib.import_module(module), name)(**settings)


def timed(step: Step, calls: int) -> float:
    """Seconds for `calls` calls, from the first call to the last result."""
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        result = step.call()
    step.wait(result)
    return time.perf_counter() - start


def calls_needed(step: Step) -> int:
    """Returns how many calls one timing needs; this warms the step up."""
    timed(step, 1)  # traces and compiles
    calls = 1
    while (taken := timed(step, calls)) < SECONDS and calls < MOST_CALLS:
        calls = min(MOST_CALLS, 1 + int(1.2 * calls * SECONDS / max(taken, 1e-6)))
    return calls


def resident() -> int:
    """Returns the bytes of memory that this process has now."""
    return _status("VmRSS")


def peak_above_base(
    builder: str, settings: Mapping[str, Any], tiny: Mapping[str, Any], limit: int
) -> int:
    """Returns the most bytes that a step's build and call need above the base.

    The base is the memory after the same step at a tiny size: the library,
    its threads and its compiler are loaded by then.

    Args:
        builder: The builder's dotted path.
        settings: Of the step that is measured.
        tiny: Of the tiny one.
        limit: Bytes above the base from which on allocations fail.
    """
    timed(build(builder, tiny), 1)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + limit, hard))
    base = resident()
    # Sets the peak back to the present, see proc_pid_clear_refs(5).
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    timed(build(builder, settings), 1)
    return _status("VmHWM") - base


def answer(requests: IO[str], answers: IO[str]) -> None:
    """Answers requests until none follow."""
    step: Step | None = None
    calls = 0
    for line in requests:
        request = json.loads(line)
        reply: dict[str, Any]
        match request.pop("do"):
            case "prepare":
                step = None  # the former one's memory is free before
                step = build(**request)
                calls = calls_needed(step)
                reply = {"calls": calls}
            case "run" if step is not None:
                reply = {"seconds": timed(step, calls) / (calls * step.parts)}
            case "peak":
                reply = {"bytes": peak_above_base(**request)}
            case other:
                raise ValueError(f"No such request: {other!r}")
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def main() -> None:
    """Serves the process that started this one."""
    # Libraries print to the error stream, not among the answers.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        answer(sys.stdin, answers)


def _status(name: str) -> int:
    """Reads a field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: this needs Linux.")


if __name__ == "__main__":
    main()
