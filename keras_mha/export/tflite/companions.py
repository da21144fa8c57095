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
    for kind, stem in (("ids", "litert"), ("mediapipe", "mediapipe")):
        file = next((file for file in files if file.kind == kind), None)
        if file is None:
            continue
        (source, *_), (answer, *_) = file.inputs, file.outputs
        facts = {
            "file": Path(file.path).name,
            "stem": Path(file.path).stem,
            "signature": signature_name,
            "input": source.name,
            "output": answer.name,
            "length": file.sequence_length,
            "rows": file.batch_size,
            "count": math.prod(size or 1 for size in answer.shape or ()),
            "shape": ", ".join(map(str, answer.shape or ())),
        }
        for suffix in (".kt", ".swift"):
            template = (_SNIPPETS / f"{stem}{suffix}").read_text("utf-8")
            texts[f"{stem}{suffix}"] = Template(template).substitute(facts)
    return texts
