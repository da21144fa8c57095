"""Writes a TFLite file with labels and a tokenizer in it, and checks it in MediaPipe.

It holds the same model as the file of ids. MediaPipe brings its tokenizers: the check
counts the texts that they cut into the samples' ids, and compares the scores of all
texts, each with the model's for the ids that MediaPipe cut it into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_mha.export.parity import Arrays, ParityError, check_parity
from keras_mha.export.report import Parity
from keras_mha.export.runtimes import mediapipe_text
from keras_mha.export.runtimes.descriptor import File
from keras_mha.export.runtimes.fresh_process import run_in_fresh_process
from keras_mha.export.tflite.file import (
    Written,
    compare_runs,
    describe_file,
    run_litert,
)
from keras_mha.export.tflite.inputs import FixedInputs
from keras_mha.export.tflite.metadata import Metadata, add_metadata, further_inputs
from keras_mha.export.tflite.plan import Plan
from keras_mha.export.tflite.report import MediaPipeCheck, TFLiteFile

_SHOWN = 5  # texts in a report


def write_mediapipe_file(
    plan: Plan, inputs: FixedInputs, of_ids: Written, path: Path
) -> TFLiteFile:
    """Writes the file of one length at `path`, and checks it.

    Args:
        plan: That of the export, with metadata.
        inputs: Those of the model of ids.
        of_ids: The file of the model.
        path: Where to write.

    Returns:
        What the report says of it.

    Raises:
        ParityError: If a value differs by more than is allowed, the labels come back
            in another order, or MediaPipe cuts no text into the ids of its sample.
    """
    metadata, ids = plan.metadata, inputs.ids
    if metadata is None:
        raise TypeError("`plan` must have metadata")
    path.write_bytes(add_metadata(of_ids.model, metadata, plan.endpoint.model.name))
    rows = np.array_split(ids.astype(np.int32), len(ids))
    (name,) = inputs.specs
    cases = [{name: row, **further_inputs(metadata, row)} for row in rows]
    answers, facts = run_litert(path, cases, plan)
    parity = compare_runs(
        plan.endpoint.answer({name: ids}),
        actual=answers,
        facts=facts,
        samples=len(ids),
        tolerance=plan.allowed,
    )
    specs = {n: tf.TensorSpec(a.shape, tf.int32) for n, a in cases[0].items()}
    check = _check(plan, ids, metadata, path)
    run = (answers, facts, parity)
    return describe_file(path, "mediapipe", inputs, specs, of_ids.contents, run, check)


def _check(
    plan: Plan, ids: np.ndarray, metadata: Metadata, path: Path
) -> MediaPipeCheck:
    texts = list(metadata.texts or ())
    answers, facts = run_mediapipe(path, texts, timeout=plan.timeout)
    if tuple(facts["labels"]) != metadata.labels:
        raise ParityError(
            f"MediaPipe reads the labels {facts['labels']}, not "
            f"{list(metadata.labels)}. Nothing was written."
        )
    cut_ids = np.concatenate([answer["ids"] for answer in answers])
    same = np.all(cut_ids == ids, axis=1)
    if not np.any(same):
        raise ParityError(
            f"MediaPipe cuts none of the {len(texts)} texts into the ids of its "
            f"sample: {texts[0][:80]!r} into {cut_ids[0].tolist()}, not "
            f"{ids[0].tolist()}. Is the vocabulary that of the samples?"
        )
    scored = np.flatnonzero(np.all(cut_ids >= 0, axis=1))
    parity = _compare_scores(plan, cut_ids[scored], [answers[i] for i in scored], facts)
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
    plan: Plan,
    ids: np.ndarray,
    answers: Sequence[Mapping[str, np.ndarray]],
    facts: Mapping[str, Any],
) -> Parity:
    """Compares MediaPipe's scores with the model's for the ids that it cut."""
    (name,) = plan.endpoint.inputs
    ((output, wanted),) = plan.endpoint.answer({name: ids}).items()
    return check_parity(
        [{output: wanted[i : i + 1]} for i in range(len(wanted))],
        [{output: answer["scores"]} for answer in answers],
        tolerance=plan.allowed,
        samples=len(ids),
        runtime=facts["runtime"],
        runtime_version=facts["version"],
    )
