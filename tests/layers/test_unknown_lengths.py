"""Training whose graph does not know the length decides when it runs.

Letters: B batch, T length, N heads, H head size, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha import (
    MultiHeadAttention,
    MultiHeadSelfAttention,
    RotaryEmbedding,
    TransformerDecoderBlock,
    TransformerEncoderBlock,
)
from keras_mha.attention import reference
from keras_mha.attention.blockwise import front as blockwise
from tests.support.layers import B, D, H, N, normal, padding, randomize

BORDER = 7
LENGTHS = {BORDER: "reference", BORDER + 1: "blockwise"}
CHOICES = {"If", "StatelessIf"}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> dict[str, tf.Variable]:
    """How often each form ran, with a border that short tests can cross."""
    monkeypatch.setattr(blockwise, "_FEW", B * N * BORDER**2)
    monkeypatch.setattr(blockwise, "_SKIPPED_FROM", BORDER + 1)
    counts = {name: tf.Variable(0) for name in ("reference", "blockwise")}
    for module, name in ((reference, "reference"), (blockwise, "blockwise")):
        monkeypatch.setattr(module, "attend", _counted(module.attend, counts[name]))
    return counts


def _counted(attend: Callable[..., Any], count: tf.Variable) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        mixed, scores = attend(*args, **kwargs)
        with tf.control_dependencies([count.assign_add(1)]):
            return tf.identity(mixed), scores

    return counted


def tally(ran: dict[str, tf.Variable]) -> dict[str, int]:
    """What ran since the last time."""
    counts = {name: int(count.numpy()) for name, count in ran.items() if count.numpy()}
    for count in ran.values():
        count.assign(0)
    return counts


class OfPairs(MultiHeadAttention):
    """Attention to the inputs backwards, called as the other layers are."""

    def call(self, inputs: Any, mask: Any = None, training: Any = None) -> Any:
        masks = {"query_mask": mask, "value_mask": mask[:, ::-1]}
        return super().call(inputs, inputs[:, ::-1], **masks, training=training)

    def build(self, input_shape: Any) -> None:
        super().build(input_shape, input_shape)

    def argument_shapes(self) -> dict[str, str]:
        return {"inputs": "(B, T, D)"}


CAUSAL = {"use_causal_mask": True}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (lambda: MultiHeadSelfAttention(N, H), {}),
    "causal": (
        lambda: MultiHeadSelfAttention(N, H, position=RotaryEmbedding(fraction=0.8)),
        CAUSAL,
    ),
    "options": (
        lambda: MultiHeadSelfAttention(
            N,
            H,
            dropout=0.4,
            seed=3,
            position="relative",
            num_key_value_heads=1,
            use_sinks=True,
            logits_soft_cap=2.0,
        ),
        {},
    ),
    "pairs": (lambda: OfPairs(N, H, dropout=0.4, seed=3), {}),
    "encoder": (lambda: TransformerEncoderBlock(N, 5, H, dropout=0.3, seed=3), {}),
    "decoder": (lambda: TransformerDecoderBlock(N, 5, H, dropout=0.3, seed=3), {}),
}


def training_step(layer: Any, **call: Any) -> Callable[..., Any]:
    """Outputs, and gradients of the inputs and of all weights."""

    def step(inputs: Any, mask: Any) -> Any:
        weights = [weight.value for weight in layer.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, mask=mask, training=True, **call)
            weighted = outputs * tf.cos(tf.range(float(D)))
            loss = tf.reduce_sum(weighted * tf.cast(mask, "float32")[..., None])
        gradients = tape.gradient(loss, [inputs, *weights])
        return outputs, [tf.convert_to_tensor(each) for each in gradients]

    return step


def any_length(step: Callable[..., Any]) -> Any:
    signature = [tf.TensorSpec((None, None, D)), tf.TensorSpec((None, None), tf.bool)]
    return tf.function(step, input_signature=signature)


def built(make: Callable[[], Any]) -> Any:
    layer = make()
    layer.build((None, None, D))
    return randomize(layer)


def operations(graph: Any) -> list[str]:
    """The kinds of operations in a graph and in the functions that it calls."""
    definition = graph.as_graph_def()
    functions = definition.library.function
    nodes = [*definition.node, *(node for one in functions for node in one.node_def)]
    return [node.op for node in nodes]


@pytest.mark.parametrize(("make", "call"), CASES.values(), ids=CASES)
def test_both_sides_of_the_border_are_the_reference(
    ran: dict[str, tf.Variable], make: Callable[[], Any], call: dict[str, Any]
) -> None:
    layer, expected = built(make), built(make)
    traced = any_length(training_step(layer, **call))
    for length, form in LENGTHS.items():
        mask = padding(5, length, 3, length=length)
        inputs = normal(B, length, D, seed=length)
        outputs, gradients = traced(inputs, mask)
        assert tally(ran) == {form: 1}
        wanted, slopes = training_step(expected, **call)(tf.constant(inputs), mask)
        tally(ran)
        np.testing.assert_allclose(outputs, wanted, atol=1e-5)
        for slope, one in zip(slopes, gradients, strict=True):
            np.testing.assert_allclose(one, slope, atol=1e-4)
    assert traced.experimental_get_tracing_count() == 1


def test_a_mask_that_leaves_out_blocks_has_its_own_border(
    ran: dict[str, tf.Variable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "_FEW", 2**27)
    layer = built(lambda: MultiHeadSelfAttention(N, H))
    for call, above in (({}, "reference"), (CAUSAL, "blockwise")):
        traced = any_length(training_step(layer, **call))
        for length, form in ((BORDER, "reference"), (BORDER + 1, above)):
            traced(normal(B, length, D), np.ones((B, length), bool))
            assert tally(ran) == {form: 1}


@pytest.mark.parametrize(("make", "call"), CASES.values(), ids=CASES)
def test_graphs_of_inference_hold_no_choice(
    make: Callable[[], Any], call: dict[str, Any]
) -> None:
    layer = built(make)

    def kinds(**options: Any) -> set[str]:
        traced = any_length(lambda x, mask: layer(x, mask=mask, **options, **call))
        return {*operations(traced.get_concrete_function().graph)}

    for options in ({}, {"training": False}):
        assert not kinds(**options) & {*CHOICES, "While", "StatelessWhile"}
    assert kinds(training=True) >= {"StatelessIf", "StatelessWhile"}


def test_a_known_length_leaves_no_choice() -> None:
    layer = built(lambda: MultiHeadSelfAttention(N, H))
    traced = tf.function(lambda x: layer(x, training=True))
    graph = traced.get_concrete_function(tf.TensorSpec((None, 9, D))).graph
    assert not CHOICES & {*operations(graph)}


def test_xla_keeps_one_form() -> None:
    layer = built(lambda: MultiHeadSelfAttention(N, H, seed=1))
    traced = tf.function(lambda x: layer(x, training=True), jit_compile=True)
    graph = traced.get_concrete_function(tf.TensorSpec((None, None, D))).graph
    assert not CHOICES & {*operations(graph)}


@pytest.mark.parametrize("mode", [None, "full"])
def test_fit_on_batches_of_both_kinds(ran: dict[str, tf.Variable], mode: Any) -> None:
    def model(flash_attention: bool | None) -> keras.Model:
        keras.utils.set_random_seed(0)
        ids = keras.Input((None,), dtype="int32")
        x = keras.layers.Embedding(9, D, mask_zero=True)(ids)
        with keras.RematScope(mode=mode):
            block = TransformerEncoderBlock(
                N, 5, H, dropout=0.3, seed=3, flash_attention=flash_attention
            )
        pooled = keras.layers.GlobalAveragePooling1D()(block(x))
        built = keras.Model(ids, keras.layers.Dense(1)(pooled))
        built.compile("sgd", "mse", jit_compile=False)
        return built

    batches = []
    for length in (*LENGTHS, 3, 12):
        ids = np.random.default_rng(length).integers(1, 9, (B, length))
        batches.append((ids * padding(3, length, 2, length=length), np.ones((B, 1))))
    found, expected = model(None), model(False)
    for batch in batches:
        loss, wanted = found.train_on_batch(*batch), expected.train_on_batch(*batch)
        np.testing.assert_allclose(loss, wanted, rtol=1e-4)
    for one, other in zip(found.weights, expected.weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert set(tally(ran)) == {"reference", "blockwise"}
