"""A kind of mask that only this file knows, on every path that attention takes."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from typing_extensions import override

import keras_mha
from keras_mha import CausalMask, Mask, PaddingMask, SegmentMask, SlidingWindowMask
from keras_mha.attention.dispatch import IMPLEMENTATIONS
from keras_mha.attention.mask_parts import MaskParts, materialize
from tests.support import reference as oracle
from tests.support.attention_cases import (
    BACKEND,
    CASES,
    KEY_SEGMENTS,
    MODES,
    QUERY_SEGMENTS,
    B,
    MaskWords,
    N,
    S,
    T,
    arrays_of,
    check_close,
    draw,
    pairs,
    upstream_of,
    value_and_gradients,
)


@keras.saving.register_keras_serializable(package="tests")
class StridedMask(Mask):
    """Query `i` sees key `j` unless `i + 2 j + shift[b]` is a multiple of `step`."""

    def __init__(self, step: int, shift: Any = (0,)) -> None:
        self.step, self.shift = step, shift

    @override
    def visible(self, queries: Any, keys: Any) -> Any:
        places = queries[:, None] + 2 * keys
        shift = ops.reshape(ops.convert_to_tensor(self.shift, "int32"), (-1, 1, 1))
        return ops.not_equal((places + shift) % self.step, 0)

    @override
    def get_config(self) -> dict[str, Any]:
        return {"step": self.step, "shift": np.asarray(self.shift).tolist()}


class HeadMask(Mask):
    """Hides a key, by head and its place, from all queries."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table

    @override
    def visible(self, queries: Any, keys: Any) -> Any:
        table = ops.take(ops.convert_to_tensor(self.table), keys, axis=1)
        return ops.expand_dims(table, (0, 2))


SHIFT = np.array([0, 1], "int32")
LENGTHS = np.array([S, 9], "int32")
HEADS = draw(N, S, seed=21) > -0.5
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "alone": (None, {}),
    "causal": (CausalMask(2), {"is_causal": True, "offset": 2}),
    "window": (SlidingWindowMask(4), {"sliding_window": 4}),
    "padding": (PaddingMask(LENGTHS), {"key_padding": LENGTHS}),
    "segments": (
        SegmentMask(QUERY_SEGMENTS, KEY_SEGMENTS),
        {"query_segments": QUERY_SEGMENTS, "key_segments": KEY_SEGMENTS},
    ),
    "table": (pairs(B, N, T, S), {"pairs": pairs(B, N, T, S)}),
}


def strided(step: int, shift: np.ndarray, length: int = T, keys: int = S) -> np.ndarray:
    """What the strided mask says, pair by pair, `(B, 1, T, S)`."""
    table = np.ones((len(shift), 1, length, keys), bool)
    for b, _, i, j in np.ndindex(*table.shape):
        table[b, 0, i, j] = (i + 2 * j + shift[b]) % step != 0
    return table


def expected(shown: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The oracle's values and gradients."""
    arrays = arrays_of(CASES["plain"])
    mixed, *_, gradients = oracle.attend_and_gradients(
        **arrays, visible=shown, upstream=upstream_of(CASES["plain"])[0]
    )
    return [mixed], [gradients._asdict()[name] for name in arrays]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("implementation", ["auto", "reference", "portable"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_kind_of_ones_own(name: str, implementation: str, mode: str) -> None:
    """With a tensor in it, alone and joined to others; lengths unknown in graphs."""
    other, words = OTHERS[name]

    def attend(*tensors: Any) -> Any:
        *heads, shift = tensors
        mask: Any = StridedMask(3, shift)
        mask = mask if other is None else other & mask
        return keras_mha.dot_product_attention(
            *heads, mask=mask, implementation=implementation
        )

    found = value_and_gradients(
        attend,
        [
            ops.convert_to_tensor(x, dtype="float32")
            for x in arrays_of(CASES["plain"]).values()
        ],
        upstream_of(CASES["plain"]),
        mode,
        constants=[ops.convert_to_tensor(SHIFT)],
        shapes=[
            *[(None, None, *x.shape[2:]) for x in arrays_of(CASES["plain"]).values()],
            (None,),
        ],
    )
    shown = strided(3, SHIFT) & oracle.visible_pairs((B, N, T, S), **words)
    assert shown.any()
    assert not shown.all()
    for one, other_one in zip(found, expected(shown), strict=True):
        for x, y in zip(one, other_one, strict=True):
            check_close(x, y, 1e-5)


def test_a_kind_of_ones_own_with_every_other() -> None:
    mask: Any = StridedMask(3, SHIFT)
    shown = strided(3, SHIFT)
    for other, words in OTHERS.values():
        if other is not None:
            mask = mask & other
            shown = shown & oracle.visible_pairs((B, N, T, S), **words)
    mask, shown = mask & HeadMask(HEADS), shown & HEADS[None, :, None]
    assert shown.any()
    table = np.asarray(mask.visible(ops.arange(T), ops.arange(S)))
    np.testing.assert_array_equal(np.broadcast_to(table, shown.shape), shown)
    merged = np.asarray(materialize(mask.take_apart(), T, S))
    np.testing.assert_array_equal(np.broadcast_to(merged, shown.shape), shown)
    found = keras_mha.dot_product_attention(
        *(
            ops.convert_to_tensor(x, dtype="float32")
            for x in arrays_of(CASES["plain"]).values()
        ),
        mask=mask,
    )
    check_close(np.asarray(found), expected(shown)[0][0], 1e-5)


@pytest.mark.parametrize("implementation", ["blockwise"])
def test_who_cannot_take_a_kind_says_who_can(implementation: str) -> None:
    heads = [
        ops.convert_to_tensor(x, dtype="float32")
        for x in arrays_of(CASES["plain"]).values()
    ]
    text = (
        r"`implementation='blockwise'` does not take a mask with StridedMask; "
        r"these can: \['reference', 'portable'"
    )
    with pytest.raises(ValueError, match=text):
        keras_mha.dot_product_attention(
            *heads, mask=StridedMask(3) & CausalMask(), implementation=implementation
        )


@pytest.mark.parametrize("field", MaskParts._fields)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_part_of_a_mask_is_dropped(implementation: str, field: str) -> None:
    """Each part is in `TAKES` and changes the values, or is refused."""
    ids = [np.asarray(x, "int32") for x in (QUERY_SEGMENTS, KEY_SEGMENTS)]
    parts = {
        "query_padding": MaskWords(query_padding=np.array([4, T], "int32")),
        "key_padding": MaskWords(key_padding=LENGTHS),
        "pairs": MaskWords(pairs=pairs(T, S)),
        "lower": MaskWords(sliding_window=3),
        "upper": MaskWords(is_causal=True),
        "query_segments": MaskWords(query_segments=ids[0], key_segments=ids[1]),
        "key_segments": MaskWords(query_segments=ids[0], key_segments=ids[1]),
    }
    module = IMPLEMENTATIONS[implementation]
    if implementation == "fused" and BACKEND == "tensorflow":
        pytest.skip("TensorFlow has no fused kernel")
    if field == "others":
        mask: Any = StridedMask(3, SHIFT)
        shown = np.broadcast_to(strided(3, SHIFT), (B, N, T, S))
    else:
        mask = parts[field].value()
        shown = oracle.visible_pairs((B, N, T, S), **parts[field]._asdict())
    heads = [
        ops.convert_to_tensor(x, dtype="float32")
        for x in arrays_of(CASES["plain"]).values()
    ]
    if field not in module.TAKES:
        with pytest.raises(ValueError, match="does not take a mask with"):
            keras_mha.dot_product_attention(
                *heads, mask=mask, implementation=implementation
            )
        return
    found = keras_mha.dot_product_attention(
        *heads, mask=mask, implementation=implementation
    )
    check_close(np.asarray(found), expected(shown)[0][0], 1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((T, S), "float32"),
        ((S, T), "bool"),
        ((S,), "bool"),
        ((1, B, N, T, S), "bool"),
    ],
)
def test_what_a_kind_returns_is_checked(shape: tuple[int, ...], dtype: str) -> None:
    class Wrong(Mask):
        @override
        def visible(self, queries: Any, keys: Any) -> Any:
            return ops.ones(shape, dtype)

    heads = [
        ops.convert_to_tensor(x, dtype="float32")
        for x in arrays_of(CASES["plain"]).values()
    ]
    text = rf"`Wrong.visible` must return booleans .*\({T}, {S}\).*{dtype} of shape"
    with pytest.raises(ValueError, match=text):
        keras_mha.dot_product_attention(*heads, mask=Wrong())
