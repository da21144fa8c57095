"""KerasHub's attention layers, in the place where its blocks hold them.

The blocks, such as `TransformerDecoder`, and the models around them keep their code.
KerasHub is not imported: its layers are recognized by the names of their classes.

Letters: B batch, T query length, S key length, D model width, N query heads, K
key/value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops
from typing_extensions import override

from keras_mha.convert.keras_layers import (
    Masks,
    from_stock,
    layer_options,
    take_path,
)
from keras_mha.convert.stock_masks import StockRows
from keras_mha.layers.multi_head_attention import MultiHeadAttention
from keras_mha.twin import Twins, put
from keras_mha.typing import Tensor


def convert_layer(layer: Any, twins: Twins, masks: Masks) -> Any:
    """Makes ours of a layer of KerasHub; `None` if it is another, or not built yet."""
    kind = type(layer)
    convert = _CONVERTERS.get(kind.__name__)
    if kind.__module__.partition(".")[0] != "keras_hub" or convert is None:
        return None
    # Only the first takes all its sizes when it is made.
    if not layer.built and kind.__name__ != "CachedMultiHeadAttention":
        return None
    return convert(layer, twins, masks)


@keras.saving.register_keras_serializable(package="keras_mha")
class CachedAttention(MultiHeadAttention):
    """`MultiHeadAttention` with the call of KerasHub's `CachedMultiHeadAttention`.

    Args:
        *args: Arguments of `MultiHeadAttention`.
        **kwargs: Arguments of `MultiHeadAttention`.

    Call arguments:
        query: `(B, T, D)`.
        value: `(B, S, D)`.
        key: `(B, S, D)`. Defaults to `value`.
        attention_mask: `(B, T, S)`.
        cache: Keys and values `(B, 2, S, N, H)`.
        cache_update_index: Where in the cache the new keys and values go; with `None`
            the cache holds all.
        return_attention_scores: Whether to return the probabilities too.
        training: Whether dropout is active.

    Returns:
        The outputs; with `return_attention_scores` also the probabilities; and with a
        `cache` the new cache.
    """

    @override
    def call(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        cache_update_index: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
    ) -> Any:
        keys, cache = _with_cache(
            lambda: (
                self._key_dense(value if key is None else key),
                self._value_dense(value),
            ),
            cache,
            cache_update_index,
        )
        mixed, scores = self._compute_attention(
            self._query_dense(query),
            keys[0],
            keys[1],
            _as_booleans(attention_mask),
            training,
            return_attention_scores,
        )
        outputs = [self._output_dense(mixed)]
        if return_attention_scores:
            outputs.append(scores)
        if cache is not None:
            outputs.append(cache)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @override
    def compute_output_spec(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        cache_update_index: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
    ) -> Any:
        del attention_mask, cache_update_index
        outputs = super().compute_output_spec(
            query,
            value,
            key,
            return_attention_scores=return_attention_scores,
            training=training,
        )
        if cache is None:
            return outputs
        cache = keras.KerasTensor(cache.shape, dtype=self.compute_dtype)
        return (*keras.tree.flatten(outputs), cache)


@keras.saving.register_keras_serializable(package="keras_mha")
class CachedStockAttention(StockRows, CachedAttention):
    """`CachedAttention` in which a query that sees no key gets what Keras gives it."""


class RotaryAttention(MultiHeadAttention):
    """`MultiHeadAttention` with the call of the attention in KerasHub's Llama.

    The rotary layer of the original, which is a part of it, turns queries and keys.

    Args:
        *args: Arguments of `MultiHeadAttention`.
        window: Query `i` attends to keys with `|i - j| < window`. Defaults to no limit.
        **kwargs: Arguments of `MultiHeadAttention`.

    Call arguments:
        hidden_states: `(B, T, D)`.
        attention_mask: `(B, T, S)`.
        cache: Keys and values `(B, 2, S, K, H)`.
        cache_update_index: See `CachedAttention`.
        training: Whether dropout is active.

    Returns:
        The outputs `(B, T, D)`, and with a `cache` the new cache.
    """

    def __init__(self, *args: Any, window: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._window = window
        # Parts of the original.
        self.rotary_embedding_layer: Any = None
        self._dropout_layer: Any = None
        self._query_dense_layer_norm: Any = None
        self._key_dense_layer_norm: Any = None

    @override
    def call(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        cache_update_index: Any = None,
        training: bool | None = None,
    ) -> Any:
        start = 0 if cache_update_index is None else cache_update_index

        def turned(heads: Tensor, norm: Any) -> Tensor:
            heads = heads if norm is None else norm(heads)
            return self.rotary_embedding_layer(heads, start_index=start)

        keys, cache = _with_cache(
            lambda: (
                turned(self._key_dense(hidden_states), self._key_dense_layer_norm),
                self._value_dense(hidden_states),
            ),
            cache,
            cache_update_index,
        )
        query = turned(self._query_dense(hidden_states), self._query_dense_layer_norm)
        mask = _as_booleans(attention_mask)
        if self._window is not None:
            near = _band(self._window, start, query, keys[0])
            mask = near if mask is None else ops.logical_and(mask, near)
        mixed, _ = self._compute_attention(query, keys[0], keys[1], mask, training)
        if self._dropout_layer is not None:
            mixed = self._dropout_layer(mixed, training=training)
        outputs = self._output_dense(mixed)
        return outputs if cache is None else (outputs, cache)

    @override
    def compute_output_spec(
        self, hidden_states: Tensor, cache: Any = None, **call: Any
    ) -> Any:
        del call
        outputs = keras.KerasTensor(hidden_states.shape, dtype=self.compute_dtype)
        if cache is None:
            return outputs
        return outputs, keras.KerasTensor(cache.shape, dtype=self.compute_dtype)


class GemmaAttention(RotaryAttention):
    """`RotaryAttention` with the names and defaults of KerasHub's Gemma."""

    @override
    def call(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        cache_update_index: Any = 0,
        training: bool | None = False,
    ) -> Any:
        index = None if cache is None else cache_update_index
        return super().call(x, attention_mask, cache, index, training)

    @override
    def compute_output_spec(self, x: Tensor, cache: Any = None, **call: Any) -> Any:
        return super().compute_output_spec(x, cache, **call)


def _with_cache(
    project: Callable[[], tuple[Tensor, Tensor]], cache: Any, index: Any
) -> tuple[Any, Any]:
    """Returns keys and values `(B, S, K, H)`, and the cache with the new ones in it."""
    if cache is None:
        if index is not None:
            raise ValueError(
                "`cache_update_index` needs a `cache`. "
                f"Received: cache=None, cache_update_index={index}"
            )
        return project(), None
    kept = cache[:, 0], cache[:, 1]
    if index is None:
        return kept, cache
    joined = [
        ops.slice_update(old, [0, index, 0, 0], ops.cast(new, old.dtype))
        for old, new in zip(kept, project(), strict=True)
    ]
    return joined, ops.stack(joined, axis=1)


def _band(window: int, start: Any, query: Tensor, keys: Tensor) -> Tensor:
    """The mask `(1, T, S)` of keys near queries, the first of which is at `start`."""
    rows = ops.arange(ops.shape(query)[1])[:, None] + start
    distances = ops.abs(rows - ops.arange(ops.shape(keys)[1])[None])
    return ops.less(distances, window)[None]


def _as_booleans(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else ops.cast(mask, "bool")


# How each layer is converted.


def _cached(layer: Any, twins: Twins, masks: Masks) -> Any:
    kind = CachedStockAttention if masks == "as_keras" else CachedAttention
    return from_stock(layer, twins, kind=kind)


def _rotary(layer: Any, twins: Twins, _: Masks) -> RotaryAttention:
    # Others have a window whose mask the block around them makes.
    windowed = hasattr(layer, "_mask_sliding_window") and getattr(
        layer, "use_sliding_window_attention", True
    )
    window = (layer.sliding_window_size or None) if windowed else None
    return _with_parts(layer, twins, RotaryAttention, window=window)


def _gemma(layer: Any, twins: Twins, _: Masks) -> GemmaAttention:
    windowed = layer.use_sliding_window_attention
    converted = _with_parts(
        layer,
        twins,
        GemmaAttention,
        logits_soft_cap=layer.logit_soft_cap,
        dropout=layer.dropout,
        window=layer.sliding_window_size if windowed else None,
    )
    if not layer.query_head_dim_normalize:
        converted._score_scale = (layer.hidden_dim // layer.num_query_heads) ** -0.5
    return converted


def _with_parts(
    layer: Any, twins: Twins, kind: Callable[..., Any], **options: Any
) -> Any:
    """Makes a layer that has copies of the parts of another."""

    def read(*names: str) -> Any:
        return next((vars(layer)[name] for name in names if name in vars(layer)), None)

    output: Any = read("_output_dense", "output_dense")  # its kernel is (N, H, D)
    converted = kind(
        num_heads=read("num_query_heads", "_num_query_heads"),
        key_dim=output.kernel.shape[1],
        num_key_value_heads=read("num_key_value_heads", "_num_key_value_heads"),
        **options,
        **layer_options(layer),
    )
    shape = layer.get_build_config()["input_shape"]
    converted.build(shape, shape)
    for name in ("query", "key", "value", "output"):
        part = read(f"_{name}_dense", f"{name}_dense")
        put(converted, f"_{name}_dense", twins.copy(part))
    rotary = read("rotary_embedding_layer", "rope_layer")
    put(converted, "rotary_embedding_layer", twins.copy(rotary))
    for name in ("_query_dense_layer_norm", "_key_dense_layer_norm"):
        put(converted, name, twins.copy(read(name)))
    if kind is RotaryAttention:  # on mixed values; Gemma's is on probabilities
        dropout = read("_dropout_layer", "dropout_layer")
        put(converted, "_dropout_layer", twins.copy(dropout))
    take_path(layer, converted)
    return converted


_CONVERTERS: dict[str, Callable[[Any, Twins, Masks], Any]] = {
    "CachedMultiHeadAttention": _cached,
    "WhisperCachedMultiHeadAttention": _cached,
    "LlamaAttention": _rotary,
    "CachedMistralAttention": _rotary,
    "CachedMixtralAttention": _rotary,
    "Phi3Attention": _rotary,
    "QwenAttention": _rotary,
    "QwenMoeAttention": _rotary,
    "Qwen3Attention": _rotary,
    "Qwen3MoeAttention": _rotary,
    "CachedGemmaAttention": _gemma,
}
