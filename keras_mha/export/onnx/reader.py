"""Describes an ONNX file to its runtimes."""

from __future__ import annotations

from pathlib import Path

from keras_mha.export.cases import Opened, Samples
from keras_mha.export.runtimes.descriptor import File


def open_file(
    path: Path, samples: Samples, *, signature_name: str, timeout: float
) -> Opened:
    """Describes the file; its runtimes are the ones that read it.

    Args:
        path: The file.
        samples: The model and its samples.
        signature_name: Not needed: the format has no signatures.
        timeout: Not needed: nothing is read.
    """
    del signature_name, timeout
    outputs = {name: name for name in samples.output_names}
    return Opened(File(path, "onnx", outputs=outputs), samples.in_batches)
