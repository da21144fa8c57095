"""Writes what came of the programs' tests into the documents."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "programs.md"
# The tests by what the reader calls them.
COLUMNS = {
    "test_swap_and_fit": "swap, `fit`",
    "test_from_keras": "`from_keras`",
    "test_save_and_load": "save, load",
    "test_saved_model": "SavedModel",
    "test_tflite-float": "TFLite",
    "test_tflite-int8": "int8",
    "test_tflite-gpu": "for GPUs",
    "test_onnx": "ONNX",
}
HEAD = """\
# Programs

Small programs of many kinds, each written as its users write it: their own layers,
plain constructors, lists and dictionaries of inputs, training steps of their own. Each
runs on `keras.layers.MultiHeadAttention` and with our layer in its place, is converted,
saved and exported, and is compared by value on inputs that were no samples.
`make test-programs` runs them and writes this page; they are in `tests/programs/`.
Saving is of weights, and of the whole model where Keras loads that of its own layer;
files for GPUs are those that pass the lint and answer rightly on the CPU.

"""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Writes the page if every program went through every test."""
    reports = [
        (outcome, report)
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, ())
        if report.nodeid.startswith("tests/programs/")
    ]
    cells, reasons = _cells(reports)
    programs = {program for program, _ in cells}
    if programs and len(cells) == len(programs) * len(COLUMNS):
        PAGE.write_text(_page(cells, reasons), "utf-8")
        terminalreporter.write_line(f"Wrote {PAGE}")


def _cells(
    reports: list[tuple[str, pytest.TestReport]],
) -> tuple[dict[tuple[str, str], str], dict[str, list[str]]]:
    """Returns "yes", "no" or "FAILED" by program and column, and reasons for "no"."""
    cells: dict[tuple[str, str], str] = {}
    reasons: dict[str, list[str]] = {}
    for outcome, report in reports:
        match = re.search(r"::(test_\w+)\[([\w-]+)\]$", report.nodeid)
        if match is None:
            continue
        parts = match[2].split("-")
        kinds = [part for part in parts if part in ("float", "int8", "gpu")]
        (program,) = set(parts) - set(kinds)
        refused = [str(value) for _, value in report.user_properties]
        said = "no" if refused else "yes"
        cells[program, "-".join([match[1], *kinds])] = (
            "FAILED" if outcome == "failed" else said
        )
        for reason in refused:
            if reason not in reasons.setdefault(program, []):
                reasons[program].append(reason)
    return cells, reasons


def _page(cells: dict[tuple[str, str], str], reasons: dict[str, list[str]]) -> str:
    lines = [
        "| program | " + " | ".join(COLUMNS.values()) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for program in sorted({program for program, _ in cells}):
        row = [cells[program, column] for column in COLUMNS]
        lines.append(f"| {program.replace('_', ' ')} | " + " | ".join(row) + " |")
    lines += ["", "## Why some cannot go", ""]
    lines += [
        f"- {program.replace('_', ' ')}: {'; '.join(texts)}."
        for program, texts in sorted(reasons.items())
    ]
    return HEAD + "\n".join(lines) + "\n"
