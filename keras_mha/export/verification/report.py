"""The results of `verify`: one row for each file and runtime."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from keras_mha.export.report import ExportReport

Status = Literal["reference", "ok", "wrong", "failed", "not run"]
_COLORS = {"ok": "tab:green", "wrong": "tab:red"}


@dataclass(frozen=True)
class RuntimeCheck:
    """One file in one runtime, compared with the Keras model; `None` if unknown.

    Attributes:
        file: The file or directory; empty for the Keras model itself.
        runtime: What ran it.
        status: `"reference"` for the Keras model; `"ok"` where every value is within
            the tolerance; `"wrong"` where one is not; `"failed"` where the runtime
            gave no values, or the GPU delegate did not take the whole graph;
            `"not run"` where the runtime is absent or does not take such a model.
        reason: Why, or what to install; empty where `status` says it all.
        version: The runtime's version.
        samples: Number of rows compared.
        tolerance: The absolute difference that was allowed.
        max_absolute_difference: Over all outputs; `None` also where it is infinite.
        max_relative_difference: The same, where the model's value is not zero.
        label_agreement: Share of rows with the same label as the model's: the largest
            of several classes, or whether one probability is at least 0.5.
        accuracy: Share of rows with the right label.
        size_bytes: Of the file.
        latency: The median time of a row, in calls of one row or the file's fixed
            batch, as a multiple of the Keras model's. None where it is emulated.
        delegate_partitions: Number of parts that LiteRT's CPU delegate took over.
        fully_accelerated: Whether the GPU delegate took the whole graph.
        same_ids: Share of texts that MediaPipe cuts into the model's own ids; where it
            does not, values are not compared, and labels are.
    """

    file: str
    runtime: str
    status: Status
    reason: str = ""
    version: str | None = None
    samples: int | None = None
    tolerance: float | None = None
    max_absolute_difference: float | None = None
    max_relative_difference: float | None = None
    label_agreement: float | None = None
    accuracy: float | None = None
    size_bytes: int | None = None
    latency: float | None = None
    delegate_partitions: int | None = None
    fully_accelerated: bool | None = None
    same_ids: float | None = None


_HEADS = {
    "file": "file",
    "runtime": "runtime",
    "status": "status",
    "samples": "rows",
    "max_absolute_difference": "max. difference",
    "max_relative_difference": "relative",
    "tolerance": "tolerance",
    "same_ids": "same ids",
    "label_agreement": "label agreement",
    "accuracy": "accuracy",
    "size_bytes": "bytes",
    "latency": "latency",
    "delegate_partitions": "CPU partitions",
    "fully_accelerated": "whole on GPU",
}


@dataclass(frozen=True)
class VerificationReport(ExportReport):
    """The results of `verify`.

    Attributes:
        checks: The Keras model, then one entry for each file and runtime.

    Example:

    >>> from keras_mha.export import RuntimeCheck, VerificationReport
    >>> absent = RuntimeCheck("a.onnx", "OpenVINO", "not run", "pip install openvino")
    >>> facts = ("tiny", 7, "3.15.1", "2.21.0", ("keras_mha",))
    >>> VerificationReport(*facts, checks=(absent,)).passed
    False
    >>> right = RuntimeCheck("a.onnx", "ONNX Runtime", "ok", samples=5)
    >>> VerificationReport(*facts, checks=(right, absent)).passed
    True
    """

    checks: tuple[RuntimeCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether something is ok and nothing is wrong or failed.

        What was not run counts neither way.
        """
        statuses = {check.status for check in self.checks}
        return "ok" in statuses and not statuses & {"wrong", "failed"}

    def to_json(self) -> str:
        """Returns all fields as indented JSON, and `passed` with them."""
        return json.dumps({"passed": self.passed, **asdict(self)}, indent=2)

    def to_markdown(self) -> str:
        """Returns a table, a row for each file and runtime, and the versions used."""
        used = [
            key
            for key in _HEADS
            if any(getattr(check, key) is not None for check in self.checks)
        ]
        lines = [[_HEADS[key] for key in used], ["---"] * len(used)]
        names = _names(self.checks)
        lines += [[_cell(check, key, names) for key in used] for check in self.checks]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        verdict = "passed" if self.passed else "not passed"
        return (
            f"## Verification of {self.model}: {verdict}\n\n{table}\n\n"
            f"{self.parameters} parameters; Keras {self.keras}, TensorFlow "
            f"{self.tensorflow}. Differences are from the Keras model, latencies "
            "multiples of its. Every other row is a process of its own, which cannot "
            f"import {', '.join(self.blocked)}."
        )

    def write(self, path: str | Path) -> None:
        """Writes the report as JSON, Markdown or a picture, by the end of `path`.

        Raises:
            ImportError: If `path` ends in `.png`, and matplotlib is not installed.
            ValueError: If `path` ends in none of `.json`, `.md` and `.png`.
        """
        path = Path(path)
        if path.suffix not in (".json", ".md", ".png"):
            raise ValueError(f"`path` must end in .json, .md or .png. Received: {path}")
        if path.suffix != ".png":
            super().write(path)
            return
        part = path.with_name(f".{path.name}.part")
        _draw(self, part)
        part.replace(path)


def _names(checks: Sequence[RuntimeCheck]) -> dict[str, str]:
    """Returns each file's name, with its folder's where other folders have it too."""
    files = {check.file for check in checks}
    shared = Counter(Path(file).name for file in files)
    return {
        file: "/".join(Path(file).parts[-2:])
        if shared[Path(file).name] > 1
        else Path(file).name
        for file in files
    }


def _cell(check: RuntimeCheck, key: str, names: Mapping[str, str]) -> str:
    value = getattr(check, key)
    if key == "status":
        text = f"{value}: {_brief(check.reason)}" if check.reason else value
    elif key == "file":
        text = names[value] or "(the model)"
    elif key == "runtime":
        text = f"{value} {check.version or ''}".strip()
    elif value is None:
        text = ""
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    elif key in ("same_ids", "label_agreement", "accuracy"):
        text = f"{value:.2%}"
    else:
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def _brief(reason: str) -> str:
    """Returns the first line and the last, which holds an error's own message."""
    lines = reason.splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0]} [...] {lines[-1]}"


def _draw(report: VerificationReport, path: Path) -> None:
    """Draws bars of differences next to bars of latencies."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "The picture needs matplotlib: pip install 'keras-mha[plot]'"
        ) from error

    checks = report.checks
    names = _names(checks)
    labels = [
        f"{names[check.file]}\n{check.runtime}" if check.file else check.runtime
        for check in checks
    ]
    rows = range(len(checks))
    figure = Figure(figsize=(12, 1.2 + 0.6 * len(checks)), layout="constrained")
    values, times = figure.subplots(1, 2, sharey=True)
    for row, check in zip(rows, checks, strict=True):
        difference, latency = check.max_absolute_difference, check.latency
        color = _COLORS.get(check.status, "tab:gray")
        if difference is not None and check.status != "reference":
            # Equal values have no place on the axis: they get its left end.
            values.barh(row, max(difference, 1e-9), color=color)
            values.text(max(difference, 1e-9), row, f" {difference:.2g}", va="center")
        elif check.status != "reference":
            values.text(1e-9, row, f" {check.status}", va="center")
        if check.tolerance is not None:
            values.plot([check.tolerance] * 2, [row - 0.4, row + 0.4], color="black")
        if latency is not None:
            bar = times.barh(row, latency, color="tab:blue")
            times.bar_label(bar, [f"{latency:.2g}"], padding=3)
    values.set_yticks(list(rows), labels)
    values.invert_yaxis()
    values.set_xscale("log")
    values.set_xlim(1e-9, 10)
    values.set_title("Largest difference from the model (line: tolerance)")
    times.set_title("Latency, as a multiple of the Keras model's")
    times.margins(x=0.15)
    figure.suptitle(f"{report.model}: {'passed' if report.passed else 'not passed'}")
    figure.savefig(path, dpi=100, format="png")
