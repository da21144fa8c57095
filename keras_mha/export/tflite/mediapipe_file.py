"""Writes a TFLite file with labels and a tokenizer in it, and checks it in MediaPipe.

The model in it is the one of the file of ids. MediaPipe's tokenizers are its own: the
check tells how many texts they cut into the samples' ids, and compares the scores of
all texts, each with what the model gives for the ids that MediaPipe made of it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_mha.export.endpoint import Endpoint
from keras_mha.export.parity import Arrays, ParityError, check_parity
from keras_mha.export.report import Parity
from keras_mha.export.runtimes import mediapipe_text
from keras_mha.export.runtimes.descriptor import File
from keras_mha.export.runtimes.fresh_process import run_in_fresh_process
from keras_mha.export.tflite.arguments import pad
from keras_mha.export.tflite.file import (
    Settings,
    compare_runs,
    describe_file,
    run_litert,
)
from keras_mha.export.tflite.metadata import (
    BertMetadata,
    Metadata,
    RegexMetadata,
    add_metadata,
    further_inputs,
)
from keras_mha.export.tflite.report import MediaPipeCheck, TFLiteFile
from keras_mha.export.tflite.source import Source

INSTALL = "pip install 'keras-mha[mediapipe]'"
_SHOWN = 5  # texts in a report


def complete(
    metadata: Any, source: Source, *, batch_size: int, length: int
) -> Metadata:
    """Metadata with the vocabulary and the texts of a model of texts.

    Args:
        metadata: What the caller gave.
        source: The model.
        batch_size: The files' number of rows.
        length: The length of one of them.

    Raises:
        TypeError: If it is no metadata.
        ValueError: If it does not fit the model.
    """
    if not isinstance(metadata, BertMetadata | RegexMetadata):
        raise TypeError(
            "`metadata` must be a BertMetadata or a RegexMetadata. Received: "
            f"{metadata!r} of type {type(metadata).__name__}"
        )
    if batch_size != 1:
        raise ValueError(
            "`metadata` is for files of one row, as MediaPipe runs them. Received: "
            f"batch_size={batch_size}"
        )
    _check_labels(metadata, source, length)
    whole = source.whole
    if whole is not None:
        if isinstance(metadata, RegexMetadata):
            raise ValueError(
                "`metadata` must be a BertMetadata where the model has a tokenizer, "
                "which is one of wordpieces. Received: a RegexMetadata"
            )
        for name in ("vocabulary", "texts"):
            if getattr(metadata, name) is not None:
                raise ValueError(
                    f"`metadata` must leave out `{name}` where the model has a "
                    "tokenizer, which tells it. Received: one of "
                    f"{len(getattr(metadata, name))} strings"
                )
        if not whole.tokenizer.lowercase:
            raise ValueError(
                "`metadata` is for a tokenizer with `lowercase=True`: MediaPipe's "
                "lowers letters. Received a model whose tokenizer has lowercase=False"
            )
        # What is no UTF-8 stands for itself until MediaPipe refuses it.
        texts = [text.decode("utf-8", "surrogateescape") for text in whole.texts.flat]
        vocabulary = whole.tokenizer.get_vocabulary()
        return replace(metadata, vocabulary=vocabulary, texts=texts)
    if metadata.vocabulary is None or metadata.texts is None:
        raise ValueError(
            "`metadata` must hold `vocabulary` and `texts` for a model of ids. "
            f"Received: vocabulary={_brief(metadata.vocabulary)} and "
            f"texts={_brief(metadata.texts)}"
        )
    if len(metadata.texts) != len(source.rows):
        raise ValueError(
            "`metadata` must hold in `texts` one text for each of the samples. "
            f"Received: {len(metadata.texts)} texts and {len(source.rows)} samples"
        )
    return metadata


def _brief(items: Sequence[str] | None) -> str:
    return "None" if items is None else f"{len(items)} strings"


def _check_labels(metadata: Metadata, source: Source, length: int) -> None:
    endpoint, ids = source.describe(pad(source.rows[:1], length, "samples"))
    answer = endpoint.answer({next(iter(endpoint.inputs)): ids})
    shapes = {name: (array.dtype.name, array.shape) for name, array in answer.items()}
    wanted = [("float32", (1, len(metadata.labels)))]
    if list(shapes.values()) != wanted:
        raise ValueError(
            f"`metadata` has {len(metadata.labels)} labels, for a model with one "
            f"float32 output of shape (B, {len(metadata.labels)}). Received a model "
            f"with the outputs {shapes}"
        )


def write_mediapipe_file(
    endpoint: Endpoint,
    ids: np.ndarray,
    metadata: Metadata,
    ids_file: TFLiteFile,
    path: Path,
    settings: Settings,
) -> TFLiteFile:
    """Writes the file at `path`, checks it, and says what it found.

    Args:
        endpoint: The model of ids.
        ids: The samples.
        metadata: With a vocabulary, and a text for each sample.
        ids_file: The file of the model.
        path: Where to write.
        settings: Those of the export.

    Raises:
        ParityError: If a value differs by more than is allowed, the labels come back
            in another order, or MediaPipe cuts no text into the ids of its sample.
    """
    content = Path(ids_file.path).read_bytes()
    path.write_bytes(add_metadata(content, metadata, endpoint.model.name))
    ((name, free),) = endpoint.inputs.items()
    rows = np.array_split(ids.astype(np.int32), len(ids))
    cases = [{name: row, **further_inputs(metadata, row)} for row in rows]
    answers, facts = run_litert(path, cases, settings)
    wanted = endpoint.answer({name: ids.astype(free.dtype.as_numpy_dtype)})
    parity = compare_runs(
        wanted,
        actual=answers,
        facts=facts,
        samples=len(ids),
        tolerance=settings.allowed,
    )
    specs = {n: tf.TensorSpec(a.shape, tf.int32) for n, a in cases[0].items()}
    check = _check(endpoint, ids, metadata, path, settings)
    found = (answers, facts, parity)
    return describe_file(path, "mediapipe", ids.shape[1], specs, settings, found, check)


def _check(
    endpoint: Endpoint,
    ids: np.ndarray,
    metadata: Metadata,
    path: Path,
    settings: Settings,
) -> MediaPipeCheck:
    if importlib.util.find_spec("mediapipe") is None:
        return MediaPipeCheck("not run", INSTALL)
    texts = list(metadata.texts or ())
    answers, facts = run_mediapipe(path, texts, timeout=settings.timeout)
    if tuple(facts["labels"]) != metadata.labels:
        raise ParityError(
            f"MediaPipe reads the labels {facts['labels']}, not "
            f"{list(metadata.labels)}. Nothing was written."
        )
    own_ids = np.concatenate([answer["ids"] for answer in answers])
    same = np.all(own_ids == ids, axis=1)
    if not np.any(same):
        raise ParityError(
            f"MediaPipe cuts none of the {len(texts)} texts into the ids of its "
            f"sample: {texts[0][:80]!r} into {own_ids[0].tolist()}, not "
            f"{ids[0].tolist()}. Is the vocabulary the samples' own?"
        )
    scored = np.flatnonzero(np.all(own_ids >= 0, axis=1))
    parity = _compare_scores(
        endpoint, own_ids[scored], [answers[i] for i in scored], facts, settings.allowed
    )
    return MediaPipeCheck(
        status="ok",
        texts=len(texts),
        same_ids=int(np.sum(same)),
        other_ids=tuple(repr(texts[i][:80]) for i in np.flatnonzero(~same)[:_SHOWN]),
        parity=parity,
    )


def run_mediapipe(
    path: Path, texts: Sequence[str], *, timeout: float
) -> tuple[list[Arrays], dict[str, Any]]:
    """Runs every text; see `keras_mha.export.runtimes.mediapipe_text`."""
    cases = []
    for text in texts:
        array = np.empty((1,), object)
        array[0] = text.encode("utf-8", "surrogateescape")
        cases.append({"text": array})
    return run_in_fresh_process(
        mediapipe_text.RUNTIME, File(path, "tflite/mediapipe"), cases, timeout=timeout
    )


def _compare_scores(
    endpoint: Endpoint,
    ids: np.ndarray,
    answers: Sequence[Mapping[str, np.ndarray]],
    facts: Mapping[str, Any],
    tolerance: float,
) -> Parity:
    """Compares MediaPipe's scores with the model's for the ids that MediaPipe made."""
    ((name, spec),) = endpoint.inputs.items()
    given = ids.astype(spec.dtype.as_numpy_dtype)
    ((output, wanted),) = endpoint.answer({name: given}).items()
    return check_parity(
        [{output: wanted[i : i + 1]} for i in range(len(wanted))],
        [{output: answer["scores"]} for answer in answers],
        tolerance=tolerance,
        samples=len(ids),
        runtime=facts["runtime"],
        runtime_version=facts["version"],
    )
