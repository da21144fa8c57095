"""The cache as pure functions: what is kept, what is shown, and from where."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from keras_mha.attention.cache import Cache, Extended, empty_cache, extend_cache
from keras_mha.attention.mask_parts import materialize
from tests.support.attention_cases import cast, draw, numbers, value_and_gradients

B, T, K, H, V = 2, 11, 3, 5, 7
KEYS = draw(B, T, K, H, seed=1).astype("float32")
VALUES = draw(B, T, K, V, seed=2).astype("float32")
REAL = np.random.default_rng(3).random((B, T)) < 0.7


def empty(max_length: int = T, window: int | None = None) -> Cache:
    return empty_cache(B, max_length, (K, H), (K, V), "float32", window)


def extend(cache: Cache, place: slice, window: int | None, padded: bool) -> Extended:
    return extend_cache(
        cache,
        ops.convert_to_tensor(KEYS[:, place]),
        ops.convert_to_tensor(VALUES[:, place]),
        ops.convert_to_tensor(REAL[:, place]) if padded else None,
        window,
    )


def seen_by(extended: Extended, length: int) -> list[list[list[np.ndarray]]]:
    """For each row and query, the keys that it sees, in order."""
    visible = materialize(extended.mask, length, extended.key.shape[1])
    shown = np.asarray(ops.convert_to_numpy(visible))
    shown = np.broadcast_to(shown, (B, 1, length, extended.key.shape[1]))
    keys = numbers(extended.key)
    return [[keys[b, shown[b, 0, t]] for t in range(length)] for b in range(B)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 4, T, T + 1, T + 4])
@pytest.mark.parametrize("chunks", [[1] * T, [4, 1, 1, 5], [T]])
def test_each_query_sees_the_keys_before_it(
    chunks: list[int], window: int | None, padded: bool
) -> None:
    cache, start = empty(window=window), 0
    for length in chunks:
        extended = extend(cache, slice(start, start + length), window, padded)
        found = seen_by(extended, length)
        for b in range(B):
            for t in range(length):
                place = start + t
                first = 0 if window is None else max(0, place - window + 1)
                places = [
                    j
                    for j in range(first, place + 1)
                    if not padded or (REAL[b, j] and REAL[b, place])
                ]
                np.testing.assert_array_equal(found[b][t], KEYS[b, places])
        cache, start = extended.cache, start + length
    assert int(cache["length"]) == T


def test_values_lie_beside_their_keys() -> None:
    cache = extend(empty(), slice(0, 4), None, padded=False).cache
    cache = extend(cache, slice(4, 7), None, padded=False).cache
    np.testing.assert_array_equal(numbers(cache["key"])[:, :7], KEYS[:, :7])
    np.testing.assert_array_equal(numbers(cache["value"])[:, :7], VALUES[:, :7])
    mask = ops.convert_to_numpy(cache["mask"])
    np.testing.assert_array_equal(mask, np.arange(T)[None].repeat(B, 0) < 7)


def test_a_windows_cache_holds_the_last_positions_the_oldest_first() -> None:
    cache = empty(window=4)
    for start, stop in ((0, 2), (2, 3), (3, 9)):
        cache = extend(cache, slice(start, stop), 4, padded=True).cache
    real = REAL[:, 6:9]
    for name, given in (("key", KEYS), ("value", VALUES)):
        expected = np.where(real[..., None, None], given[:, 6:9], 0.0)
        np.testing.assert_array_equal(numbers(cache[name]), expected)
    np.testing.assert_array_equal(ops.convert_to_numpy(cache["mask"]), real)


def test_nan_in_padding_is_not_kept() -> None:
    poisoned = [np.where(REAL[..., None, None], x, np.nan) for x in (KEYS, VALUES)]
    kept = extend_cache(empty(), *poisoned, REAL).cache
    for name, given in (("key", KEYS), ("value", VALUES)):
        expected = np.where(REAL[..., None, None], given, 0.0)
        np.testing.assert_array_equal(numbers(kept[name])[:, :T], expected)


@pytest.mark.parametrize(
    ("max_length", "window", "kept"),
    [(T, None, T), (T, 4, 3), (2, 4, 2), (3, 4, 3), (T, 1, 1), (1, None, 1)],
)
def test_how_much_is_kept(max_length: int, window: int | None, kept: int) -> None:
    cache = empty(max_length, window)
    shapes = {name: tuple(tensor.shape) for name, tensor in cache.items()}
    assert shapes == {
        "key": (B, kept, K, H),
        "value": (B, kept, K, V),
        "mask": (B, kept),
        "length": (),
    }
    dtypes = {n: keras.backend.standardize_dtype(x.dtype) for n, x in cache.items()}
    assert dtypes == {
        "key": "float32",
        "value": "float32",
        "mask": "bool",
        "length": "int32",
    }
    assert not any(np.any(ops.convert_to_numpy(each)) for each in cache.values())


@pytest.mark.parametrize(
    ("max_length", "window", "overflows"),
    [(5, None, False), (4, None, True), (4, 6, True), (4, 4, None), (4, 5, None)],
)
def test_overflow_is_told(
    max_length: int, window: int | None, overflows: bool | None
) -> None:
    cache = extend(empty(max_length, window), slice(0, 3), window, padded=False).cache
    found = extend(cache, slice(3, 5), window, padded=False).overflows
    assert (found if found is None else bool(found)) is overflows


def test_narrow_caches_round_what_comes() -> None:
    cache = empty_cache(B, T, (K, H), (K, V), "float16")
    extended = extend(cache, slice(0, 4), None, padded=False)
    assert keras.backend.standardize_dtype(extended.key.dtype) == "float16"
    rounded = KEYS[:, :4].astype("float16")
    np.testing.assert_array_equal(numbers(extended.key)[:, :4], rounded)


@pytest.mark.parametrize("window", [None, 4])
def test_gradients_reach_what_was_written_and_what_was_kept(window: int | None) -> None:
    def function(*heads: Any) -> Any:
        cache = empty(window=window)
        for place in (slice(0, 4), slice(4, 7)):
            new = (each[:, place] for each in heads)
            extended = extend_cache(cache, *new, None, window)
            cache = extended.cache
        return extended.key, extended.value

    shown = 7 if window is None else 6
    upstream = [draw(B, T, K, size, seed=8) for size in (H, V)]
    if window is not None:
        upstream = [each[:, :shown] for each in upstream]
    outputs, gradients = value_and_gradients(
        function, cast([KEYS, VALUES], "float32"), upstream
    )
    # With the window of 4, three positions are kept, of which the first is number 1.
    first = 7 - shown
    for output, gradient, array, one in zip(
        outputs, gradients, (KEYS, VALUES), upstream, strict=True
    ):
        expected = np.zeros_like(gradient)
        expected[:, first:7] = one[:, :shown]
        np.testing.assert_allclose(gradient, expected, atol=1e-6)
        np.testing.assert_array_equal(output[:, :shown], array[:, first:7])


def test_a_chunk_that_can_never_fit_is_refused() -> None:
    text = r"no more positions in one call .* Received: 5 positions and a cache for 4"
    with pytest.raises(ValueError, match=text):
        extend(empty(4), slice(0, 5), None, padded=False)
    extend(empty(4, window=3), slice(0, 5), 3, padded=False)
