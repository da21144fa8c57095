"""What an export found out, as frozen dataclasses that print themselves."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal


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
    """How far an exported file's values are from its model's.

    Attributes:
        max_absolute_difference: Over all outputs of all runs.
        max_relative_difference: The same, where the model's value is not zero.
        tolerance: The absolute difference that was allowed.
        samples: Number of rows compared.
        batch_sizes: The batch sizes that were run.
        runtime: What ran the file.
        runtime_version: Its version.
    """

    max_absolute_difference: float
    max_relative_difference: float
    tolerance: float
    samples: int
    batch_sizes: tuple[int, ...]
    runtime: str
    runtime_version: str


@dataclass(frozen=True)
class ExportReport:
    """What every exporter reports.

    Attributes:
        model: The model's name.
        parameters: Number of weights in the model.
        keras: Version of Keras that wrote the files.
        tensorflow: Version of TensorFlow that wrote the files.
        blocked: Packages that the verifying process was unable to import.
    """

    model: str
    parameters: int
    keras: str
    tensorflow: str
    blocked: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain dictionaries, lists, strings and numbers."""
        return json.loads(self.to_json())

    def to_json(self) -> str:
        """All fields as indented JSON.

        Example:

        >>> from keras_mha.export import ExportReport
        >>> report = ExportReport("tiny", 7, "3.15.1", "2.21.0", ("keras",))
        >>> report.to_dict()["blocked"]
        ['keras']
        """
        return json.dumps(asdict(self), indent=2)

    def to_markdown(self) -> str:
        """All fields as a Markdown section with a table, and one for each file.

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
        """
        return "\n\n".join(_sections(f"## {type(self).__name__}", self.to_dict()))

    def write(self, path: str | Path) -> None:
        """Writes the report as JSON or Markdown, by the extension of `path`.

        Raises:
            ValueError: If `path` ends neither in `.json` nor in `.md`.
        """
        path = Path(path)
        if path.suffix not in (".json", ".md"):
            raise ValueError(f"`path` must end in .json or .md. Received: {path}")
        text = self.to_json() if path.suffix == ".json" else self.to_markdown()
        beside = path.with_name(f".{path.name}.part")
        beside.write_text(text + "\n", "utf-8")
        beside.replace(path)


@dataclass(frozen=True)
class SignatureReport:
    """A further signature of a SavedModel, checked like the first.

    Attributes:
        name: Its name.
        inputs: Its inputs.
        outputs: Its outputs.
        parity: The comparison with the model.
    """

    name: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    parity: Parity


@dataclass(frozen=True)
class SavedModelReport(ExportReport):
    """What `export_saved_model` wrote and checked.

    Attributes:
        path: The version's directory.
        version: Its number.
        size_bytes: Of all files in it.
        inputs: The signature's inputs.
        outputs: The signature's outputs.
        warmup_records: Number of requests that TF Serving replays on loading.
        compiled_marks_removed: Number of marks that would have asked for XLA.
        custom_operations: Operations that plain TensorFlow does not know; TF Serving
            has those of tensorflow-text built in.
        batch_difference: How much the answer to a row changed at most with the other
            rows of its batch.
        parity: The comparison with the model.
        gpu_note: What to know before it is served on a GPU.
        further_signatures: Those besides `serving_default` and `serve`.
        tflite: The signature of `model.tflite`, if that was asked for.
    """

    path: str
    version: int
    size_bytes: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    warmup_records: int
    compiled_marks_removed: int
    custom_operations: tuple[str, ...]
    batch_difference: float
    parity: Parity
    gpu_note: str
    further_signatures: tuple[SignatureReport, ...] = ()
    tflite: SignatureReport | None = None


@dataclass(frozen=True)
class MediaPipeCheck:
    """A file with metadata in MediaPipe's TextClassifier.

    MediaPipe cuts texts itself. The scores of all texts are compared, each with what
    the model gives for the ids that MediaPipe made of it.

    Attributes:
        status: `"ok"`, or `"not run"` where mediapipe is not installed.
        reason: What to install; empty where it was run.
        texts: Number of texts.
        same_ids: Number of texts that MediaPipe cuts into the ids of the samples.
        other_ids: The first texts that it cuts otherwise, as Python writes them.
        parity: The comparison of the scores.
    """

    status: Literal["ok", "not run"]
    reason: str = ""
    texts: int = 0
    same_ids: int = 0
    other_ids: tuple[str, ...] = ()
    parity: Parity | None = None


@dataclass(frozen=True)
class TFLiteFile:
    """One file that `export_tflite` wrote and checked.

    Attributes:
        path: Where it is.
        kind: `"ids"` takes ids, `"text"` takes strings, and `"mediapipe"` has labels
            and a tokenizer in it for MediaPipe, which takes strings.
        sequence_length: The fixed length of its ids.
        batch_size: The fixed number of rows.
        size_bytes: Of the file.
        inputs: The signature's inputs.
        outputs: The signature's outputs.
        operators: How often each builtin operation occurs, most frequent first.
        custom_operations: Operations that are not built in; tensorflow-text has those
            of a file that takes strings.
        min_runtime_version: The oldest TensorFlow Lite that has the builtin operations,
            in the versions that the file uses, as the file says itself.
        delegate_partitions: Number of parts that the CPU delegate (XNNPACK) took
            over; `None` where the runtime does not tell.
        parity: The comparison with the model, in LiteRT.
        mediapipe: The comparison in MediaPipe, for a file of that kind.
    """

    path: str
    kind: Literal["ids", "text", "mediapipe"]
    sequence_length: int
    batch_size: int
    size_bytes: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    operators: dict[str, int]
    custom_operations: tuple[str, ...]
    min_runtime_version: str
    delegate_partitions: int | None
    parity: Parity
    mediapipe: MediaPipeCheck | None = None


@dataclass(frozen=True)
class TFLiteReport(ExportReport):
    """What `export_tflite` wrote and checked.

    Attributes:
        signature_name: The name of the signature in every file.
        quantization: How the files' numbers were made smaller, or `None`.
        target: What the files are for.
        notes: One sentence for each layer that was exported as it is.
        files: One entry for each file, by length and kind.
        companions: The paths of what stands beside them: `vocab.txt` and `labels.txt`
            where they are known, `manifest.json`, and snippets of code.
    """

    signature_name: str
    quantization: str | None
    target: str
    notes: tuple[str, ...]
    files: tuple[TFLiteFile, ...]
    companions: tuple[str, ...]


@dataclass(frozen=True)
class ONNXReport(ExportReport):
    """What `export_onnx` wrote and checked.

    Attributes:
        path: Where the file is.
        opset: Version of ONNX' operations that it uses.
        size_bytes: Of the file.
        inputs: Its inputs.
        outputs: Its outputs.
        operators: How often each operation occurs, most frequent first.
        free_sizes: The sizes that each free one had in the comparison, by the name
            of the size: `batch`, or the input and the axis, such as `ids_1`.
        parity: The comparison with the model.
    """

    path: str
    opset: int
    size_bytes: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    operators: dict[str, int]
    free_sizes: dict[str, tuple[int, ...]]
    parity: Parity


def _sections(title: str, fields: dict[str, Any]) -> list[str]:
    """A table of `fields` under `title`, then one section for each part."""
    files = fields.get("files", [])
    signatures = fields.get("further_signatures", [])
    mediapipe, tflite = fields.get("mediapipe"), fields.get("tflite")
    nested = ("files", "further_signatures", "parity", "mediapipe", "tflite")
    # A nested comparison stands on the level of its owner.
    flat = {key: fields[key] for key in fields if key not in nested}
    flat |= fields.get("parity") or {}
    rows = ["| field | value |", "| --- | --- |"]
    rows += [f"| {key} | {_cell(value)} |" for key, value in flat.items()]
    parts = [title, "\n".join(rows)]
    for file in files:
        parts += _sections(f"### {Path(file['path']).name}", file)
    for signature in signatures:
        parts += _sections(f"### signature {signature['name']}", signature)
    if mediapipe:
        parts += _sections("#### in MediaPipe", mediapipe)
    if tflite is not None:
        parts += _sections(f"### signature {tflite['name']} of model.tflite", tflite)
    return parts


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
