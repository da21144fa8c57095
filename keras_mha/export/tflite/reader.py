"""Reads what a TFLite file's runtimes need to know of it, without running it."""

from __future__ import annotations

from pathlib import Path

from keras_mha.export.cases import Opened, Samples, fixed_cases, text_cases
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
    inputs = [graph["tensors"][number] for number in graph["inputs"]]
    if contents["has_metadata"]:
        kind = "tflite/mediapipe"
    else:
        kind = "tflite/text" if inputs[0]["dtype"] == "string" else "tflite"
    if samples.are_texts != (kind != "tflite"):
        raise AbsentError(
            "it takes ids, and no strings"
            if samples.are_texts
            else "it takes texts, and the model ids: verify the model of texts"
        )
    if kind == "tflite/mediapipe":
        try:
            cases = text_cases(samples, inputs[0]["shape"][-1])
        except ValueError as error:
            raise AbsentError(f"its ids cannot be compared: {error}") from error
    elif len(inputs) != 1:
        raise ValueError(f"{path} must have one input, and has {len(inputs)}")
    else:
        cases = fixed_cases(samples, inputs[0]["shape"], inputs[0]["dtype"])
    quantized = any(
        # The tokenizer's tables are bytes.
        tensor["constant"] and tensor["dtype"] in _SMALL and tensor["dtype"] != "uint8"
        for tensor in graph["tensors"]
    )
    file = File(path, kind, signature_name)
    return Opened(file, cases, quantized=quantized, unread=_UNREAD[kind])
