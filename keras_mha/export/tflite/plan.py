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
from keras_mha.export.samples import Arrays
from keras_mha.export.tflite.inputs import (
    FixedInputs,
    even_rows,
    fix_inputs,
    takes_ids,
)
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
class Plan:
    """All that an export is to write and to check; see `export_tflite`.

    Attributes:
        endpoint: The model, or the part of a model of texts that takes ids; its
            answers are the right ones.
        device: The same in its device form, which is what is converted.
        files: The inputs of each file.
        text_model: The model of texts that the model of ids is a part of, if any.
        writes_text: Whether to write files that take strings.
        metadata: Labels, vocabulary and texts for MediaPipe, or `None`.
        rounded_tolerance: What a quantized file or model may differ by; `None` where
            nothing is rounded.
        notes: One sentence for each layer that is exported as it is.
    """

    endpoint: Endpoint
    device: Endpoint
    files: tuple[FixedInputs, ...]
    text_model: TextModel | None
    writes_text: bool
    metadata: Metadata | None
    quantization: Quantization | None
    target: Target
    signature_name: str
    tolerance: float
    rounded_tolerance: float | None
    timeout: float
    notes: tuple[str, ...]

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


def make_plan(
    model: keras.Model,
    directory: Path,
    *,
    sequence_lengths: Sequence[int] | None,
    shapes: Mapping[str, Sequence[int]] | None,
    batch_size: int | None,
    uint8_inputs: Sequence[str],
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
    if sequence_lengths is not None:
        sequence_lengths = _check_sizes("sequence_lengths", sequence_lengths)
    if batch_size is not None:
        batch_size = _check_size("batch_size", batch_size)
    check_tolerance(tolerance)
    check_timeout(timeout)
    if overwrite is not None:
        overwrite = check_flag(overwrite, "overwrite")
    check_quantization(quantization, representative_data)
    if check_flag(text, "text"):
        _check_text(target)
    if metadata is not None:
        check_metadata(metadata, batch_size or 1)
    text_model = None
    if text or (metadata is not None and _takes_texts(model)):
        endpoint, samples, ranges, text_model = _read_text_model(
            model, samples, representative_data
        )
        arrays, names = samples, list(endpoint.answer(endpoint.take(samples, slice(1))))
    else:
        samples = even_rows(model, samples)
        (endpoint, arrays), names = describe(model, samples), None
        _check_inputs(endpoint)
        ranges = _read_ranges(model, representative_data)
    if ranges is None and quantization == "int8_dense":
        ranges = arrays
    if (text or metadata is not None) and not takes_ids(endpoint):
        raise ValueError(
            "`text` and `metadata` are for a model with one input of ids, (B, T). "
            f"Received the inputs {_described(endpoint)}"
        )
    files = fix_inputs(
        endpoint,
        arrays,
        ranges,
        lengths=sequence_lengths,
        shapes=shapes,
        batch_size=batch_size,
        uint8_inputs=uint8_inputs,
        named_by_length=text or metadata is not None,
    )
    kinds = [*["text"] * bool(text), *["mediapipe"] * (metadata is not None)]
    stems = [file.name for file in files]
    stems += [f"{kind}_{file.length}" for kind in kinds for file in files]
    paths = [directory / f"{stem}.tflite" for stem in stems]
    check_overwrite([*paths, directory / "manifest.json"], overwrite=overwrite)
    rounded = _check_precision(endpoint.model)
    notes = _check_target(endpoint.model, target, quantization)
    rounded_tolerance = _check_rounded(quantized_tolerance, quantization, rounded)

    if metadata is not None:
        check_labels(
            metadata, endpoint.answer(endpoint.take(files[0].samples, slice(1)))
        )
        if text_model is not None:
            tokenizer, texts = text_model.tokenizer, text_model.texts
            metadata = with_tokenizer(metadata, tokenizer, texts)
        check_complete(metadata, len(files[0].ids))
    device_model = device_form(endpoint.model, target=target)
    device, _ = describe(device_model, samples, names)
    return Plan(
        endpoint=endpoint,
        device=device,
        files=files,
        text_model=text_model,
        writes_text=text,
        metadata=metadata,
        quantization=quantization,
        target=target,
        signature_name=signature_name,
        tolerance=tolerance,
        rounded_tolerance=rounded_tolerance,
        timeout=timeout,
        notes=notes,
    )


# The model and its samples.


def _read_ranges(model: keras.Model, representative_data: Any) -> Arrays | None:
    if representative_data is None:
        return None
    return describe(model, even_rows(model, representative_data))[1]


def _takes_texts(model: keras.Model) -> bool:
    inputs = getattr(model, "inputs", None) or ()
    return any(x.dtype == "string" for x in inputs)


def _read_text_model(
    model: keras.Model, samples: Any, representative_data: Any
) -> tuple[Endpoint, Arrays, Arrays | None, TextModel]:
    """Cuts a model of texts behind its tokenizer.

    Returns:
        The model of ids; the samples' ids; those of the representative data; and the
        model of texts.
    """
    endpoint, arrays = describe(model, samples)
    if len(arrays) != 1 or next(iter(endpoint.inputs.values())).dtype != tf.string:
        raise ValueError(
            "With `text=True`, `model` must have one input, of strings. Received the "
            f"inputs {_described(endpoint)}"
        )
    # Of a copy: the model of ids adds a call to each layer.
    copied, _ = describe(twin(model), samples)
    inner, cut = after_tokenizer(copied, arrays)
    ranges = None
    if representative_data is not None:
        _, further = describe(model, representative_data)
        ranges = _without_padding(inner, after_tokenizer(copied, further)[1])
    (texts,) = arrays.values()
    text_model = TextModel(endpoint, texts, tokenizer_of(model))
    return inner, _without_padding(inner, cut), ranges, text_model


def _without_padding(endpoint: Endpoint, arrays: Arrays) -> Arrays:
    """Cuts off columns of padding, where the model takes ids of any length."""
    if endpoint.inputs[INPUT].shape[1] is not None:
        return arrays
    used = 1 + np.flatnonzero(np.any(arrays[INPUT], axis=0))[-1]
    return {**arrays, INPUT: arrays[INPUT][:, :used]}


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


def _check_inputs(endpoint: Endpoint) -> None:
    """Refuses a model that takes strings."""
    if any(spec.dtype == tf.string for spec in endpoint.inputs.values()):
        raise ValueError(
            "`model` must take numbers; strings need operations that TFLite has not "
            "built in. Pass the part of the model after its tokenizer: "
            "`without_tokenizer` gives it; or pass `text=True` for an additional file "
            "with those operations. Received a model with the inputs "
            f"{_described(endpoint)}"
        )


def _described(endpoint: Endpoint) -> dict[str, str]:
    return {
        name: f"{spec.dtype.name} {tuple(spec.shape)}"
        for name, spec in endpoint.inputs.items()
    }


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
    """Returns which layers stay as they are."""
    if target not in TARGETS:
        raise ValueError(
            f"`target` must be one of {list(TARGETS)}. Received: target={target!r}"
        )
    if target == "gpu" and quantization == "int8_dense":
        raise ValueError(
            "`target='gpu'` takes float activations: GPU delegates answer wrongly on "
            "int8 ones, without a word. Received: quantization='int8_dense'"
        )
    return layers_as_they_are(model)


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
