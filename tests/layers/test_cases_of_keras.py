"""Keras' own tests of its layer, run with ours in its place.

They come with Keras, of whatever version is installed: a case that is new there is run
here too.
"""

from __future__ import annotations

from unittest import mock

import pytest
from keras.src.layers.attention import multi_head_attention_test as cases

import keras_mha


@pytest.mark.filterwarnings("default")  # some cases warn with Keras' layer, too
class TestInPlaceOfKerasLayer(cases.MultiHeadAttentionTest):
    """The cases find the layer as `layers.MultiHeadAttention`."""

    def setUp(self) -> None:
        super().setUp()
        patch = mock.patch.object(
            cases.layers, "MultiHeadAttention", keras_mha.MultiHeadAttention
        )
        self.enterContext(patch)

    def test_the_cases_see_our_layer(self) -> None:
        layer = cases.layers.MultiHeadAttention(num_heads=2, key_dim=3)
        assert type(layer) is keras_mha.MultiHeadAttention


def test_no_case_of_keras_is_lost() -> None:
    names = [name for name in dir(cases.MultiHeadAttentionTest) if name[:5] == "test_"]
    assert len(names) >= 50
