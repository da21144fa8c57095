"""Writes a TFLite file that takes strings: a tokenizer before a model of ids.

The tokenizer's operations are tensorflow-text's, which an interpreter must be given:
in Python `InterpreterWithCustomOps(custom_op_registerers=SELECT_TFTEXT_OPS)`, on a
device the C++ library of the same package. All others are built in; none is Flex. The
model behind it is the one of the file of ids, operator for operator and weight for
weight, and LiteRT's CPU delegate takes it over as it does there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from keras_mha.export.runtimes.litert import registrar
from keras_mha.export.tflite.counts import read_contents
from keras_mha.export.tflite.edit import join
from keras_mha.export.tflite.file import (
    Settings,
    batches,
    compare_runs,
    convert,
    describe_file,
    run_litert,
    trace,
)
from keras_mha.export.tflite.report import TFLiteFile
from keras_mha.export.tflite.source import TextModel
from keras_mha.export.tokens import INPUT

if TYPE_CHECKING:
    from keras_mha.text import WordpieceTokenizer

OPERATIONS = frozenset(
    {"FastBertNormalize", "FastWordpieceTokenizeWithOffsets", "RaggedTensorToTensor"}
)


def check_text(target: str) -> None:
    """Refuses what a file that takes strings cannot be written or run for.

    Raises:
        ImportError: If tensorflow-text is not installed, or not for LiteRT.
        ValueError: If the target is the GPU.
    """
    if target == "gpu":
        raise ValueError(
            "`text=True` is for the CPU: no GPU takes strings. Received: target='gpu'"
        )
    try:
        registrar()
    except FileNotFoundError as error:
        raise ImportError(str(error)) from error


def write_text_file(
    model: TextModel, ids_file: TFLiteFile, path: Path, settings: Settings
) -> TFLiteFile:
    """Writes the file at `path`, checks it, and says what it found.

    Args:
        model: The model of texts.
        ids_file: The file of the model of ids in it.
        path: Where to write.
        settings: Those of the export.
    """
    length = ids_file.sequence_length
    (name,) = model.endpoint.inputs
    shape = (settings.batch_size, *model.texts.shape[1:])
    spec = tf.TensorSpec(shape, tf.string, name)
    graph = path.with_suffix("")
    tokenizer = _of_length(model.tokenizer, length)

    def tokenize(texts: Any) -> dict[str, Any]:
        ids = tokenizer(texts)
        ids = tf.pad(ids, [[0, 0], [0, length - tokenizer.max_length]])
        # The converter forgets what shape that has.
        return {INPUT: tf.reshape(ids, (settings.batch_size, length))}

    trace(tokenize, spec, graph, settings.signature_name, tokenizer)
    front = convert(graph, settings.signature_name, None, (), custom=True)
    foreign = set(read_contents(front).custom) - OPERATIONS
    if foreign:
        raise ValueError(
            "`model` has a tokenizer that this tensorflow-text writes with operations "
            f"that it does not register in TFLite. Received: {sorted(foreign)}"
        )
    path.write_bytes(join(front, Path(ids_file.path).read_bytes()))

    runs = batches(model.texts, settings.batch_size)
    answers, facts = run_litert(
        path, [{name: texts} for texts in runs], settings, "tflite/text"
    )
    parity = compare_runs(
        model.endpoint.answer({name: np.concatenate(runs)}),
        actual=answers,
        facts=facts,
        samples=len(model.texts),
        tolerance=settings.allowed,
    )
    found = (answers, facts, parity)
    return describe_file(path, "text", length, {name: spec}, settings, found)


def _of_length(tokenizer: WordpieceTokenizer, length: int) -> WordpieceTokenizer:
    """The same tokenizer, with as many ids in every row as fit."""
    most = min(tokenizer.max_length, length)
    config = tokenizer.get_config() | {"max_length": most, "pad_to": most}
    return type(tokenizer).from_config(config)
