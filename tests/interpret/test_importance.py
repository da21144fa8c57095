"""The importance of heads against differences of a loss in NumPy float64.

Letters: B batch, T length, N query heads, D width.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import keras_mha
from keras_mha.interpret import head_importance
from tests.support import layer_oracle as oracle
from tests.support.layers import normal, randomize
from tests.support.small_models import (
    IDS,
    LABELS,
    NUM_IDS,
    REAL,
    B,
    D,
    H,
    N,
    T,
    classifier,
    path_of,
)

VECTORS, TARGETS = normal(B, T, D), normal(B, T, D, seed=3)
CROSS_ENTROPY = "sparse_categorical_crossentropy"


def two_layers(**options: Any) -> tuple[keras.Model, list[Any]]:
    inputs = keras.Input((None, D), name="vectors")
    mask = keras.Input((None,), dtype="bool", name="mask")
    layers = [
        keras_mha.MultiHeadSelfAttention(N, key_dim=H, name="first", **options),
        keras_mha.MultiHeadSelfAttention(N + 2, key_dim=H, name="second", **options),
    ]
    outputs = inputs
    for layer in layers:
        outputs = layer(outputs, mask=mask)
    model = keras.Model([inputs, mask], outputs)
    randomize(model)
    return model, layers


def squared(labels: Any, outputs: Any) -> Any:
    return ops.square(labels - outputs)


def losses(layers: list[Any], masks: list[np.ndarray]) -> np.ndarray:
    """The mean of each example's real positions under head masks `(B, N)`, in NumPy."""
    values: Any = VECTORS
    for layer, mask in zip(layers, masks, strict=True):
        weights = oracle.weights_of(layer)
        values, _ = oracle.attention(layer, weights, values, mask=REAL, head_mask=mask)
    positions = np.square(TARGETS - values).mean(axis=2)
    return (positions * REAL).sum(axis=1) / REAL.sum(axis=1)


def expected(layers: list[Any]) -> list[np.ndarray]:
    """The mean of the absolute slopes along each head's factor."""
    step, found = 1e-4, []
    for place, layer in enumerate(layers):
        numbers = np.zeros(layer.num_heads)
        for head in range(layer.num_heads):
            sides = []
            for sign in (1, -1):
                masks = [np.ones((B, other.num_heads)) for other in layers]
                masks[place][:, head] += sign * step
                sides.append(losses(layers, masks))
            numbers[head] = np.abs((sides[0] - sides[1]) / (2 * step)).mean()
        found.append(numbers)
    return found


@pytest.mark.parametrize(
    "options", [{}, {"flash_attention": True}, {"jit_compile": True}, {"dropout": 0.5}]
)
@pytest.mark.parametrize("batch_size", [2, 32])
def test_the_oracle(options: dict[str, Any], batch_size: int) -> None:
    model, layers = two_layers(**options)
    found = head_importance(
        model,
        [VECTORS, REAL],
        TARGETS,
        loss=squared,
        normalize=False,
        batch_size=batch_size,
    )
    assert list(found) == ["first", "second"]
    for numbers, wanted in zip(found.values(), expected(layers), strict=True):
        np.testing.assert_allclose(numbers, wanted, rtol=2e-4)
        assert wanted.min() > 0


def test_slopes_of_opposite_signs_do_not_cancel() -> None:
    """The mean of absolute slopes, not the size of their mean."""
    model, layers = two_layers()
    step = 1e-4
    masks = [np.ones((B, layer.num_heads)) for layer in layers]
    up, down = ([m.copy() for m in masks] for _ in range(2))
    up[0][:, 0] += step
    down[0][:, 0] -= step
    slopes = (losses(layers, up) - losses(layers, down)) / (2 * step)
    assert slopes.min() < 0 < slopes.max()  # the case tells them apart
    found = head_importance(
        model, [VECTORS, REAL], TARGETS, loss=squared, normalize=False
    )
    np.testing.assert_allclose(found["first"][0], np.abs(slopes).mean(), rtol=2e-4)
    assert found["first"][0] > 1.05 * abs(slopes.mean())


def test_layers_are_normalized() -> None:
    model, _ = two_layers()
    plain = head_importance(
        model, [VECTORS, REAL], TARGETS, loss=squared, normalize=False
    )
    found = head_importance(model, [VECTORS, REAL], TARGETS, loss=squared)
    for path, numbers in plain.items():
        np.testing.assert_allclose(found[path], numbers / np.sqrt((numbers**2).sum()))


def test_a_head_that_is_not_read_has_none() -> None:
    model, layers = two_layers()
    kernel = np.array(layers[1].output_dense.kernel)
    kernel[2] = 0.0
    layers[1].output_dense.kernel.assign(kernel)
    found = head_importance(model, [VECTORS, REAL], TARGETS, loss=squared)
    assert found["second"][2] == 0
    assert np.all(np.delete(found["second"], 2) > 0)


def test_the_loss_comes_from_compile() -> None:
    model = classifier(N, 2)
    wanted = head_importance(model, IDS, LABELS, loss=CROSS_ENTROPY)
    for loss in (CROSS_ENTROPY, keras.losses.SparseCategoricalCrossentropy()):
        model.compile(loss=loss)
        found = head_importance(model, IDS, LABELS)
        assert list(found) == [path_of(0), path_of(1)]
        for path, numbers in wanted.items():
            np.testing.assert_allclose(found[path], numbers, rtol=1e-5)


def tokens_model(outputs: int, dtype: str = "float32") -> keras.Sequential:
    """Ids `(B, T)`, 0 padding, to numbers at each position, masked where padding is."""
    heads = keras_mha.MultiHeadSelfAttention(N, key_dim=H, name="heads", dtype=dtype)
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(NUM_IDS, D, mask_zero=True, dtype=dtype),
            heads,
            keras.layers.Dense(outputs, name="numbers", dtype=dtype),
        ]
    )
    randomize(model)
    return model


def rows_model(outputs: int, activation: str | None = None) -> keras.Model:
    """Ids `(B, T)` to numbers of each row."""
    tokens = tokens_model(D)
    pooled = keras.layers.GlobalAveragePooling1D()(tokens.outputs[0])
    dense = keras.layers.Dense(outputs, activation)
    model = keras.Model(tokens.inputs, dense(pooled))
    randomize(dense)
    return model


def slopes_of_keras(model: Any, labels: np.ndarray) -> np.ndarray:
    """The mean absolute slope `(N,)` of the loss that Keras counts for each example."""
    kernel = model.get_layer("heads").output_dense.kernel
    whole, step = np.array(kernel), 1e-2
    rows = [slice(b, b + 1) for b in range(B)]

    def losses_without(head: int, part: float) -> np.ndarray:
        kernel.assign(
            np.where(np.arange(N) == head, 1 - part, 1)[:, None, None] * whole
        )
        given = [
            (tf.constant(labels[row]), model(tf.constant(IDS[row]))) for row in rows
        ]
        kernel.assign(whole)
        return np.array([model.compute_loss(None, y, y_pred) for y, y_pred in given])

    return np.array(
        [
            np.abs(losses_without(h, step) - losses_without(h, -step)).mean()
            for h in range(N)
        ]
    ) / (2 * step)


TOKEN_LABELS = np.random.default_rng(4).integers(0, 3, (B, T))
LOSSES: dict[str, tuple[Any, Any, np.ndarray]] = {
    "a name, labels (n,)": (
        lambda: rows_model(1, "sigmoid"),
        "binary_crossentropy",
        LABELS,
    ),
    "a short name, labels (n,)": (lambda: rows_model(1), "mse", LABELS),
    "a name, labels (n, 1)": (lambda: rows_model(1), "mae", LABELS[:, None] * 5.0),
    "a name, outputs (n, C)": (
        lambda: rows_model(3, "softmax"),
        "sparse_categorical_crossentropy",
        LABELS,
    ),
    "a loss that shapes choose": (lambda: rows_model(1, "sigmoid"), "ce", LABELS),
    "a function, labels (n,)": (lambda: rows_model(1), squared, LABELS),
    "a class": (lambda: rows_model(1), keras.losses.LogCosh, LABELS),
    "positions, a name": (lambda: tokens_model(1), "mse", TOKEN_LABELS[..., None]),
    "positions, an object": (
        lambda: tokens_model(3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        TOKEN_LABELS,
    ),
    "positions, some ignored": (
        lambda: tokens_model(3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1),
        TOKEN_LABELS,
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_are_those_that_keras_counts(case: str) -> None:
    make, loss, labels = LOSSES[case]
    model = make()
    model.compile(loss=loss)
    wanted = slopes_of_keras(model, labels)
    found = head_importance(model, IDS, labels, normalize=False)
    np.testing.assert_allclose(found["heads"], wanted, rtol=2e-3, atol=2e-5)
    assert wanted.min() > 1e-3


def test_a_function_may_average_positions_by_itself() -> None:
    """`(B,)` is taken as it is, padding or not; other axes must be the mask's."""
    model = tokens_model(2)
    targets = normal(B, T, 2, seed=3)

    def halves(labels: Any, outputs: Any) -> Any:
        return ops.mean(squared(labels, outputs), axis=(1, 2)) / 2

    def of_axes(labels: Any, outputs: Any) -> Any:
        return ops.mean(squared(labels, outputs), axis=1)

    found = head_importance(model, IDS, targets, loss=halves, normalize=False)
    unmasked = keras.Model(model.inputs, model.outputs[0] * 1.0)
    wanted = head_importance(unmasked, IDS, targets, loss="mse", normalize=False)
    np.testing.assert_allclose(found["heads"], wanted["heads"] / 2, rtol=1e-5)
    shapes = "losses of shape .5, 2. and a mask of shape .5, 7."
    with pytest.raises(ValueError, match=f"axes of the outputs' mask.* {shapes}"):
        head_importance(model, IDS, targets, loss=of_axes)
    # Keras does not broadcast these either: it drops the last axis of the outputs.
    shapes = "losses of shape .5,. and a mask of shape .5, 7."
    with pytest.raises(ValueError, match=f"labels of as many axes as .* {shapes}"):
        head_importance(tokens_model(1), IDS, TOKEN_LABELS, loss="mse")


@pytest.mark.parametrize(("size", "factor"), [(50.0, 1e-4), (1e9, 1.0)])
def test_float16_loses_no_gradient(size: float, factor: float) -> None:
    """Of a long text's positions each has a part that float16 rounds to zero.

    And where the gradients are too large for float16, they do not become infinite.
    """
    ids = np.random.default_rng(0).integers(1, NUM_IDS, (3, 512))
    labels = size * normal(3, 512, 1)
    loss = "mae" if factor < 1 else "mse"
    found = []
    for dtype in ("float32", "mixed_float16"):
        model = tokens_model(1, dtype=dtype)
        kernel = model.get_layer("numbers").kernel
        kernel.assign(factor * kernel)
        numbers = head_importance(model, ids, labels, loss=loss, normalize=False)
        found.append(numbers["heads"])
    np.testing.assert_allclose(found[1], found[0], rtol=5e-3)


def test_losses_of_float16_outputs_are_those_of_floatx() -> None:
    """The cosine divides by squares of 300, which is no number of float16."""
    found = []
    for dtype in ("float32", "mixed_float16"):
        model = tokens_model(2, dtype=dtype)
        labels = 300 * normal(B, T, 2, seed=3)
        numbers = head_importance(
            model, IDS, labels, loss="cosine_similarity", normalize=False
        )
        found.append(numbers["heads"])
    np.testing.assert_allclose(found[1], found[0], rtol=2e-2)


def test_labels_may_have_a_structure_of_their_own() -> None:
    model = tokens_model(2)
    targets = normal(B, T, 2, seed=3)

    def weighted(labels: Any, outputs: Any) -> Any:
        return labels["weights"][:, None, None] * squared(labels["targets"], outputs)

    weights = np.array([1, 2, 3, 4, 5])
    found = head_importance(
        model,
        IDS,
        {"targets": targets, "weights": weights},
        loss=weighted,
        normalize=False,
    )
    rows = [
        head_importance(
            model, IDS[b : b + 1], targets[b : b + 1], loss="mse", normalize=False
        )["heads"]
        for b in range(B)
    ]
    np.testing.assert_allclose(found["heads"], weights @ np.array(rows) / B, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dataset", "list"])
def test_batches_of_pairs(kind: str) -> None:
    model = classifier(N)
    dataset: Any = tf.data.Dataset.from_tensor_slices((IDS, LABELS)).batch(2)
    given = dataset if kind == "dataset" else list(dataset.as_numpy_iterator())
    found = head_importance(model, given, loss=CROSS_ENTROPY)
    wanted = head_importance(model, IDS, LABELS, loss=CROSS_ENTROPY)
    np.testing.assert_allclose(found[path_of(0)], wanted[path_of(0)], rtol=1e-5)


def test_a_shared_layer_counts_once_over_its_calls() -> None:
    inputs = keras.Input((None, D))
    layer = keras_mha.MultiHeadSelfAttention(N, key_dim=H, name="heads")
    model = keras.Model(inputs, layer(layer(inputs)))
    randomize(model)
    found = head_importance(model, VECTORS, TARGETS, loss=squared, normalize=False)
    mask, step = tf.ones((B, N)), 1e-2
    weights = oracle.weights_of(layer)

    def loss_of(mask: np.ndarray) -> np.ndarray:
        values: Any = VECTORS
        for _ in range(2):
            values, _ = oracle.attention(layer, weights, values, head_mask=mask)
        return np.square(TARGETS - values).mean(axis=(1, 2))

    for head in range(N):
        change = np.zeros((B, N))
        change[:, head] = step * 1e-2
        ones = np.asarray(mask, float)
        slope = (loss_of(ones + change) - loss_of(ones - change)) / (2e-2 * step)
        np.testing.assert_allclose(found["heads"][head], np.abs(slope).mean(), 2e-4)


@pytest.mark.parametrize("kind", ["list", "dictionary"])
def test_a_layer_of_several_inputs(kind: str) -> None:
    memory = normal(B, T + 2, H, seed=2)
    layer = keras_mha.MultiHeadAttention(N, H, name="heads")
    query, value = keras.Input((None, D)), keras.Input((None, H))
    model = keras.Model([query, value], layer(query, value))
    randomize(model)
    given = {
        "list": [VECTORS, memory],
        "dictionary": {"value": memory, "query": VECTORS},
    }
    wanted = head_importance(model, given["list"], TARGETS, loss="mse")
    found = head_importance(layer, given[kind], TARGETS, loss="mse", batch_size=2)
    np.testing.assert_allclose(found["heads"], wanted["heads"], rtol=1e-5)


def test_the_model_stays_as_it_is() -> None:
    model = classifier(N, dropout=0.3, seed=1)
    model.compile("sgd", CROSS_ENTROPY)
    answers = model.predict(IDS, verbose=0)
    before = [np.array(variable) for variable in model.variables]
    head_importance(model, IDS, LABELS)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    np.testing.assert_array_equal(model.predict(IDS, verbose=0), answers)


class Folded(keras.layers.Layer):
    """Lets a layer attend within halves of the batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = keras_mha.MultiHeadSelfAttention(N, key_dim=H, name="heads")

    def build(self, shape: Any) -> None:
        self.heads.build(shape)

    def call(self, inputs: Any) -> Any:
        folded = ops.concatenate([inputs, inputs], axis=0)
        return ops.split(self.heads(folded), 2, axis=0)[0]


def reduced(labels: Any, outputs: Any) -> Any:
    return ops.mean(squared(labels, outputs))


def detached(labels: Any, outputs: Any) -> Any:
    return squared(labels, ops.stop_gradient(outputs))


def test_wrong_arguments() -> None:
    model, _ = two_layers()
    given = [VECTORS, REAL]
    with pytest.raises(ValueError, match="`loss` is needed"):
        head_importance(model, given, TARGETS)
    with pytest.raises(TypeError, match="`loss` must be .* Received: loss=3"):
        head_importance(model, given, TARGETS, loss=3)
    with pytest.raises(ValueError, match="each of the 5 examples"):
        head_importance(model, given, TARGETS, loss=reduced)
    with pytest.raises(ValueError, match="no gradient at .'first', 'second'."):
        head_importance(model, given, TARGETS, loss=detached)
    with pytest.raises(ValueError, match="Received: .3, 5. rows"):
        head_importance(model, given, TARGETS[:3], loss=squared)
    with pytest.raises(ValueError, match="iterable of batches"):
        head_importance(model, VECTORS, loss=squared)
    with pytest.raises(ValueError, match="one batch or more"):
        head_importance(model, iter(()), loss=squared)
    batch = (tuple(given), TARGETS, np.ones(B))
    with pytest.raises(ValueError, match="weights of examples"):
        head_importance(model, [batch], loss=squared)
    with pytest.raises(ValueError, match="`batch_size`.* Received: batch_size=0"):
        head_importance(model, given, TARGETS, loss=squared, batch_size=0)
    inputs = keras.Input((None, D))
    folded = keras.Model(inputs, Folded()(inputs))
    with pytest.raises(ValueError, match="10 rows at 'folded/heads' of 5 examples"):
        head_importance(folded, VECTORS, TARGETS, loss=squared)


def test_layers_that_rematerialise_are_refused() -> None:
    """There the tape sees no head mask: zeros would be wrong."""
    with keras.RematScope(mode="full"):
        model, _ = two_layers()
    with pytest.raises(ValueError, match="RematScope.* no gradient at .'first', 'sec"):
        head_importance(model, [VECTORS, REAL], TARGETS, loss=squared)
