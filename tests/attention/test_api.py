"""The one door: arguments, choice of implementation, scores on request, errors."""

from __future__ import annotations

import re
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import keras_mha
from keras_mha import (
    CausalMask,
    PaddingMask,
    SegmentMask,
    SlidingWindowMask,
    TableMask,
    dot_product_attention,
)
from keras_mha.attention import mask_parts
from keras_mha.attention.dispatch import (
    attend,
    current_implementation,
    implementation_scope,
    prepare_inputs,
)
from keras_mha.attention.mask_parts import NOTHING, MaskParts
from tests.support.attention_cases import (
    BACKEND,
    CASES,
    KEY_PADDING,
    KEY_SEGMENTS,
    QUERY_PADDING,
    QUERY_SEGMENTS,
    SEED,
    B,
    Case,
    N,
    S,
    T,
    V,
    arrays_of,
    attention_of,
    cast,
    draw,
    expect,
    heads,
    numbers,
    pairs,
    run,
    upstream_of,
)

needs_tensorflow = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="compiles TensorFlow's functions"
)
SQUARE = Case(lengths=(T, T))


def mix(case: Case = CASES["plain"], **options: Any) -> np.ndarray:
    return numbers(dot_product_attention(*cast(heads(case), "float32"), **options))


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({"is_causal": True}, CausalMask()),
        ({"sliding_window": 3}, SlidingWindowMask(3)),
        (
            {"is_causal": True, "sliding_window": 3},
            CausalMask() & SlidingWindowMask(3),
        ),
        ({"segment_ids": QUERY_SEGMENTS}, SegmentMask(QUERY_SEGMENTS)),
        (
            {"segment_ids": (QUERY_SEGMENTS, QUERY_SEGMENTS[::-1])},
            SegmentMask(QUERY_SEGMENTS, QUERY_SEGMENTS[::-1]),
        ),
        ({"mask": pairs(T, T)}, TableMask(pairs(T, T)[None, None])),
        ({"mask": 7 * pairs(B, T, T)}, TableMask(pairs(B, T, T)[:, None])),
        ({"mask": pairs(B, 1, T, T)}, TableMask(pairs(B, 1, T, T))),
        ({"mask": CausalMask(3), "sliding_window": None}, CausalMask(3)),
        (
            {
                "mask": PaddingMask(np.array([4, T])) & pairs(B, N, T, T),
                "is_causal": True,
                "segment_ids": QUERY_SEGMENTS[0],
            },
            pairs(B, N, T, T)
            & CausalMask()
            & SegmentMask(QUERY_SEGMENTS[0])
            & PaddingMask(np.array([4, T])),
        ),
    ],
)
def test_arguments_are_masks(options: dict[str, Any], mask: keras_mha.Mask) -> None:
    found = mix(SQUARE, **options)
    np.testing.assert_array_equal(found, mix(SQUARE, mask=mask))
    assert np.abs(found - mix(SQUARE)).max() > 0.1


def test_segments_of_queries_and_keys() -> None:
    case = CASES["segments"]
    (expected,), _ = expect(case, arrays_of(case), upstream_of(case))
    found = mix(case, segment_ids=(QUERY_SEGMENTS, KEY_SEGMENTS))
    np.testing.assert_allclose(found, expected, atol=1e-6)


SLOPES = np.array([0.5, 0.25, 0.0625], "float32")


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (
            lambda d: ops.multiply(-SLOPES[:, None], ops.abs(ops.cast(d, "float32"))),
            "heads",
        ),
        (lambda d: 0.3 * ops.cast(d, "float32")[None], "shared"),
    ],
    ids=["as ALiBi", "one for all heads"],
)
@pytest.mark.parametrize("implementation", ["reference", "portable"])
def test_a_callable_bias_is_the_tensor_of_its_distances(
    function: Any, shape: str, implementation: str
) -> None:
    distances = np.arange(S)[None] - np.arange(T)[:, None]  # of key from query, j - i
    factors = -SLOPES[:, None, None] if shape == "heads" else 0.3
    table = factors * (np.abs(distances) if shape == "heads" else distances)
    table = np.broadcast_to(table, (1, N, T, S)).astype("float32")
    by_tensor = mix(bias=table, implementation=implementation)
    by_callable = mix(bias=function, implementation=implementation)
    np.testing.assert_allclose(by_callable, by_tensor, atol=1e-6)
    doubled = mix(bias=lambda d: function(2 * d), implementation=implementation)
    assert np.abs(doubled - by_tensor).max() > 1e-2


def test_seeds_are_integers_generators_or_tensors() -> None:
    case = CASES["dropout"]
    generator = keras.random.SeedGenerator(SEED)
    first, second = (mix(dropout=0.3, seed=generator) for _ in range(2))
    again = keras.random.SeedGenerator(SEED)
    np.testing.assert_array_equal(mix(dropout=0.3, seed=again.next()), first)
    assert np.abs(first - second).max() > 0.1
    (expected,), _ = expect(case, arrays_of(case), upstream_of(case))
    np.testing.assert_allclose(mix(dropout=0.3, seed=SEED), expected, atol=1e-5)
    assert np.abs(mix(dropout=0.3, seed=SEED + 1) - expected).max() > 0.1


def test_auto_is_one_of_the_implementations() -> None:
    for name in ("causal", "grouped", "dropout", "scores"):
        case = CASES[name]
        arrays = arrays_of(case)
        tensors = dict(zip(arrays, cast(list(arrays.values()), "float32"), strict=True))
        found, _ = run(case, "auto", tensors, upstream_of(case))
        expected, _ = expect(case, arrays, upstream_of(case))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_scores_come_on_request() -> None:
    arrays = cast(heads(), "float32")
    mixed, none = attend(*arrays, MaskParts(upper=0))
    again, scores = attend(*arrays, MaskParts(upper=0), return_scores=True)
    assert none is None
    assert scores is not None
    np.testing.assert_allclose(numbers(mixed), numbers(again), atol=1e-6)
    np.testing.assert_allclose(numbers(scores).sum(axis=-1), 1.0, atol=1e-6)


@needs_tensorflow
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_unknown_sizes_compile(implementation: str) -> None:
    """XLA on a trace that knows neither batch nor lengths, at two sizes."""
    import tensorflow as tf

    case = CASES["causal window after a cache"]
    function = tf.function(
        attention_of(case, implementation, ["query", "key", "value"]),
        input_signature=[
            tf.TensorSpec([None, None, *array.shape[2:]]) for array in heads(case)
        ],
        jit_compile=True,
    )
    for lengths in ((T, S), (5, 3)):
        sized = case._replace(lengths=lengths)
        (expected,), _ = expect(sized, arrays_of(sized), upstream_of(sized))
        found = function(*cast(heads(sized), "float32"))
        np.testing.assert_allclose(numbers(found), expected, atol=1e-6)


@needs_tensorflow
def test_a_seed_may_be_an_argument_of_the_compiled_function() -> None:
    import tensorflow as tf

    arrays = cast(heads(), "float32")
    compiled = tf.function(
        lambda seed: attend(*arrays, NOTHING, seed=seed, dropout=0.3)[0],
        jit_compile=True,
    )
    for number in (3, 5):
        seed = tf.constant([number, 0], "uint32")
        eager, _ = attend(*arrays, NOTHING, seed=seed, dropout=0.3)
        np.testing.assert_allclose(numbers(compiled(seed)), numbers(eager), atol=1e-6)
        assert np.abs(numbers(eager) - mix()).max() > 0.1


HEADS = {
    "query": np.zeros((B, T, N, 5), "float32"),
    "key": np.zeros((B, S, N, 5), "float32"),
    "value": np.zeros((B, S, N, V), "float32"),
}


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"query": zeros(T, N, 5)}, ValueError, "(B, T, N, H), `key` (B, S, K, H) and"),
        ({"key": zeros(1, S, N, 5)}, ValueError, "must agree in B, S and H. Received:"),
        ({"key": zeros(B, S, N, 3)}, ValueError, "key (2, 13, 3, 3)"),
        ({"value": zeros(B, 5, N, V)}, ValueError, "value (2, 5, 3, 7)"),
        ({"key": zeros(B, S, 1, 5)}, ValueError, "must have K heads, and N of `query`"),
        (
            {"key": zeros(B, S, 2, 5), "value": zeros(B, S, 2, V)},
            ValueError,
            "must be a multiple of K. Received: query (2, 11, 3, 5), key (2, 13, 2, 5)",
        ),
        ({"key": zeros(B, S, N, 5, dtype="float16")}, TypeError, "key float16"),
        (
            {name: x.astype("int32") for name, x in HEADS.items()},
            TypeError,
            "must have one floating dtype. Received: query int32",
        ),
        ({"scale": float("inf")}, ValueError, "`scale` must be a finite number"),
        ({"scale": "1"}, ValueError, "Received: scale='1'"),
        ({"logits_soft_cap": 0.0}, ValueError, "`logits_soft_cap` must be positive"),
        ({"logits_soft_cap": True}, ValueError, "`logits_soft_cap` must be a finite"),
        ({"mask": zeros(T, S)}, TypeError, "`mask` must be boolean or integer"),
        ({"mask": pairs(S, T)}, ValueError, "Every dimension of `mask` must be 1 or"),
        ({"mask": pairs(S)}, ValueError, "`mask` must have rank 2 (T, S), 3 (B, T, S)"),
        ({"sliding_window": 0}, ValueError, "`sliding_window` must be a positive int"),
        (
            {"segment_ids": np.zeros((B, T), int)},
            ValueError,
            "whose shape is (2, 13). Received: segment_ids of shape (2, 11)",
        ),
        (
            {"segment_ids": (np.zeros((B, S), int), np.zeros((B, S), int))},
            ValueError,
            "whose shape is (2, 11). Received: segment_ids of shape (2, 13)",
        ),
        (
            {"segment_ids": np.zeros(T, int)},
            ValueError,
            "whose shape is (2, 13). Received: segment_ids of shape (1, 11)",
        ),
        (
            {"mask": PaddingMask(np.ones(B + 1, int))},
            ValueError,
            "key padding of `mask` must fit B=2, T=11 and S=13. Received: shape (3",
        ),
        ({"bias": zeros(T, S, dtype="int32")}, TypeError, "`bias` must be floating"),
        ({"bias": pairs(T, S)}, TypeError, "What may not attend is a mask"),
        (
            {"bias": zeros(S)},
            ValueError,
            "`bias` must have the shape (T, S), (B",
        ),
        (
            {"bias": zeros(S, T)},
            ValueError,
            "here (2, 3, 11, 13). Received: shape (1, 1",
        ),
        (
            {"bias": zeros(T, T + S)},
            ValueError,
            "`bias` must broadcast to (B, N, T, S)",
        ),
        ({"bias": zeros(B, B, T, S)}, ValueError, "Received: shape (2, 2, 11, 13)"),
        (
            {"bias": lambda d: ops.zeros((2, *d.shape))},
            ValueError,
            "`bias` returns must be (N or 1, T + S - 1), here (3, 23). Received:",
        ),
        ({"bias": lambda d: ops.zeros(d.shape)}, ValueError, "Received: shape (23,)"),
        ({"sinks": zeros(1)}, ValueError, "`sinks` must be (N,), here (3,). Received"),
        ({"sinks": zeros(2 * N)}, ValueError, "Received: shape (6,)"),
        ({"sinks": zeros(1, N)}, ValueError, "`sinks` must have the shape (N,)"),
        ({"sinks": np.zeros(N, int)}, TypeError, "`sinks` must be floating"),
        ({"dropout": 0.5}, ValueError, "needs a `seed`. Received: dropout=0.5"),
        ({"dropout": 1.0, "seed": 3}, ValueError, "0 <= dropout < 1. Received: dropo"),
        ({"dropout": 0.5, "seed": "3"}, TypeError, "`seed` must be an integer"),
        (
            {"implementation": "flash"},
            ValueError,
            "`implementation` must be one of ['auto', 'reference', 'blockwise', "
            "'portable'",
        ),
        (
            {"implementation": "portable", "dropout": 0.5, "seed": 3},
            ValueError,
            "`implementation='portable'` is for inference and has no dropout; these",
        ),
        (
            {"query": keras.KerasTensor((B, T, N, 5))},
            TypeError,
            "takes no symbolic tensors",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    arrays = {name: options.pop(name, array) for name, array in HEADS.items()}
    with pytest.raises(error, match=re.escape(text)):
        dot_product_attention(*arrays.values(), **options)


def test_the_scope_sets_and_restores_the_implementation() -> None:
    assert current_implementation() == "auto"
    with implementation_scope("portable"):
        assert current_implementation() == "portable"
        with implementation_scope("reference"):
            assert current_implementation() == "reference"
        assert current_implementation() == "portable"
    assert current_implementation() == "auto"


def test_the_scope_is_left_when_something_raises() -> None:
    with pytest.raises(KeyError), implementation_scope("portable"):
        raise KeyError
    assert current_implementation() == "auto"


def test_the_scope_refuses_unknown_implementations() -> None:
    text = r"`name` must be one of \['auto', 'reference', .*\]\. Received: name='flash'"
    with pytest.raises(ValueError, match=text), implementation_scope("flash"):
        pass


def test_padding_is_cleared_but_for_portable() -> None:
    inputs = draw(*QUERY_PADDING.shape, 11).astype("float32")
    expected = numbers(mask_parts.clear_padding(inputs, QUERY_PADDING))
    for name in ("auto", "reference", "blockwise"):
        with implementation_scope(name):
            found = numbers(prepare_inputs(inputs, QUERY_PADDING))
        np.testing.assert_array_equal(found, expected)
    with implementation_scope("portable"):
        assert prepare_inputs(inputs, QUERY_PADDING) is inputs


def test_the_layers_follow_the_scope() -> None:
    """NaN in hidden values tells the implementations apart."""
    layer = keras_mha.MultiHeadAttention(3, 5)
    query, value = (
        draw(B, length, 11, seed=length).astype("float32") for length in (T, S)
    )
    value[~KEY_PADDING] = np.nan
    clean = numbers(layer(query, value, value_mask=KEY_PADDING))
    assert np.all(np.isfinite(clean))
    with implementation_scope("portable"):
        spread = numbers(layer(query, value, value_mask=KEY_PADDING))
        value[~KEY_PADDING] = 0.0
        finite = numbers(layer(query, value, value_mask=KEY_PADDING))
    assert np.all(np.isnan(spread))
    np.testing.assert_allclose(finite, clean, atol=1e-5)
