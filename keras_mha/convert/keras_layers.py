"""One attention layer of Keras into one of ours, and back.

Letters: D model width, N query heads, K key/value heads, H head size of queries and
keys, V head size of values.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import keras
from keras import ops

from keras_mha.convert.stock_masks import StockMaskAttention
from keras_mha.layers.fused_projection import FusedProjection
from keras_mha.layers.multi_head_attention import MultiHeadAttention
from keras_mha.layers.projections import Projection
from keras_mha.layers.seeded_layer import keep_frozen
from keras_mha.layers.self_attention import MultiHeadSelfAttention
from keras_mha.twin import Twins, put, set_trainable
from keras_mha.typing import Tensor

Masks: TypeAlias = Literal["mend", "as_keras"]

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
_SEPARATE = "_query_dense", "_key_dense", "_value_dense"
# What `MultiHeadSelfAttention` calls those that it does not fuse.
_UNFUSED = {"_gate_dense": "gate_dense", "_output_dense": "output_dense"}
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


def is_fused(layer: object) -> bool:
    """Whether it is ours, and takes one input where Keras' layer takes two."""
    return type(layer) is MultiHeadSelfAttention


def is_ours(layer: object) -> bool:
    """Whether it is an attention layer of ours, no subclass of it."""
    return type(layer) in (
        MultiHeadAttention,
        MultiHeadSelfAttention,
        StockMaskAttention,
    )


def from_stock(
    layer: Any, twins: Twins, kind: type[MultiHeadAttention] = MultiHeadAttention
) -> MultiHeadAttention:
    """Makes our layer of the options and, if it is built, the parts of Keras'.

    Args:
        layer: The layer.
        twins: Makes the copies of its parts.
        kind: The class of the new layer.
    """
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
    if kind is StockMaskAttention:
        options["takes_masks_off"] = not grouped
    converted = kind(
        **options,
        # Keras' configurations leave it out.
        flash_attention=layer._flash_attention,
        seed=layer.seed,
        **layer_options(layer),
    )
    if layer.built:
        converted.build_from_config(layer.get_build_config())
        _take_parts(layer, converted, twins, Projection)
    return converted


def to_stock(layer: Any, twins: Twins) -> Any:
    """Makes Keras' layer of the options and, if it is built, the weights of ours.

    Raises:
        ValueError: If Keras' layer lacks an option that the layer uses.
    """
    converted = _unbuilt_stock(layer, *_head_sizes(layer))
    if not layer.built:
        return converted
    config = layer.get_build_config()
    if is_fused(layer):
        shape = config["input_shape"]
        config = {"shapes_dict": {"query_shape": shape, "value_shape": shape}}
    converted.build_from_config(config)
    if is_fused(layer):
        separate = tuple(getattr(converted, name) for name in _SEPARATE)
        _split(layer.qkv_dense, separate)
    _take_parts(layer, converted, twins, keras.layers.EinsumDense)
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
        **layer_options(layer),
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


def layer_options(layer: Any) -> dict[str, Any]:
    """The arguments of `keras.layers.Layer` that a layer in its place has."""
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


def complete(target: Any) -> None:
    """Does what has to wait until the parts of the new layer are complete."""
    for name in _PROJECTIONS:
        part = getattr(target, name, None)
        if isinstance(part, Projection):
            part.read_equation()
    keep_frozen(target)


def _take_parts(source: Any, target: Any, twins: Twins, kind: type) -> None:
    """Puts copies of a built layer's projections into another, as of a class."""
    for name in _PROJECTIONS:
        name_there = _UNFUSED.get(name, "") if is_fused(source) else name
        part = getattr(source, name_there, None)
        if part is not None:
            put(target, name, twins.copy(part, kind))
    take_path(source, target)


def take_path(source: Any, target: Any) -> None:
    """Says of a layer that it is where another is."""
    target._path, target._parent_path = source._path, source._parent_path


def _split(fused: FusedProjection, parts: tuple[Any, ...]) -> None:
    """Splits the kernel `(D, K, G H + H + V)` and the bias, G = N / K."""
    if fused.quantization_mode is not None or fused._adapted:
        raise ValueError(
            "A fused projection is split while its weights are plain floats: convert "
            "before quantizing, or load saved weights into a layer without factors. "
            f"Received: projection '{fused.path}' with quantization mode "
            f"{fused.quantization_mode!r} and low-rank factors on {fused._adapted}"
        )
    for part in parts:
        part.trainable = fused.trainable
    for name in ("kernel", "bias"):
        weight = getattr(fused, name)
        if weight is None:
            continue
        columns: list[Tensor] = fused.cut(ops.convert_to_tensor(weight))
        for part, values in zip(parts, columns, strict=True):
            split = getattr(part, name)
            split.assign(ops.reshape(values, split.shape))
            set_trainable(split, weight.trainable)
