"""The report of `export_tflite`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

from keras_mha.export.report import (
    ExportReport,
    Parity,
    ReportPart,
    TensorInfo,
    WrittenFile,
)

Kind: TypeAlias = Literal["ids", "tensors", "text", "mediapipe"]


@dataclass(frozen=True)
class MediaPipeCheck(ReportPart):
    """A file with metadata in MediaPipe's TextClassifier.

    MediaPipe cuts texts itself. The scores of all texts are compared, each with what
    the model gives for the ids that MediaPipe made of it.

    Attributes:
        status: `"ok"`: a file that MediaPipe has not run is not published.
        reason: Empty.
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

    @property
    def heading(self) -> str:
        """The title of its section."""
        return "in MediaPipe"

    def remark(self) -> str:
        """Returns what a table of all files says about it."""
        if self.parity is None:
            return f"MediaPipe {self.status}: {self.reason}"
        return (
            f"MediaPipe {self.parity.runtime_version}, {self.same_ids} of "
            f"{self.texts} texts into the same ids"
        )


@dataclass(frozen=True)
class TFLiteFile(ReportPart):
    """One file that `export_tflite` wrote and checked.

    Attributes:
        path: Where it is.
        kind: `"ids"` takes ids of one of several lengths, `"tensors"` takes what else
            a model does, `"text"` takes strings, and `"mediapipe"` has labels and a
            tokenizer in it for MediaPipe, which takes strings.
        sequence_length: The length S in its name; `None` for a file of tensors.
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

    parts: ClassVar = ("mediapipe",)

    path: str
    kind: Kind
    sequence_length: int | None
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

    @property
    def heading(self) -> str:
        """The title of its section."""
        return Path(self.path).name

    def remarks(self) -> Sequence[str]:
        """Returns what else a table of all files says about it."""
        return () if self.mediapipe is None else (self.mediapipe.remark(),)


@dataclass(frozen=True)
class TFLiteReport(ExportReport):
    """The files that `export_tflite` wrote and checked.

    Attributes:
        signature_name: The name of the signature in every file.
        quantization: How the files were shrunk, or `None`.
        target: What the files are for.
        files: One entry for each file, by length and kind.
        companions: The paths of the other files: `vocab.txt` and `labels.txt`
            where they are known, `manifest.json`, and snippets of code.
    """

    parts: ClassVar = ("files",)

    signature_name: str
    quantization: str | None
    target: str
    files: tuple[TFLiteFile, ...]
    companions: tuple[str, ...]

    def written(self) -> Sequence[WrittenFile]:
        """Returns the files by length and kind."""
        return self.files
