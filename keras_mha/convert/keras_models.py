"""Converts attention layers of Keras to ours and back, single or in whole models."""

from __future__ import annotations

import inspect
from typing import Any

import keras
from keras import ops

from keras_mha.convert.keras_layers import from_stock, is_ours, is_stock, to_stock
from keras_mha.convert.model_copy import Rule, copy_model
from keras_mha.layers.self_attention import MultiHeadSelfAttention


def from_keras(layer_or_model: Any) -> Any:
    """Turns Keras' attention into ours: one layer, or every one of a model.

    `keras.layers.MultiHeadAttention` and `keras.layers.GroupQueryAttention` become
    `keras_mha.MultiHeadAttention`, with all their options and a copy of their
    weights; int8 weights and LoRA factors are carried over. A layer that is not built
    gives one that is not.

    In a Functional or Sequential model every such layer is swapped, in models inside
    the model and inside wrappers such as `TimeDistributed` too. All other layers are
    copied with their weights, vocabularies and what `trainable` says. Names stay, and
    layers that were shared are. The original model is left as it is and shares nothing
    with the new one, which is not compiled: call `compile`; an optimizer's state does
    not carry over.

    Outputs are the same, but where Keras' layer is at fault:

    - A query that sees no key, such as one that is padding, gets the output
      projection's bias; from Keras the mean of all values, or NaN. This shows where
      what comes after reads padding: `Flatten` does, and pooling after `x + y`, which
      drops masks as `keras.layers.Add()` does not.
    - Masks stay on the inputs. Keras' layer takes them off, so that a second one that
      attends to the same tensor sees its padding.
    - An explicit `query_mask` counts, and the outputs carry it.
    - A floating `attention_mask` is refused; Keras reads it as booleans.
    - An `activity_regularizer` is for the outputs of the projections, each once;
      `GroupQueryAttention` counts the layer's outputs twice.

    What cannot be swapped raises: a layer, or a subclassed model, that makes Keras'
    attention in code of its own, as KerasHub's `TransformerEncoder` does. In code of
    yours put `keras_mha.MultiHeadAttention` in the place of
    `keras.layers.MultiHeadAttention`; it takes the same arguments, and weights go over
    by `set_weights`. Subclasses of Keras' layers are kept as they are: those in
    KerasHub's `TransformerDecoder`, for one.

    Args:
        layer_or_model: A layer of one of the two classes, or a model.

    Returns:
        A new layer, or a new model of the same class.

    Raises:
        TypeError: If it is not such a layer or model, or holds a layer that makes
            attention in code of its own.
        ValueError: If the model holds no such layer, or something cannot be copied:
            weights quantized in another way than int8, or layers whose configuration
            does not tell all of them.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from keras_mha.convert import from_keras
    >>> ids = keras.Input((None,), dtype="int32")
    >>> vectors = keras.layers.Embedding(11, 6, mask_zero=True)(ids)
    >>> mixed = keras.layers.MultiHeadAttention(2, 3, name="mix")(vectors, vectors)
    >>> pooled = keras.layers.GlobalAveragePooling1D()(mixed)
    >>> model = keras.Model(ids, pooled)
    >>> converted = from_keras(model)
    >>> type(converted.get_layer("mix")).__module__
    'keras_mha.layers.multi_head_attention'
    >>> ids = np.array([[3, 1, 4, 0], [1, 5, 0, 0]])
    >>> bool(np.allclose(converted(ids), model(ids), atol=1e-5))
    True
    """
    if is_stock(layer_or_model):
        return from_stock(layer_or_model)
    return _convert_model(layer_or_model, _FROM_KERAS)


def to_keras(layer_or_model: Any) -> Any:
    """Turns our attention into Keras', for those who have no `keras_mha`.

    `MultiHeadAttention` becomes `keras.layers.MultiHeadAttention`, or
    `keras.layers.GroupQueryAttention` where keys and values have fewer heads.
    `MultiHeadSelfAttention` does as well, its fused projection split into three: what
    was called as `layer(x)` then is `layer(x, x)`, and in a functional model is called
    so. As in `from_keras`, models are copied, and the faults listed there come back.

    A `keras.Sequential` model calls its layers with a single input. One that has a
    `MultiHeadSelfAttention` among its layers, inside another model too, becomes a
    plain `keras.Model` of the same name and layers.

    Which implementation runs does not carry over: `jit_compile` is dropped, and
    `flash_attention=False` stays.

    Args:
        layer_or_model: A `MultiHeadAttention`, a `MultiHeadSelfAttention`, or a
            Functional or Sequential model that holds some.

    Returns:
        A new layer, or a new model: of the same class, except as said above.

    Raises:
        TypeError: If it is not such a layer or model, or holds a layer that makes our
            attention in code of its own, as transformer blocks do.
        ValueError: If Keras' layer has no such thing as an option or a call argument
            that is used: `position`, `qk_norm`, `logits_soft_cap`, `use_sinks`,
            `flash_attention=True` on TensorFlow; with grouped heads `value_dim`,
            `output_shape` or several attention axes; in calls `segment_ids`,
            `attention_bias`, `head_mask` or `cache`. Also if a fused projection is
            quantized or has low-rank factors, or a Sequential model with one is not
            built.

    Example:

    >>> import keras_mha
    >>> import numpy as np
    >>> from keras_mha.convert import to_keras
    >>> inputs = np.random.normal(size=(2, 5, 8)).astype("float32")
    >>> layer = keras_mha.MultiHeadSelfAttention(num_heads=2)
    >>> expected = layer(inputs)
    >>> bool(np.allclose(to_keras(layer)(inputs, inputs), expected, atol=1e-5))
    True
    """
    if is_ours(layer_or_model):
        return to_stock(layer_or_model)
    return _convert_model(layer_or_model, _TO_KERAS)


def _convert_model(model: Any, rule: Rule) -> Any:
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"Expected {rule.old}, or a model that holds some. A subclass of such a "
            "layer may compute something else and does not convert. "
            f"Received: {model!r} of class {type(model).__name__}"
        )
    return copy_model(model, rule)


def _call_ours(
    original: Any, converted: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    del original  # takes the same arguments
    return converted(*args, **kwargs)


def _call_stock(
    original: Any, converted: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    arguments = inspect.signature(original.call).bind(*args, **kwargs).arguments
    taken = set(inspect.signature(converted.call).parameters)
    if _is_fused(original):
        arguments["query"] = arguments["value"] = arguments.pop("inputs")
        # Keras hides padded queries by the mask that the inputs carry.
        arguments["value_mask"] = arguments.pop("mask", None)
    refused = [
        name
        for name, value in arguments.items()
        if name not in taken and value is not None
    ]
    mask = arguments.get("attention_mask")
    if mask is not None and not ops.is_tensor(mask) and not hasattr(mask, "dtype"):
        refused.append("attention_mask")
    if refused:
        raise ValueError(
            "Keras' layer cannot be called with that. Received: layer "
            f"'{converted.name}' called with "
            f"{', '.join(f'`{name}`' for name in refused)}"
        )
    return converted(**{name: arguments[name] for name in arguments if name in taken})


def _is_fused(layer: Any) -> bool:
    return type(layer) is MultiHeadSelfAttention


_FROM_KERAS = Rule(
    is_swapped=is_stock,
    is_fused=lambda _: False,
    convert=from_stock,
    call=_call_ours,
    old="`keras.layers.MultiHeadAttention` or `keras.layers.GroupQueryAttention`",
    advice=(
        "In that code use `keras_mha.MultiHeadAttention` instead: it takes the same "
        "arguments, and weights go over by `new.set_weights(old.get_weights())`."
    ),
)
_TO_KERAS = Rule(
    is_swapped=is_ours,
    is_fused=_is_fused,
    convert=to_stock,
    call=_call_stock,
    old="`keras_mha.MultiHeadAttention` or `keras_mha.MultiHeadSelfAttention`",
    advice=(
        "`to_keras` converts attention layers, Functional and Sequential models: build "
        "the rest anew."
    ),
)
