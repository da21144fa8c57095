"""`_compute_attention`, overridden in a subclass as users of Keras' layer override it.

Letters: B batch, T query length, S key length, N heads, H head size, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from keras import ops

from keras_mha import CausalMask, MultiHeadAttention
from tests.support.layers import normal, randomize

B, T, S, N, H, V, D = 3, 7, 5, 2, 3, 11, 13
QUERIES, VALUES = normal(B, T, D), normal(B, S, D, seed=1)
RNG = np.random.default_rng(20261129)
SEEN = RNG.random((B, N, T, S)) < 0.6


class Zeros(MultiHeadAttention):
    def _compute_attention(self, query: Any, *others: Any) -> Any:
        del others
        return ops.zeros((*query.shape[:-1], self.value_dim)), None


class Written(MultiHeadAttention):
    """Keras' formula, written out by a user, in NumPy."""

    def _compute_attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
    ) -> Any:
        del training, return_attention_scores
        q, k, v = (np.moveaxis(np.asarray(x), -2, 1) for x in (query, key, value))
        shape = (*q.shape[:-1], *k.shape[2:-1])
        q, k = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (q, k))
        scores = q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1])
        scores = scores.reshape(shape)
        if attention_mask is not None:
            mask = np.asarray(attention_mask)
            assert mask.dtype == bool
            mask = mask[:, None] if mask.ndim < scores.ndim else mask
            scores = np.where(mask, scores, -1e30)
        scores = np.exp(
            scores - scores.max(tuple(range(q.ndim - 2, scores.ndim)), keepdims=True)
        )
        flat = scores.reshape(*q.shape[:3], -1)
        flat = flat / flat.sum(-1, keepdims=True)
        mixed = flat @ v.reshape(*v.shape[:2], -1, v.shape[-1])
        mixed = np.moveaxis(mixed.reshape(*shape[: query.ndim - 1], -1), 1, -2)
        return ops.convert_to_tensor(mixed), ops.convert_to_tensor(flat.reshape(shape))


class Handed(MultiHeadAttention):
    def _compute_attention(self, *arguments: Any, **keywords: Any) -> Any:
        return super()._compute_attention(*arguments, **keywords)


def twins(
    other: type, queries: Any = QUERIES, values: Any = VALUES, **options: Any
) -> list[Any]:
    """A layer of ours, and one of `other` with the same weights."""
    layers = [each(N, H, V, **options) for each in (MultiHeadAttention, other)]
    for layer in layers:
        layer.build(queries.shape, values.shape)
        randomize(layer)
    return layers


def test_an_override_counts() -> None:
    _, layer = twins(Zeros)
    expected = np.broadcast_to(np.asarray(layer.output_dense.bias), (B, T, D))
    np.testing.assert_array_equal(layer(QUERIES, VALUES), expected)
    assert np.abs(expected).min() > 0


# Every query sees a key, because the formula has no answer where none is seen.
VISIBLE = SEEN | (np.arange(S) == 0)


@pytest.mark.parametrize("other", [Written, Handed])
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"use_causal_mask": True},
        {"value_mask": np.arange(S) < np.array([[3], [5], [2]])},
        {"attention_mask": VISIBLE[0, 0]},
        {"attention_mask": VISIBLE[:, 0]},
        {"attention_mask": VISIBLE, "use_causal_mask": True},
        {"attention_mask": CausalMask(offset=1)},
        {
            "segment_ids": (
                np.array([[0, 0, 1, 1, 1, 2, 2]] * B),
                np.array([[0, 1, 1, 2, 2]] * B),
            ),
            "head_mask": np.array([[0.5, 2.0], [1.0, 0.0], [3.0, 1.5]], "float32"),
        },
    ],
    ids=lambda call: " ".join(call) or "plain",
)
def test_an_override_gets_all_masks_as_one(other: type, call: dict[str, Any]) -> None:
    plain, layer = twins(other)
    expected = plain(QUERIES, VALUES, **call, return_attention_scores=True)
    answers = layer(QUERIES, VALUES, **call, return_attention_scores=True)
    for one, wanted in zip(answers, expected, strict=True):
        np.testing.assert_allclose(one, wanted, atol=1e-5)


def test_an_override_sees_the_window() -> None:
    queries = normal(B, T, D)
    plain, layer = twins(Written, queries, queries, sliding_window=2)
    expected, unlimited = plain(queries, queries), twins(Written, queries, queries)[0]
    np.testing.assert_allclose(layer(queries, queries), expected, atol=1e-5)
    assert np.abs(expected - unlimited(queries, queries)).max() > 0.1


@pytest.mark.parametrize("axes", [(1, 2), (2,), (1,)])
@pytest.mark.parametrize("is_masked", [False, True])
def test_an_override_over_other_axes(axes: tuple[int, ...], is_masked: bool) -> None:
    queries = normal(B, 3, 5, D)
    plain, layer = twins(Handed, queries, queries, attention_axes=axes)
    mask = RNG.random((B, 3)) < 0.7 if is_masked else None
    expected = plain(queries, queries, value_mask=mask)
    np.testing.assert_allclose(
        layer(queries, queries, value_mask=mask), expected, atol=1e-5
    )


def test_an_override_over_two_axes_gets_a_mask_of_the_scores_rank() -> None:
    queries = normal(B, 3, 5, D)
    plain, layer = twins(Written, queries, queries)
    mask = RNG.random((B, N, 3, 5, 3, 5)) < 0.5
    mask[..., 0, 0] = True
    expected = plain(queries, queries, attention_mask=mask)
    np.testing.assert_allclose(
        layer(queries, queries, attention_mask=mask), expected, atol=1e-5
    )


def test_an_override_takes_no_bias() -> None:
    _, layer = twins(Handed)
    with pytest.raises(ValueError, match=r"Handed overrides it. .* shape \(7, 5\)"):
        layer(QUERIES, VALUES, attention_bias=normal(T, S))


def test_options_of_the_scores_are_in_what_is_overridden() -> None:
    plain, layer = twins(Handed, logits_soft_cap=0.3, use_sinks=True, position="alibi")
    expected, bare = plain(QUERIES, VALUES), twins(Handed)[0](QUERIES, VALUES)
    np.testing.assert_allclose(layer(QUERIES, VALUES), expected, atol=1e-6)
    assert np.abs(np.asarray(expected) - np.asarray(bare)).max() > 0.1
