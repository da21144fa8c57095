"""Reads what a TFLite file's runtimes need to know of it, without running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_mha.export.cases import Opened, Samples, fixed_cases, text_cases
from keras_mha.export.report import TensorInfo
from keras_mha.export.runtimes.descriptor import AbsentError, File
from keras_mha.export.tflite.graph import read_file

# Why a runtime of this format does not run a file of one kind.
_UNREAD = {
    "tflite": "the file has no metadata, which `export_tflite(metadata=...)` writes",
    "tflite/text": "the file takes strings by tensorflow-text's operations, which "
    "this runtime lacks",
    "tflite/mediapipe": "the file is for MediaPipe; the file of ids has the same graph",
}
_SMALL = ("int16", "float16", "int8", "uint8", "int4", "uint4", "int2")


def open_file(
    path: Path, samples: Samples, *, signature_name: str, timeout: float
) -> Opened:
    """Reads a file in a process of its own.

    Args:
        path: The file.
        samples: The model and its samples.
        signature_name: The signature to run.
        timeout: Seconds that reading may take.

    Raises:
        AbsentError: If it takes texts and the model ids, or the other way round.
        ValueError: If it is not a TFLite file, or does not fit the model.
    """
    contents = read_file(path, timeout=timeout)
    graph, *_ = contents["graphs"]
    inputs = _inputs_of(contents, signature_name, path)
    if contents["has_metadata"]:
        kind = "tflite/mediapipe"
    else:
        takes_strings = any(tensor.dtype == "string" for tensor in inputs.values())
        kind = "tflite/text" if takes_strings else "tflite"
    if samples.are_texts != (kind != "tflite"):
        raise AbsentError(
            "it takes ids, and no strings"
            if samples.are_texts
            else "it takes texts, and the model ids: verify the model of texts"
        )
    if kind == "tflite/mediapipe":
        try:
            cases = text_cases(samples, _length(inputs))
        except ValueError as error:
            raise AbsentError(f"its ids cannot be compared: {error}") from error
    else:
        cases = fixed_cases(samples, inputs)
    quantized = any(
        # The tokenizer's tables are bytes.
        tensor["constant"] and tensor["dtype"] in _SMALL and tensor["dtype"] != "uint8"
        for tensor in graph["tensors"]
    )
    file = File(path, kind, signature_name)
    return Opened(file, cases, quantized=quantized, unread=_UNREAD[kind])


def _inputs_of(
    contents: Mapping[str, Any], signature_name: str, path: Path
) -> dict[str, TensorInfo]:
    """Returns the inputs of a signature by its names of them."""
    signatures = contents["signatures"]
    if signature_name not in signatures:
        raise ValueError(
            f"{path} must have the signature {signature_name!r}, and has "
            f"{sorted(signatures)}"
        )
    tensors = contents["graphs"][0]["tensors"]
    return {
        name: TensorInfo(name, tensor["dtype"], _free_sizes(tensor["shape"]))
        for name, number in signatures[signature_name]["inputs"].items()
        for tensor in [tensors[number]]
    }


def _free_sizes(shape: Sequence[int]) -> tuple[int | None, ...]:
    return tuple(None if size < 0 else size for size in shape)


def _length(inputs: Mapping[str, TensorInfo]) -> int:
    first = next(iter(inputs.values()))
    return (first.shape or (0,))[-1] or 0
