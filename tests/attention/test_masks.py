"""What may attend to what, spelled out and compared with the oracle's loops."""

from __future__ import annotations

import re
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import backend, ops

import keras_mha
from keras_mha import (
    CausalMask,
    Mask,
    PaddingMask,
    SegmentMask,
    SlidingWindowMask,
    TableMask,
)
from keras_mha.attention.mask_arguments import as_boolean, as_pairs
from keras_mha.attention.mask_parts import (
    NOTHING,
    MaskParts,
    clear_padding,
    intersect,
    materialize,
)
from tests.support import reference as oracle
from tests.support.attention_cases import (
    BACKEND,
    CASES,
    QUERY_PADDING,
    WIDEST,
    B,
    MaskWords,
    N,
    S,
    T,
    cast,
    draw,
    numbers,
    pairs,
    value_and_gradients,
    visible,
)

MASKED = {
    name: case for name, case in CASES.items() if case.options & {*MaskWords._fields}
}
needs_tensorflow = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="graphs of TensorFlow"
)


def booleans(mask: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(mask))


@pytest.mark.parametrize("name", MASKED)
def test_materialize_equals_the_oracle(name: str) -> None:
    case = MASKED[name]
    found, expected = materialize(case.mask.parts(), *case.lengths), visible(case)
    assert backend.standardize_dtype(found.dtype) == "bool"
    np.testing.assert_array_equal(
        np.broadcast_to(booleans(found), expected.shape), expected
    )
    assert expected.any()
    assert not expected.all()


def test_nothing_hidden_makes_no_table() -> None:
    assert materialize(NOTHING, T, S) is None


@pytest.mark.parametrize(("query_length", "key_length"), [(1, S), (T, 1), (S, T)])
def test_causal_and_window_align_at_the_first_positions(
    query_length: int, key_length: int
) -> None:
    found = materialize(MaskParts(lower=-2, upper=0), query_length, key_length)
    for t, s in np.ndindex(query_length, key_length):
        assert bool(found[0, 0, t, s]) == (s <= t and t - s < 3)


@needs_tensorflow
def test_lengths_may_be_tensors() -> None:
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None, None])])
    def table(scores: tf.Tensor) -> tf.Tensor:
        length, other = tf.shape(scores)[0], tf.shape(scores)[1]
        found = materialize(MaskParts(lower=-1, upper=0), length, other)
        return tf.convert_to_tensor(found)

    for shape in ((T, S), (S, T)):
        expected = np.tril(np.ones(shape)) - np.tril(np.ones(shape), -2)
        np.testing.assert_array_equal(table(tf.zeros(shape))[0, 0], expected == 1)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int32", "int64"])
def test_integers_count_as_booleans(dtype: str) -> None:
    mask = np.array([0, 1, 2, 0]).astype(dtype)
    found = as_boolean(mask, "mask")
    assert backend.standardize_dtype(found.dtype) == "bool"
    np.testing.assert_array_equal(booleans(found), [False, True, True, False])


def test_negative_integers_attend() -> None:
    found = as_boolean(np.array([-1, 0]), "mask")
    np.testing.assert_array_equal(booleans(found), [True, False])


@pytest.mark.parametrize("dtype", sorted({"float16", "bfloat16", "float32", WIDEST}))
def test_floating_masks_are_refused(dtype: str) -> None:
    text = (
        r"`attention_mask` must be boolean or integer \(True or non-zero = attend\)\. "
        rf"Received dtype {dtype}\. Cast a 0/1 mask to `bool`; an additive mask .* "
        r"is a bias, not a mask"
    )
    with pytest.raises(TypeError, match=text):
        as_boolean(keras.ops.ones((T, S), dtype), "attention_mask")


def test_intersect() -> None:
    one, other = pairs(T, S), pairs(S, T).T
    both = intersect(None, one, None, other)
    np.testing.assert_array_equal(booleans(both), one & other)
    assert intersect(one) is one
    assert intersect(None, None) is None
    assert intersect() is None


@pytest.mark.parametrize(
    ("received", "expected"),
    [
        ((T, S), (1, 1, T, S)),
        ((B, T, S), (B, 1, T, S)),
        ((1, T, S), (1, 1, T, S)),
        ((B, 1, S), (B, 1, 1, S)),
        ((B, N, T, S), (B, N, T, S)),
        ((B, 1, T, S), (B, 1, T, S)),
    ],
)
def test_as_pairs(received: tuple[int, ...], expected: tuple[int, ...]) -> None:
    mask = pairs(*received)
    found = as_pairs(mask, (B, N, T, S), 1)
    np.testing.assert_array_equal(booleans(found), mask.reshape(expected))


@pytest.mark.parametrize(
    ("received", "expected"),
    [
        ((2, 3, 5, 7), (1, 1, 2, 3, 5, 7)),
        ((B, 2, 3, 5, 7), (B, 1, 2, 3, 5, 7)),
        ((B, N, 2, 3, 5, 7), (B, N, 2, 3, 5, 7)),
    ],
)
def test_as_pairs_of_two_axes(
    received: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    mask = pairs(*received)
    found = as_pairs(mask, (B, N, 2, 3, 5, 7), 2)
    np.testing.assert_array_equal(booleans(found), mask.reshape(expected))


def test_as_pairs_with_unknown_lengths() -> None:
    mask = pairs(B, T, S)
    found = as_pairs(mask, (None, N, None, None), 1)
    np.testing.assert_array_equal(booleans(found), mask[:, None])


@pytest.mark.parametrize("received", [(S,), (1, B, N, T, S)])
def test_masks_of_a_wrong_rank_are_refused(received: tuple[int, ...]) -> None:
    text = (
        r"`attention_mask` must have rank 2 \(T, S\), 3 \(B, T, S\) or 4 .* rank 2 to "
        rf"4\. Received: attention_mask of shape {re.escape(str(received))}"
    )
    with pytest.raises(ValueError, match=text):
        as_pairs(pairs(*received), (B, N, T, S), 1)


@pytest.mark.parametrize(
    "received", [(S, T), (T, S + 1), (N, T, S), (B, B, T, S), (T, N, T, S)]
)
def test_masks_of_a_wrong_shape_are_refused(received: tuple[int, ...]) -> None:
    text = (
        r"Every dimension of `attention_mask` must be 1 or that of the attention "
        rf"scores, .* = {re.escape(str((B, N, T, S)))}\. "
        rf"Received: attention_mask of shape {re.escape(str(received))}"
    )
    with pytest.raises(ValueError, match=text):
        as_pairs(pairs(*received), (B, N, T, S), 1)


@pytest.mark.parametrize("extra", [(), (3,)], ids=["BTD", "BT3D"])
def test_clear_padding_selects(extra: tuple[int, ...]) -> None:
    inputs = draw(B, T, *extra, 11).astype("float32")
    poisoned = inputs.copy()
    poisoned[~QUERY_PADDING] = np.nan
    expected = inputs.copy()
    expected[~QUERY_PADDING] = 0
    found = clear_padding(poisoned, QUERY_PADDING)
    np.testing.assert_array_equal(numbers(found), expected)
    assert clear_padding(inputs, None) is inputs


def test_clear_padding_gives_padding_no_gradient() -> None:
    inputs = np.where(QUERY_PADDING, 1.0, np.nan)[..., None]
    _, (gradient,) = value_and_gradients(
        lambda x: ops.square(clear_padding(x, ops.convert_to_tensor(QUERY_PADDING))),
        cast([inputs], "float32"),
        [np.ones(inputs.shape)],
    )
    np.testing.assert_array_equal(gradient[..., 0], np.where(QUERY_PADDING, 2.0, 0.0))


def _parts(draw_from: st.DataObject) -> list[tuple[Any, dict[str, Any]]]:
    """Masks and boolean tables, each with the oracle's words for it."""
    random = np.random.default_rng(draw_from.draw(st.integers(0, 2**32 - 1)))
    shape = draw_from.draw(
        st.sampled_from([(T, S), (B, T, S), (B, 1, T, S), (B, N, T, S), (B, 1, 1, S)])
    )
    offset, *shifts = map(int, random.integers(-2, 4, size=3))
    moved = ops.convert_to_tensor(shifts[0], "int32")
    sizes = random.integers(1, 9, size=2)
    queries, keys = random.integers(-1, 3, (B, T)), random.integers(-1, 3, (B, S))
    row = random.integers(0, 3, S)
    key_lengths, query_lengths = (random.integers(0, S, B) for _ in range(2))
    table = random.random(shape) < 0.7
    parts: list[tuple[Any, dict[str, Any]]] = [
        (CausalMask(offset), {"is_causal": True, "offset": offset}),
        *(
            (
                SlidingWindowMask(int(size), shift),
                {"sliding_window": int(size), "offset": int(shift)},
            )
            for size, shift in zip(sizes, (moved, shifts[1]), strict=True)
        ),
        (PaddingMask(key_lengths), {"key_padding": key_lengths}),
        (
            PaddingMask(key_lengths[::-1].copy(), query_lengths=query_lengths),
            {"key_padding": key_lengths[::-1], "query_padding": query_lengths},
        ),
        (
            MaskWords(key_padding=ops.convert_to_tensor(keys > 0)).value(),
            {"key_padding": keys > 0},
        ),
        (table, {"pairs": table}),
        (ops.convert_to_tensor(~table[..., ::-1].copy()), {"pairs": ~table[..., ::-1]}),
        (table[..., ::-1].astype("int32").tolist(), {"pairs": table[..., ::-1]}),
    ]
    for ids in ((queries, keys), (queries[0], row)):
        segments = dict(zip(("query_segments", "key_segments"), ids, strict=True))
        parts.append((SegmentMask(*ids), segments))
    chosen = draw_from.draw(
        st.lists(st.sampled_from(range(len(parts))), min_size=2, unique=True)
    )
    return [parts[i] for i in chosen]


@given(st.data())
def test_any_order_of_and_is_the_and_of_the_tables(data: st.DataObject) -> None:
    """Grown from one mask to the left and to the right, so that tables stand on
    either side."""
    parts = _parts(data)
    starts = [i for i, (part, _) in enumerate(parts) if isinstance(part, Mask)]
    start = data.draw(st.sampled_from(starts or [0]))
    left, right = start, start + 1
    merged = parts[start][0] if starts else TableMask(parts[start][0])
    while left > 0 or right < len(parts):
        if right == len(parts) or (left > 0 and data.draw(st.booleans())):
            left -= 1
            merged = parts[left][0] & merged
        else:
            merged = merged & parts[right][0]
            right += 1
    assert isinstance(merged, Mask)
    shape = (B, N, T, S)
    expected = np.ones(shape, bool)
    for _, words in parts:
        expected &= oracle.visible_pairs(shape, **words)
    found = booleans(materialize(merged.take_apart(), T, S))
    np.testing.assert_array_equal(np.broadcast_to(found, shape), expected)


def test_masks_with_offsets_of_their_own_meet() -> None:
    mask = CausalMask(offset=2) & SlidingWindowMask(3)
    assert mask.take_apart() == MaskParts(lower=-2, upper=2)
    assert (CausalMask(1) & CausalMask(1)).offset == 1
    with pytest.raises(ValueError, match=r"offsets of their own: \[2, 0\]"):
        _ = mask.offset


def test_kinds_are_types() -> None:
    kinds = (CausalMask(), SlidingWindowMask(3), PaddingMask([2]), SegmentMask([0, 1]))
    types = (CausalMask, SlidingWindowMask, PaddingMask, SegmentMask)
    for place, mask in enumerate(kinds):
        assert [isinstance(mask, kind) for kind in types] == [
            number == place for number in range(4)
        ]
        assert isinstance(mask, Mask)
        assert isinstance(mask & kinds[0], Mask)
        with pytest.raises(AttributeError, match="does not change.*offset=3"):
            mask.offset = 3


def test_lengths_of_queries_by_position_are_deprecated() -> None:
    """They mean what they meant, and say so."""
    with pytest.warns(DeprecationWarning, match="pass `query_lengths=`"):
        old = PaddingMask([6, S], [T, 2])
    new = PaddingMask(query_lengths=[T, 2], key_lengths=[6, S])
    for one in (old, new):
        table = materialize(one.take_apart(), T, S)
        shown = oracle.visible_pairs(
            (B, N, T, S), query_padding=np.array([T, 2]), key_padding=np.array([6, S])
        )
        np.testing.assert_array_equal(
            np.broadcast_to(booleans(table), shown.shape), shown
        )
    for args, words in (
        (([1], [1]), {"query_lengths": [1]}),
        (([1],), {"key_lengths": [1]}),
        (([1], [1], [1]), {}),
    ):
        with pytest.raises(TypeError, match="`PaddingMask` takes .* once each"):
            PaddingMask(*args, **words)


def test_equal_windows_meet_in_the_narrower() -> None:
    assert (SlidingWindowMask(5) & SlidingWindowMask(3)).sliding_window == 3


def test_offsets_of_numpy_are_integers() -> None:
    mask = CausalMask(np.int64(2)) & SlidingWindowMask(3, offset=2)
    assert mask == CausalMask(2) & SlidingWindowMask(3, 2)


@pytest.mark.parametrize("offset", [0, 2, -3])
def test_an_offset_may_be_a_tensor(offset: int) -> None:
    table = materialize(
        CausalMask(ops.convert_to_tensor(offset, "int32")).take_apart(), T, S
    )
    expected = np.tril(np.ones((T, S), bool), offset)
    np.testing.assert_array_equal(booleans(table)[0, 0], expected)


@pytest.mark.parametrize("make", [CausalMask, lambda x: SlidingWindowMask(3, x)])
def test_other_offsets_are_refused(make: Any) -> None:
    with pytest.raises(TypeError, match="`offset` must be integers. Received dtype fl"):
        make(1.5)
    with pytest.raises(ValueError, match="`offset` must have rank 0. Received: .*(2,)"):
        make(np.array([1, 2]))


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None])
def test_other_windows_are_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=f"`size` must be a positive .*size={size}"):
        SlidingWindowMask(size)


def test_tables_of_rank_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 2 \(T, S\).*Received: shape \(13,\)"):
        _ = CausalMask() & np.ones(S, bool)
    with pytest.raises(TypeError, match="`mask` must be boolean or integer"):
        _ = np.ones((T, S)) & CausalMask()


def test_padding_lengths_are_counted_from_the_front() -> None:
    table = materialize(
        PaddingMask(np.array([0, S]), query_lengths=np.array([T, 2])).take_apart(), T, S
    )
    expected = np.zeros((2, T, S), bool)
    expected[1, :2] = True
    np.testing.assert_array_equal(booleans(table)[:, 0], expected)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (PaddingMask, "key_lengths"),
        (lambda x: PaddingMask(query_lengths=x), "query_lengths"),
    ],
)
def test_other_lengths_are_refused(make: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"`{name}` must be integers. Received dtype f"):
        make(np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match=rf"`{name}` must have rank 1.*\(2, 1\)"):
        make(np.array([[1], [2]]))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (SegmentMask, "query_ids"),
        (lambda x: SegmentMask(np.array([0, 1]), x), "key_ids"),
    ],
)
def test_other_segments_are_refused(make: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"`{name}` must be integers. Received dtype f"):
        make(np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match=rf"`{name}` must have rank 1 or 2.*\(1, 1, 2"):
        make(np.array([[[0, 1]]]))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (PaddingMask, "key_lengths"),
        (lambda x: PaddingMask(query_lengths=x), "query_lengths"),
        (SegmentMask, "query_ids"),
        (CausalMask, "offset"),
    ],
)
def test_what_stands_for_an_input_is_refused(make: Any, name: str) -> None:
    text = f"`{name}` must have values.*`attention_mask`"
    with pytest.raises(TypeError, match=text):
        make(keras.Input((), dtype="int32"))


def test_a_functional_model_takes_lengths_as_the_error_says() -> None:
    inputs, lengths = keras.Input((S, 8)), keras.Input((), dtype="int32")
    visible = ops.expand_dims(lengths, (1, 2)) > ops.arange(S)
    layer = keras_mha.MultiHeadSelfAttention(2)
    model = keras.Model([inputs, lengths], layer(inputs, attention_mask=visible))
    array = np.random.default_rng(3).normal(size=(2, S, 8)).astype("float32")
    found = model([array, np.array([3, 5])])
    expected = layer(array, attention_mask=PaddingMask(np.array([3, 5])))
    np.testing.assert_allclose(numbers(found), numbers(expected), atol=1e-6)
