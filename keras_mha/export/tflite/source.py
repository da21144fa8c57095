"""What `export_tflite` makes files of: a model of ids, and one of texts around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from keras_mha.export.endpoint import Endpoint, describe
from keras_mha.export.tflite.arguments import as_rows, check_input
from keras_mha.export.tokens import INPUT, after_tokenizer, tokenizer_of

if TYPE_CHECKING:
    from keras_mha.text import WordpieceTokenizer


@dataclass(frozen=True)
class TextModel:
    """A model of texts.

    Attributes:
        endpoint: The model; it has one input.
        texts: The samples, as bytes in the shape that the input has.
        tokenizer: Its tokenizer.
    """

    endpoint: Endpoint
    texts: np.ndarray
    tokenizer: WordpieceTokenizer


@dataclass(frozen=True)
class Source:
    """A model of ids.

    Attributes:
        model: The model.
        output_names: Its outputs' names; `None` for its own.
        rows: The samples' ids.
        ranges: The same of the representative data.
        whole: The model of texts that it is a part of, if it is one.
    """

    model: keras.Model
    output_names: Sequence[str] | None
    rows: Sequence[np.ndarray]
    ranges: Sequence[np.ndarray] | None
    whole: TextModel | None = None

    def describe(self, ids: np.ndarray) -> tuple[Endpoint, np.ndarray]:
        """The model by the names of its inputs and outputs, and its ids."""
        endpoint, arrays = describe(self.model, ids, self.output_names)
        return endpoint, next(iter(arrays.values()))


def read_source(
    model: keras.Model, samples: Any, representative_data: Any, *, text: bool
) -> Source:
    """Takes a model of ids as it is, and cuts one of texts behind its tokenizer.

    Args:
        model: The model.
        samples: Its inputs.
        representative_data: Further ones, or `None`.
        text: Whether the model is one of texts.

    Raises:
        TypeError: If samples have another type than the model's input.
        ValueError: If it is no model that is asked for.
    """
    if not text:
        check_input(model)
        ranges = representative_data
        return Source(
            model,
            None,
            as_rows(samples, "samples"),
            None if ranges is None else as_rows(ranges, "representative_data"),
        )
    endpoint, arrays = describe(model, samples)
    if len(arrays) != 1 or next(iter(endpoint.inputs.values())).dtype != tf.string:
        raise ValueError(
            "With `text=True`, `model` must have one input, of strings. Received the "
            f"inputs { {n: spec.dtype.name for n, spec in endpoint.inputs.items()} }"
        )
    inner, cut = after_tokenizer(endpoint, arrays)
    check_input(inner.model)
    ranges = None
    if representative_data is not None:
        _, further = describe(model, representative_data)
        ranges = _unpadded(after_tokenizer(endpoint, further)[1][INPUT])
    (texts,) = arrays.values()
    return Source(
        inner.model,
        list(inner.answer({name: array[:1] for name, array in cut.items()})),
        _unpadded(cut[INPUT]),
        ranges,
        TextModel(endpoint, texts, tokenizer_of(model)),
    )


def _unpadded(ids: np.ndarray) -> list[np.ndarray]:
    return [row[: 1 + np.flatnonzero(row)[-1]] for row in ids]
