from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha.export.samples import join_batches

ROWS = [[3, 1], [4, 1, 5], [9], [2, 6]]


def test_shorter_batches_are_padded() -> None:
    ragged = tf.ragged.constant(ROWS, dtype=tf.int32)
    dataset = tf.data.Dataset.from_tensor_slices(ragged)
    joined = join_batches(dataset.ragged_batch(2))
    np.testing.assert_array_equal(joined, [[3, 1, 0], [4, 1, 5], [9, 0, 0], [2, 6, 0]])


def test_targets_and_weights_are_left_out() -> None:
    x = {"text": np.array(["a", "b", "c"]), "size": np.array([2.0, 3.0, 5.0])}
    y = np.zeros(3)
    for whole in ((x,), (x, y), (x, y, y)):
        joined = join_batches(tf.data.Dataset.from_tensor_slices(whole).batch(2))
        assert joined["text"].tolist() == [b"a", b"b", b"c"]
        assert joined["size"].tolist() == [2.0, 3.0, 5.0]


def test_a_dataset_may_have_no_end() -> None:
    dataset = tf.data.Dataset.range(7).repeat().batch(50)
    assert join_batches(dataset).shape == (300,)


def test_a_dataset_of_keras() -> None:
    class Batches(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return np.full((2, 3), index), np.zeros(2)

    assert join_batches(Batches()).tolist() == [[0] * 3] * 2 + [[1] * 3] * 2


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="one or more batches.*is empty"):
        join_batches(tf.data.Dataset.range(0).batch(2))
