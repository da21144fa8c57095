"""Runs a TFLite file with metadata in MediaPipe's TextClassifier.

Stand-alone: mediapipe, ai_edge_litert's schema and NumPy, no import of tensorflow.
"""

from __future__ import annotations

import atexit
import functools
import io
import zipfile
from pathlib import Path
from typing import Any

from .descriptor import Arrays, Loaded, Runtime


def load(path: str) -> Loaded:
    """Loads the file at `path` to classify one text in each case.

    A case is one array of one text as bytes. Its answer has the `scores` `(1, C)` in
    the order of the labels, and the `ids` `(1, S)` into which the text is cut; NaN and
    -1 for bytes that are not UTF-8, which MediaPipe refuses. The facts hold the
    `labels`.

    MediaPipe does not tell into which ids it cuts a text. So that these can be
    compared too, its TextEmbedder runs the same metadata with a graph that gives back
    the ids.
    """
    import mediapipe
    import numpy as np
    from mediapipe.tasks.python.core.base_options import BaseOptions
    from mediapipe.tasks.python.text.text_classifier import TextClassifier
    from mediapipe.tasks.python.text.text_embedder import (
        TextEmbedder,
        TextEmbedderOptions,
    )

    content = Path(path).read_bytes()
    probe = TextEmbedderOptions(BaseOptions(model_asset_buffer=_giving_ids(content)))
    classifier = TextClassifier.create_from_model_path(path)
    atexit.register(classifier.close)
    embedder = TextEmbedder.create_from_options(probe)
    atexit.register(embedder.close)
    labels: list[str] = []

    @functools.cache  # a case that is run again to be timed is only classified
    def cut(text: str) -> Any:
        (embedding,) = embedder.embed(text).embeddings
        return np.array([embedding.embedding]).astype(np.int32)

    def answer(case: Arrays) -> Arrays:
        text = _decoded(case)
        # Classified even where it is refused: that tells the shapes.
        (result,) = classifier.classify(text or "").classifications
        categories = sorted(result.categories, key=lambda one: one.index)
        labels[:] = [str(one.category_name) for one in categories]
        scores = np.array([[one.score for one in categories]], np.float32)
        ids = cut(text or "")
        if text is None:
            return {"scores": scores * np.nan, "ids": 0 * ids - 1}
        return {"scores": scores, "ids": ids}

    def facts() -> dict[str, Any]:
        return {"version": mediapipe.__version__, "labels": labels}

    return answer, facts


def _decoded(case: Arrays) -> str | None:
    (texts,) = case.values()
    try:
        return texts.ravel()[0].decode()
    except UnicodeDecodeError:
        return None


def _giving_ids(content: bytes) -> bytes:
    """Replaces the graph by one that turns its first input into floats."""
    from ai_edge_litert import schema_py_generated as schema
    from flatbuffers import Builder

    model: Any = schema.ModelT.InitFromPackedBuf(content, 0)
    in_use = {entry.buffer for entry in model.metadata}
    for number, buffer in enumerate(model.buffers):
        if number not in in_use:
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
        zipfile.ZipFile(io.BytesIO(content)) as source,
        zipfile.ZipFile(probe, "a") as archive,
    ):
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    return probe.getvalue()


RUNTIME = Runtime(
    "mediapipe_text",
    "MediaPipe TextClassifier",
    ("tflite/mediapipe",),
    {"mediapipe": "mediapipe", "ai_edge_litert": "tflite"},
    takes_text=True,
    cuts_texts=True,
)
