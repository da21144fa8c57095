"""The plan of an export to TFLite: its arguments, checked once, and what they say."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from keras_mha.attention.numeric import plain_integer
from keras_mha.export.device.form import (
    TARGETS,
    Target,
    device_form,
    layers_as_they_are,
)
from keras_mha.export.endpoint import Endpoint, describe
from keras_mha.export.files import check_overwrite
from keras_mha.export.parity import check_timeout, check_tolerance
from keras_mha.export.runtimes.litert import registrar
from keras_mha.export.tflite.metadata import (
    Metadata,
    check_complete,
    check_labels,
    check_metadata,
    with_tokenizer,
)
from keras_mha.export.tflite.quantization import (
    TOLERANCES,
    Quantization,
    check_quantization,
)
from keras_mha.export.tokens import INPUT, after_tokenizer, tokenizer_of
from keras_mha.layers.arguments import check_flag
from keras_mha.twin import twin

if TYPE_CHECKING:
    from keras_mha.text import WordpieceTokenizer


@dataclass(frozen=True)
class TextModel:
    """A model of texts, around one of ids.

    Attributes:
        endpoint: The model; it has one input.
        texts: The samples, as bytes in the shape that the input has.
        tokenizer: Its tokenizer.
    """

    endpoint: Endpoint
    texts: np.ndarray
    tokenizer: WordpieceTokenizer


@dataclass(frozen=True)
class Padded:
    """The rows of ids for the files of one length.

    Attributes:
        length: S.
        ids: The samples, `(n, S)`.
        ranges: The representative data, `(m, S)`, or `None`.
    """

    length: int
    ids: np.ndarray
    ranges: np.ndarray | None


@dataclass(frozen=True)
class Plan:
    """All that an export is to write and to check; see `export_tflite`.

    Attributes:
        endpoint: The model of ids, whose answers are the right ones.
        device: The same in its device form, which is what is converted.
        lengths: The samples, padded to each length.
        text_model: The model of texts that the model of ids is a part of, if any.
        writes_text: Whether to write files that take strings.
        metadata: Labels, vocabulary and texts for MediaPipe, or `None`.
        rounded_tolerance: What a quantized file or model may differ by; `None` where
            nothing is rounded.
        notes: One sentence for each layer that is exported as it is.
    """

    endpoint: Endpoint
    device: Endpoint
    lengths: tuple[Padded, ...]
    text_model: TextModel | None
    writes_text: bool
    metadata: Metadata | None
    batch_size: int
    quantization: Quantization | None
    target: Target
    signature_name: str
    tolerance: float
    rounded_tolerance: float | None
    timeout: float
    notes: tuple[str, ...]

    @property
    def input_name(self) -> str:
        """Returns the name of the model's input of ids."""
        return next(iter(self.endpoint.inputs))

    @property
    def allowed(self) -> float:
        """Returns what the files may differ by from the model."""
        rounded = self.rounded_tolerance
        return self.tolerance if rounded is None else rounded

    @property
    def vocabulary(self) -> Sequence[str] | None:
        """Returns the tokens in the order of their ids, where they are known."""
        if self.text_model is not None:
            return self.text_model.tokenizer.get_vocabulary()
        return None if self.metadata is None else self.metadata.vocabulary

    def answer(
        self, ids: np.ndarray, endpoint: Endpoint | None = None
    ) -> Mapping[str, np.ndarray]:
        """Returns the model's values for ids, or those of `endpoint`."""
        ((name, spec),) = self.endpoint.inputs.items()
        rows = ids.astype(spec.dtype.as_numpy_dtype)
        return (endpoint or self.endpoint).answer({name: rows})


def make_plan(
    model: keras.Model,
    directory: Path,
    *,
    sequence_lengths: Sequence[int],
    batch_size: int,
    samples: Any,
    overwrite: bool | None,
    quantization: Quantization | None,
    representative_data: Any,
    target: Target,
    text: bool,
    metadata: Metadata | None,
    tolerance: float,
    quantized_tolerance: float | None,
    signature_name: str,
    timeout: float,
) -> Plan:
    """Checks the arguments of `export_tflite`, and reads the model and its samples."""
    if importlib.util.find_spec("ai_edge_litert") is None:
        raise ImportError(
            "`export_tflite` needs ai-edge-litert: pip install 'keras-mha[tflite]'"
        )
    lengths = _check_sizes("sequence_lengths", sequence_lengths)
    batch_size = _check_size("batch_size", batch_size)
    check_tolerance(tolerance)
    check_timeout(timeout)
    if overwrite is not None:
        overwrite = check_flag(overwrite, "overwrite")
    kinds = ["model", *["text"] * bool(text), *["mediapipe"] * (metadata is not None)]
    names = [f"{kind}_{length}.tflite" for kind in kinds for length in lengths]
    paths = [directory / name for name in [*names, "manifest.json"]]
    check_overwrite(paths, overwrite=overwrite)
    check_quantization(quantization, representative_data)
    if check_flag(text, "text"):
        _check_text(target)
    if metadata is not None:
        check_metadata(metadata, batch_size)
    text_model = None
    if text or (metadata is not None and _takes_texts(model)):
        model, outputs, rows, ranges, text_model = _read_text_model(
            model, samples, representative_data
        )
    else:
        _check_input(model)
        outputs, rows = None, _as_rows(samples, "samples")
        ranges = representative_data
        if ranges is not None:
            ranges = _as_rows(ranges, "representative_data")
    rounded = _check_precision(model)
    notes = _check_target(model, target, quantization)
    rounded_tolerance = _check_rounded(quantized_tolerance, quantization, rounded)

    padded = []
    for length in lengths:
        ids = _pad(rows, length, "samples")
        endpoint, arrays = describe(model, ids, outputs)
        further = None
        if ranges is not None:
            further = _pad(ranges, length, "representative_data")
        padded.append(Padded(length, next(iter(arrays.values())), further))
    endpoint, _ = describe(model, padded[0].ids, outputs)
    if metadata is not None:
        first = {next(iter(endpoint.inputs)): padded[0].ids[:1]}
        check_labels(metadata, endpoint.answer(first))
        if text_model is not None:
            tokenizer, texts = text_model.tokenizer, text_model.texts
            metadata = with_tokenizer(metadata, tokenizer, texts)
        check_complete(metadata, len(rows))
    longest = max(padded, key=lambda one: one.length)
    device_model = device_form(
        model,
        target=target,
        padded_queries_read=reads_padded_queries(model, outputs, longest.ids),
    )
    return Plan(
        endpoint=endpoint,
        device=describe(device_model, padded[0].ids, outputs)[0],
        lengths=tuple(padded),
        text_model=text_model,
        writes_text=text,
        metadata=metadata,
        batch_size=batch_size,
        quantization=quantization,
        target=target,
        signature_name=signature_name,
        tolerance=tolerance,
        rounded_tolerance=rounded_tolerance,
        timeout=timeout,
        notes=notes,
    )


def reads_padded_queries(
    model: keras.Model, names: Sequence[str] | None, ids: np.ndarray, *, seed: int = 0
) -> bool:
    """Tells whether answers depend on rows of attention whose query is padding.

    They do not where outputs are pooled by mask, and attention need not clear them.
    Decided by trial: ids with random padding, in all places, are answered with those
    rows cleared and not, and every bit is compared.

    Args:
        model: A model of ids.
        names: Its outputs' names, or `None` for the model's.
        ids: Integers `(n, T)`.
        seed: Of the padding.
    """
    generator = np.random.default_rng(seed)
    ids = np.resize(ids, (16, ids.shape[1]))
    padded = generator.random(ids.shape) < np.linspace(0.3, 0.9, 16)[:, None]
    # A row of padding only is outside the form's domain.
    seen = generator.integers(ids.shape[1], size=16)
    padded[np.arange(16), seen] = False
    visible = np.maximum(ids, 1)  # samples may be padded themselves
    rows = np.where(padded, 0, visible).astype(ids.dtype)
    answers = []
    for read in (True, False):
        copied = device_form(model, padded_queries_read=read)
        endpoint, case = describe(copied, rows, names)
        answers.append(endpoint.answer(case))
    cleared, uncleared = answers
    return any(
        not np.array_equal(cleared[name], uncleared[name], equal_nan=True)
        for name in cleared
    )


# The model and its samples.


def _takes_texts(model: keras.Model) -> bool:
    inputs = getattr(model, "inputs", None) or ()
    return any(x.dtype == "string" for x in inputs)


def _read_text_model(
    model: keras.Model, samples: Any, representative_data: Any
) -> tuple[
    keras.Model,
    list[str],
    list[np.ndarray],
    list[np.ndarray] | None,
    TextModel,
]:
    """Cuts a model of texts behind its tokenizer.

    Returns:
        The model of ids; its outputs' names; the samples' ids; those of the
        representative data; and the model of texts.
    """
    endpoint, arrays = describe(model, samples)
    if len(arrays) != 1 or next(iter(endpoint.inputs.values())).dtype != tf.string:
        raise ValueError(
            "With `text=True`, `model` must have one input, of strings. Received the "
            f"inputs { {n: spec.dtype.name for n, spec in endpoint.inputs.items()} }"
        )
    # Of a copy: the model of ids adds a call to each layer.
    copied, _ = describe(twin(model), samples)
    inner, cut = after_tokenizer(copied, arrays)
    _check_input(inner.model)
    ranges = None
    if representative_data is not None:
        _, further = describe(model, representative_data)
        ranges = _unpadded(after_tokenizer(copied, further)[1][INPUT])
    (texts,) = arrays.values()
    names = list(inner.answer({name: array[:1] for name, array in cut.items()}))
    text_model = TextModel(endpoint, texts, tokenizer_of(model))
    return inner.model, names, _unpadded(cut[INPUT]), ranges, text_model


def _unpadded(ids: np.ndarray) -> list[np.ndarray]:
    return [row[: 1 + np.flatnonzero(row)[-1]] for row in ids]


def _as_rows(samples: Any, argument: str) -> list[np.ndarray]:
    """Rows of ids that may differ in length."""
    rows = [np.asarray(row) for row in samples]
    if not rows or any(row.ndim != 1 or row.dtype.kind not in "iu" for row in rows):
        raise ValueError(
            f"`{argument}` must be one or more rows of integer ids. Received: "
            f"{[(str(row.dtype), row.shape) for row in rows[:3]]}"
        )
    return rows


def _pad(rows: Sequence[np.ndarray], length: int, argument: str) -> np.ndarray:
    """The rows as one array, filled up with 0."""
    longest = max(map(len, rows))
    if longest > length:
        raise ValueError(
            f"`{argument}` must not be longer than any of `sequence_lengths`. "
            f"Received: a row of {longest} ids for the length {length}"
        )
    return np.stack([np.pad(row, (0, length - len(row))) for row in rows])


# What is refused.


def _check_sizes(argument: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns each size once."""
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise TypeError(
            f"`{argument}` must be a sequence, such as (16,). Received: {sizes!r}"
        )
    if not sizes:
        raise ValueError(f"`{argument}` must not be empty. Received: {sizes!r}")
    return tuple(dict.fromkeys(_check_size(argument, size) for size in sizes))


def _check_size(argument: str, size: Any) -> int:
    number = plain_integer(size)
    if number is None or number < 1:
        raise ValueError(f"`{argument}` must be a positive integer. Received: {size!r}")
    return number


def _check_input(model: keras.Model) -> None:
    """Refuses a model whose inputs are known and are not one input of ids."""
    inputs = getattr(model, "inputs", None)
    if inputs is None:
        return
    described = ", ".join(f"{x.name}: {x.dtype} {x.shape}" for x in inputs)
    if _takes_texts(model):
        raise ValueError(
            "`model` must take integer ids; strings need operations that TFLite has "
            "not built in. Pass the part of the model after its tokenizer: "
            "`without_tokenizer` gives it; or pass `text=True` for an additional file "
            f"with those operations. Received the inputs {described}"
        )
    if len(inputs) != 1 or "int" not in inputs[0].dtype or len(inputs[0].shape) != 2:
        raise ValueError(
            "`model` must have one integer input of shape (B, T), the ids. Received "
            f"the inputs {described}"
        )


def _check_text(target: Target) -> None:
    """Refuses what a file that takes strings cannot be written or run for."""
    if target == "gpu":
        raise ValueError(
            "`text=True` is for the CPU: no GPU takes strings. Received: target='gpu'"
        )
    try:
        registrar()
    except FileNotFoundError as error:
        raise ImportError(str(error)) from error


def _check_precision(model: keras.Model) -> bool:
    """Refuses half precision; returns whether Keras quantized any layer."""
    layers = list(model._flatten_layers(include_self=False))
    for layer in layers:
        if layer.compute_dtype in ("float16", "bfloat16"):
            raise ValueError(
                "`model` must compute in float32, as TFLite does. Received: layer "
                f"{layer.name!r} with compute_dtype={layer.compute_dtype!r}. Load "
                "the weights into a model made with the policy 'float32'."
            )
    return any(layer.quantization_mode is not None for layer in layers)


def _check_target(
    model: keras.Model, target: Target, quantization: Quantization | None
) -> tuple[str, ...]:
    """Returns which layers stay as they are, or refuses them for the target."""
    if target not in TARGETS:
        raise ValueError(
            f"`target` must be one of {list(TARGETS)}. Received: target={target!r}"
        )
    notes = layers_as_they_are(model)
    if target == "gpu" and notes:
        raise ValueError(
            "`target='gpu'` needs every layer in its device form. Received: "
            + "; ".join(notes)
        )
    if target == "gpu" and quantization == "int8_dense":
        raise ValueError(
            "`target='gpu'` takes float activations: GPU delegates answer wrongly on "
            "int8 ones, without a word. Received: quantization='int8_dense'"
        )
    return notes


def _check_rounded(
    tolerance: float | None, quantization: Quantization | None, rounded: bool
) -> float | None:
    """Returns what a quantized file or model may differ by; `None` where none is."""
    if quantization is None and not rounded:
        if tolerance is not None:
            raise ValueError(
                "`quantized_tolerance` is for quantized files and models; the float "
                "file's is `tolerance`. Received: "
                f"quantized_tolerance={tolerance} with quantization=None"
            )
        return None
    if tolerance is None:
        return max(TOLERANCES.get(quantization or "", 0), 0.05 * rounded)
    check_tolerance(tolerance, "quantized_tolerance")
    return tolerance
