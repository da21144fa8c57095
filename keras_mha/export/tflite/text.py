"""Writes a TFLite file that takes strings: a tokenizer before a model of ids.

The tokenizer's operations are tensorflow-text's, which the interpreter must get:
in Python `InterpreterWithCustomOps(custom_op_registerers=SELECT_TFTEXT_OPS)`, on a
device the C++ library of the same package. All others are built in; none is Flex. The
model behind it is the one of the file of ids, operator for operator and weight for
weight, and LiteRT's CPU delegate takes it over as it does there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from keras_mha.export.cases import filled_up
from keras_mha.export.runtimes import tflite_schema
from keras_mha.export.tflite.edit import join
from keras_mha.export.tflite.file import (
    Written,
    compare_runs,
    convert,
    describe_file,
    run_litert,
    traced,
)
from keras_mha.export.tflite.graph import contents_of
from keras_mha.export.tflite.inputs import FixedInputs
from keras_mha.export.tflite.plan import Plan
from keras_mha.export.tflite.report import TFLiteFile
from keras_mha.export.tokens import INPUT

if TYPE_CHECKING:
    from keras_mha.text import WordpieceTokenizer

OPERATIONS = frozenset(
    {"FastBertNormalize", "FastWordpieceTokenizeWithOffsets", "RaggedTensorToTensor"}
)


def write_text_file(
    plan: Plan, inputs: FixedInputs, of_ids: Written, path: Path
) -> TFLiteFile:
    """Writes the file of one length at `path`, and checks it.

    Args:
        plan: That of the export, with a model of texts.
        inputs: Those of the model of ids.
        of_ids: The file of the model of ids in it.
        path: Where to write.

    Returns:
        What the report says of it.
    """
    model, length = plan.text_model, inputs.length
    if model is None or length is None:
        raise TypeError("`plan` must have a model of texts")
    ((name, spec),) = model.endpoint.inputs.items()
    rows = inputs.batch_size
    specs = {name: tf.TensorSpec((rows, *spec.shape[1:]), tf.string, name)}
    tokenizer = _of_length(model.tokenizer, length)

    def tokenize(tensors: Mapping[str, Any]) -> dict[str, Any]:
        ids = tokenizer(tensors[name])
        ids = tf.pad(ids, [[0, 0], [0, length - tokenizer.max_length]])
        # The converter forgets what shape that has.
        return {INPUT: tf.reshape(ids, (rows, length))}

    with traced(tokenize, specs, plan.signature_name, tokenizer) as graph:
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

    texts = filled_up(model.texts, rows)
    cases = [{name: texts[i : i + rows]} for i in range(0, len(texts), rows)]
    answers, facts = run_litert(path, cases, plan, "tflite/text")
    parity = compare_runs(
        model.endpoint.answer({name: texts}),
        actual=answers,
        facts=facts,
        samples=len(model.texts),
        tolerance=plan.allowed,
    )
    run = (answers, facts, parity)
    return describe_file(path, "text", inputs, specs, contents, run)


def _of_length(tokenizer: WordpieceTokenizer, length: int) -> WordpieceTokenizer:
    """The same tokenizer, with as many ids in every row as fit."""
    most = min(tokenizer.max_length, length)
    config = tokenizer.get_config() | {"max_length": most, "pad_to": most}
    return type(tokenizer).from_config(config)
