"""Runs one file in one runtime, for a row of a report."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from keras_mha.export.cases import Cases, Opened, Samples, labels_of
from keras_mha.export.files import size_of
from keras_mha.export.parity import ParityError, VerificationError, check_parity
from keras_mha.export.report import Parity
from keras_mha.export.runtimes.descriptor import AbsentError, File, Runtime
from keras_mha.export.runtimes.fresh_process import FreshProcess
from keras_mha.export.verification.report import RuntimeCheck, Status

Answers = Sequence[Mapping[str, np.ndarray]]
UNCOUNTED = 3  # turns before those that are timed


class Job:
    """Takes the steps `find`, `open`, `start`, `take_turn` and `finish` in this order.

    A step that fails settles the row, and those after it do nothing.

    Args:
        path: The file.
        runtime: The runtime.
        right: The right class of each sample, where it is known.
    """

    def __init__(self, path: Path, runtime: Runtime, right: np.ndarray | None) -> None:
        self.check = RuntimeCheck(
            file=str(path),
            runtime=runtime.label,
            status="failed",
            size_bytes=size_of(path),
        )
        self._runtime = runtime
        self._right = right
        self._ready: tuple[File, Cases, float] | None = None
        self._process: FreshProcess | None = None
        self._seconds: list[float] = []

    def fail(self, reason: str) -> None:
        """Settles the row: the runtime gave no values."""
        self._settle(status="failed", reason=reason)

    def find(self, samples: Samples) -> bool:
        """Returns whether the runtime is here and takes the model's inputs."""
        try:
            if samples.are_texts and not self._runtime.takes_text:
                raise AbsentError("it takes ids, and no strings")
            self._runtime.check_present()
        except AbsentError as error:
            self.skip(str(error))
            return False
        return True

    def skip(self, reason: str) -> None:
        """Settles the row: the runtime was not asked."""
        self._settle(status="not run", reason=reason)

    def open(self, opened: Opened, tolerance: float, emulated_samples: int) -> None:
        """Says what to run."""
        if opened.file.kind not in self._runtime.reads:
            self.skip(opened.unread)
            return
        cases = opened.cases
        if self._runtime.emulated:
            cases = cases.first(emulated_samples)
        self._ready = opened.file, cases, tolerance

    def start(self, stack: ExitStack, *, in_turns: bool, timeout: float) -> None:
        """Starts the process, which ends with `stack`, and waits for its values."""
        if self._ready is None:
            return
        file, cases, _ = self._ready
        timed = in_turns and not self._runtime.emulated
        with self._failing():
            process = stack.enter_context(
                FreshProcess(self._runtime, file, cases.inputs, in_turns=timed)
            )
            if timed:
                process.wait_for_values(timeout)
                self._process = process
            else:
                self._compare(*process.finish(timeout))

    def take_turn(self, timeout: float) -> None:
        """Runs the last case once more, and keeps the time."""
        if self._process is not None:
            with self._failing():
                self._seconds.append(self._process.time_call(timeout))

    def finish(self, reference_seconds: float | None, timeout: float) -> None:
        """Compares the values of a process that took turns."""
        if self._process is None or self._ready is None or reference_seconds is None:
            return
        process, cases = self._process, self._ready[1]
        with self._failing():
            self._compare(*process.finish(timeout))
            seconds = statistics.median(self._seconds[UNCOUNTED:]) / cases.timed_rows
            self.check = replace(self.check, latency=seconds / reference_seconds)

    def _compare(self, answers: Answers, facts: Mapping[str, Any]) -> None:
        """Settles the row by the values."""
        if self._ready is None:
            return
        _, cases, tolerance = self._ready
        self.check = replace(
            self.check,
            version=facts["version"],
            samples=cases.rows,
            tolerance=tolerance,
            delegate_partitions=facts.get("delegate_partitions"),
            fully_accelerated=facts.get("fully_accelerated"),
        )
        expected = cases.expected
        same = np.full(len(expected), True)
        if self._runtime.cuts_texts:
            pairs = zip(expected, answers, strict=True)
            same = np.array([np.array_equal(e["ids"], a["ids"]) for e, a in pairs])
            expected, answers = (
                [{"scores": one["scores"]} for one in several]
                for several in (expected, answers)
            )
            self.check = replace(
                self.check, samples=int(np.sum(same)), same_ids=float(np.mean(same))
            )
        if not same.any():
            self._settle(status="wrong", reason="it cuts no text into the model's ids")
            return
        try:
            parity = check_parity(
                list(itertools.compress(expected, same)),
                list(itertools.compress(answers, same)),
                tolerance=np.inf,
                samples=cases.rows,
                runtime=facts["runtime"],
                runtime_version=facts["version"],
            )
        except ParityError as error:
            self._settle(status="wrong", reason=str(error))
            return
        labels = labels_of(answers, cases.rows)
        right = None if self._right is None else self._right[cases.samples]
        self.check = replace(
            self.check,
            label_agreement=share(labels, labels_of(expected, cases.rows)),
            accuracy=share(labels, right),
            max_absolute_difference=_finite(parity.max_absolute_difference),
            max_relative_difference=_finite(parity.max_relative_difference),
        )
        if not parity.max_absolute_difference <= tolerance:
            self._settle(status="wrong", reason=_excess(parity, tolerance))
        elif facts.get("fully_accelerated") is False:
            self.fail(
                "the GPU delegate did not take the whole graph: "
                "`lint_tflite(path, target='gpu')` tells of what it refuses"
            )
        elif not same.all():
            other = int(np.sum(~same))
            self._settle(
                status="ok",
                reason=f"but it cuts {other} texts into other ids than the model; "
                "their values were not compared",
            )
        else:
            self._settle(status="ok")

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Makes the process' failure the row's."""
        try:
            yield
        except AbsentError as error:
            self.skip(str(error))
        except VerificationError as error:
            self.fail(str(error))

    def _settle(self, *, status: Status, reason: str = "") -> None:
        self.check = replace(self.check, status=status, reason=reason)
        self._ready = self._process = None


def share(labels: np.ndarray | None, others: np.ndarray | None) -> float | None:
    """Returns the share of equal labels, or `None` without labels."""
    if labels is None or others is None:
        return None
    return float(np.mean(labels == others))


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _excess(parity: Parity, tolerance: float) -> str:
    if np.isfinite(parity.max_absolute_difference):
        return f"the tolerance is {tolerance:.3g}"
    return "strings or integers differ, or a value is not finite"
