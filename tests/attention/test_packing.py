"""Packing: every token once, whole sequences, and the values each has alone."""

from __future__ import annotations

import re
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from keras_mha.attention.packing import (
    PackedSequences,
    pack_sequences,
    unpack_sequences,
)
from tests.support.attention_cases import draw, numbers
from tests.support.reference import attend

LENGTHS = [2, 5, 0, 4, 8, 1, 2]
B, T, R, L, D = 7, 8, 5, 11, 3
# What differentiates by a tape, in a graph or XLA; a model below learns on any backend.
on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="TensorFlow's tape and graphs"
)


def ragged(lengths: list[int] = LENGTHS, *trailing: int) -> list[np.ndarray]:
    """A sequence for each length, no number twice and none of them zero."""
    size = int(np.prod(trailing))
    tokens = np.arange(1, sum(lengths) * size + 1).reshape(-1, *trailing)
    return np.split(tokens, np.cumsum(lengths)[:-1])


def pad(sequences: list[np.ndarray], T: int = T) -> np.ndarray:
    padded = np.zeros((len(sequences), T, *sequences[0].shape[1:]), sequences[0].dtype)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded


def random_batch() -> tuple[np.ndarray, np.ndarray]:
    """Random `(R, L, D)` and the index of LENGTHS, T being 8."""
    packed = pack_sequences(pad(ragged()), LENGTHS, row_length=L, num_rows=R)
    return draw(R, L, D), packed.index


def check(packed: PackedSequences, sequences: list[np.ndarray]) -> None:
    """Reads each row from left to right and finds each sequence once, whole."""
    values, segment_ids, positions, index = packed
    trailing = sequences[0].shape[1:]
    assert values.shape == (*segment_ids.shape, *trailing)
    assert positions.shape == segment_ids.shape
    assert {x.dtype for x in packed[1:]} == {np.dtype("int32")}
    found = []
    for row, ids in enumerate(segment_ids):
        taken = np.count_nonzero(ids > 0)
        last = max(0, ids.max())
        assert set(ids[:taken]) == set(range(1, last + 1))
        assert (ids[taken:] == -1).all()
        assert np.all(np.diff(ids[:taken]) >= 0)
        assert not positions[row, taken:].any()
        assert not values[row, taken:].any()
        for segment in range(1, last + 1):
            there = ids == segment
            np.testing.assert_array_equal(positions[row, there], np.arange(there.sum()))
            found.append(values[row, there].tolist())
    assert sorted(found) == sorted(s.tolist() for s in sequences if len(s))
    for places, sequence in zip(index, sequences, strict=True):
        there = values.reshape(-1, *trailing)[places[places >= 0]]
        np.testing.assert_array_equal(there, sequence)


lengths_and_rows = st.lists(st.integers(0, 13), min_size=1, max_size=11).flatmap(
    lambda lengths: st.tuples(
        st.just(lengths), st.integers(max(1, *lengths), 29), st.sampled_from([(), (3,)])
    )
)


@given(lengths_and_rows)
def test_every_token_stands_once_and_comes_back(
    case: tuple[list[int], int, tuple[int, ...]],
) -> None:
    lengths, row_length, trailing = case
    sequences = ragged(lengths, *trailing)
    packed = pack_sequences(sequences, row_length=row_length)
    check(packed, sequences)
    T = max(lengths)
    assert packed.index.shape == (len(lengths), T)
    expected = pad(sequences, T)
    np.testing.assert_array_equal(
        unpack_sequences(packed.values, packed.index), expected
    )
    # First fit: no two rows would have gone into one.
    held = np.sort(np.count_nonzero(packed.segment_ids > 0, axis=1))
    assert len(held) == 1 or held[0] + held[1] > row_length
    again = pack_sequences(expected, lengths, row_length=row_length)
    for one, other in zip(packed, again, strict=True):
        np.testing.assert_array_equal(one, other)


@given(st.integers(0, 2**20 - 1), st.integers(5, 13))
def test_masks_of_any_pattern_come_back(bits: int, row_length: int) -> None:
    mask = np.array([bits >> i & 1 for i in range(20)], bool).reshape(4, 5)
    padded = np.where(mask, np.arange(1, 21).reshape(4, 5), -1)
    packed = pack_sequences(padded, mask, row_length=row_length)
    check(packed, [row[there] for row, there in zip(padded, mask, strict=True)])
    np.testing.assert_array_equal(packed.index >= 0, mask)
    np.testing.assert_array_equal(
        unpack_sequences(packed.values, packed.index), np.where(mask, padded, 0)
    )


def test_the_layout_of_a_small_batch() -> None:
    """Longest first: 8; 5 and 4 in a new row; 2 after 8, 2 after 4, 1 after the first.

    Of the two of length 2, the one that came first goes first.
    """
    packed = pack_sequences(ragged(), row_length=11)
    two, five, none, four, eight, one, other = (s.tolist() for s in ragged())
    assert none == []
    assert packed.values.tolist() == [eight + two + one, five + four + other]
    assert packed.segment_ids.tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3],
        [1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3],
    ]
    assert packed.positions.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 0],
        [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1],
    ]
    assert packed.index.tolist() == [
        [8, 9, -1, -1, -1, -1, -1, -1],
        [11, 12, 13, 14, 15, -1, -1, -1],
        [-1, -1, -1, -1, -1, -1, -1, -1],
        [16, 17, 18, 19, -1, -1, -1, -1],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [10, -1, -1, -1, -1, -1, -1, -1],
        [20, 21, -1, -1, -1, -1, -1, -1],
    ]


@pytest.mark.parametrize(
    ("lengths", "row_length", "rows"),
    [
        # In the order given, first fit would need 4.
        ([2, 5, 4, 7, 1, 3, 8], 10, 3),
        # 6 + 3 + 3 and 4 + 4 + 4 would do: first-fit decreasing is no perfect packer.
        ([6, 4, 4, 4, 3, 3], 12, 3),
        ([6, 6, 6], 11, 3),
        ([1] * 23, 7, 4),
        ([0, 0], 7, 1),
    ],
)
def test_the_number_of_rows(lengths: list[int], row_length: int, rows: int) -> None:
    packed = pack_sequences(ragged(lengths), row_length=row_length)
    assert packed.values.shape == (rows, row_length)


def test_num_rows_fixes_every_shape() -> None:
    shapes = set()
    for lengths in (LENGTHS, [1] * 7, [0] * 7, [L] * 5 + [0] * 2):
        sequences = ragged(lengths)
        packed = pack_sequences(sequences, row_length=L, num_rows=R)
        check(packed, sequences)
        shapes.add(tuple(x.shape for x in packed))
    assert shapes == {((R, L), (R, L), (R, L), (7, L))}


def test_spare_rows_are_empty() -> None:
    packed = pack_sequences(ragged(), row_length=L, num_rows=R, pad_value=-1)
    assert (packed.segment_ids[2:] == -1).all()
    assert not packed.positions[2:].any()
    assert (packed.values[2:] == -1).all()
    assert (packed.segment_ids[:2] > 0).all()


def test_pad_value_stands_where_no_token_does() -> None:
    packed = pack_sequences(ragged(), row_length=13, pad_value=-5)
    np.testing.assert_array_equal(packed.values == -5, packed.segment_ids == -1)
    assert (packed.values == -5).any()


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "float32"])
def test_values_keep_their_dtype(dtype: str) -> None:
    sequences = [s.astype(dtype) for s in ragged()]
    assert pack_sequences(sequences, row_length=L).values.dtype == dtype
    assert pack_sequences(pad(sequences), LENGTHS, row_length=L).values.dtype == dtype


def test_every_form_of_the_same_sequences_packs_alike() -> None:
    sequences = ragged()
    expected = pack_sequences(sequences, row_length=L)
    # An empty Python list is float64 to NumPy; it must not make the tokens so.
    assert expected.values.dtype == np.int64
    present = np.arange(T) < np.array(LENGTHS)[:, None]
    forms = {
        "lists": ([s.tolist() for s in sequences],),
        "tuple": (tuple(sequences),),
        "objects": (np.array([*sequences, None], object)[:-1],),
        "ragged": (
            tf.RaggedTensor.from_row_lengths(np.concatenate(sequences), LENGTHS),
        ),
        "lengths": (pad(sequences), np.array(LENGTHS, "uint8")),
        "tensors": (tf.constant(pad(sequences)), tf.constant(LENGTHS)),
        "mask": (pad(sequences), present),
        "list of tensors": ([tf.constant(s) for s in sequences],),
    }
    for name, form in forms.items():
        found = pack_sequences(*form, row_length=L)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)
            assert one.dtype == other.dtype, name


def test_ragged_tensors_keep_their_inner_dimensions() -> None:
    sequences = ragged(LENGTHS, D)
    tensor = tf.RaggedTensor.from_row_lengths(np.concatenate(sequences), LENGTHS)
    check(pack_sequences(tensor, row_length=L), sequences)


def test_pack_lays_out_what_comes_with_the_tokens() -> None:
    sequences = ragged(LENGTHS, 2)
    packed = pack_sequences(sequences, row_length=13, num_rows=3)
    labels = [10 * s[:, 1] for s in sequences]
    expected = np.where(packed.segment_ids > 0, 10 * packed.values[..., 1], -1)
    assert (expected == -1).any()
    forms = [
        labels,
        tf.RaggedTensor.from_row_lengths(np.concatenate(labels), LENGTHS),
        pad(labels, T=13),
    ]
    for form in forms:
        np.testing.assert_array_equal(packed.pack(form, pad_value=-1), expected)
    vectors = [np.repeat(10.0 * s[:, 1:], 5, axis=1) for s in sequences]
    np.testing.assert_array_equal(
        packed.pack(vectors, pad_value=-1), np.repeat(expected[..., None], 5, axis=2)
    )


@on_tensorflow
@pytest.mark.parametrize("mode", ["eager", "graph", "xla", "unknown shapes"])
@pytest.mark.parametrize("trailing", [(), (D,), (D, 2)], ids=["RL", "RLD", "RLND"])
def test_unpack_and_its_gradient(mode: str, trailing: tuple[int, ...]) -> None:
    _, index = random_batch()
    packed, upstream = draw(R, L, *trailing), draw(*index.shape, *trailing, seed=1)
    expected = np.zeros(upstream.shape)
    scattered = np.zeros(packed.shape)
    for b, t in np.ndindex(*index.shape):
        if index[b, t] >= 0:
            place = divmod(index[b, t], L)
            expected[b, t] = packed[place]
            scattered[place] = upstream[b, t]

    def step(packed: Any, index: Any, upstream: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            tape.watch(packed)
            unpacked = unpack_sequences(packed, index)
        gradient = tape.gradient(unpacked, packed, output_gradients=upstream)
        return unpacked, tf.convert_to_tensor(gradient)

    arrays = (tf.constant(packed), tf.constant(index), tf.constant(upstream))
    if mode != "eager":
        step = tf.function(
            step,
            jit_compile=mode == "xla",
            input_signature=[tf.TensorSpec([None] * x.ndim, x.dtype) for x in arrays]
            if mode == "unknown shapes"
            else None,
        )
    unpacked, gradient = step(*arrays)
    np.testing.assert_array_equal(unpacked, expected)
    np.testing.assert_array_equal(gradient, scattered)


@on_tensorflow
@pytest.mark.parametrize("jit_compile", [False, True])
def test_nan_in_packed_padding_stays_there(jit_compile: bool) -> None:
    values, index = random_batch()
    poisoned = np.full((R * L, D), np.nan)
    poisoned[index[index >= 0]] = values.reshape(-1, D)[index[index >= 0]]
    poisoned = tf.constant(poisoned.reshape(R, L, D))

    @tf.function(jit_compile=jit_compile)
    def step(packed: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            tape.watch(packed)
            unpacked = unpack_sequences(packed, index)
            loss = tf.reduce_sum(unpacked**2)
        return unpacked, tf.convert_to_tensor(tape.gradient(loss, packed))

    unpacked, gradient = map(numbers, step(poisoned))
    expected = numbers(unpack_sequences(values, index))
    np.testing.assert_array_equal(unpacked, expected)
    np.testing.assert_array_equal(unpacked[index < 0], 0)
    np.testing.assert_array_equal(
        gradient, np.where(np.isnan(poisoned), 0, 2 * numbers(poisoned))
    )


def test_the_first_columns_fetch_the_first_tokens() -> None:
    packed = pack_sequences(ragged(), row_length=L)
    firsts = unpack_sequences(packed.values, packed.index[:, :1])
    expected = [s[0] if len(s) else 0 for s in ragged()]
    np.testing.assert_array_equal(numbers(firsts)[:, 0], expected)


def test_packed_sequences_attend_as_they_do_alone() -> None:
    N, H = 2, 5
    sequences = [
        draw(length, 3 * N * H, seed=i).reshape(length, 3, N, H)
        for i, length in enumerate(LENGTHS)
    ]
    packed = pack_sequences(sequences, row_length=L, num_rows=R)
    ids = packed.segment_ids
    visible = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] > 0)
    assert (~visible[:2]).any(axis=(1, 2)).all()
    query, key, value = np.moveaxis(packed.values, 2, 0)
    mixed, _ = attend(query, key, value, visible[:, None])
    unpacked = numbers(unpack_sequences(mixed.astype("float32"), packed.index))
    for found, sequence in zip(unpacked, sequences, strict=True):
        query, key, value = sequence.transpose(1, 0, 2, 3)[:, None]
        alone, _ = attend(query, key, value)
        length = len(sequence)
        np.testing.assert_allclose(found[:length], alone[0], rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(found[length:], 0)


def test_a_packed_batch_passes_through_tf_data() -> None:
    batches = [LENGTHS, [3, 0, 11, 5, 5, 2, 1]]

    def generate() -> Any:
        for lengths in batches:
            yield pack_sequences(ragged(lengths), row_length=L, num_rows=R)

    spec = tf.TensorSpec((R, L), tf.int32)
    dataset = tf.data.Dataset.from_generator(
        generate,
        output_signature=PackedSequences(
            tf.TensorSpec((R, L), tf.int64), spec, spec, tf.TensorSpec((7, L), tf.int32)
        ),
    ).map(lambda packed: packed._replace(values=-packed.values))
    for lengths, packed in zip(batches, dataset.as_numpy_iterator(), strict=True):
        assert isinstance(packed, PackedSequences)
        check(packed, [-sequence for sequence in ragged(lengths)])


def vectors(i: int) -> list[np.ndarray]:
    lengths = np.random.default_rng(i).integers(0, 8, size=B)
    return [draw(n, D, seed=i).astype("float32") for n in lengths]


class Batches(keras.utils.PyDataset):
    """Packed batches of `vectors`, and for each sequence its length."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[PackedSequences, np.ndarray]:
        packed = pack_sequences(vectors(i), row_length=L, num_rows=R)
        return packed, np.array([len(sequence) for sequence in vectors(i)])


@pytest.mark.parametrize("jit_compile", [False, "auto"])
def test_a_model_takes_packed_rows_and_learns_from_each_sequence(
    jit_compile: bool | str,
) -> None:
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    inputs = PackedSequences(
        keras.Input((None, D)),
        keras.Input((None,), dtype="int32"),
        keras.Input((None,), dtype="int32"),
        keras.Input((None,), dtype="int32"),
    )
    unpacked = unpack_sequences(dense(inputs.values), inputs.index)
    model = keras.Model(inputs, keras.ops.sum(unpacked, axis=(1, 2)))
    model.compile(keras.optimizers.SGD(1.0), "mse", jit_compile=jit_compile)

    # A step down the squared error of `sum(sequence) @ kernel`, from a kernel of zeros.
    targets = Batches(1)[0][1]
    sums = np.array([x.sum(axis=0) for i in range(3) for x in vectors(i)])
    expected = 2 / B * sums[:B].T @ targets[:, None]
    np.testing.assert_allclose(
        model.evaluate(Batches(1), verbose=0), np.mean(targets**2), rtol=1e-5
    )
    model.fit(Batches(1), verbose=0)
    np.testing.assert_allclose(dense.get_weights()[0], expected, rtol=1e-5)

    # R rows go in, B predictions come out, in the order of the sequences.
    found = model.predict(Batches(3), verbose=0)
    np.testing.assert_allclose(found, (sums @ expected)[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "text"),
    [
        (
            (ragged(),),
            {"row_length": 6},
            ValueError,
            r"`row_length` must be at least the longest sequence's 8 tokens "
            r"\(number 4, from 0\)\. Received: row_length=6",
        ),
        (
            (ragged(),),
            {"row_length": 8, "num_rows": 2},
            ValueError,
            r"The sequences need 3 rows of 8 tokens\. Received: num_rows=2",
        ),
        (
            (ragged(),),
            {"row_length": 0},
            ValueError,
            r"`row_length` must be an integer, 1 or more\. Received: 0",
        ),
        (
            (ragged(),),
            {"row_length": 11.0},
            ValueError,
            r"`row_length` must be an integer, 1 or more\. Received: 11\.0",
        ),
        (
            (ragged(),),
            {"row_length": L, "num_rows": 0},
            ValueError,
            r"`num_rows` must be an integer, 1 or more\. Received: 0",
        ),
        (
            (ragged(),),
            {"row_length": L, "num_rows": True},
            ValueError,
            r"`num_rows` must be an integer, 1 or more\. Received: True",
        ),
        (
            (ragged(), [1]),
            {"row_length": L},
            ValueError,
            r"`lengths` goes with a padded array .* Received: lengths=\[1\]",
        ),
        (
            (pad(ragged()),),
            {"row_length": L},
            ValueError,
            r"or a padded array \(B, T, \.\.\.\) with `lengths`\. "
            r"Received: sequences of shape \(7, 8\), lengths=None",
        ),
        (
            (np.arange(7), [7]),
            {"row_length": L},
            ValueError,
            r"Received: sequences of shape \(7,\), lengths=\[7\]",
        ),
        (
            (pad(ragged()), np.ones((7, 8))),
            {"row_length": L},
            TypeError,
            r"`lengths` must be integers \(B,\) or a boolean mask \(B, T\)\. "
            r"Received: lengths of dtype float64",
        ),
        (
            (pad(ragged(), 13), np.ones((7, 7), bool)),
            {"row_length": L},
            ValueError,
            r"integers \(B,\) = \(7,\) or a boolean mask \(B, T\) = \(7, 13\)\. "
            r"Received: bool of shape \(7, 7\)",
        ),
        (
            (pad(ragged()), [1, 2]),
            {"row_length": L},
            ValueError,
            r"Received: int64 of shape \(2,\)",
        ),
        (
            (pad(ragged()), [1, 2, 3, 4, 5, 6, 9]),
            {"row_length": L},
            ValueError,
            r"`lengths` must be from 0 to T = 8\. Received: lengths=\[1, .*, 9\]",
        ),
        (
            (pad(ragged()), [1, 2, 3, 4, 5, 6, -1]),
            {"row_length": L},
            ValueError,
            r"`lengths` must be from 0 to T = 8\. Received: lengths=\[1, .*, -1\]",
        ),
        (
            ([],),
            {"row_length": L},
            ValueError,
            r"`sequences` must hold one array .* or more\. Received: \[\]",
        ),
        (
            ([1, 2, 3],),
            {"row_length": L},
            ValueError,
            r"`sequences` must hold one array .* or more\. Received: \[1, 2, 3\]",
        ),
        (
            ([np.zeros((2, 3)), np.zeros((2, 5))],),
            {"row_length": L},
            ValueError,
            r"`sequences` must agree in every dimension after the length\. "
            r"Received: shapes \[\(2, 3\), \(2, 5\)\]",
        ),
        (
            (tf.ragged.constant([[[1], [2, 3]]]),),
            {"row_length": L},
            ValueError,
            r"`sequences` must have one ragged dimension, the length\. Received: 2",
        ),
        (
            (ragged(),),
            {"row_length": L, "pad_value": 0.5},
            ValueError,
            r"`pad_value` must be a value of the tokens' dtype, int64\. "
            r"Received: pad_value=0\.5",
        ),
        (
            ([s.astype("uint8") for s in ragged()],),
            {"row_length": L, "pad_value": -1},
            ValueError,
            r"dtype, uint8\. Received: pad_value=-1",
        ),
        (
            (ragged(),),
            {"row_length": L, "pad_value": np.nan},
            ValueError,
            r"dtype, int64\. Received: pad_value=nan",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused(
    arguments: tuple[Any, ...],
    settings: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    with pytest.raises(error, match=text):
        pack_sequences(*arguments, **settings)


def test_pack_refuses_other_lengths() -> None:
    packed = pack_sequences(ragged(), row_length=L)
    other = [2, 5, 0, 4, 8, 2, 1]
    with pytest.raises(
        ValueError,
        match=r"`other` must have the lengths of the packed sequences, "
        + re.escape(f"{LENGTHS}. Received: {other}"),
    ):
        packed.pack(ragged(other))
    with pytest.raises(
        ValueError,
        match=r"`other` must have the leading dimensions \(B, T\) of the packed "
        r"sequences, \(7, 8\)\. Received: other of shape \(7, 11, 3\)",
    ):
        packed.pack(np.zeros((7, 11, 3)))
