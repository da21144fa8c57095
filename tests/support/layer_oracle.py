"""The attention layers in NumPy float64: every option written from its formula.

Works on every backend, and shares nothing with the package but the names of weights.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H
head size, V head size of values, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tests.support import reference as oracle
from tests.support.reference import Array

Weights = Mapping[str, Array]


def weights_of(layer: Any) -> dict[str, Array]:
    """A layer's weights in float64, by their paths inside the layer."""
    return {
        weight.path.removeprefix(f"{layer.path}/"): numbers(weight)
        for weight in layer.weights
        if "seed_generator" not in weight.path
    }


def numbers(tensor: Any) -> Array:
    """A tensor of any backend and floating dtype as float64."""
    from keras import ops

    return np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32")), np.float64)


def attention(
    layer: Any,
    weights: Weights,
    query: ArrayLike,
    value: ArrayLike | None = None,
    key: ArrayLike | None = None,
    **call: Any,
) -> tuple[Array, Array]:
    """Outputs and probabilities of an attention layer.

    Args:
        layer: A built layer, which tells its options.
        weights: As `weights_of` returns them; may be changed.
        query: `(B, T, D)`, the inputs of self-attention.
        value: `(B, S, D)`; `None` for self-attention.
        key: `(B, S, D)`; the values where `None`.
        **call: Call arguments of the layer, other than `training`.
    """
    options = layer.get_config()
    query = np.asarray(query, np.float64)
    if value is None:
        weights, value = unfused(layer, weights), query
    value = np.asarray(value, np.float64)
    key = value if key is None else np.asarray(key, np.float64)

    queries, keys = (
        oracle.project(inputs, weights, name)
        for inputs, name in ((query, "query"), (key, "key"))
    )
    queries = normalized(queries, weights, "query_norm")
    keys = normalized(keys, weights, "key_norm")
    position = layer.position_layer
    kind = type(position).__name__
    if kind == "RotaryEmbedding":
        queries, keys = (
            rotated(heads, **position.get_config()) for heads in (queries, keys)
        )
    B, T, N = queries.shape[:3]
    S = keys.shape[1]
    bias = np.zeros((B, N, T, S))
    if call.get("attention_bias") is not None:
        given = np.asarray(call["attention_bias"], np.float64)
        bias = bias + (given[:, None] if given.ndim == 3 else given)
    if kind == "ALiBi":
        for n in range(N):
            slope = 2.0 ** (-8.0 * (n + 1) / N)  # N a power of two
            bias[:, n] -= slope * np.abs(distances(T, S))
    if kind == "RelativePositionBias":
        table = weights[f"{position.name}/embeddings"]
        for t, s in np.ndindex(T, S):
            bias[:, :, t, s] += table[bucket(s - t, **position.get_config())]
    mixed, scores = oracle.attend(
        queries,
        keys,
        oracle.project(value, weights, "value"),
        visible_in_call((B, N, T, S), options["sliding_window"], **call),
        bias=bias,
        sinks=weights.get("sinks"),
        logits_soft_cap=options["logits_soft_cap"],
    )
    if call.get("head_mask") is not None:
        factors = np.asarray(call["head_mask"], np.float64)
        mixed = mixed * np.broadcast_to(factors, (B, N))[:, None, :, None]
    if "gate/kernel" in weights:
        mixed = mixed / (1.0 + np.exp(-oracle.project(query, weights, "gate")))
    outputs = np.tensordot(mixed, weights["attention_output/kernel"], axes=2)
    return outputs + weights.get("attention_output/bias", 0.0), scores


def unfused(layer: Any, weights: Weights) -> dict[str, Array]:
    """The weights of self-attention, its fused ones cut into three projections.

    The columns of key head `k` are those of its queries, of the head, of its values.
    """
    N, K = layer.num_heads, layer.num_key_value_heads
    G = N // K
    H, V = layer.qkv_dense.head_sizes
    cut = {name: weights[name] for name in weights if not name.startswith("qkv/")}
    for name in ("kernel", "bias"):
        if f"qkv/{name}" not in weights:
            continue
        fused = weights[f"qkv/{name}"]
        queries = [
            fused[..., k, g * H : (g + 1) * H] for k in range(K) for g in range(G)
        ]
        cut[f"query/{name}"] = np.stack(queries, axis=-2)
        cut[f"key/{name}"] = fused[..., G * H : (G + 1) * H]
        cut[f"value/{name}"] = fused[..., (G + 1) * H :]
        assert cut[f"value/{name}"].shape[-1] == V
    return cut


def visible_in_call(
    shape: tuple[int, int, int, int],
    sliding_window: int | None = None,
    *,
    mask: ArrayLike | None = None,
    query_mask: ArrayLike | None = None,
    value_mask: ArrayLike | None = None,
    key_mask: ArrayLike | None = None,
    attention_mask: ArrayLike | None = None,
    use_causal_mask: bool = False,
    segment_ids: Any = None,
    **others: object,
) -> Array:
    """Which query sees which key, `(B, N, T, S)`, by a layer's call arguments."""
    del others
    columns = [each for each in (mask, value_mask, key_mask) if each is not None]
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,) * 2
    return oracle.visible_pairs(
        shape,
        mask if query_mask is None else query_mask,
        np.logical_and.reduce(columns) if columns else None,
        attention_mask,
        use_causal_mask,
        sliding_window,
        *pair,
    )


def distances(T: int, S: int) -> Array:
    """Key position minus query position, `(T, S)`."""
    return np.arange(S) - np.arange(T)[:, None]


def normalized(heads: Array, weights: Weights, name: str) -> Array:
    """RMS or layer normalization over H, if there are weights of that name."""
    if f"{name}/scale" in weights:
        mean_square = np.mean(heads**2, axis=-1, keepdims=True)
        return heads / np.sqrt(mean_square + 1e-6) * weights[f"{name}/scale"]
    if f"{name}/gamma" in weights:
        centered = heads - heads.mean(axis=-1, keepdims=True)
        variance = np.mean(centered**2, axis=-1, keepdims=True)
        scaled = centered / np.sqrt(variance + 1e-6) * weights[f"{name}/gamma"]
        return scaled + weights[f"{name}/beta"]
    return heads


def rotated(
    heads: Array,
    base: float = 10000.0,
    fraction: float = 1.0,
    interleaved: bool = False,
    **others: object,
) -> Array:
    """Turns pairs of features as complex numbers, position by position."""
    del others
    turned, size = heads.copy(), round(fraction * heads.shape[-1])
    for pair in range(size // 2):
        one, other = (
            (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + size // 2)
        )
        for place in range(heads.shape[1]):
            angle = place * base ** (-2 * pair / size)
            number = heads[:, place, :, one] + 1j * heads[:, place, :, other]
            number = number * np.exp(1j * angle)
            turned[:, place, :, one] = number.real
            turned[:, place, :, other] = number.imag
    return turned


def bucket(
    distance: int,
    num_buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
    **others: object,
) -> int:
    """T5's bucket of one distance of a key from a query."""
    del others
    first, count = 0, num_buckets
    if bidirectional:
        count //= 2
        first = count if distance > 0 else 0
        far = abs(distance)
    else:
        far = max(-distance, 0)
    exact = count // 2
    if far < exact:
        return first + far
    steps = math.log(far / exact) / math.log(max_distance / exact)
    return first + min(count - 1, exact + int(steps * (count - exact)))
