"""Writes a TFLite file that takes strings: a tokenizer before a model of ids.

The tokenizer's operations are tensorflow-text's, which the interpreter must get:
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

from keras_mha.export.runtimes import tflite_schema
from keras_mha.export.tflite.edit import join
from keras_mha.export.tflite.file import (
    Written,
    batches,
    compare_runs,
    convert,
    describe_file,
    run_litert,
    trace,
)
from keras_mha.export.tflite.graph import contents_of
from keras_mha.export.tflite.plan import Padded, Plan
from keras_mha.export.tflite.report import TFLiteFile
from keras_mha.export.tokens import INPUT

if TYPE_CHECKING:
    from keras_mha.text import WordpieceTokenizer

OPERATIONS = frozenset(
    {"FastBertNormalize", "FastWordpieceTokenizeWithOffsets", "RaggedTensorToTensor"}
)


def write_text_file(
    plan: Plan, padded: Padded, of_ids: Written, path: Path
) -> TFLiteFile:
    """Writes the file of one length at `path`, and checks it.

    Args:
        plan: That of the export, with a model of texts.
        padded: The length.
        of_ids: The file of the model of ids in it.
        path: Where to write.

    Returns:
        What the report says of it.
    """
    model, length = plan.text_model, padded.length
    if model is None:
        raise TypeError("`plan` must have a model of texts")
    (name,) = model.endpoint.inputs
    shape = (plan.batch_size, *model.texts.shape[1:])
    spec = tf.TensorSpec(shape, tf.string, name)
    graph = path.with_suffix("")
    tokenizer = _of_length(model.tokenizer, length)

    def tokenize(texts: Any) -> dict[str, Any]:
        ids = tokenizer(texts)
        ids = tf.pad(ids, [[0, 0], [0, length - tokenizer.max_length]])
        # The converter forgets what shape that has.
        return {INPUT: tf.reshape(ids, (plan.batch_size, length))}

    trace(tokenize, spec, graph, plan.signature_name, tokenizer)
    front = convert(graph, plan.signature_name, None, (), custom=True)
    joined = join(tflite_schema.unpack(front), of_ids.model)
    content = tflite_schema.pack(joined)
    contents = contents_of(tflite_schema.describe(joined, len(content)))
    foreign = set(contents.custom) - OPERATIONS
    if foreign:
        raise ValueError(
            "`model` has a tokenizer that this tensorflow-text writes with operations "
            f"that it does not register in TFLite. Received: {sorted(foreign)}"
        )
    path.write_bytes(content)

    runs = batches(model.texts, plan.batch_size)
    answers, facts = run_litert(
        path, [{name: texts} for texts in runs], plan, "tflite/text"
    )
    parity = compare_runs(
        model.endpoint.answer({name: np.concatenate(runs)}),
        actual=answers,
        facts=facts,
        samples=len(model.texts),
        tolerance=plan.allowed,
    )
    run = (answers, facts, parity)
    return describe_file(path, "text", length, {name: spec}, plan, contents, run)


def _of_length(tokenizer: WordpieceTokenizer, length: int) -> WordpieceTokenizer:
    """The same tokenizer, with as many ids in every row as fit."""
    most = min(tokenizer.max_length, length)
    config = tokenizer.get_config() | {"max_length": most, "pad_to": most}
    return type(tokenizer).from_config(config)
