"""Runs comparisons: one process for each contender, of which one works at a time."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.cases import Comparison, Entry, MemoryComparison

ROOT = Path(__file__).resolve().parents[1]
TINY_LENGTH = 16
Progress = Callable[[str], None]


class ContenderError(RuntimeError):
    """A contender gave no measurement; the text says why."""


@dataclass(frozen=True)
class Options:
    """How measurements are made.

    Attributes:
        reference: The matrix product that is timed in each round.
        reference_operations: Its floating-point operations.
        rounds: Timings of each entry.
        timeout: Seconds that one answer may take.
        memory_limit: Bytes above its base that a process may take.
        environment: Added to the environment of every process.
    """

    reference: Entry
    reference_operations: float
    rounds: int = 7
    timeout: float = 1800.0
    memory_limit: int = 16 * 2**30
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """The timings of one entry, or why it has none."""

    label: str
    seconds: list[float] = field(default_factory=list)
    failure: str | None = None


class Worker:
    """One process running `benchmarks.worker`."""

    def __init__(self, environment: Mapping[str, str], timeout: float) -> None:
        self._timeout = timeout
        self._errors = tempfile.TemporaryFile(  # noqa: SIM115 - `close` closes it.
            "w+", encoding="utf-8", errors="replace"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Returns the answer to one request.

        Raises:
            ContenderError: If the process ended, or took too long and was ended.
        """
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None  # noqa: S101 - both are pipes.
        assert answers is not None  # noqa: S101 - likewise.
        try:
            requests.write(json.dumps(request) + "\n")
            requests.flush()
        except BrokenPipeError:
            raise ContenderError(self._epitaph()) from None
        if not select.select([answers], [], [], self._timeout)[0]:
            self._process.kill()
            raise ContenderError(f"no answer within {self._timeout:g} s")
        line = answers.readline()
        if not line:
            raise ContenderError(self._epitaph())
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _epitaph(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        text = last_error(self._errors.read())
        if status < 0:
            ended = f"ended by {signal.Signals(-status).name}"
            return f"{ended}: {text}" if text else ended
        return text


class Workers:
    """The processes of one group of comparisons, by label; a context manager."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._running: dict[str, Worker] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for label in list(self._running):
            self.discard(label)

    def of(self, entry: Entry) -> Worker:
        """Returns the process of that label; starts it if needed.

        Raises:
            ContenderError: If the package it needs is not installed.
        """
        if entry.package and importlib.util.find_spec(entry.package) is None:
            raise ContenderError(f"{entry.package} is not installed")
        if entry.label not in self._running:
            environment = {**self._options.environment, **entry.environment}
            self._running[entry.label] = Worker(environment, self._options.timeout)
        return self._running[entry.label]

    def discard(self, label: str) -> None:
        """Ends the process of that label, if it runs."""
        worker = self._running.pop(label, None)
        if worker is not None:
            worker.close()


def run_times(
    comparison: Comparison, workers: Workers, options: Options, progress: Progress
) -> dict[str, Any]:
    """Times the entries of `comparison` in turns, the matrix product among them.

    Returns:
        JSON-ready: the title, the operations, the reference's seconds a round, and
        for each entry its label with its seconds a round or the reason of its failure.
    """
    outcomes = [Outcome(entry.label) for entry in comparison.entries]
    reference = Outcome(options.reference.label)
    taking_part = list(zip(comparison.entries, outcomes, strict=True))

    def attempt(entry: Entry, outcome: Outcome, **request: Any) -> None:
        try:
            reply = workers.of(entry).ask(**request)
        except ContenderError as error:
            workers.discard(entry.label)
            outcome.failure = str(error)
            outcome.seconds.clear()
        else:
            outcome.seconds += [reply["seconds"]] if "seconds" in reply else []

    for entry, outcome in [(options.reference, reference), *taking_part]:
        progress(f"{comparison.title}: preparing {entry.label}")
        settings = dict(entry.settings)
        attempt(entry, outcome, do="prepare", builder=entry.builder, settings=settings)
    if reference.failure:
        raise ContenderError(f"{reference.label}: {reference.failure}")
    for number in range(options.rounds):
        progress(f"{comparison.title}: round {number + 1} of {options.rounds}")
        # The first one changes each time: what ran before heats or cools a GPU.
        first = number % len(taking_part)
        turns = [*taking_part[first:], *taking_part[:first]]
        for entry, outcome in [(options.reference, reference), *turns]:
            if outcome.failure is None:
                attempt(entry, outcome, do="run")
    return {
        "title": comparison.title,
        "operations": comparison.operations,
        "reference_seconds": reference.seconds,
        "entries": [vars(outcome) for outcome in outcomes],
    }


def run_memory(
    comparison: MemoryComparison, options: Options, progress: Progress
) -> dict[str, Any]:
    """Measures each entry at each length in its own process.

    Returns:
        JSON-ready: the title, the lengths, and for each entry its label with, for
        each length, the bytes or the reason of the failure.
    """
    entries = []
    for entry in comparison.entries:
        peaks: list[int | str] = []
        for length in comparison.lengths:
            progress(f"{comparison.title}: {entry.label}, T={length}")
            with Workers(options) as workers:
                try:
                    reply = workers.of(entry).ask(
                        do="peak",
                        builder=entry.builder,
                        settings=_at_length(comparison, entry, length),
                        tiny=_at_length(comparison, entry, TINY_LENGTH),
                        limit=options.memory_limit,
                    )
                except ContenderError as error:
                    peaks.append(str(error))
                else:
                    peaks.append(reply["bytes"])
        entries.append({"label": entry.label, "peaks": peaks})
    return {
        "title": comparison.title,
        "lengths": list(comparison.lengths),
        "entries": entries,
    }


def last_error(text: str) -> str:
    """Returns the error at the end of a traceback, without this disk's folders.

    Where no line names one, the last line with something in it.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    named = [
        number
        for number, line in enumerate(lines)
        if re.match(r"[\w.]*(Error|Exception)\b", line)
    ]
    last = named[-1] if named else -1
    error = "".join(lines[last:][:1])
    if error.endswith(":"):
        # TensorFlow says where, partly indented, and names the error below that.
        below = (line for line in lines[last + 1 :] if not re.match(r"\s|Detect", line))
        error = f"{error} {next(below, '')}"
    without_modules = re.sub(r"^(?:\w+\.)+(?=\w+(?:Error|Exception)\b)", "", error)
    return re.sub(r"(?<![\w.)])/(?:[^\s/'\"():]+/)+", "", without_modules)[:300]


def _at_length(comparison: MemoryComparison, entry: Entry, T: int) -> dict[str, Any]:
    B, N, H = comparison.shape
    return {**entry.settings, "shape": (B, N, T, H)}
