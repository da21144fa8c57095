"""The results of an export, as frozen dataclasses that print themselves.

Each format's report is in its folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True)
class TensorInfo:
    """One named input or output of an exported file.

    Attributes:
        name: Its name in the signature.
        dtype: Its type, as NumPy and TensorFlow write it.
        shape: Its sizes; `None` is a free one, or in place of all a free rank.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None


@dataclass(frozen=True)
class Parity:
    """The distance of an exported file's values from its model's.

    Attributes:
        max_absolute_difference: Over all outputs of all runs. Of inputs that were no
            samples it counts in proportion, where their outputs are larger.
        max_relative_difference: The same, where the model's value is not zero.
        tolerance: The absolute difference that was allowed.
        samples: Number of rows compared.
        batch_sizes: The batch sizes that were run.
        runtime: What ran the file.
        runtime_version: Its version.
        drawn: Number of rows compared that were no samples.
    """

    max_absolute_difference: float
    max_relative_difference: float
    tolerance: float
    samples: int
    batch_sizes: tuple[int, ...]
    runtime: str
    runtime_version: str
    drawn: int = 0


@dataclass(frozen=True)
class ReportPart:
    """A dataclass that becomes a section of a report, with sections of its own."""

    parts: ClassVar[tuple[str, ...]] = ()
    """The fields that become sections: such dataclasses, tuples of them, or `None`."""

    @property
    def heading(self) -> str:
        """The title of its section."""
        return type(self).__name__

    def remarks(self) -> Sequence[str]:
        """Returns what else a table of all files says about it."""
        return ()


class WrittenFile(Protocol):
    """Holds what a table of all files shows of one."""

    @property
    def path(self) -> str:
        """Where it is."""
        ...

    @property
    def size_bytes(self) -> int:
        """Its size, or that of all files in it."""
        ...

    @property
    def parity(self) -> Parity:
        """The comparison with the model."""
        ...

    def remarks(self) -> Sequence[str]:
        """Returns what else is to be said about it."""
        ...


@dataclass(frozen=True)
class ExportReport(ReportPart):
    """The fields of every exporter's report.

    Attributes:
        model: The model's name.
        parameters: Number of weights in the model.
        keras: Version of Keras that wrote the files.
        tensorflow: Version of TensorFlow that wrote the files.
        blocked: Packages that the verifying process was unable to import.
        notes: One sentence for whatever differs from the model: a name that Keras made
            up, a layer that was exported as it is.
    """

    model: str
    parameters: int
    keras: str
    tensorflow: str
    blocked: tuple[str, ...]
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    def written(self) -> Sequence[WrittenFile]:
        """Returns the files that were written."""
        return ()

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as plain dictionaries, lists, strings and numbers."""
        return json.loads(self.to_json())

    def to_json(self) -> str:
        """Returns all fields as indented JSON.

        Example:

        >>> from keras_mha.export import ExportReport
        >>> report = ExportReport("tiny", 7, "3.15.1", "2.21.0", ("keras",))
        >>> report.to_dict()["blocked"]
        ['keras']
        """
        return json.dumps(asdict(self), indent=2)

    def to_markdown(self) -> str:
        """Returns all fields as a Markdown section with a table, and one for each file.

        Example:

        >>> from keras_mha.export import ExportReport
        >>> report = ExportReport("tiny", 7, "3.15.1", "2.21.0", ())
        >>> print(report.to_markdown())
        ## ExportReport
        <BLANKLINE>
        | field | value |
        | --- | --- |
        | model | tiny |
        | parameters | 7 |
        | keras | 3.15.1 |
        | tensorflow | 2.21.0 |
        | blocked | none |
        | notes | none |
        """
        return "\n\n".join(_sections(self, self.heading, 2))

    def write(self, path: str | Path) -> None:
        """Writes the report as JSON or Markdown, by the extension of `path`.

        Raises:
            ValueError: If `path` ends neither in `.json` nor in `.md`.
        """
        path = Path(path)
        if path.suffix not in (".json", ".md"):
            raise ValueError(f"`path` must end in .json or .md. Received: {path}")
        text = self.to_json() if path.suffix == ".json" else self.to_markdown()
        part = path.with_name(f".{path.name}.part")
        part.write_text(text + "\n", "utf-8")
        part.replace(path)


def _sections(part: ReportPart, title: str, level: int) -> list[str]:
    """Returns a table of a part's fields under its title, then its own parts."""
    plain = json.loads(json.dumps(asdict(part)))
    rows = {key: plain[key] for key in plain if key not in (*part.parts, "parity")}
    # The comparison stands on the level of its owner.
    rows |= plain.get("parity") or {}
    lines = ["| field | value |", "| --- | --- |"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in rows.items()]
    sections = [f"{'#' * level} {title}", "\n".join(lines)]
    for name in part.parts:
        value = getattr(part, name)
        for one in value if isinstance(value, tuple) else filter(None, [value]):
            sections += _sections(one, one.heading, level + 1)
    return sections


def _cell(value: Any) -> str:
    return _text(value).replace("|", "\\|")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, dict) and "dtype" in value:
        return f"{value['name']} {value['dtype']} {value['shape']}"
    if isinstance(value, dict) and any(isinstance(v, list) for v in value.values()):
        return "; ".join(f"{key}: {_text(items)}" for key, items in value.items())
    if isinstance(value, dict):
        return ", ".join(f"{key} {count}" for key, count in value.items())
    return str(value)
