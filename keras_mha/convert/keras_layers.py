"""One attention layer of Keras into one of ours, and back.

Letters: D model width, N query heads, K key/value heads, H head size of queries and
keys, V head size of values.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_mha.copying import set_trainable
from keras_mha.layers.fused_projection import FusedProjection
from keras_mha.layers.multi_head_attention import MultiHeadAttention
from keras_mha.layers.self_attention import MultiHeadSelfAttention
from keras_mha.typing import Tensor

StockAttention = keras.layers.MultiHeadAttention
StockGroupedAttention = keras.layers.GroupQueryAttention

# The attributes that hold the dense layers, alike in Keras' layers and ours.
_PROJECTIONS = (
    "_query_dense",
    "_key_dense",
    "_gate_dense",
    "_value_dense",
    "_output_dense",
)
# What `MultiHeadSelfAttention` calls those that it does not fuse.
_UNFUSED = {"_gate_dense": "gate_dense", "_output_dense": "output_dense"}
_WEIGHTS = ("_kernel", "bias", "kernel_scale", "lora_kernel_a", "lora_kernel_b")
_SHARED_OPTIONS = (
    "dropout",
    "use_bias",
    "use_gate",
    "sliding_window",
    "kernel_initializer",
    "bias_initializer",
    "kernel_regularizer",
    "bias_regularizer",
    "activity_regularizer",
    "kernel_constraint",
    "bias_constraint",
)


def is_stock(layer: object) -> bool:
    """Whether it is Keras' own attention layer; a subclass may compute otherwise."""
    return type(layer) in (StockAttention, StockGroupedAttention)


def is_ours(layer: object) -> bool:
    """Whether it is an attention layer of ours, no subclass of it."""
    return type(layer) in (MultiHeadAttention, MultiHeadSelfAttention)


def from_stock(layer: Any) -> MultiHeadAttention:
    """Makes our layer of the options and, if it is built, the weights of Keras'."""
    grouped = isinstance(layer, StockGroupedAttention)
    prefix = "" if grouped else "_"
    options = {name: getattr(layer, prefix + name) for name in _SHARED_OPTIONS}
    if grouped:
        options.update(
            num_heads=layer.num_query_heads,
            key_dim=layer.head_dim,
            num_key_value_heads=layer.num_key_value_heads,
        )
    else:
        names = ("num_heads", "key_dim", "value_dim", "output_shape", "attention_axes")
        options.update({name: getattr(layer, f"_{name}") for name in names})
    converted = MultiHeadAttention(
        **options,
        # Keras' configurations leave it out.
        flash_attention=layer._flash_attention,
        seed=layer.seed,
        **_layer_options(layer),
    )
    if layer.built:
        converted.build_from_config(layer.get_build_config())
        copy_weights(layer, converted)
    return converted


def to_stock(layer: Any) -> Any:
    """Makes Keras' layer of the options and, if it is built, the weights of ours.

    Raises:
        ValueError: If Keras' layer lacks an option that the layer uses.
    """
    converted = _unbuilt_stock(layer, *_head_sizes(layer))
    if layer.built:
        config = layer.get_build_config()
        if isinstance(layer, MultiHeadSelfAttention):
            shape = config["input_shape"]
            config = {"shapes_dict": {"query_shape": shape, "value_shape": shape}}
        converted.build_from_config(config)
        copy_weights(layer, converted)
    return converted


def _unbuilt_stock(layer: Any, key_dim: int, value_dim: int) -> Any:
    config = layer.get_config()
    grouped = layer.num_key_value_heads != layer.num_heads
    refused = {
        name: config[name]
        for name in ("position", "qk_norm", "logits_soft_cap", "use_sinks")
        if config[name] not in (None, False)
    }
    if grouped:
        if value_dim != key_dim:
            refused["value_dim"] = value_dim
        if config["output_shape"] is not None:
            refused["output_shape"] = config["output_shape"]
        if config.get("attention_axes") not in (None, (1,)):
            refused["attention_axes"] = config["attention_axes"]
    if config["flash_attention"] and keras.backend.backend() == "tensorflow":
        refused["flash_attention"] = True
    if refused:
        kind = "GroupQueryAttention" if grouped else "MultiHeadAttention"
        listed = ", ".join(f"{name}={value!r}" for name, value in refused.items())
        raise ValueError(
            f"`keras.layers.{kind}` has no option like that. "
            f"Received: layer '{layer.name}' with {listed}"
        )
    options = {
        "dropout": layer.dropout,
        "use_bias": layer.use_bias,
        "use_gate": config["use_gate"],
        "sliding_window": config["sliding_window"],
        "flash_attention": config["flash_attention"],
        "seed": layer.seed,
        **layer._projections.projection_kwargs(),
        **_layer_options(layer),
    }
    if grouped:
        return StockGroupedAttention(
            head_dim=key_dim,
            num_query_heads=layer.num_heads,
            num_key_value_heads=layer.num_key_value_heads,
            **options,
        )
    return StockAttention(
        num_heads=layer.num_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        output_shape=config["output_shape"],
        attention_axes=config.get("attention_axes"),
        **options,
    )


def _layer_options(layer: Any) -> dict[str, Any]:
    return {
        "name": layer.name,
        "trainable": layer.trainable,
        "dtype": layer.dtype_policy,
        "autocast": layer.autocast,
    }


def _head_sizes(layer: Any) -> tuple[int, int]:
    """H and V."""
    if isinstance(layer, MultiHeadSelfAttention) and layer.built:
        return layer.qkv_dense.head_sizes
    if layer.key_dim is None:
        raise ValueError(
            "Keras' layer wants `key_dim`, which `MultiHeadSelfAttention` works out "
            "while it is built: build the layer first, or give it a `key_dim`. "
            f"Received: layer '{layer.name}', not built, with key_dim=None"
        )
    return layer.key_dim, layer.value_dim or layer.key_dim


# Weights.


def copy_weights(source: Any, target: Any) -> None:
    """Copies all weights between built attention layers, of which one is Keras'.

    Raises:
        ValueError: If the source is quantized or adapted in a way that the target
            cannot be.
    """
    if isinstance(source, MultiHeadSelfAttention):
        _copy_fused(source.qkv_dense, _separate(target))
    for one, other in _projections(source, target):
        _copy_projection(one, other)
    copy_trainable(source, target)


def copy_trainable(source: Any, target: Any) -> None:
    """Says of each part of an attention layer whether it is trained."""
    target.trainable = source.trainable
    if not source.trainable:
        # Keras leaves what a frozen layer builds unfrozen.
        return
    pairs = _projections(source, target)
    if isinstance(source, MultiHeadSelfAttention):
        pairs += [(source.qkv_dense, part) for part in _separate(target)]
    for one, other in pairs:
        other.trainable = one.trainable
        for name in _WEIGHTS:
            weight = getattr(one, name, None)
            if weight is not None:
                set_trainable(getattr(other, name), weight.trainable)


def _projections(source: Any, target: Any) -> list[tuple[Any, Any]]:
    """The dense layers that both have, those of the source first."""
    fused = isinstance(source, MultiHeadSelfAttention)
    pairs = []
    for name in _PROJECTIONS:
        one = getattr(source, _UNFUSED.get(name, name) if fused else name, None)
        if one is not None:
            pairs.append((one, getattr(target, name)))
    return pairs


def _separate(layer: Any) -> list[Any]:
    return [layer._query_dense, layer._key_dense, layer._value_dense]


def _copy_projection(source: Any, target: Any) -> None:
    mode = source.quantization_mode
    if mode not in (None, "int8"):
        raise ValueError(
            "Only float and int8 weights convert: convert the float layer, then "
            f"quantize it. Received: projection '{source.path}' with quantization "
            f"mode {mode!r}"
        )
    if mode != target.quantization_mode:
        target.quantize(mode, config=source.quantization_config)
    if source.lora_enabled and not target.lora_enabled:
        target.enable_lora(source.lora_rank, lora_alpha=source.lora_alpha)
    for name in _WEIGHTS:
        weight = getattr(source, name, None)
        if weight is not None:
            getattr(target, name).assign(weight)


def _copy_fused(fused: FusedProjection, parts: list[Any]) -> None:
    """Splits the kernel `(D, K, G H + H + V)` and the bias, G = N / K."""
    if fused.quantization_mode is not None or fused._adapted:
        raise ValueError(
            "A fused projection is split while its weights are plain floats: convert "
            "before quantizing, or load saved weights into a layer without factors. "
            f"Received: projection '{fused.path}' with quantization mode "
            f"{fused.quantization_mode!r} and low-rank factors on {fused._adapted}"
        )
    for name in ("kernel", "bias"):
        weight = getattr(fused, name)
        if weight is None:
            continue
        columns: list[Tensor] = fused.cut(ops.convert_to_tensor(weight))
        for part, target in zip(columns, parts, strict=True):
            weight = getattr(target, name)
            weight.assign(ops.reshape(part, weight.shape))
