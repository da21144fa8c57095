"""The report of `export_saved_model`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from keras_mha.export.report import (
    ExportReport,
    Parity,
    ReportPart,
    TensorInfo,
    WrittenFile,
)


@dataclass(frozen=True)
class SignatureReport(ReportPart):
    """A further signature, checked like the first.

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

    @property
    def heading(self) -> str:
        """The title of its section."""
        return f"signature {self.name}"


@dataclass(frozen=True)
class ServedTFLite(SignatureReport):
    """The signature of `model.tflite`."""

    @property
    def heading(self) -> str:
        """The title of its section."""
        return f"signature {self.name} of model.tflite"


@dataclass(frozen=True)
class SavedModelReport(ExportReport):
    """The files that `export_saved_model` wrote and checked.

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
            rows of its batch; `None` where no server may batch.
        parity: The comparison with the model.
        gpu_note: What to know before it is served on a GPU.
        further_signatures: Those other than `serving_default` and `serve`.
        tflite: The signature of `model.tflite`, if that was asked for.
    """

    parts: ClassVar = ("further_signatures", "tflite")

    path: str
    version: int
    size_bytes: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    warmup_records: int
    compiled_marks_removed: int
    custom_operations: tuple[str, ...]
    batch_difference: float | None
    parity: Parity
    gpu_note: str
    further_signatures: tuple[SignatureReport, ...] = ()
    tflite: ServedTFLite | None = None

    def written(self) -> Sequence[WrittenFile]:
        """Returns the version's directory."""
        return (self,)
