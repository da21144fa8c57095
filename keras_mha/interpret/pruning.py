"""Models without some of their attention heads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import keras
import numpy as np
from typing_extensions import override

from keras_mha.attention.numeric import plain_integer
from keras_mha.copying import Copier, described, own_objects, set_trainable
from keras_mha.interpret.paths import attention_layers, layer_paths
from keras_mha.layers.attention_layer import AttentionLayer
from keras_mha.layers.positions import ALiBi, RelativePositionBias
from keras_mha.layers.self_attention import MultiHeadSelfAttention
from keras_mha.layers.transformer_block import TransformerBlock
from keras_mha.models.bert import BertEncoder
from keras_mha.twin import twin

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
            factors; if the configuration of a model or layer does not hold the
            attention layer; if two functions or classes of yours in one layer have the
            same name; or the model does not fit (see `attention_maps`).

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
    pruner = _Pruner(
        {
            id(layers[path]): _Remaining.of(layers[path], path, removed)
            for path, removed in check_heads(layers, heads).items()
        }
    )
    smaller = pruner.copy(model)
    pruner.carry_state()
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


class _Pruner(Copier):
    """Copies models without the heads that go."""

    def __init__(self, plan: Mapping[int, _Remaining]) -> None:
        super().__init__()
        self.plan = plan  # by identity: names may repeat

    @override
    def is_swapped(self, layer: Any) -> bool:
        return id(layer) in self.plan

    @override
    def swap(self, layer: Any) -> Any:
        return self.copy_holder(layer)

    @override
    def copy_holder(self, layer: Any) -> Any:
        with own_objects(layer):
            return type(layer).from_config(_config(layer, self.plan))

    @override
    def carry_swapped(self, one: Any, other: Any) -> None:
        if not other.built:
            other.build_from_config(one.get_build_config())
        cuts = _cuts(one, self.plan[id(one)])
        values = [cuts.get(id(x), np.asarray)(np.asarray(x)) for x in one.variables]
        wanted = [value.shape for value in values]
        shapes = [tuple(variable.shape) for variable in other.variables]
        if wanted != shapes:
            raise ValueError(
                "A layer made from a configuration must have the heads that it says. "
                f"Received: {described(one)} with weights of shapes {shapes} in the "
                f"place of {wanted}"
            )
        # Outer layers come first: they hand `trainable` on to inner ones.
        for each, copied in zip(
            one._flatten_layers(), other._flatten_layers(), strict=True
        ):
            copied.trainable = each.trainable
        for old, new, value in zip(one.variables, other.variables, values, strict=True):
            new.assign(value)
            set_trainable(new, old.trainable)


def _config(
    holder: keras.layers.Layer, plan: Mapping[int, _Remaining]
) -> dict[str, Any]:
    """The configuration of a layer without the heads that go, at any depth.

    Asked of a copy, whose layers answer so too: names in configurations do not tell
    which layer is meant.
    """
    copied = twin(holder)
    pairs = zip(holder._flatten_layers(), copied._flatten_layers(), strict=True)
    plan = {id(copy): plan[id(one)] for one, copy in pairs if id(one) in plan}
    told: set[int] = set()

    def asked(layer: keras.layers.Layer) -> Callable[[], dict[str, Any]]:
        get_config = layer.get_config

        @functools.wraps(get_config)  # on which Keras looks for a mark
        def smaller() -> dict[str, Any]:
            config = get_config()
            changes = _changes(layer, config, plan)
            told.update(map(id, layer._flatten_layers() if changes else [layer]))
            return config | changes

        return smaller

    def losing(layers: Iterable[Any]) -> list[Any]:
        return [x for x in layers if any(id(y) in plan for y in x._flatten_layers())]

    layers = losing(copied._flatten_layers())
    for layer in layers:
        # Not through `setattr`, with which Keras tracks what layers own.
        vars(layer)["get_config"] = asked(layer)
    config = copied.get_config()
    for layer in layers:
        missing = [x.name for x in losing(layer._layers) if id(x) not in told]
        if id(layer) in told and missing:
            raise ValueError(
                "Layers must hold in their configuration the layers that lose heads. "
                f"Received: {type(layer).__name__} {layer.name!r}, which makes "
                f"{sorted(missing)} by itself"
            )
    return config


def _changes(
    layer: keras.layers.Layer, config: dict[str, Any], plan: Mapping[int, _Remaining]
) -> dict[str, Any]:
    """Reads what a layer says of all the attention in it."""
    if isinstance(layer, AttentionLayer):
        return _attention_config(layer, config, plan[id(layer)])
    if isinstance(layer, TransformerBlock):
        return config  # it has asked the attention in it
    # A subclass may fix the sizes, and not take them.
    if isinstance(layer, BertEncoder) and {*_OF_ENCODERS} <= {*config}:
        return _encoder_config(layer, plan)
    return {}


def _attention_config(
    layer: AttentionLayer, config: dict[str, Any], remaining: _Remaining
) -> dict[str, Any]:
    H, V = _head_sizes(layer)
    shares = config["num_key_value_heads"] is not None
    position = config["position"]
    if isinstance(position, dict) and "num_heads" in position["config"]:
        inner = {**position["config"], "num_heads": len(remaining.heads)}
        position = {**position, "config": inner}
    return {
        "num_heads": len(remaining.heads),
        "num_key_value_heads": len(remaining.groups) if shares else None,
        "key_dim": H,
        "value_dim": V,
        "position": position,
    }


def _encoder_config(
    encoder: BertEncoder, plan: Mapping[int, _Remaining]
) -> dict[str, Any]:
    """Reads what a `BertEncoder` says of its blocks' attention."""
    layers = [block.attention.sublayer for block in encoder.blocks]
    left = [
        len(plan[id(layer)].heads) if id(layer) in plan else layer.num_heads
        for layer in layers
    ]
    return {"num_heads": left, "key_dim": encoder.key_dim}


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
