"""Writes what goes with TFLite files: vocabulary, labels, manifest and snippets."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from keras_mha.export.report import TensorInfo
from keras_mha.export.tflite.metadata import LABELS, VOCABULARY, lines
from keras_mha.export.tflite.report import TFLiteFile

MANIFEST = "manifest.json"
# The oldest GPU delegate that is right on a mask that is added (LiteRT#8593).
_MIN_LITERT_GPU = "2.1.6"
_SNIPPETS = Path(__file__).with_name("snippets")


def write_companions(
    directory: Path,
    files: Sequence[TFLiteFile],
    *,
    vocabulary: Sequence[str] | None,
    labels: Sequence[str] | None,
    signature_name: str,
) -> list[Path]:
    """Writes them into `directory`, the manifest as the last.

    Args:
        directory: Where `files` are.
        files: The TFLite files.
        vocabulary: Tokens in the order of their ids, where there is a tokenizer.
        labels: Names of the classes, where they are known.
        signature_name: The signature's name.
    """
    written = []

    def write(name: str, content: bytes) -> None:
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        written.append(path)

    if vocabulary is not None:
        write(VOCABULARY, lines(vocabulary))
    if labels is not None:
        write(LABELS, lines(labels))
    for name, text in _snippets(files, signature_name).items():
        write(f"snippets/{name}", text.encode())
    names = [path.relative_to(directory).as_posix() for path in written]
    manifest = _manifest(directory, files, names, signature_name)
    write(MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")
    return written


def _manifest(
    directory: Path,
    files: Sequence[TFLiteFile],
    companions: Sequence[str],
    signature_name: str,
) -> dict[str, Any]:
    """Tells a program that runs the files what it must know, and if all fit together.

    Each file appears whole under its name, but not all at once: hashes that fit tell
    that all are of one export.
    """
    entries = {
        Path(file.path).name: {
            "kind": file.kind,
            "inputs": [asdict(tensor) for tensor in file.inputs],
            "outputs": [asdict(tensor) for tensor in file.outputs],
            "custom_operations": file.custom_operations,
            "min_runtime_version": file.min_runtime_version,
            "sha256": _sha256(Path(file.path)),
        }
        for file in files
    }
    return {
        "signature_name": signature_name,
        "min_litert_version_for_gpu": _MIN_LITERT_GPU,
        "files": entries,
        "companions": {name: _sha256(directory / name) for name in companions},
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _snippets(files: Sequence[TFLiteFile], signature_name: str) -> dict[str, str]:
    """Programs for phones, by the name of their file."""
    texts = {}
    stems = {"ids": "litert", "tensors": "litert", "mediapipe": "mediapipe"}
    first = {stems[file.kind]: file for file in reversed(files) if file.kind in stems}
    for stem, file in first.items():
        for suffix in (".kt", ".swift"):
            template = Template((_SNIPPETS / f"{stem}{suffix}").read_text("utf-8"))
            facts = _facts(file) | {"signature": signature_name}
            texts[f"{stem}{suffix}"] = template.substitute(facts)
    return dict(sorted(texts.items()))


# Kotlin's buffers, by the types of TFLite; all others are bytes.
_BUFFERS = {"float32": "FloatBuffer", "int32": "IntBuffer", "int64": "LongBuffer"}


def _facts(file: TFLiteFile) -> dict[str, str]:
    """Returns what the programs say of a file."""
    answers = ", ".join(
        f'"{one.name}" to {_buffer(one)}({_count(one)})' for one in file.outputs
    )
    return {
        "file": Path(file.path).name,
        "stem": Path(file.path).stem,
        "takes": "; ".join(map(_written, file.inputs)),
        "gives": "; ".join(map(_written, file.outputs)),
        "counts": ", ".join(f'"{one.name}" to {_count(one)}' for one in file.inputs),
        "answers": answers,
        "sizes": ", ".join(f'"{one.name}": {_bytes(one)}' for one in file.inputs),
        "outputs": ", ".join(f'"{one.name}"' for one in file.outputs),
    }


def _buffer(tensor: TensorInfo) -> str:
    kind = _BUFFERS.get(tensor.dtype)
    return f"{kind}.allocate" if kind else "ByteBuffer.allocateDirect"


def _count(tensor: TensorInfo) -> int:
    return math.prod(size or 1 for size in tensor.shape or ())


def _bytes(tensor: TensorInfo) -> int:
    return _count(tensor) * np.dtype(tensor.dtype).itemsize


def _written(tensor: TensorInfo) -> str:
    return f"{tensor.name}, {tensor.dtype} {list(tensor.shape or ())}"
