"""Converts attention layers of Keras to ours and back, single or in whole models."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import keras
from keras import ops

from keras_mha.convert.comparison import describe_differences
from keras_mha.convert.keras_layers import (
    Masks,
    is_fused,
    is_ours,
    to_stock,
)
from keras_mha.convert.layer_swap import Rule, swap_layers
from keras_mha.convert.registry import convert_layer
from keras_mha.layers.arguments import check_flag, check_name
from keras_mha.twin import Twins


def from_keras(
    layer_or_model: Any,
    *,
    samples: Any = None,
    masks: Masks = "mend",
    dtype: Any = None,
    copy: bool = True,
) -> Any:
    """Turns Keras' attention into ours: one layer, or every one of a model.

    `keras.layers.MultiHeadAttention` and `keras.layers.GroupQueryAttention` become
    `keras_mha.MultiHeadAttention`, with all their options and a copy of their
    weights; int8 weights and LoRA factors are carried over. A layer that is not built
    gives one that is not.

    In a model, or a layer of yours, every such layer is swapped: in the graph, in
    models inside the model, in wrappers, and in attributes of your own layers and
    subclassed models, which keep their code. All other layers are copied with their
    weights, vocabularies and what `trainable` says, without calling a constructor.
    Names stay, weights fit the same files, and layers that were shared are. The
    original stays as it is and shares no variable with the new one, which is not
    compiled: call `compile`; an optimizer's state does not carry over.

    A saved model of your own class makes its layers in its code when it is loaded, and
    so makes Keras' attention again. Convert what was loaded, or put
    `keras_mha.MultiHeadAttention` into the code: it takes the same arguments.

    Outputs are the same, but where Keras' layer is at fault:

    - Masks stay on the inputs. Keras' layer takes them off, so that in `x + y` or
      `Add()([x, y])` of its inputs and outputs the mask is lost, and the attention
      after it reads padding.
    - A query that sees no key, such as one that is padding, gets the output
      projection's bias; from Keras the mean of all values, or NaN. This shows where
      what comes after reads padding, as `Flatten` and pooling without a mask do.
    - An explicit `query_mask` counts, and the outputs carry it.
    - A floating `attention_mask` is refused; Keras reads it as booleans.
    - An `activity_regularizer` is for the outputs of the projections, each once;
      `GroupQueryAttention` counts the layer's outputs twice.

    Original and copy are compared on `samples`, or on a few inputs drawn with padding
    and without. Where their answers differ, a warning says in which output, by how much
    and through which layers. What an output's own mask says is padding does not count.

    Subclasses of Keras' layers may compute something else and stay as they are. Those
    of KerasHub that have a twin here are swapped in its layers, backbones and tasks:
    `CachedMultiHeadAttention`, in `TransformerDecoder`, GPT-2, OPT, BART and Whisper,
    and the attention of Llama, Mistral, Mixtral, Phi-3, Qwen and Gemma. `generate`
    gives the same tokens. `register_converter` adds classes of yours.

    Args:
        layer_or_model: A layer of one of the two classes, or a layer or model of any
            class that holds some.
        samples: Inputs in the structure that `model(...)` takes, to compare the answers
            on. Defaults to drawn ones.
        masks: `"mend"` treats masks as `keras_mha.MultiHeadAttention` does;
            `"as_keras"` keeps the answers of the original, faults included, by layers
            of the class `StockMaskAttention`.
        dtype: A dtype policy for all floating layers of the copy, such as
            `"mixed_bfloat16"`; weights keep their values. With it, a model of our
            layers is copied too. Defaults to the policies of the original.
        copy: Whether the new layers have variables of their own. With False they share
            those of the original: training one trains the other, and no memory is
            taken.

    Returns:
        A new layer, or a new model of the same class.

    Raises:
        TypeError: If it is not such a layer or model.
        ValueError: If the model holds no such layer and no `dtype` is passed, `masks`
            has another value, or
            `dtype` is no floating policy or, with `copy=False`, has weights of another
            dtype.

    Warns:
        UserWarning: If the copy answers otherwise than the original.

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
    masks = check_name(masks, "masks", Masks)
    policy = None if dtype is None else _check_policy(dtype)
    share = not check_flag(copy, "copy")
    rule = _from_keras(masks)
    converted, swapped = _convert(layer_or_model, rule, policy, share=share)
    # Rounding would hide what else differs.
    same = converted, swapped
    if swapped and policy is not None:
        same = _convert(layer_or_model, rule, share=True)
    differences = describe_differences(
        layer_or_model, *same, samples, expected=masks == "mend"
    )
    if differences:
        if masks == "mend":
            differences += ' `masks="as_keras"` keeps the answers of the original.'
            if makers := _makers(layer_or_model, swapped):
                differences += (
                    " Layers that make attention in their own code make Keras' again "
                    f"when a saved copy is loaded: {', '.join(map(repr, makers))}."
                )
        warnings.warn(differences, stacklevel=2)
    return converted


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

    What `from_keras` made of KerasHub's layers stays as it is. Which implementation
    runs does not carry over: `jit_compile` is dropped, and `flash_attention=False`
    stays.

    Args:
        layer_or_model: A `MultiHeadAttention`, a `MultiHeadSelfAttention`, or a layer
            or model that holds some.

    Returns:
        A new layer, or a new model: of the same class, except as said above.

    Raises:
        TypeError: If it is not such a layer or model, or holds a layer that calls
            `MultiHeadSelfAttention` in its code, as transformer blocks do.
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
    converted, swapped = _convert(layer_or_model, _TO_KERAS)
    differences = describe_differences(
        layer_or_model, converted, swapped, None, expected=True
    )
    if differences:
        warnings.warn(differences, stacklevel=2)
    return converted


def _makers(model: Any, swapped: list[tuple[Any, Any]]) -> list[str]:
    """Names of the layers of users that hold what is swapped."""
    inner = {id(layer) for layer, _ in swapped}
    return [
        layer.name
        for layer in model._flatten_layers()
        if not isinstance(layer, keras.Function)
        and not type(layer).__module__.startswith(("keras.", "keras_mha."))
        and any(id(each) in inner for each in layer._layers)
    ]


def _convert(
    model: Any, rule: Rule, policy: Any = None, *, share: bool = False
) -> tuple[Any, list[tuple[Any, Any]]]:
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(_expected(model, rule))
    converted, swapped = swap_layers(model, rule, policy, share=share)
    if swapped or policy is not None:
        return converted, swapped
    if isinstance(model, keras.Model):
        raise ValueError(
            f"There is nothing to convert: the model holds no {rule.old}. "
            f"Received: model '{model.name}' of class {type(model).__name__}, "
            f"{'built' if model.built else 'not built'}"
        )
    raise TypeError(_expected(model, rule))


def _expected(received: Any, rule: Rule) -> str:
    return (
        f"Expected {rule.old}, or a layer or model that holds some. A subclass of such "
        "a layer may compute something else and does not convert. "
        f"Received: {received!r} of class {type(received).__name__}"
        f"{'' if getattr(received, 'built', True) else ', not built'}"
    )


def _check_policy(dtype: Any) -> Any:
    try:
        policy = keras.dtype_policies.get(dtype)
        floating = "float" in policy.compute_dtype
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`dtype` must be a floating dtype policy, or its name, such as "
            f"'mixed_bfloat16'. Received: dtype={dtype!r}"
        ) from error
    if not floating or policy.quantization_mode is not None:
        raise ValueError(
            "`dtype` must be a floating dtype policy; quantize with `quantize`. "
            f"Received: dtype={dtype!r}"
        )
    return policy


def _call_ours(_: Any, converted: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    return converted(*args, **kwargs)


def _call_stock(
    original: Any, converted: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    arguments = inspect.signature(original.call).bind(*args, **kwargs).arguments
    taken = set(inspect.signature(converted.call).parameters)
    if is_fused(original):
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


def _to_stock(layer: Any, twins: Twins) -> Any:
    return to_stock(layer, twins) if is_ours(layer) else None


def _from_keras(masks: Masks) -> Rule:
    return Rule(
        convert=lambda layer, twins: convert_layer(layer, twins, masks),
        call=_call_ours,
        is_fused=lambda _: False,
        old="`keras.layers.MultiHeadAttention` or `keras.layers.GroupQueryAttention`",
    )


_TO_KERAS = Rule(
    convert=_to_stock,
    call=_call_stock,
    is_fused=is_fused,
    old="`keras_mha.MultiHeadAttention` or `keras_mha.MultiHeadSelfAttention`",
)
