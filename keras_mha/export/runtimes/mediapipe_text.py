"""Runs a TFLite file with metadata in MediaPipe's TextClassifier.

Stand-alone: mediapipe, `tflite_schema` and NumPy, no import of tensorflow.
"""

from __future__ import annotations

import atexit
import functools
import io
import zipfile
from pathlib import Path
from typing import Any

from . import tflite_schema
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
    model = tflite_schema.unpack(content)
    tflite_schema.give_back_ids(model)
    probe = io.BytesIO()
    probe.write(tflite_schema.pack(model))
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
