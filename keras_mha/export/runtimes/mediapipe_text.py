"""Runs a TFLite file with metadata in MediaPipe's TextClassifier.

Stand-alone: mediapipe, ai_edge_litert's schema and NumPy, no import of tensorflow.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def run(
    path: str, cases: Sequence[Mapping[str, np.ndarray]]
) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
    """Classifies the text of every case.

    MediaPipe does not tell into which ids it cuts a text. So that these can be
    compared too, its TextEmbedder runs the same metadata with a graph that gives back
    the ids.

    Args:
        path: The file.
        cases: One array each, of one text as bytes. MediaPipe takes UTF-8 alone: bytes
            that are none are refused.

    Returns:
        For each case the `scores` `(1, C)` in the order of the labels, and the `ids`
        `(1, S)`; NaN and -1 for a text that was refused. And facts about the runtime,
        among them the `labels`.
    """
    import mediapipe
    from mediapipe.tasks.python.core.base_options import BaseOptions
    from mediapipe.tasks.python.text.text_classifier import TextClassifier
    from mediapipe.tasks.python.text.text_embedder import (
        TextEmbedder,
        TextEmbedderOptions,
    )

    content = Path(path).read_bytes()
    probe = TextEmbedderOptions(BaseOptions(model_asset_buffer=_giving_ids(content)))
    answers, labels = [], []
    with (
        TextClassifier.create_from_model_path(path) as classifier,
        TextEmbedder.create_from_options(probe) as embedder,
    ):
        for number, case in enumerate(cases):
            text = _decoded(case)
            # Classified even where it is refused: that tells the shapes.
            (found,) = classifier.classify(text or "").classifications
            categories = sorted(found.categories, key=lambda one: one.index)
            scores = np.array([[one.score for one in categories]], np.float32)
            if number >= len(cases):  # run again to be timed
                continue
            (embedding,) = embedder.embed(text or "").embeddings
            ids = np.array([embedding.embedding]).astype(np.int32)
            if text is None:
                scores, ids = scores * np.nan, 0 * ids - 1
            answers.append({"scores": scores, "ids": ids})
            labels = [one.category_name for one in categories]
    facts = {
        "runtime": "MediaPipe TextClassifier",
        "version": mediapipe.__version__,
        "labels": labels,
    }
    return answers, facts


def _decoded(case: Mapping[str, np.ndarray]) -> str | None:
    (texts,) = case.values()
    try:
        return texts.ravel()[0].decode()
    except UnicodeDecodeError:
        return None


def _giving_ids(content: bytes) -> bytes:
    """The same file with another graph, that turns its first input into floats."""
    from ai_edge_litert import schema_py_generated as schema
    from flatbuffers import Builder

    model: Any = schema.ModelT.InitFromPackedBuf(content, 0)
    kept = {entry.buffer for entry in model.metadata}
    for number, buffer in enumerate(model.buffers):
        if number not in kept:
            buffer.data = None
    graph = model.subgraphs[0]
    tensors = [graph.tensors[number] for number in graph.inputs]
    ids = tensors[0]
    ids_as_float = schema.TensorT(
        shape=ids.shape, type=schema.TensorType.FLOAT32, name="ids_as_float"
    )
    operator = schema.OperatorT(
        opcodeIndex=0,
        inputs=[0],
        outputs=[len(tensors)],
        builtinOptionsType=schema.BuiltinOptions.CastOptions,
        builtinOptions=schema.CastOptionsT(
            inDataType=ids.type, outDataType=schema.TensorType.FLOAT32
        ),
    )
    cast = schema.BuiltinOperator.CAST
    model.operatorCodes = [
        schema.OperatorCodeT(deprecatedBuiltinCode=cast, builtinCode=cast, version=1)
    ]
    graph.inputs = list(range(len(tensors)))
    graph.outputs = [len(tensors)]
    graph.tensors, graph.operators = [*tensors, ids_as_float], [operator]
    model.subgraphs, model.signatureDefs = [graph], []
    builder = Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    probe = io.BytesIO()
    probe.write(builder.Output())
    with (
        zipfile.ZipFile(io.BytesIO(content)) as own,
        zipfile.ZipFile(probe, "a") as archive,
    ):
        for name in own.namelist():
            archive.writestr(name, own.read(name))
    return probe.getvalue()
