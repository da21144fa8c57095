"""The steps of pruning: order, scores, and that each step's model answers so."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha.interpret import (
    PruningCurve,
    PruningStep,
    head_importance,
    prune_heads,
    pruning_curve,
)
from keras_mha.interpret.curve import accuracy
from tests.support.layers import normal, randomize
from tests.support.small_models import (
    IDS,
    LABELS,
    B,
    D,
    T,
    bert_classifier,
    bert_encoder,
    classifier,
    path_of,
)

FIRST, SECOND = path_of(0), path_of(1)
IMPORTANCE = {FIRST: np.array([0.3, 0.9, 0.2]), SECOND: np.array([0.1, 0.25])}


def test_the_least_important_head_goes_first_and_one_stays() -> None:
    curve = pruning_curve(classifier(3, 2), IMPORTANCE, IDS, LABELS)
    assert [step.removed for step in curve.steps] == [
        {},
        {SECOND: (0,)},
        {SECOND: (0,), FIRST: (2,)},
        {SECOND: (0,), FIRST: (0, 2)},
    ]
    assert [step.heads_left for step in curve.steps] == [5, 4, 3, 2]


def test_several_heads_a_step() -> None:
    curve = pruning_curve(classifier(3, 2), IMPORTANCE, IDS, LABELS, heads_per_step=2)
    assert [step.heads_left for step in curve.steps] == [5, 3, 2]


def test_a_layer_of_several_inputs() -> None:
    layer = keras_mha.MultiHeadAttention(3, 2, name="heads")
    inputs = [normal(B, T, D), normal(B, T + 2, 13, seed=2)]
    layer.build(*(each.shape for each in inputs))
    randomize(layer)
    targets = np.asarray(layer(*inputs))
    curve = pruning_curve(
        layer,
        {"heads": np.array([0.3, 0.9, 0.2])},
        inputs,
        targets,
        metric=lambda labels, outputs: -float(np.square(labels - outputs).mean()),
    )
    assert [step.removed for step in curve.steps] == [
        {},
        {"heads": (2,)},
        {"heads": (0, 2)},
    ]
    masks = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 0]], "float32")
    answers = [np.asarray(layer(*inputs, head_mask=mask)) for mask in masks]
    wanted = [-np.square(targets - answer).mean() for answer in answers]
    np.testing.assert_allclose([s.score for s in curve.steps], wanted, rtol=1e-4)
    assert wanted[1] < -1e-3


def test_layers_without_importance_stay() -> None:
    only = {FIRST: IMPORTANCE[FIRST]}
    curve = pruning_curve(classifier(3, 2), only, IDS, LABELS)
    assert curve.steps[-1].removed == {FIRST: (0, 2)}
    assert curve.steps[-1].heads_left == 3


def test_groups_that_share_keys_go_together() -> None:
    model = classifier(6, num_key_value_heads=3)
    numbers = np.array([0.1, 0.5, 0.3, 0.2, 0.0, 0.9])  # groups: 0.6, 0.5, 0.9
    curve = pruning_curve(model, {FIRST: numbers}, IDS, LABELS)
    removed = [step.removed.get(FIRST, ()) for step in curve.steps]
    assert removed == [(), (2, 3), (0, 1, 2, 3)]
    for step in curve.steps:
        prune_heads(model, step.removed)


def margin(labels: Any, outputs: Any) -> float:
    """A metric that tells answers apart."""
    return float(outputs[np.arange(len(labels)), labels].std())


@pytest.mark.parametrize("batch_size", [2, 256])
def test_scores_are_those_of_the_pruned_models(batch_size: int) -> None:
    """Over all batches at once."""
    model = classifier(3, 2)
    curve = pruning_curve(
        model, IMPORTANCE, IDS, LABELS, metric=margin, batch_size=batch_size
    )
    assert curve.metric == "margin"
    for step in curve.steps:
        outputs = np.asarray(prune_heads(model, step.removed)(IDS))
        np.testing.assert_allclose(step.score, margin(LABELS, outputs), rtol=1e-4)
    assert len({round(step.score, 5) for step in curve.steps}) == len(curve.steps)


def test_a_model_around_a_bert_encoder() -> None:
    model = bert_classifier(bert_encoder(num_heads=(3, 2), key_dim=5))
    importance = {f"bert/{path}": numbers for path, numbers in IMPORTANCE.items()}
    curve = pruning_curve(model, importance, IDS, LABELS, metric=margin)
    assert [step.heads_left for step in curve.steps] == [5, 4, 3, 2]
    for step in curve.steps:
        smaller: Any = prune_heads(model, step.removed)
        score = margin(LABELS, np.asarray(smaller(IDS)))
        np.testing.assert_allclose(step.score, score, rtol=1e-4)
        # The first step removes nothing, and its model is a copy.
        gone = step.removed
        first, second = (len(gone.get(f"bert/{path}", ())) for path in (FIRST, SECOND))
        assert smaller.get_layer("bert").num_heads == (3 - first, 2 - second)
    assert len({round(step.score, 5) for step in curve.steps}) == len(curve.steps)


def trained() -> tuple[keras.Model, np.ndarray, np.ndarray]:
    """Learns to tell whether a word stands anywhere after another; 1 where it does."""
    generator = np.random.default_rng(0)
    ids = generator.integers(1, 13, (512, T))
    labels = ((ids == 3).any(1) & (ids == 5).any(1)).astype(int)
    # As many of both.
    rows = np.concatenate(
        [np.resize(np.flatnonzero(labels == label), 256) for label in (0, 1)]
    )
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras_mha.TokenAndPositionEmbedding(13, T, D, name="embedding"),
            keras_mha.TransformerEncoderBlock(5, 17, key_dim=3, name="block_0"),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    model.fit(ids[rows], labels[rows], epochs=8, batch_size=32, verbose=0)
    return model, ids[rows], labels[rows]


def test_a_trained_model_keeps_more_when_the_least_useful_heads_go_first() -> None:
    model, ids, labels = trained()
    importance = head_importance(model, ids, labels)
    before = model.get_weights()
    curve = pruning_curve(model, importance, ids, labels)
    scores = [step.score for step in curve.steps]
    for weight, value in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, value)
    # What the model itself and the pruned ones reach.
    for step in (curve.steps[0], curve.steps[2], curve.steps[-1]):
        smaller: Any = prune_heads(model, step.removed)
        answers = smaller.predict(ids, verbose=0).argmax(-1)
        assert abs(step.score - np.mean(answers == labels)) < 2 / len(ids)
    assert scores[0] > 0.95
    upside_down = {path: -numbers for path, numbers in importance.items()}
    worst = [s.score for s in pruning_curve(model, upside_down, ids, labels).steps]
    assert np.mean(scores[1:]) > np.mean(worst[1:])


def test_the_smallest_model_within_a_loss_and_the_table() -> None:
    steps = (
        PruningStep({}, 4, 0.9),
        PruningStep({"a": (1,)}, 3, 0.8),
        PruningStep({"a": (0, 1)}, 2, 0.87),
        PruningStep({"a": (0, 1), "b": (0,)}, 1, 0.5),
    )
    curve = PruningCurve("accuracy", steps)
    assert curve.smallest(0.05) is steps[2]
    assert curve.smallest(0.0) is steps[0]
    with pytest.raises(ValueError, match="`max_drop` must be 0 or more. Received: -1"):
        curve.smallest(-1)
    assert curve.to_markdown().splitlines()[2:] == [
        "| 4 | 0.9000 |  |",
        "| 3 | 0.8000 | a: 1 |",
        "| 2 | 0.8700 | a: 0 |",
        "| 1 | 0.5000 | b: 0 |",
    ]


@pytest.mark.parametrize(
    ("labels", "outputs"),
    [
        ([1, 0, 2], [[0, 1, 0], [1, 0, 0], [1, 0, 0]]),
        ([[1], [0], [2]], [[0, 1, 0], [1, 0, 0], [1, 0, 0]]),
        ([[0, 1], [1, 0], [0, 1]], [[0.1, 0.9], [0.8, 0.2], [0.7, 0.3]]),
        ([1, 0, 1], [0.7, 0.2, 0.4]),
        ([[1], [0], [1]], [[0.7], [0.2], [0.4]]),
    ],
)
def test_accuracy(labels: Any, outputs: Any) -> None:
    assert accuracy(labels, outputs) == 2 / 3


def test_wrong_arguments() -> None:
    model = classifier(3)
    for importance, message in (
        ({"block": np.ones(3)}, "Received: 'block'"),
        ({FIRST: np.ones(2)}, r"of shape \(2,\)"),
        ({FIRST: np.array([0.1, np.nan, 1])}, "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            pruning_curve(model, importance, IDS, LABELS)
    good = {FIRST: np.ones(3)}
    with pytest.raises(TypeError, match="Received: metric='loss'"):
        pruning_curve(model, good, IDS, LABELS, metric="loss")
    with pytest.raises(ValueError, match="`heads_per_step`"):
        pruning_curve(model, good, IDS, LABELS, heads_per_step=0)
    layer = keras_mha.MultiHeadSelfAttention(3, key_dim=2, name="heads")
    layer.build((B, T, D))
    given = normal(B, T, D)
    with pytest.raises(ValueError, match=r"labels \(5, 7, 11\)"):
        pruning_curve(layer, {"heads": np.ones(3)}, given, given)
