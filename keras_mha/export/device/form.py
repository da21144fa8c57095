"""A copy of a model whose layers compute in the form that devices run.

`FORMS` and `_MASK_FORMS` say which layer has which form: add a new layer there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import keras
from keras.src.ops.numpy import GetItem, NotEqual

from keras_mha.attention.dispatch import implementation_scope
from keras_mha.export.device import attention as device_attention
from keras_mha.export.device import layers as device_layers
from keras_mha.export.device.layers import (
    Form,
    MaskForm,
    NoDeviceFormError,
    PaddingMasks,
    Swap,
)
from keras_mha.layers.embedding import TokenAndPositionEmbedding
from keras_mha.layers.multi_head_attention import MultiHeadAttention
from keras_mha.layers.projections import Projection
from keras_mha.layers.self_attention import MultiHeadSelfAttention
from keras_mha.twin import described, twin

_layers = keras.layers

FORMS: dict[type, Form] = {
    _layers.Dense: device_layers.dense,
    _layers.EinsumDense: device_layers.einsum_dense,
    Projection: device_layers.einsum_dense,
    _layers.LayerNormalization: device_layers.layer_normalization,
    _layers.RMSNormalization: device_layers.rms_normalization,
    _layers.GroupNormalization: device_layers.group_normalization,
    _layers.UpSampling2D: device_layers.up_sampling,
    GetItem: device_layers.get_item,
}

# Those that make padding masks, or read them.
_MASK_FORMS: dict[type, MaskForm] = {
    _layers.Embedding: device_layers.embedding,
    _layers.ReversibleEmbedding: device_layers.reversible_embedding,
    _layers.GlobalAveragePooling1D: device_layers.global_average_pooling,
    _layers.MultiHeadAttention: device_attention.stock_attention,
    NotEqual: device_layers.not_equal,
    **dict.fromkeys(
        (_layers.RNN, _layers.SimpleRNN, _layers.GRU, _layers.LSTM),
        device_layers.recurrent,
    ),
    TokenAndPositionEmbedding: device_layers.token_and_position_embedding,
    MultiHeadSelfAttention: device_attention.self_attention,
    MultiHeadAttention: device_attention.attention,
}

Target: TypeAlias = Literal["cpu", "gpu"]
# Where a target needs another form than the rest.
TARGETS: dict[Target, dict[type, MaskForm]] = {
    "cpu": {},
    "gpu": {
        _layers.Embedding: device_layers.guarded_embedding,
        _layers.ReversibleEmbedding: device_layers.guarded_reversible_embedding,
    },
}

# Their layers without a form convert well as they are.
_KNOWN_PACKAGES = ("keras", "keras_mha")
_DEQUANTIZED = (_layers.Dense, _layers.EinsumDense, _layers.Embedding)


def register_device_form(layer_class: type, form: Form) -> None:
    """Registers what layers of a class do in files for devices.

    Args:
        layer_class: A subclass of `keras.layers.Layer`. The form also serves its
            subclasses that do not override `call`.
        form: Takes a layer of a copy of the model and returns the `Swap`s to make in
            it, or raises `NoDeviceFormError`.

    Raises:
        TypeError: If `layer_class` is not such a class, or `form` cannot be called.

    Example:

    >>> import keras
    >>> from keras_mha.export import Swap, register_device_form
    >>> from keras_mha.export.device.form import FORMS
    >>> class Square(keras.layers.Layer):
    ...     def call(self, inputs):
    ...         return keras.ops.power(inputs, 2)
    >>> def square(layer):
    ...     return [Swap(layer, "call", lambda inputs: inputs * inputs)]
    >>> register_device_form(Square, square)
    >>> FORMS.pop(Square) is square
    True
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, _layers.Layer)):
        raise TypeError(
            "`layer_class` must be a subclass of keras.layers.Layer. "
            f"Received: {layer_class!r}"
        )
    if not callable(form):
        raise TypeError(
            "`form` must be a function that takes a layer and returns `Swap`s. "
            f"Received: {form!r}"
        )
    FORMS[layer_class] = form


def device_form(model: keras.Model, *, target: Target = "cpu") -> keras.Model:
    """Copies a model into its device form; the copy shares the model's variables.

    The model itself stays as it is, and other threads may call it meanwhile.

    Args:
        model: A built model, of any kind.
        target: A key of `TARGETS`.

    Raises:
        ValueError: If a layer was quantized by Keras in another way than int8, or is
            not one that can be dequantized.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from keras_mha.export.device.form import device_form
    >>> ids = keras.Input((None,), dtype="int32")
    >>> model = keras.Model(ids, keras.layers.Embedding(11, 5)(ids))
    >>> given = np.array([[3, 1, 4]])
    >>> bool(np.allclose(device_form(model)(given), model(given)))
    True
    """
    copied = twin(model)
    masks = PaddingMasks()
    swaps, _ = _plan(copied, target, masks)
    # Not through `setattr`, with which Keras tracks what layers own.
    for owner, name, value in swaps:
        owner.__dict__[name] = value
    call = copied.call

    @functools.wraps(call)  # whose parameters name the inputs
    def call_portably(*args: Any, **kwargs: Any) -> Any:
        try:
            with implementation_scope("portable"):
                return call(*args, **kwargs)
        finally:
            masks.forget()

    copied.__dict__["call"] = call_portably
    return copied


def layers_as_they_are(model: keras.Model) -> tuple[str, ...]:
    """Says for each layer of a model that has no device form why it has none."""
    return _plan(twin(model), "cpu", PaddingMasks())[1]


def _plan(
    model: keras.Model, target: Target, masks: PaddingMasks
) -> tuple[list[Swap], tuple[str, ...]]:
    """Returns the swaps, and a sentence for each layer that stays as it is."""
    forms = _forms(target, masks)
    swaps: list[Swap] = []
    notes: dict[str, None] = {}
    for layer in _operations(model):
        form = _find(forms, layer)
        _check_quantization(layer)
        if form is None:
            if isinstance(layer, _layers.Layer) and not _is_plain(layer):
                notes[f"{described(layer)} has no device form"] = None
            continue
        try:
            swaps += form(layer)
        except NoDeviceFormError as reason:
            notes[f"{described(layer)} stays as it is: {reason}"] = None
    return swaps, tuple(notes)


def _forms(target: Target, masks: PaddingMasks) -> dict[type, Form]:
    """The forms by class; those of the target first, then those that users added."""

    def bound(form: MaskForm) -> Form:
        return lambda layer: form(layer, masks)

    by_class = {kind: bound(form) for kind, form in _MASK_FORMS.items()}
    for_target = {kind: bound(form) for kind, form in TARGETS[target].items()}
    return by_class | FORMS | for_target


def _operations(model: keras.Model) -> Iterator[Any]:
    """Every layer once, inner ones first, and what else functional models call."""
    layers = {id(layer): layer for layer in model._flatten_layers()}
    # What an outer layer puts in place of an inner one's methods comes last.
    inwards = list(layers.values())
    for layer in inwards:
        # Operations such as `x[:, 0]` are not layers.
        functional = getattr(layer, "_functional", layer)  # of a `keras.Sequential`
        for operation in getattr(functional, "operations", ()):
            if not isinstance(operation, _layers.Layer):
                yield operation
    yield from reversed(inwards)


def _find(forms: Mapping[type, Form], layer: Any) -> Form | None:
    """Finds the form of the layer's class, or of one that it inherits `call` from."""
    for base in type(layer).__mro__:
        if base in forms:
            same = getattr(type(layer), "call", None) is getattr(base, "call", None)
            return forms[base] if same else None
    return None


def _is_plain(layer: Any) -> bool:
    """Whether it converts well as it is, or each layer that it is made of is asked."""
    is_known = type(layer).__module__.partition(".")[0] in _KNOWN_PACKAGES
    return is_known or bool(layer._layers)


def _check_quantization(layer: Any) -> None:
    mode = getattr(layer, "quantization_mode", None)
    if mode is None:
        return
    if mode != "int8" or not isinstance(layer, _DEQUANTIZED):
        raise ValueError(
            "`model` must not be quantized by Keras but to int8, in dense layers and "
            f"embeddings, which are dequantized. Received: {described(layer)} with "
            f"quantization mode {mode!r}"
        )
