"""MultiHeadAttention against the oracle and against Keras' layer.

Letters: B batch, T query length, S key length, N heads, H head size of queries and
keys, V head size of values, DQ, DV, DK widths of queries, values and keys.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_mha import MultiHeadAttention, RelativePositionBias
from keras_mha.layers.keras_mask import get_keras_mask, set_keras_mask
from tests.support import reference as oracle
from tests.support.attention_cases import cast, check_slopes, draw, numbers, pairs
from tests.support.layers import made, normal, plain_config

Stock = keras.layers.MultiHeadAttention

B, T, S, N, H, V, DQ, DV, DK = 2, 5, 7, 3, 11, 4, 13, 17, 19
SHAPES = (B, T, DQ), (B, S, DV), (B, S, DK)
QUERY_MASK = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)
VALUE_MASK = np.array([[1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1, 1]], bool)
KEY_MASK = np.array([[1, 1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 1, 1, 0]], bool)
PAIRS = {2: pairs(T, S), 3: pairs(B, T, S), 4: pairs(B, N, T, S)}
PADDING = {"query_mask": QUERY_MASK, "value_mask": VALUE_MASK, "key_mask": KEY_MASK}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "value_dim": {"value_dim": V},
    "gate": {"use_gate": True, "value_dim": V},
    "no bias": {"use_bias": False},
    "gate, no bias": {"use_bias": False, "use_gate": True},
    "output size": {"output_shape": 23},
    "output shape": {"output_shape": (2, 3), "value_dim": V},
    "window": {"sliding_window": 3},
    "all": {
        "value_dim": V,
        "use_gate": True,
        "output_shape": [2, 3],
        "sliding_window": 4,
        "dropout": 0.3,
    },
}
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"use_causal_mask": True},
    "query": {"query_mask": QUERY_MASK},
    "value": {"value_mask": VALUE_MASK},
    "key": {"key_mask": KEY_MASK},
    "padding": PADDING,
    "rank 2": {"attention_mask": PAIRS[2]},
    "rank 3": {"attention_mask": PAIRS[3]},
    "rank 4": {"attention_mask": PAIRS[4]},
    "one head": {"attention_mask": PAIRS[4][:, :1]},
    "one example": {"attention_mask": PAIRS[4][:1]},
    "empty rows": {"attention_mask": PAIRS[3] & (np.arange(T) != 2)[:, None]},
    "all": {**PADDING, "attention_mask": PAIRS[4], "use_causal_mask": True},
}
CASES = [("plain", mask) for mask in MASKS] + [
    (options, mask)
    for options in OPTIONS
    if options != "plain"
    for mask in ("none", "all")
]
each_case = pytest.mark.parametrize(("options", "mask"), CASES)


def inputs(dtype: str = "float32", seed: int = 0) -> list[np.ndarray]:
    """Queries, values and keys: the order of the layer's arguments."""
    return [draw(*shape, seed=seed + i).astype(dtype) for i, shape in enumerate(SHAPES)]


@functools.cache
def _layer(option_items: tuple[tuple[str, Any], ...]) -> MultiHeadAttention:
    return made(MultiHeadAttention(N, H, **dict(option_items)), *SHAPES)


def layer_of(name: str = "plain", **options: Any) -> MultiHeadAttention:
    """A built layer with random weights; the same object for the same options."""
    given = {**OPTIONS[name], **options}
    shape = given.get("output_shape")
    if isinstance(shape, list):
        given["output_shape"] = tuple(shape)
    return _layer(tuple(sorted(given.items())))


def twin(layer: MultiHeadAttention, **options: Any) -> Any:
    """Keras' layer of the same options with the same weights."""
    config = layer.get_config()
    known = inspect.signature(Stock.__init__).parameters.keys() - {"self", "kwargs"}
    stock = Stock(**{**{name: config[name] for name in known}, **options})
    stock.build(*SHAPES)
    stock.set_weights(layer.get_weights())
    return stock


def shown(mask: dict[str, Any], window: int | None = None) -> np.ndarray:
    """What the call arguments `mask` leave visible, `(B, N, T, S)`."""
    pair_mask = mask.get("attention_mask")
    if pair_mask is not None and pair_mask.ndim == 3:
        pair_mask = pair_mask[:, None]
    return oracle.visible_pairs(
        (B, N, T, S),
        mask.get("query_mask"),
        mask.get("value_mask"),
        pair_mask,
        mask.get("use_causal_mask", False),
        window,
    ) & oracle.visible_pairs((B, N, T, S), key_padding=mask.get("key_mask"))


def expected(
    layer: MultiHeadAttention, arrays: list[Any], mask: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    visible = shown(mask, layer.get_config()["sliding_window"])
    return oracle.multi_head_attention(oracle.layer_weights(layer), *arrays, visible)


def carrying(array: Any, mask: Any) -> Any:
    """A tensor that carries a Keras mask, as an Embedding's outputs do."""
    tensor = tf.constant(array)
    if mask is not None:
        set_keras_mask(tensor, tf.constant(mask))
    return tensor


def differentiate(
    layer: Any, arrays: list[np.ndarray], **call: Any
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Outputs, and the gradients of all inputs and weights of a weighted sum."""
    tensors = [tf.constant(array) for array in arrays]
    variables = [weight.value for weight in layer.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        outputs = layer(*tensors, **call)
        upstream = tf.constant(draw(*outputs.shape, seed=7), outputs.dtype)
        loss = tf.reduce_sum(outputs * upstream)
    found = tape.gradient(loss, [*tensors, *variables])
    return numbers(outputs), [numbers(gradient) for gradient in found]


# --- against the oracle -------------------------------------------------------------


@each_case
def test_forward_equals_the_oracle(options: str, mask: str) -> None:
    layer, arrays = layer_of(options), inputs()
    found = layer(*arrays, **MASKS[mask], return_attention_scores=True)
    for one, other in zip(found, expected(layer, arrays, MASKS[mask]), strict=True):
        np.testing.assert_allclose(numbers(one), other, atol=2e-5)
    # Without the scores the same outputs come.
    np.testing.assert_allclose(layer(*arrays, **MASKS[mask]), found[0], atol=1e-6)


@each_case
def test_gradients_equal_the_oracles_differences(options: str, mask: str) -> None:
    layer, arrays = layer_of(options, dtype="float64"), inputs("float64")
    weights = oracle.layer_weights(layer)
    visible = shown(MASKS[mask], layer.get_config()["sliding_window"])

    def function(query: Any, value: Any, key: Any, *given: Any) -> np.ndarray:
        named = dict(zip(weights, given, strict=True))
        return oracle.multi_head_attention(named, query, value, key, visible)[0]

    outputs, found = differentiate(layer, arrays, **MASKS[mask])
    moved = [*arrays, *weights.values()]
    np.testing.assert_allclose(outputs, function(*moved), atol=1e-6)
    upstream = draw(*outputs.shape, seed=7)
    check_slopes(found, function, moved, upstream, tolerance=2e-6)


@pytest.mark.parametrize("name", sorted(MASKS.keys() - {"none"}))
def test_the_comparison_sees_a_dropped_mask(name: str) -> None:
    layer, arrays = layer_of(), inputs()
    dropped = numbers(layer(*arrays))
    assert np.abs(dropped - expected(layer, arrays, MASKS[name])[0]).max() > 1e-2


@pytest.mark.parametrize("name", oracle.layer_weights(layer_of("gate")))
def test_the_comparison_sees_a_changed_weight(name: str) -> None:
    layer, arrays = layer_of("gate"), inputs()
    weights = oracle.layer_weights(layer)
    changed = weights | {name: weights[name] + draw(*weights[name].shape, seed=5)}
    found = numbers(layer(*arrays))
    outputs, _ = oracle.multi_head_attention(changed, *arrays)
    difference = np.abs(found - outputs).max()
    # The keys' bias adds the same to all scores of a row, which softmax ignores.
    assert difference < 1e-5 if name == "key/bias" else difference > 1e-2


def test_key_defaults_to_value() -> None:
    layer = made(MultiHeadAttention(N, H), (B, T, DQ), (B, S, DV))
    query, value, _ = inputs()
    outputs, _ = oracle.multi_head_attention(oracle.layer_weights(layer), query, value)
    np.testing.assert_allclose(layer(query, value), outputs, atol=2e-5)
    np.testing.assert_array_equal(layer(query, value, value), layer(query, value))


@pytest.mark.parametrize(("query_length", "key_length"), [(1, S), (T, 1), (1, 1)])
def test_lengths_of_one(query_length: int, key_length: int) -> None:
    query, value, key = inputs()
    arrays = [query[:, :query_length], value[:, :key_length], key[:, :key_length]]
    visible = oracle.visible_pairs((B, N, query_length, key_length), is_causal=True)
    layer = layer_of("gate")
    outputs, _ = oracle.multi_head_attention(
        oracle.layer_weights(layer), *arrays, visible=visible
    )
    found = layer(*arrays, use_causal_mask=True)
    np.testing.assert_allclose(found, outputs, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [{"key_dim": 1, "value_dim": V}, {"value_dim": 1}, {"output_shape": (N, 1)}],
)
def test_sizes_of_one_where_the_length_equals_the_heads(
    options: dict[str, Any],
) -> None:
    # `keras.ops.add` takes a bias (N, 1) for one of the positions (B, N, ...).
    arrays = [normal(B, N, DQ), normal(B, N, DV, seed=1)]
    layer: Any = MultiHeadAttention(**{"num_heads": N, "key_dim": H, **options})
    made(layer, *(array.shape for array in arrays))
    outputs, _ = oracle.multi_head_attention(oracle.layer_weights(layer), *arrays)
    np.testing.assert_allclose(layer(*arrays), outputs, atol=2e-5)


@pytest.mark.parametrize(
    "shape", [(B, 4, T, DQ), (B, 2, 4, T, DQ)], ids=["BATD", "BCATD"]
)
def test_several_axes_with_padding_equal_the_oracle(shape: tuple[int, ...]) -> None:
    axes = (len(shape) - 3, len(shape) - 2)
    query, value = normal(*shape), normal(*shape[:-3], 3, S, DV, seed=1)
    layer = made(
        MultiHeadAttention(N, H, attention_axes=axes), query.shape, value.shape
    )
    query_mask, value_mask = (
        np.arange(x.size // x.shape[-1]) % 3 > 0 for x in (query, value)
    )
    query_mask = query_mask.reshape(query.shape[:-1])
    value_mask = value_mask.reshape(value.shape[:-1])
    visible = (
        query_mask[..., None, :, :, None, None]
        & value_mask[..., None, None, None, :, :]
    )
    outputs, scores = oracle.multi_head_attention(
        oracle.layer_weights(layer), query, value, visible=visible, axes=axes
    )
    found = layer(
        carrying(query, query_mask),
        carrying(value, value_mask),
        return_attention_scores=True,
    )
    np.testing.assert_allclose(found[0], outputs, atol=2e-5)
    np.testing.assert_allclose(found[1], scores, atol=2e-5)


# --- padding ------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("mask", ["padding", "all"])
def test_poison_in_padding_is_harmless(poison: float, mask: str) -> None:
    layer, clean, dirty = layer_of("gate"), inputs(), inputs()
    dirty[0][~QUERY_MASK] = poison
    # Values and keys are hidden together: each where either's mask says so.
    dirty[1][~(VALUE_MASK & KEY_MASK)] = dirty[2][~(VALUE_MASK & KEY_MASK)] = poison
    outputs, found = differentiate(layer, dirty, **MASKS[mask])
    same, wanted = differentiate(layer, clean, **MASKS[mask])
    np.testing.assert_array_equal(outputs, same)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    # Hidden positions get no gradient.
    assert np.all(found[0][~QUERY_MASK] == 0)
    assert np.all(found[1][~(VALUE_MASK & KEY_MASK)] == 0)


@pytest.mark.parametrize("poison", [0.0, np.nan, 1e30])
def test_longer_padding_changes_no_real_position(poison: float) -> None:
    layer, arrays = layer_of("gate"), inputs()
    short = layer(*arrays, **PADDING, use_causal_mask=True)
    longer = [
        np.pad(x, ((0, 0), (0, 4), (0, 0)), constant_values=poison) for x in arrays
    ]
    masks = {name: np.pad(mask, ((0, 0), (0, 4))) for name, mask in PADDING.items()}
    long = numbers(layer(*longer, **masks, use_causal_mask=True))
    np.testing.assert_allclose(long[:, :T], short, atol=1e-6)


def test_a_query_that_sees_no_key_gives_the_bias_and_no_gradient() -> None:
    layer, arrays = layer_of("gate"), inputs()
    empty = np.zeros((T, S), bool)
    outputs, found = differentiate(layer, arrays, attention_mask=empty)
    bias = oracle.layer_weights(layer)["attention_output/bias"]
    np.testing.assert_allclose(outputs, np.broadcast_to(bias, outputs.shape))
    names = ["query", "value", "key", *oracle.layer_weights(layer)]
    nonzero = [n for n, g in zip(names, found, strict=True) if np.any(g != 0)]
    assert nonzero == ["attention_output/bias"]


# --- against Keras' layer -----------------------------------------------------------

# Every combination but those Keras gets wrong: a mask of rank 4 with padding.
COMBINATIONS = [
    (query, value, key, rank, causal, scores)
    for query, value, key, rank, causal, scores in itertools.product(
        *[(False, True)] * 3, (None, 2, 3, 4), (False, True), (False, True)
    )
    if not (rank == 4 and (query or value or key))
]


@pytest.mark.parametrize("options", ["plain", "window"])
@pytest.mark.parametrize(
    ("query", "value", "key", "rank", "causal", "scores"), COMBINATIONS
)
def test_every_mask_combination_equals_keras(
    options: str,
    query: bool,
    value: bool,
    key: bool,
    rank: int | None,
    causal: bool,
    scores: bool,
) -> None:
    layer = layer_of(options)
    masks = {
        "query_mask": QUERY_MASK if query else None,
        "value_mask": VALUE_MASK if value else None,
        "key_mask": KEY_MASK if key else None,
    }
    call = {
        "attention_mask": None if rank is None else PAIRS[rank],
        "use_causal_mask": causal,
        "return_attention_scores": scores,
    }
    # Carried by the inputs: an explicit query_mask Keras ignores.
    found, wanted = (
        one(*map(carrying, inputs(), masks.values()), **call)
        for one in (layer, _stock(options))
    )
    given = {name: mask for name, mask in masks.items() if mask is not None}
    given |= {"use_causal_mask": causal}
    if rank is not None:
        given["attention_mask"] = PAIRS[rank]
    visible = shown(given, layer.get_config()["sliding_window"])
    if scores:
        np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)
        found, wanted = found[0], wanted[0]
    # Without scores, Keras mixes the padding into rows that see no key.
    rows = visible.any(axis=-1).all(axis=1) | scores
    assert rows.sum() > B
    np.testing.assert_allclose(numbers(found)[rows], numbers(wanted)[rows], atol=1e-5)


@functools.cache
def _stock(options: str) -> Any:
    return twin(layer_of(options))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("scores", [False, True], ids=["plain", "scores"])
def test_every_option_equals_keras(options: str, scores: bool) -> None:
    layer = layer_of(options)
    arrays = inputs()
    found, wanted = (
        keras.tree.flatten(one(*arrays, return_attention_scores=scores))
        for one in (layer, _stock(options))
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_equal_keras(options: str) -> None:
    pair = PAIRS[3] | np.eye(T, S, dtype=bool)
    call = {"attention_mask": pair, "use_causal_mask": True}
    one, other = (
        differentiate(layer, inputs(), **call)[1]
        for layer in (layer_of(options), _stock(options))
    )
    for found, wanted in zip(one, other, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_integer_masks_equal_boolean_ones() -> None:
    layer = layer_of()
    integers = {
        name: mask.astype("int32") * 2 if isinstance(mask, np.ndarray) else mask
        for name, mask in MASKS["all"].items()
    }
    found, wanted = (layer(*inputs(), **call) for call in (integers, MASKS["all"]))
    np.testing.assert_array_equal(found, wanted)


# --- weights ------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_weights_are_named_and_shaped_as_in_keras(options: str) -> None:
    layer = MultiHeadAttention(N, H, name="mha", **OPTIONS[options])
    stock = Stock(N, H, name="mha", **OPTIONS[options])
    for one in (layer, stock):
        one.build(*SHAPES)
    assert [w.path for w in layer.weights] == [w.path for w in stock.weights]
    assert [w.shape for w in layer.weights] == [w.shape for w in stock.weights]
    assert [w.trainable for w in layer.weights] == [w.trainable for w in stock.weights]


@pytest.mark.parametrize(
    ("options", "count", "generators"),
    [
        ({}, 8, 0),
        ({"use_bias": False, "dropout": 0.5}, 4, 1),
        ({"use_gate": True}, 10, 0),
        ({"use_gate": True, "use_bias": False, "dropout": 0.5}, 5, 1),
    ],
)
def test_weight_counts(options: dict[str, Any], count: int, generators: int) -> None:
    layer = made(MultiHeadAttention(N, H, **options), *SHAPES)
    assert len(layer.trainable_weights) == count
    assert len(layer.non_trainable_weights) == 0
    assert len(layer.non_trainable_variables) == generators
    assert layer.losses == []


def functional(layer_class: Any, **options: Any) -> keras.Model:
    arguments = [keras.Input(shape[1:]) for shape in SHAPES]
    return keras.Model(arguments, layer_class(N, H, name="mha", **options)(*arguments))


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
@pytest.mark.parametrize("options", ["plain", "gate", "all"])
@pytest.mark.parametrize("to_keras", [False, True], ids=["from Keras", "to Keras"])
def test_weight_files_pass_to_and_from_keras(
    tmp_path: Path, suffix: str, options: str, to_keras: bool
) -> None:
    classes = (MultiHeadAttention, Stock) if to_keras else (Stock, MultiHeadAttention)
    source, target = (functional(one, **OPTIONS[options]) for one in classes)
    source.set_weights([draw(*w.shape, seed=i) for i, w in enumerate(source.weights)])
    path = tmp_path / f"saved{suffix}"
    (source.save if suffix == ".keras" else source.save_weights)(path)
    assert np.abs(numbers(source(inputs())) - numbers(target(inputs()))).max() > 0.1
    target.load_weights(path)
    for one, other in zip(source.get_weights(), target.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(target(inputs()), source(inputs()), rtol=1e-4, atol=1e-4)


def test_a_model_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    model = functional(MultiHeadAttention, **OPTIONS["all"])
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.get_layer("mha")) is MultiHeadAttention
    np.testing.assert_array_equal(loaded(inputs()), model(inputs()))


# --- the constructor ----------------------------------------------------------------

CHANGED: dict[str, Any] = {
    "num_heads": 2,
    "key_dim": 5,
    "value_dim": 3,
    "dropout": 0.25,
    "use_bias": False,
    "output_shape": (7, 2),
    "attention_axes": (1,),
    "sliding_window": 3,
    "flash_attention": False,
    "kernel_initializer": keras.initializers.HeNormal(),
    "bias_initializer": keras.initializers.Ones(),
    "kernel_regularizer": keras.regularizers.L2(0.5),
    "bias_regularizer": keras.regularizers.L1(0.5),
    "activity_regularizer": keras.regularizers.L2(0.25),
    "kernel_constraint": keras.constraints.NonNeg(),
    "bias_constraint": keras.constraints.MaxNorm(3.0),
    "use_gate": True,
    "seed": 7,
    "jit_compile": False,
    "num_key_value_heads": 1,
    "position": RelativePositionBias(2, num_buckets=8),
    "qk_norm": "layer",
    "logits_soft_cap": 2.0,
    "use_sinks": True,
}
# What Keras' layer has not.
OURS = (
    "jit_compile",
    "num_key_value_heads",
    "position",
    "qk_norm",
    "logits_soft_cap",
    "use_sinks",
)


@pytest.mark.parametrize(
    "method", ["__init__", "call", "build", "compute_output_shape"]
)
def test_calls_of_keras_layer_are_understood(method: str) -> None:
    """Keras' arguments come first, in order; what follows can be left out."""
    kinds = inspect.Parameter

    def arguments(function: Callable[..., Any]) -> list[inspect.Parameter]:
        parameters = inspect.signature(function).parameters.values()
        return [each for each in parameters if each.kind is not kinds.VAR_KEYWORD]

    found = arguments(getattr(MultiHeadAttention, method))
    wanted = arguments(getattr(Stock, method))
    for ours, theirs in zip(found, wanted, strict=False):
        assert (ours.name, ours.kind) == (theirs.name, theirs.kind)
        # With a cache there are no values to pass.
        if (method, ours.name) == ("call", "value"):
            assert ours.default is None
        else:
            assert ours.default == theirs.default
    for ours in found[len(wanted) :]:
        assert ours.default is not kinds.empty
        assert method != "__init__" or ours.kind is kinds.KEYWORD_ONLY


def test_every_argument_is_in_the_config_and_comes_back() -> None:
    signature = inspect.signature(MultiHeadAttention.__init__).parameters
    assert CHANGED.keys() == signature.keys() - {"self", "kwargs"}
    layer = MultiHeadAttention(**CHANGED)
    config = layer.get_config()
    for name, value in CHANGED.items():
        default = signature[name].default
        assert value is not default
        held = config[name]
        if hasattr(value, "get_config"):
            assert held["class_name"] == type(value).__name__
            assert held["config"] == value.get_config()
        else:
            assert held == value
    config = plain_config(layer)
    assert plain_config(MultiHeadAttention.from_config(config)) == config
    layer.build(*SHAPES)
    assert plain_config(layer) == config


def test_the_config_of_keras_is_understood() -> None:
    arguments = {k: v for k, v in CHANGED.items() if k not in OURS}
    config = Stock(**arguments).get_config()
    found = MultiHeadAttention.from_config(config).get_config()
    assert {name: found[name] for name in config} == config


def test_properties() -> None:
    layer = layer_of("all")
    assert (layer.num_heads, layer.key_dim, layer.value_dim) == (N, H, V)
    assert layer_of().value_dim == H
    assert (layer.dropout, layer.use_bias, layer.attention_axes) == (0.3, True, None)
    assert layer.jit_compile == "auto"
    names = [
        getattr(layer, f"{n}_dense").name for n in ("query", "key", "value", "output")
    ]
    assert names == ["query", "key", "value", "attention_output"]


@pytest.mark.parametrize(
    "name", ["num_heads", "key_dim", "value_dim", "sliding_window"]
)
@pytest.mark.parametrize("bad", [0, -2, 1.5, "3", True])
def test_sizes_must_be_positive_integers(name: str, bad: Any) -> None:
    text = (
        rf"Received an invalid value for argument `{name}`, expected a positive "
        rf"integer.*Received: {name}={bad!r}"
    )
    with pytest.raises(ValueError, match=text):
        MultiHeadAttention(**{"num_heads": N, "key_dim": H, name: bad})


@pytest.mark.parametrize("bad", [8.0, "8", (), {}])
def test_output_shape_must_be_sizes(bad: Any) -> None:
    text = rf"Invalid `output_shape`: {re.escape(str(bad))}\. .* tuple or list of them"
    with pytest.raises(ValueError, match=text):
        MultiHeadAttention(N, H, output_shape=bad)


@pytest.mark.parametrize("bad", [0, -1, (3, 0), (2.0,)])
def test_output_sizes_must_be_positive(bad: Any) -> None:
    with pytest.raises(
        ValueError, match=r"`output_shape`, expected a positive integer"
    ):
        MultiHeadAttention(N, H, output_shape=bad)


@pytest.mark.parametrize("bad", [1.0, "1", {1}, (1.0,)])
def test_attention_axes_must_be_integers(bad: Any) -> None:
    text = (
        r"`attention_axes` must be an int, or a list or tuple of ints\. "
        rf"Received: attention_axes={re.escape(str(bad))}"
    )
    with pytest.raises(ValueError, match=text):
        MultiHeadAttention(N, H, attention_axes=bad)


@pytest.mark.parametrize("axes", [0, 2, -1, (1, -2), ()])
def test_attention_axes_must_be_inner_axes(axes: Any) -> None:
    text = r"`attention_axes` must name different axes .* Received: attention_axes="
    with pytest.raises(ValueError, match=text):
        MultiHeadAttention(N, H, attention_axes=axes).build(*SHAPES)


@pytest.mark.parametrize("bad", [-0.1, 1.0, "half", None])
def test_dropout_must_be_a_rate(bad: Any) -> None:
    text = (
        rf"`dropout` must be a number with 0 <= dropout < 1\. Received: dropout={bad}"
    )
    with pytest.raises(ValueError, match=text):
        MultiHeadAttention(N, H, dropout=bad)


@pytest.mark.parametrize("bad", ["yes", None, 1])
def test_jit_compile_has_three_values(bad: Any) -> None:
    text = (
        rf"`jit_compile` must be True, False or 'auto'\. Received: jit_compile={bad!r}"
    )
    with pytest.raises(ValueError, match=text):
        MultiHeadAttention(N, H, jit_compile=bad)


def test_flash_attention_has_three_values() -> None:
    for value in (True, False, None):
        config = MultiHeadAttention(N, H, flash_attention=value).get_config()
        assert config["flash_attention"] is value
    text = r"`flash_attention` must be True or False\. Received: .*'yes'"
    with pytest.raises(ValueError, match=text):
        MultiHeadAttention(N, H, flash_attention="yes")


def test_initializers_are_not_shared() -> None:
    layer = MultiHeadAttention(
        N,
        H,
        use_gate=True,
        output_shape=DQ,
        kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.02),
        bias_initializer="random_normal",
    )
    layer.build((B, T, DQ), (B, S, DQ))
    weights = [numbers(weight).ravel() for weight in layer.weights]
    for one, other in itertools.combinations(weights, 2):
        size = min(one.size, other.size)
        assert np.all(one[:size] != other[:size])
    # And Keras' spread: the same for any shape.
    assert 0.015 < numbers(layer.query_dense.kernel).std() < 0.025


def test_default_initial_kernels_are_those_of_keras() -> None:
    layers = [one(N, H, use_gate=True) for one in (MultiHeadAttention, Stock)]
    for layer in layers:
        keras.utils.set_random_seed(3)
        layer.build(*SHAPES)
    for one, other in zip(*(layer.get_weights() for layer in layers), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", ["kernel", "bias"])
def test_constraints_and_regularizers_reach_every_projection(kind: str) -> None:
    layer = MultiHeadAttention(
        N,
        H,
        use_gate=True,
        **{
            f"{kind}_constraint": "non_neg",
            f"{kind}_regularizer": keras.regularizers.L2(1),
        },
    )
    made(layer, *SHAPES)
    weights = [w for w in layer.weights if w.name == kind]
    others = [w for w in layer.weights if w.name != kind]
    assert len(weights) == len(others) == 5
    assert all(isinstance(w.constraint, keras.constraints.NonNeg) for w in weights)
    assert all(w.constraint is None for w in others)
    squares = sum(float(np.sum(numbers(w) ** 2)) for w in weights)
    np.testing.assert_allclose(sum(map(float, layer.losses)), squares, rtol=1e-5)


def test_the_activity_regularizer_acts_as_in_keras() -> None:
    options: dict[str, Any] = {"activity_regularizer": keras.regularizers.L2(0.5)}
    layer = made(MultiHeadAttention(N, H, **options), *SHAPES)
    stock = twin(layer)
    for one in (layer, stock):
        one(*inputs())
    found, wanted = (sorted(map(float, one.losses)) for one in (layer, stock))
    assert len(found) == 4
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


# --- shapes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "value", "key", "output_shape"),
    [
        ((4, 8), (2, 8), None, None),
        ((4, 8), (2, 8), (2, 3), None),
        ((4, 8), (2, 8), None, (3, 4)),
        ((4, 8), (2, 8), (2, 3), (1, 5)),
        ((4, 8), (2, 8), (2, 3), 5),
        ((4, 2, 3, 8), (1, 1, 5, 8), (1, 1, 5, 2), None),
        ((4, 2, 3, 8), (1, 1, 5, 8), (1, 1, 5, 2), (3, 2)),
        ((4, 2, 3, 8), (4, 2, 3, 7), (4, 2, 3, 8), None),
    ],
)
def test_compute_output_shape(
    query: Any, value: Any, key: Any, output_shape: Any
) -> None:
    layer = MultiHeadAttention(2, 3, output_shape=output_shape)
    shapes = [(B, *shape) for shape in (query, value, key) if shape]
    outputs = layer(*(normal(*shape) for shape in shapes))
    assert layer.compute_output_shape(*shapes) == tuple(outputs.shape)
    assert layer.compute_output_shape(*map(list, shapes)) == tuple(outputs.shape)
    size = output_shape if isinstance(output_shape, tuple) else (output_shape or 8,)
    assert tuple(outputs.shape) == (B, *query[:-1], *size)
    dynamic = [(None, *[None] * len(s[1:-1]), s[-1]) for s in shapes]
    assert layer.compute_output_shape(*dynamic)[0] is None


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 8), (2, 2, 7), (2, 3, 7)),
        ((2, 4, 8), (2, 2, 8), (2, 1, 7)),
        ((2, 4, 2, 3, 8), (2, 1, 1, 5, 8), (2, 1, 15, 5, 2)),
        ((2, 4, 8), (2, 2, 8), (2,)),
    ],
)
def test_keys_must_match_values(shapes: tuple[tuple[int, ...], ...]) -> None:
    layer = MultiHeadAttention(2, 3)
    text = (
        r"All dimensions of `value` and `key`, except the last one, must be equal\. "
        rf"Received: value_shape={re.escape(str(shapes[1]))} and "
        rf"key_shape={re.escape(str(shapes[2]))}"
    )
    for function in (
        layer.compute_output_shape,
        layer.build,
        lambda *given: layer(*(normal(*shape) for shape in given)),
    ):
        with pytest.raises(ValueError, match=text):
            function(*shapes)


@pytest.mark.parametrize("axes", [1, -3, (2,), (-2,), [1, 2], (2, 1), (-2, -3)])
@pytest.mark.parametrize("use_gate", [False, True], ids=["plain", "gate"])
def test_negative_axes(axes: Any, use_gate: bool) -> None:
    query = normal(2, 3, 7, 5)
    given = [axes] if isinstance(axes, int) else axes
    positive = [axis % 4 for axis in given]
    layers = [
        made(
            MultiHeadAttention(2, 5, attention_axes=a, use_gate=use_gate),
            query.shape,
            query.shape,
        )
        for a in (axes, positive, list(reversed(positive)))
    ]
    one, other, swapped = (
        x(query, query, return_attention_scores=True) for x in layers
    )
    for found, wanted in zip(one, other, strict=True):
        np.testing.assert_array_equal(found, wanted)
    # The order of the axes only orders the scores.
    np.testing.assert_allclose(swapped[0], one[0], atol=1e-5)
    if len(given) == 2:
        order = (0, 1, 3, 2, 5, 4)
        np.testing.assert_allclose(np.transpose(swapped[1], order), one[1], atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "columns", "mask", "axes"),
    [
        ((3, 4), (3, 2), (4, 2), (2,)),
        ((3, 4), (3, 2), (3, 4, 2), (2,)),
        ((3, 4), (3, 2), (3, 3, 4, 2), (2,)),
        ((3, 4), (3, 2), (3, 3, 2, 4, 2), (2,)),
        ((3, 4), (3, 2), (3, 4, 3, 2), (1, 2)),
        ((3, 4), (3, 2), (3, 3, 4, 3, 2), (1, 2)),
        ((5, 3, 4), (5, 3, 2), (3, 4, 3, 2), (2, 3)),
        ((5, 3, 4), (5, 3, 2), (3, 5, 3, 4, 3, 2), (2, 3)),
    ],
)
@pytest.mark.parametrize("use_gate", [False, True], ids=["plain", "gate"])
def test_masks_of_rank_2_to_6_equal_keras(
    rows: Any, columns: Any, mask: Any, axes: Any, use_gate: bool
) -> None:
    options = {"attention_axes": axes, "use_gate": use_gate}
    query, value = normal(3, *rows, 8), normal(3, *columns, 8, seed=1)
    stock = made(Stock(2, 5, **options), query.shape, value.shape)
    layer = made(MultiHeadAttention(2, 5, **options), query.shape, value.shape)
    visible = pairs(*mask)
    assert not visible.all()
    found, wanted = (
        one(query, value, attention_mask=visible, return_attention_scores=True)
        for one in (layer, stock)
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("lengths", [(T, S), (1, 2), (None, S), (None, None)])
def test_symbolic_scores_have_the_shape_of_real_ones(lengths: tuple[Any, Any]) -> None:
    layer = layer_of("all", dtype="float16")
    query, value, key = (
        keras.Input((length, shape[-1]), batch_size=B, dtype="float16")
        for length, shape in zip((*lengths, lengths[1]), SHAPES, strict=True)
    )
    outputs, scores = layer(query, value, key, return_attention_scores=True)
    assert outputs.shape == (B, lengths[0], 2, 3)
    assert scores.shape == (B, N, *lengths)
    model = keras.Model([query, value, key], [outputs, scores])
    arrays = [
        x[:, :n]
        for x, n in zip(inputs("float16"), (lengths[0], *lengths[1:] * 2), strict=True)
    ]
    found = model(arrays)
    wanted = layer(*arrays, return_attention_scores=True)
    for symbolic, one, other in zip((outputs, scores), found, wanted, strict=True):
        assert symbolic.dtype == one.dtype == "float16"
        np.testing.assert_array_equal(one, other)


# --- masks --------------------------------------------------------------------------


def embedded() -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """Queries and values from embeddings, with the masks they carry."""
    ids = np.array([[1, 2, 3, 0, 0], [3, 3, 1, 1, 2], [1, 0, 0, 0, 0]])
    other = np.array([[5, 4, 0], [3, 0, 0], [2, 1, 1]])
    query = keras.layers.Embedding(4, 8, mask_zero=True)(ids)
    value = keras.layers.Embedding(6, 8, mask_zero=True)(other)
    return query, value, ids != 0, other != 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scores", [False, True])
def test_carried_masks_equal_a_manual_one(causal: bool, scores: bool) -> None:
    query, value, query_mask, value_mask = embedded()
    layer = made(MultiHeadAttention(2, 5), query.shape, value.shape)
    found = layer(query, value, use_causal_mask=causal, return_attention_scores=scores)
    manual = query_mask[:, :, None] & value_mask[:, None]
    if causal:
        manual = manual & np.tri(5, 3, dtype=bool)
    wanted = layer(
        query.numpy(),
        value.numpy(),
        attention_mask=manual,
        return_attention_scores=scores,
    )
    for one, other in zip(*map(keras.tree.flatten, (found, wanted)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("scores", [False, True])
def test_the_outputs_carry_the_queries_mask(scores: bool) -> None:
    query, value, query_mask, _ = embedded()
    outputs = made(MultiHeadAttention(2, 5), query.shape, value.shape)(
        query, value, return_attention_scores=scores
    )
    outputs = outputs[0] if scores else outputs
    np.testing.assert_array_equal(get_keras_mask(outputs), query_mask)


def test_no_mask_no_carried_mask() -> None:
    assert get_keras_mask(layer_of()(*inputs(), value_mask=VALUE_MASK)) is None


@pytest.mark.parametrize("pair_mask", [False, True], ids=["bare", "attention_mask"])
def test_carried_masks_in_a_functional_model(pair_mask: bool) -> None:
    ids, other = keras.Input((T,), dtype="int32"), keras.Input((S,), dtype="int32")
    pair = keras.Input((T, S), dtype="bool")
    query = keras.layers.Embedding(4, DQ, mask_zero=True)(ids)
    value = keras.layers.Embedding(4, DV, mask_zero=True)(other)
    layer = made(MultiHeadAttention(N, H), (B, T, DQ), (B, S, DV))
    outputs = layer(query, value, attention_mask=pair if pair_mask else None)
    pooled = keras.layers.GlobalAveragePooling1D()(outputs)
    arguments = [ids, other, pair] if pair_mask else [ids, other]
    model = keras.Model(arguments, [query, value, outputs, pooled])
    given = [QUERY_MASK * 2, VALUE_MASK * 3, PAIRS[3]][: len(arguments)]
    masks = {"query_mask": QUERY_MASK, "value_mask": VALUE_MASK}
    masks |= {"attention_mask": PAIRS[3]} if pair_mask else {}
    for run in (model, model.predict_on_batch):
        q, v, found, mean = map(numbers, run(given))
        wanted, _ = oracle.multi_head_attention(
            oracle.layer_weights(layer), q, v, visible=shown(masks)
        )
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        # The pooling sees the mask that the outputs carry.
        rows = QUERY_MASK[..., None]
        np.testing.assert_allclose(mean, (found * rows).sum(1) / rows.sum(1), atol=1e-5)


def test_masks_of_rank_2_3_and_4_mean_the_same() -> None:
    layer, lower = layer_of(), np.tri(T, S, dtype=bool)
    one, *others = (
        layer(*inputs(), attention_mask=np.broadcast_to(lower, shape))
        for shape in ((T, S), (B, T, S), (B, 1, T, S), (B, N, T, S))
    )
    for other in others:
        np.testing.assert_array_equal(other, one)
    np.testing.assert_allclose(one, layer(*inputs(), use_causal_mask=True), atol=1e-6)


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_causal_equals_an_explicit_mask(scores: bool, dropout: float) -> None:
    layer = layer_of(dropout=dropout)
    causal, explicit = (
        keras.tree.flatten(layer(*inputs(), return_attention_scores=scores, **call))
        for call in (
            {"use_causal_mask": True, "attention_mask": PAIRS[3]},
            {"attention_mask": PAIRS[3] & np.tri(T, S, dtype=bool)},
        )
    )
    for one, other in zip(causal, explicit, strict=True):
        np.testing.assert_array_equal(one, other)
    if scores:
        assert np.all(numbers(causal[1])[..., ~np.tri(T, S, dtype=bool)] == 0)


@pytest.mark.parametrize("causal", [False, True])
def test_a_sliding_window_shows_its_band(causal: bool) -> None:
    layer = layer_of("window")
    _, scores = layer(*inputs(), use_causal_mask=causal, return_attention_scores=True)
    offset = np.arange(T)[:, None] - np.arange(S)
    band = (np.abs(offset) < 3) & ((offset >= 0) | (not causal))
    assert np.all((numbers(scores) > 0) == band)


@pytest.mark.parametrize("name", ["attention_mask", *PADDING])
def test_floating_masks_are_refused(name: str) -> None:
    mask = MASKS["all"][name].astype("float32")
    text = rf"`{name}` must be boolean or integer .* Received dtype float32"
    with pytest.raises(TypeError, match=text):
        layer_of()(*inputs(), **{name: mask})


@pytest.mark.parametrize(
    "shape", [(S, T), (T, T), (B, S, T), (B, B, T, S), (T, B, T, S)]
)
def test_attention_masks_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    text = rf"`attention_mask` must be 1 or .* of shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=text):
        layer_of()(*inputs(), attention_mask=pairs(*shape))


@pytest.mark.parametrize("shape", [(S,), (1, B, N, T, S)])
def test_attention_masks_of_a_wrong_rank_are_refused(shape: tuple[int, ...]) -> None:
    text = rf"`attention_mask` must have rank 2 .* of shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=text):
        layer_of()(*inputs(), attention_mask=pairs(*shape))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("query_mask", (B, S)),
        ("query_mask", (B,)),
        ("query_mask", (B, T, 1)),
        ("value_mask", (B, T)),
        ("value_mask", (B, 1)),
        ("value_mask", (B, T, S)),
        ("key_mask", (B, T)),
    ],
)
def test_padding_masks_that_do_not_fit_are_refused(
    name: str, shape: tuple[int, ...]
) -> None:
    text = rf"`{name}`.*Received: {name} of shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=text):
        layer_of()(*inputs(), **{name: np.ones(shape, bool)})


def test_axes_that_do_not_attend_must_match() -> None:
    # As many rows in all, so that folding them into the batch would go unnoticed.
    query, value = normal(2, 3, T, DQ), normal(3, 2, T, DV)
    with pytest.raises(
        ValueError, match=r"Received: .*\(2, 3, 5, 13\).*\(3, 2, 5, 17\)"
    ):
        MultiHeadAttention(2, 3, attention_axes=2)(query, value)


def test_inputs_need_an_axis_to_attend_over() -> None:
    with pytest.raises(ValueError, match="`attention_axes`"):
        MultiHeadAttention(2, 3)(normal(B, DQ), normal(B, DV))


def test_causal_over_several_axes_is_refused() -> None:
    query = normal(B, 3, T, DQ)
    for options, call in (({}, {"use_causal_mask": True}), ({"sliding_window": 2}, {})):
        layer = MultiHeadAttention(2, 3, **options)
        text = r"need a single attention axis.*Received: attention_axes=\(1, 2\)"
        with pytest.raises(ValueError, match=text):
            layer(query, query, **call)


def test_masks_cause_no_warning() -> None:
    query, value, *_ = embedded()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer = MultiHeadAttention(2, 5, use_gate=True, dropout=0.3)
        layer(query, value)
        layer(query, value, value, return_attention_scores=True, training=True)
    assert [str(warning.message) for warning in caught] == []


# --- precision ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "dtype", "tolerance"),
    [("mixed_float16", "float16", 5e-3), ("mixed_bfloat16", "bfloat16", 4e-2)],
)
def test_mixed_precision_is_close_to_float32(
    policy: str, dtype: str, tolerance: float
) -> None:
    layer, exact = layer_of("gate", dtype=policy), layer_of("gate")
    assert all(weight.dtype == "float32" for weight in layer.weights)
    found = layer(*inputs(), **MASKS["all"], return_attention_scores=True)
    wanted = exact(*inputs(), **MASKS["all"], return_attention_scores=True)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        scale = np.abs(numbers(other)).max()
        np.testing.assert_allclose(numbers(one), numbers(other), atol=tolerance * scale)


def test_float16_by_hand() -> None:
    # Unit vectors for queries and keys: a score is 1 / sqrt(7) where they agree.
    size, unit = 7, np.eye(7)[None]
    value = np.arange(size * size).reshape(1, size, size) / 100
    layer = MultiHeadAttention(size, size, dtype="float16")
    layer.build(unit.shape, unit.shape)
    kernel = np.repeat(np.eye(size)[:, None], size, axis=1)
    bias = np.zeros((size, size))
    output = np.repeat(np.eye(size)[None], size, axis=0)
    layer.set_weights([kernel, bias] * 3 + [output, np.zeros(size)])
    found, scores = layer(unit, value, unit, return_attention_scores=True)
    weight = np.exp(1 / np.sqrt(size))
    table = np.where(np.eye(size) > 0, weight, 1.0) / (weight + size - 1)
    assert found.dtype == scores.dtype == "float16"
    np.testing.assert_allclose(
        numbers(scores), np.tile(table, (1, size, 1, 1)), atol=2e-4
    )
    np.testing.assert_allclose(numbers(found), size * (table @ value), atol=5e-3)


# --- dropout, XLA, training ---------------------------------------------------------


def test_dropout_acts_in_training_alone() -> None:
    layer, plain = layer_of(dropout=0.5, seed=3), layer_of()
    np.testing.assert_array_equal(layer(*inputs()), plain(*inputs()))
    first, second = (numbers(layer(*inputs(), training=True)) for _ in range(2))
    assert np.abs(first - numbers(plain(*inputs()))).max() > 0.1
    assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize("mask", ["none", "all"])
def test_xla_gives_the_same_values_gradients_and_dropout(mask: str) -> None:
    results = []
    for jit_compile in (False, True):
        options = {"jit_compile": jit_compile, "dropout": 0.4, "seed": 5}
        layer = made(MultiHeadAttention(N, H, use_gate=True, **options), *SHAPES)
        results.append(differentiate(layer, inputs(), **MASKS[mask], training=True))
    (one, gradients), (other, wanted) = results
    np.testing.assert_allclose(other, one, atol=2e-5)
    for found, right in zip(wanted, gradients, strict=True):
        np.testing.assert_allclose(found, right, atol=1e-4)


def test_supports_jit_follows_jit_compile() -> None:
    for value in (True, False, "auto"):
        layer = MultiHeadAttention(N, H, jit_compile=value)
        assert layer.supports_jit == (value is not False)


def test_it_learns_to_copy() -> None:
    """A task that attention alone can do: fetch the value of the matching key."""
    generator = np.random.default_rng(0)
    keys = np.eye(5, dtype="float32")[
        np.stack([generator.permutation(5) for _ in range(64)])
    ]
    value = generator.normal(size=(64, 5, 3)).astype("float32")
    query = np.broadcast_to(np.eye(5, dtype="float32"), (64, 5, 5))
    target = np.einsum("btd,bsd,bsv->btv", query, keys, value)
    arguments = [keras.Input((5, size)) for size in (5, 3, 5)]
    layer = MultiHeadAttention(1, 8, output_shape=3)
    model = keras.Model(arguments, layer(*arguments))
    model.compile(keras.optimizers.Adam(0.1), "mse", jit_compile=False)
    history = model.fit(
        [query, value, keys], target, epochs=30, batch_size=64, verbose=0
    )
    assert history.history["loss"][-1] < 0.1 * np.var(target)


# --- LoRA, quantization, policies ---------------------------------------------------

PROJECTIONS = ("query_dense", "key_dense", "value_dense")


def test_lora_on_the_projections(tmp_path: Path) -> None:
    options = {"use_bias": False, "use_gate": True}
    model, plain = (functional(MultiHeadAttention, **options) for _ in range(2))
    layer: Any = model.get_layer("mha")
    before = numbers(model(inputs()))
    for name in PROJECTIONS:
        getattr(layer, name).enable_lora(2)
    assert len(layer.trainable_variables) == 8
    assert len(layer.non_trainable_variables) == 3
    np.testing.assert_allclose(model(inputs()), before, atol=1e-5)

    frozen = [numbers(getattr(layer, name)._kernel) for name in PROJECTIONS]
    model.compile("sgd", "mse", jit_compile=False)
    for _ in range(2):  # the second factor starts at zero, the first moves after it
        model.train_on_batch(inputs(), normal(B, T, DQ))
    for name, kernel in zip(PROJECTIONS, frozen, strict=True):
        np.testing.assert_array_equal(numbers(getattr(layer, name)._kernel), kernel)
        assert np.any(numbers(getattr(layer, name).lora_kernel_b) != 0)
    after = numbers(model(inputs()))
    assert np.abs(after - before).max() > 1e-3

    model.save(tmp_path / "lora.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "lora.keras")
    np.testing.assert_allclose(loaded(inputs()), after, atol=1e-5)

    model.save_weights(tmp_path / "lora.weights.h5")
    plain.load_weights(tmp_path / "lora.weights.h5")
    np.testing.assert_allclose(plain(inputs()), after, atol=1e-5)

    adapted: Any = functional(MultiHeadAttention, **options)
    adapted.get_layer("mha").query_dense.enable_lora(2)
    plain.save_weights(tmp_path / "plain.weights.h5")
    adapted.load_weights(tmp_path / "plain.weights.h5")
    np.testing.assert_allclose(adapted(inputs()), after, atol=1e-5)


# What Keras says of every Functional model.
@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize`")
@pytest.mark.parametrize("use_gate", [False, True], ids=["plain", "gate"])
@pytest.mark.parametrize("through", ["layer", "model"])
def test_int8_quantization(use_gate: bool, through: str) -> None:
    model = functional(MultiHeadAttention, use_gate=use_gate)
    layer: Any = model.get_layer("mha")
    before = numbers(model(inputs()))
    (layer if through == "layer" else model).quantize("int8")
    names = [*PROJECTIONS, "output_dense", *(["_gate_dense"] if use_gate else [])]
    for name in names:
        assert getattr(layer, name)._kernel.dtype == "int8"
    after = numbers(model(inputs()))
    assert 0 < np.mean((after - before) ** 2) < 1e-3 * np.mean(before**2)


def test_a_policy_map_reaches_the_projections_by_name() -> None:
    policies = keras.dtype_policies.DTypePolicyMap()
    for name in ("query", "value"):
        policies[f"mha/{name}"] = keras.dtype_policies.QuantizedDTypePolicy(
            "int8", "float32"
        )
    policies["mha/key"] = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    layer = MultiHeadAttention(N, H, dtype=policies, name="mha")
    layer.build(*SHAPES)
    assert layer.query_dense._kernel.dtype == layer.value_dense._kernel.dtype == "int8"
    assert layer.key_dense.compute_dtype == "bfloat16"
    assert layer.output_dense._kernel.dtype == "float32"


# --- any shapes, masks and options --------------------------------------------------


@st.composite
def calls(draw_from: st.DrawFn) -> dict[str, Any]:
    size = st.integers(1, 4)
    # Head sizes of one have a test of their own.
    head = st.integers(2, 5)
    return {
        "sizes": [draw_from(head if name == "h" else size) for name in "btsnhqvk"],
        "options": {
            "value_dim": draw_from(st.none() | head),
            "use_bias": draw_from(st.booleans()),
            "use_gate": draw_from(st.booleans()),
            "output_shape": draw_from(st.none() | size | st.tuples(size, head)),
            "sliding_window": draw_from(st.none() | size),
        },
        "use_causal_mask": draw_from(st.booleans()),
        "paddings": draw_from(st.tuples(*[st.booleans()] * 3)),
        "pairs": draw_from(
            st.sampled_from([None, "TS", "BTS", "B1TS", "1NTS", "BNTS"])
        ),
        "own_keys": draw_from(st.booleans()),
        "seed": draw_from(st.integers(0, 99)),
    }


@settings(max_examples=40)
@given(calls())
def test_any_call_equals_the_oracle(call: dict[str, Any]) -> None:
    b, t, s, n, h, dq, dv, dk = call["sizes"]
    length = {"B": b, "N": n, "T": t, "S": s, "1": 1}
    generator = np.random.default_rng(call["seed"])
    query, value, key = (
        generator.normal(size=x) for x in ((b, t, dq), (b, s, dv), (b, s, dk))
    )
    arrays = [query, value, key] if call["own_keys"] else [query, value]
    layer = MultiHeadAttention(n, h, **call["options"], dtype="float64")
    made(layer, *(x.shape for x in arrays), seed=call["seed"])

    masks: dict[str, Any] = {}
    names = ["query_mask", "value_mask", "key_mask"]
    for name, asked, x in zip(
        names, call["paddings"], (query, value, key), strict=True
    ):
        if asked:
            masks[name] = generator.random(x.shape[:2]) < 0.7
    visible = oracle.visible_pairs(
        (b, n, t, s),
        masks.get("query_mask"),
        masks.get("value_mask"),
        is_causal=call["use_causal_mask"],
        sliding_window=call["options"]["sliding_window"],
    ) & oracle.visible_pairs((b, n, t, s), key_padding=masks.get("key_mask"))
    if call["pairs"] is not None:
        pair = generator.random([length[letter] for letter in call["pairs"]]) < 0.6
        masks["attention_mask"] = pair
        visible = visible & (pair[:, None] if pair.ndim == 3 else pair)

    found = layer(
        *cast(arrays, "float64"),
        **masks,
        use_causal_mask=call["use_causal_mask"],
        return_attention_scores=True,
    )
    wanted = oracle.multi_head_attention(
        oracle.layer_weights(layer), *arrays, visible=visible
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_queries_and_values_of_different_rank_are_refused() -> None:
    text = "`query` and `value` must have as many dimensions. Received: query_shape="
    for query, value in ((normal(B, T, DQ), normal(B, 3, S, DV)),):
        with pytest.raises(ValueError, match=text):
            MultiHeadAttention(2, 3)(query, value)


@pytest.mark.parametrize("name", PADDING)
def test_symbolic_masks_are_checked_at_once(name: str) -> None:
    query, value = keras.Input((T, DQ)), keras.Input((S, DV))
    with pytest.raises(TypeError, match=f"`{name}` must be boolean or integer"):
        layer_of()(query, value, value, **{name: keras.Input((T,), dtype="float32")})
    with pytest.raises(ValueError, match=f"`{name}` must have the leading"):
        layer_of()(query, value, value, **{name: keras.Input((17,), dtype="bool")})


def test_sizes_may_be_numpy_integers() -> None:
    layer = MultiHeadAttention(np.int64(N), np.int32(H))
    assert (type(layer.num_heads), type(layer.key_dim)) == (int, int)
    assert layer(*inputs()).shape == (B, T, DQ)


def test_padding_masks_of_different_rank_combine() -> None:
    query = normal(3, 3, 3, DQ)
    layer = MultiHeadAttention(2, 3, attention_axes=(1, 2))
    short, full = np.eye(3, dtype=bool), np.ones((3, 3, 3), bool)
    full[:, :, 2] = False
    masks = {"value_mask": short, "key_mask": full}
    expanded = {"value_mask": short[:, :, None] & full, "key_mask": full}
    np.testing.assert_allclose(
        layer(query, query, query, **masks),
        layer(query, query, query, **expanded),
        atol=1e-6,
    )


def test_initializers_may_be_functions() -> None:
    def ones(shape: Any, dtype: Any = None) -> Any:
        return tf.ones(shape, dtype)

    layer = MultiHeadAttention(2, 3, kernel_initializer=ones)
    layer.build((B, T, DQ), (B, S, DV))
    assert np.all(numbers(layer.query_dense.kernel) == 1)
