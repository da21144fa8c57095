"""Each implementation's own steps, on values that can be told without an oracle.

Queries of zeros weigh all keys that they see alike, and values that are the rows of the
identity matrix show the weights themselves.

Letters: B batch, T query length, S key length, N heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from keras import ops

from keras_mha.attention import portable, reference
from keras_mha.attention.bias import Bias
from keras_mha.attention.blockwise import front as blockwise
from keras_mha.attention.blockwise import loops
from keras_mha.attention.dropout import as_seed, draw_pair_noise, keep_pairs
from keras_mha.attention.mask_parts import NOTHING, MaskParts
from tests.support.attention_cases import cast, numbers, value_and_gradients

# More than two blocks of queries and of keys at their real sizes, and a rest.
LONG, LONGER = 523, 541
WAYS: dict[str, Any] = {
    "reference": reference.attend,
    "blockwise": blockwise.attend,
    "loops": lambda *args, **options: (loops.attend(*args, **options), None),
    "portable": portable.attend,
}


def weights_of(way: str, mask: MaskParts, T: int, S: int) -> tuple[Any, Any]:
    """The weights `(T, S)`, and the gradient of the values `(S, T)`, the same again."""

    def attend(query: Any, key: Any, value: Any) -> Any:
        return WAYS[way](query, key, value, mask, Bias(), scale=1.0)[0]

    zeros = [np.zeros((1, length, 1, 2)) for length in (T, S)]
    (mixed,), gradients = value_and_gradients(
        attend,
        cast([*zeros, np.eye(S)[None, :, None]], "float32"),
        [np.eye(T, S)[None, :, None]],
        "graph" if way == "blockwise" else "eager",
    )
    return mixed[0, :, 0], gradients[2][0, :, 0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("lower", "upper"),
    [(None, 0), (None, 3), (None, -2), (-299, 0), (-4, 4), (-310, 40), (2, 9)],
)
def test_the_edge_of_a_range_at_real_block_sizes(
    way: str, lower: int | None, upper: int
) -> None:
    distances = np.arange(LONGER) - np.arange(LONG)[:, None]
    shown = (distances <= upper) & (True if lower is None else distances >= lower)
    counts = np.maximum(shown.sum(axis=1, keepdims=True), 1)
    weights, gradient = weights_of(
        way, MaskParts(lower=lower, upper=upper), LONG, LONGER
    )
    np.testing.assert_allclose(weights, shown / counts, atol=1e-6)
    expected = (shown / counts).T @ np.eye(LONG, LONGER)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_the_soft_cap_comes_before_the_bias(way: str) -> None:
    zeros, value = np.zeros((1, 1, 1, 2)), np.array([0.0, 1.0]).reshape(1, 2, 1, 1)
    bias = Bias(pairs=ops.convert_to_tensor(np.log([[[[1.0, 3.0]]]]), "float32"))
    mixed, _ = WAYS[way](
        *cast([zeros, np.ones((1, 2, 1, 2)), value], "float32"),
        NOTHING,
        bias,
        scale=1.0,
        logits_soft_cap=0.1,
    )
    np.testing.assert_allclose(numbers(mixed).ravel(), [0.75], atol=1e-6)


@pytest.mark.parametrize("way", ["reference", "blockwise", "loops"])
def test_what_dropout_leaves_is_raised(way: str) -> None:
    T, S, seed = 5, 67, as_seed(3)
    mixed, _ = WAYS[way](
        *cast([np.zeros((1, n, 2, 3)) for n in (T, S)], "float32"),
        *cast([np.ones((1, S, 2, 1))], "float32"),
        NOTHING,
        Bias(),
        scale=1.0,
        dropout=0.25,
        seed=seed,
    )
    kept = keep_pairs(draw_pair_noise(seed, (1, 2, T), S), 0.25)
    share = np.asarray(ops.convert_to_numpy(kept)).mean(axis=3)[0].T
    assert 0.5 < share.min() < share.max() < 1.0
    np.testing.assert_allclose(numbers(mixed)[0, :, :, 0], share / 0.75, atol=1e-6)
