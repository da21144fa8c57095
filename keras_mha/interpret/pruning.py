"""Models without some of their attention heads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import keras
import numpy as np

from keras_mha.attention.numeric import plain_integer
from keras_mha.interpret.paths import attention_layers, layer_paths
from keras_mha.layers.attention_layer import AttentionLayer
from keras_mha.layers.positions import (
    ALiBi,
    DistanceBias,
    FunctionBias,
    RelativePositionBias,
)
from keras_mha.layers.self_attention import MultiHeadSelfAttention
from keras_mha.layers.transformer_block import TransformerBlock
from keras_mha.models.bert import BertEncoder
from keras_mha.twin import Twins, own_variable, retrace, set_trainable, twin

Cut = Callable[[np.ndarray], np.ndarray]
_Model = TypeVar("_Model", bound=keras.layers.Layer)
# What the configuration of a `BertEncoder` says of its blocks.
_OF_ENCODERS = ("num_heads", "key_dim")


def prune_heads(model: _Model, heads: Mapping[str, Iterable[int]]) -> _Model:
    """Makes a smaller model that lacks some attention heads.

    The weights of those heads are gone from the projections, and what remains gives
    the outputs that `model` gives with a `head_mask` of zeros there. The new model has
    weights of its own and is not compiled; `model` stays as it is, also meanwhile. The
    new one can be trained, saved and exported like any other. What is frozen stays
    frozen.

    Where queries share keys and values (`num_key_value_heads`), as many heads must
    stay in every group that keeps any; a group without heads goes, keys and values
    included.

    Source: Michel, Levy and Neubig 2019, "Are sixteen heads really better than one?".

    Args:
        model: A built model that attends by layers of keras_mha, and whose layers hold
            their sublayers in their configurations, as Functional and Sequential
            models, `ResidualNorm`, the blocks, `BertEncoder` and Keras' wrappers do.
        heads: Which heads go, from 0 to N - 1, by path of the layer, as
            `attention_maps` names it.

    Returns:
        The new model, of the class of `model`.

    Raises:
        TypeError: If `model` is not a Keras layer.
        ValueError: If a layer or head does not exist, a layer would keep no head or
            groups of different sizes; if a layer has ALiBi, whose slopes depend on the
            number of heads; if weights are quantized or have low-rank
            factors; if the configuration of a layer does not hold the attention layer;
            or the model does not fit (see `attention_maps`).

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_mha
    >>> from keras_mha.interpret import prune_heads
    >>> inputs = keras.Input((None, 8))
    >>> layer = keras_mha.MultiHeadSelfAttention(num_heads=4, name="heads")
    >>> model = keras.Model(inputs, layer(inputs))
    >>> smaller = prune_heads(model, {"heads": [0, 3]})
    >>> model.count_params(), smaller.count_params()
    (288, 148)
    >>> x = np.random.normal(size=(3, 5, 8)).astype("float32")
    >>> masked = layer(x, head_mask=np.array([0.0, 1.0, 1.0, 0.0]))
    >>> bool(np.allclose(smaller(x), masked, atol=1e-5))
    True
    """
    layers = attention_layers(model)
    _check_weights(model)
    plan = {
        id(layers[path]): _Remaining.of(layers[path], path, removed)
        for path, removed in check_heads(layers, heads).items()
    }  # by identity: names may repeat
    pruned: list[AttentionLayer] = []

    def replace(layer: Any, _: Twins) -> AttentionLayer | None:
        if id(layer) not in plan:
            return None
        pruned.append(_without_heads(layer, plan[id(layer)]))
        return pruned[-1]

    smaller = twin(model, copy_variable=own_variable, replace=replace)
    retrace(smaller)
    for layer in smaller._flatten_layers():
        if isinstance(layer, BertEncoder):
            # Its configuration says them of all blocks.
            counts = [block.attention.sublayer.num_heads for block in layer.blocks]
            if counts != _counts(layer):
                layer.num_heads = tuple(counts)
    _check_told(smaller, pruned)
    return smaller


def check_heads(
    layers: Mapping[str, AttentionLayer], heads: Mapping[str, Iterable[int]]
) -> dict[str, tuple[int, ...]]:
    """Returns the heads by path, each once and in order, without empty entries.

    Raises:
        ValueError: If a layer or head does not exist.
    """
    removed = {}
    for path, listed in heads.items():
        if path not in layers:
            raise ValueError(
                f"`heads` must name attention layers of the model, {list(layers)}. "
                f"Received: {path!r}"
            )
        N = layers[path].num_heads
        numbers = [plain_integer(head) for head in listed]
        if not all(n is not None and 0 <= n < N for n in numbers):
            raise ValueError(
                f"`heads` of {path!r} must be integers from 0 to {N - 1}. "
                f"Received: {list(listed)}"
            )
        if numbers:
            removed[path] = tuple(sorted({n for n in numbers if n is not None}))
    return removed


class _Remaining(NamedTuple):
    """The query heads of a layer that stay, by the key and value head they share."""

    groups: dict[int, list[int]]

    @classmethod
    def of(
        cls, layer: AttentionLayer, path: str, removed: tuple[int, ...]
    ) -> _Remaining:
        size = layer.num_heads // layer.num_key_value_heads
        groups: dict[int, list[int]] = {}
        for head in range(layer.num_heads):
            if head not in removed:
                groups.setdefault(head // size, []).append(head)
        if not groups:
            raise ValueError(
                f"One head or more must stay in each layer. Received: {path!r} without "
                f"all of its {layer.num_heads}"
            )
        if len({len(heads) for heads in groups.values()}) > 1:
            raise ValueError(
                "Of queries that share keys and values as many must stay in each "
                f"group. Received: {path!r}, with groups of {size}, of which "
                f"{list(groups.values())} would stay"
            )
        if isinstance(layer.position_layer, ALiBi):
            raise ValueError(
                "ALiBi's slopes depend on the number of heads: those that stay would "
                f"get others. Received: {path!r} with ALiBi"
            )
        return cls(groups)

    @property
    def heads(self) -> list[int]:
        return [head for heads in self.groups.values() for head in heads]


def _without_heads(layer: AttentionLayer, remaining: _Remaining) -> AttentionLayer:
    config = _attention_config(layer, layer.get_config(), remaining)
    smaller = type(layer).from_config(config)
    smaller.build_from_config(layer.get_build_config())
    smaller._path, smaller._parent_path = layer._path, layer._parent_path
    cuts = _cuts(layer, remaining)
    # Outer layers come first: they hand `trainable` on to inner ones.
    for each, copied in zip(
        layer._flatten_layers(), smaller._flatten_layers(), strict=True
    ):
        copied.trainable = each.trainable
    for old, new in zip(layer.variables, smaller.variables, strict=True):
        new.assign(cuts.get(id(old), np.asarray)(np.asarray(old)))
        set_trainable(new, old.trainable)
    return smaller


def _check_told(model: keras.layers.Layer, pruned: list[AttentionLayer]) -> None:
    """Refuses layers whose configuration does not hold those that lost heads.

    They would have all heads when a saved model is loaded.
    """
    probe = Twins()
    copied = probe.make(model)  # whose layers note that their configuration is asked
    lost = {id(probe.copy(layer)) for layer in pruned}
    told: set[int] = set()

    def noted(layer: keras.layers.Layer) -> Callable[[], dict[str, Any]]:
        get_config = layer.get_config

        @functools.wraps(get_config)  # on which Keras looks for a mark
        def asked() -> dict[str, Any]:
            told.add(id(layer))
            return get_config()

        return asked

    def losing(layers: Iterable[Any]) -> list[Any]:
        return [x for x in layers if any(id(y) in lost for y in x._flatten_layers())]

    def check(layer: keras.layers.Layer) -> None:
        if _tells(layer):
            return
        told.clear()
        layer.get_config()
        inner = losing(layer._layers)
        missing = sorted(x.name for x in inner if id(x) not in told)
        if missing:
            raise ValueError(
                "Layers must hold in their configuration the layers that lose heads. "
                f"Received: {type(layer).__name__} {layer.name!r}, which makes "
                f"{missing} by itself"
            )
        for each in inner:
            check(each)

    for layer in losing(copied._flatten_layers()):
        # Not through `setattr`, with which Keras tracks what layers own.
        vars(layer)["get_config"] = noted(layer)
    check(copied)


def _tells(layer: keras.layers.Layer) -> bool:
    """Whether the configuration of a layer says all of the attention in it."""
    if isinstance(layer, BertEncoder):
        # A subclass may fix the sizes, and not take them.
        return {*_OF_ENCODERS} <= {*layer.get_config()}
    return isinstance(layer, AttentionLayer | TransformerBlock)


def _counts(encoder: BertEncoder) -> list[int]:
    N = encoder.num_heads
    return [N] * encoder.num_layers if isinstance(N, int) else list(N)


def _attention_config(
    layer: AttentionLayer, config: dict[str, Any], remaining: _Remaining
) -> dict[str, Any]:
    """The configuration with fewer heads, and objects for what users may have made."""
    H, V = _head_sizes(layer)
    N, shares = len(remaining.heads), config["num_key_value_heads"] is not None
    position: Any = layer.position_layer
    if isinstance(position, DistanceBias) and not isinstance(position, FunctionBias):
        position = type(position).from_config(position.get_config() | {"num_heads": N})
    objects = vars(layer._projections)
    return {
        **config,
        **{name: objects[name] for name in objects.keys() & config.keys()},
        "num_heads": N,
        "num_key_value_heads": len(remaining.groups) if shares else None,
        "key_dim": H,
        "value_dim": V,
        "position": config["position"] if layer._position is not None else position,
    }


def _head_sizes(layer: AttentionLayer) -> tuple[int, int]:
    """H and V."""
    if isinstance(layer, MultiHeadSelfAttention):
        return layer.qkv_dense.head_sizes
    sizes: Any = layer
    return sizes.key_dim, sizes.value_dim


def _cuts(layer: AttentionLayer, remaining: _Remaining) -> dict[int, Cut]:
    """How to cut each weight that belongs to heads, by the weight's identity.

    Letters: D model width, N query heads, K key/value heads, H head size.
    """
    parts: Any = layer
    cuts: dict[int, Cut] = {}

    def cut(dense: Any, kernel: Cut, bias: Cut | None) -> None:
        cuts[id(dense.kernel)] = kernel
        if bias is not None and dense.bias is not None:
            cuts[id(dense.bias)] = bias

    of_heads = _take(remaining.heads, axis=-2)  # of `(D, N, H)` and `(N, H)`
    if isinstance(layer, MultiHeadSelfAttention):
        fused = _take_fused(remaining, _head_sizes(layer)[0], layer)
        cut(parts.qkv_dense, fused, fused)
        gate = getattr(parts, "gate_dense", None)
    else:
        of_groups = _take(
            list(remaining.groups), axis=-2
        )  # of `(D, K, H)` and `(K, H)`
        cut(parts.query_dense, of_heads, of_heads)
        cut(parts.key_dense, of_groups, of_groups)
        cut(parts.value_dense, of_groups, of_groups)
        gate = getattr(parts, "_gate_dense", None)
    if gate is not None:
        cut(gate, of_heads, of_heads)
    cut(parts.output_dense, _take(remaining.heads, axis=0), None)
    if hasattr(parts, "sinks"):
        cuts[id(parts.sinks)] = _take(remaining.heads, axis=0)
    if isinstance(layer.position_layer, RelativePositionBias):
        cuts[id(layer.position_layer.embeddings)] = _take(remaining.heads, axis=-1)
    return cuts


def _take(places: list[int], axis: int) -> Cut:
    return lambda array: np.take(array, places, axis)


def _take_fused(remaining: _Remaining, key_dim: int, layer: AttentionLayer) -> Cut:
    """Cuts `(..., K, G H + H + V)`: each group's queries, then its key and value."""
    size = layer.num_heads // layer.num_key_value_heads

    def cut(array: np.ndarray) -> np.ndarray:
        shared = np.arange(size * key_dim, array.shape[-1])
        columns = {
            group: np.concatenate(
                [np.arange(key_dim) + head % size * key_dim for head in heads]
                + [shared]
            )
            for group, heads in remaining.groups.items()
        }
        return np.stack([array[..., k, columns[k]] for k in columns], axis=-2)

    return cut


def _check_weights(model: keras.layers.Layer) -> None:
    for path, layer in {model.name: model, **layer_paths(model)}.items():
        mode = getattr(layer, "quantization_mode", None)
        adapted = getattr(layer, "lora_enabled", False) or getattr(
            layer, "_adapted", ()
        )
        if mode is not None or adapted:
            raise ValueError(
                "Heads are removed from plain weights: before they are quantized, and "
                "after low-rank factors were merged, as saving and loading does. "
                f"Received: {path!r} with "
                + (f"quantization {mode!r}" if mode else "low-rank factors")
            )
