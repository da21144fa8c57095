"""The report of `export_onnx`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keras_mha.export.report import ExportReport, Parity, TensorInfo, WrittenFile


@dataclass(frozen=True)
class ONNXReport(ExportReport):
    """The file that `export_onnx` wrote and checked.

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

    def written(self) -> Sequence[WrittenFile]:
        """Returns the file."""
        return (self,)
