"""Caches keys and values from call to call, for decoding token by token.

A cache is a plain dictionary of tensors whose shapes never change, so it passes
through `tf.function`, XLA and loops: `key` `(B, L, K, H)`, `value` `(B, L, K, V)`,
`mask` `(B, L)` boolean, False for padding and for places not yet written, and
`length`, an int32 scalar: the number of positions seen so far.

Letters: B batch, T query length, L cached positions, K key/value heads, H head size,
V head size of values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import backend, ops

from keras_mha.attention.gradient import with_gradient
from keras_mha.attention.mask_parts import MaskParts, clear_padding
from keras_mha.typing import Shape, Tensor

Cache = dict[str, Any]

_JOINT = "__"


class Extended(NamedTuple):
    """Holds what queries attend to: cached keys and those of the new positions.

    Attributes:
        key: `(B, S, K, H)`.
        value: `(B, S, K, V)`.
        mask: What may attend to what: causal.
        offset: Number of keys before the first query, an int or an int32 scalar.
        cache: The cache for the next call.
        overflows: Whether more positions were seen than the cache can hold, a boolean
            scalar; `None` where that cannot happen.
    """

    key: Tensor
    value: Tensor
    mask: MaskParts
    offset: Any
    cache: Cache
    overflows: Tensor | None


def empty_cache(
    batch_size: int,
    max_length: int,
    key_shape: tuple[int, int],
    value_shape: tuple[int, int],
    dtype: str,
    sliding_window: int | None = None,
) -> Cache:
    """Returns an empty cache.

    Args:
        batch_size: B.
        max_length: How many positions it has room for.
        key_shape: `(K, H)`.
        value_shape: `(K, V)`.
        dtype: Of keys and values.
        sliding_window: With a window the cache holds only what a query can see before
            its own position, and any number of positions fits.

    Example:

    >>> from keras_mha.attention.cache import empty_cache
    >>> cache = empty_cache(2, 100, (3, 5), (3, 7), "float32", sliding_window=12)
    >>> tuple(cache["value"].shape)
    (2, 11, 3, 7)
    """
    length = _stored_length(max_length, sliding_window)
    return {
        "key": ops.zeros((batch_size, length, *key_shape), dtype=dtype),
        "value": ops.zeros((batch_size, length, *value_shape), dtype=dtype),
        "mask": ops.zeros((batch_size, length), dtype="bool"),
        "length": ops.zeros((), dtype="int32"),
    }


def extend_cache(
    cache: Cache,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    sliding_window: int | None = None,
) -> Extended:
    """Adds keys and values to a cache.

    Without a window they are written after the cached ones. A window's cache holds
    the last positions, the oldest first, and new ones push the oldest out. A ring
    would save no copy, as functional tensors are copied anyway, and this order keeps
    the distance of every key known.

    Args:
        cache: The cache that the last call returned.
        key: `(B, T, K, H)` of the new positions.
        value: `(B, T, K, V)`, likewise.
        padding: Boolean `(B, T)`: which of them count. Defaults to all.
        sliding_window: The window with which the cache was made.

    Raises:
        ValueError: If the cache is of another layer or batch size, or T is known,
            and more than the cache can ever hold.
    """
    check_cache(cache, key.shape, value.shape, sliding_window)
    batch, T = ops.shape(key)[:2]
    fresh = ops.ones((batch, T), dtype="bool") if padding is None else padding
    # Cleared once, what is cached need not be cleared at every later step.
    key, value = (clear_padding(new, padding) for new in (key, value))
    new = {"key": key, "value": value, "mask": fresh}
    new = {name: ops.cast(new[name], cache[name].dtype) for name in new}
    L, length = ops.shape(cache["mask"])[1], cache["length"]
    if _is_ring(L, sliding_window):
        seen = {name: ops.concatenate([cache[name], new[name]], axis=1) for name in new}
        # The last L, whose shape is known though T may not be.
        stored = {name: _cut(tensor, T, cache[name]) for name, tensor in seen.items()}
        offset, overflows = L, None
    else:
        place = ops.minimum(length, L - T)  # torch would raise past the end
        seen = {name: _write(cache[name], new[name], place) for name in new}
        stored = seen
        offset, overflows = length, length + T > L
    mask = MaskParts(
        query_padding=padding,
        key_padding=seen["mask"],
        lower=None if sliding_window is None else offset - (sliding_window - 1),
        upper=offset,
    )
    cache = {**stored, "length": length + T}
    return Extended(seen["key"], seen["value"], mask, offset, cache, overflows)


def next_position(cache: Cache) -> Tensor:
    """Returns the next position, an int32 scalar.

    Raises:
        ValueError: If `cache` lacks a part of a cache.
    """
    names = {"key", "value", "mask", "length"}
    if not names <= cache.keys():
        raise ValueError(
            f"A cache holds {sorted(names)}, as `init_cache` makes it. "
            f"Received: {sorted(cache)}"
        )
    return cache["length"]


def flatten_cache(cache: dict[str, Any]) -> dict[str, Tensor]:
    """Flattens nested caches, a block's or a stack's, into one dictionary of tensors.

    The signatures of a SavedModel take and return no nested dictionaries. Names are
    joined by two underscores, which every signature allows.

    Args:
        cache: A cache, or a dictionary of caches by names without `__`.

    Raises:
        ValueError: If a name is not a string, or has two underscores.

    Example:

    >>> import keras_mha
    >>> block = keras_mha.TransformerDecoderBlock(2, 16)
    >>> block.build((None, None, 8))
    >>> flat = keras_mha.flatten_cache(block.init_cache(batch_size=3, max_length=5))
    >>> sorted(flat)
    ['self__key', 'self__length', 'self__mask', 'self__value']
    >>> list(keras_mha.unflatten_cache(flat))
    ['self']
    """
    flat: dict[str, Tensor] = {}
    for name, part in cache.items():
        if not isinstance(name, str) or _JOINT in name:
            raise ValueError(
                f"Names in a cache must be strings without {_JOINT!r}. "
                f"Received: {name!r}"
            )
        if isinstance(part, dict):
            inner = flatten_cache(part)
            flat.update({f"{name}{_JOINT}{key}": inner[key] for key in inner})
        else:
            flat[name] = part
    return flat


def unflatten_cache(flat: dict[str, Tensor]) -> dict[str, Any]:
    """Undoes `flatten_cache`."""
    cache: dict[str, Any] = {}
    for joined, tensor in flat.items():
        *outer, name = joined.split(_JOINT)
        place = cache
        for step in outer:
            place = place.setdefault(step, {})
        place[name] = tensor
    return cache


def _stored_length(max_length: int, sliding_window: int | None) -> int:
    """Returns the number of positions that a cache stores."""
    if sliding_window is None:
        return max_length
    return max(1, min(max_length, sliding_window - 1))


def _is_ring(length: Tensor, sliding_window: int | None) -> bool:
    """Whether a cache of this length holds a window's last positions."""
    return (
        sliding_window is not None
        and _stored_length(length + 1, sliding_window) == length
    )


def check_cache(
    cache: Cache,
    key_shape: Shape,
    value_shape: Shape,
    sliding_window: int | None = None,
) -> None:
    """Refuses a cache of another layer, another batch size, or without room.

    Args:
        cache: The cache.
        key_shape: `(B, T, K, H)` of the new positions, as far as it is known.
        value_shape: `(B, T, K, V)`, likewise.
        sliding_window: The layer's window.

    Raises:
        ValueError: If the cache does not fit.
    """
    for name, new in (("key", key_shape), ("value", value_shape)):
        have, want = tuple(cache[name].shape), tuple(new)
        places = ((0, have[0], want[0]), (2, have[2], want[2]), (3, have[3], want[3]))
        if any(None not in pair[1:] and pair[1] != pair[2] for pair in places):
            raise ValueError(
                "A cache must be of this layer and of as many rows as the inputs. "
                f"Received: cached {name} of shape {have}, new one of shape {want}"
            )
    room = cache["key"].shape[1]
    if room is not None and not _is_ring(room, sliding_window):
        _check_room(key_shape[1], room)


def _check_room(length: Tensor, room: Tensor) -> None:
    """Refuses a length that the cache can never hold; the rest shows at run time."""
    if isinstance(length, int) and isinstance(room, int) and length > room:
        raise ValueError(
            "A cache takes no more positions in one call than it can hold. Received: "
            f"{length} positions and a cache for {room}"
        )


def _cut(tensor: Tensor, start: Tensor, like: Tensor) -> Tensor:
    """Cuts as many positions as `like` has, from `start` on."""
    starts = [0, start, *([0] * (len(like.shape) - 2))]
    return ops.slice(tensor, starts, ops.shape(like))


def _write(stored: Tensor, new: Tensor, place: Tensor) -> Tensor:
    """Writes `new` at `place` along the second axis."""
    start = [0, place, *([0] * (len(stored.shape) - 2))]
    if "float" in backend.standardize_dtype(stored.dtype):
        # TensorFlow has no gradient of the update.
        return with_gradient(_update, (stored, new), start)
    return _put(stored, new, start)


def _update(
    inputs: tuple[Tensor, Tensor], start: list[Any]
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    stored, new = inputs

    def backward(upstream: Tensor) -> tuple[Tensor, Tensor]:
        blank = _put(upstream, ops.zeros_like(new), start)
        return blank, ops.slice(upstream, start, ops.shape(new))

    return _put(stored, new, start), backward


def _put(stored: Tensor, new: Tensor, start: list[Any]) -> Tensor:
    if backend.backend() == "tensorflow":
        from keras_mha.attention import cache_tensorflow

        return cache_tensorflow.put(stored, new, start)
    return ops.slice_update(stored, start, new)
