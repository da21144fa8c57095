"""The layers' contract on every backend of Keras, without a word of TensorFlow.

    KERAS_BACKEND=jax python -m pytest tests/layers/test_backends.py

Each option of the scores is part of one of the sets that are tested here; alone they
are in `test_score_options.py`.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from keras_mha import (
    TransformerDecoderBlock,
    TransformerEncoderBlock,
    pack_sequences,
    unpack_sequences,
)
from tests.support import score_cases as cases
from tests.support.attention_cases import MODES, check_close, numbers
from tests.support.layers import normal, randomize
from tests.support.score_cases import (
    DQ,
    DV,
    KINDS,
    B,
    H,
    N,
    S,
    T,
    made,
)

each_kind = pytest.mark.parametrize("kind", KINDS)
each_set = pytest.mark.parametrize("options", ["plain", "gemma", "t5", "bloom"])
HIDDEN = 17
INPUTS, MEMORY = normal(B, T, DQ, seed=1), normal(B, S, DV, seed=2)
LEFT_PADDED = np.arange(T) >= np.array([[3], [0]])


def block(layer_class: Any, *shapes: tuple[int, ...], **options: Any) -> Any:
    layer = layer_class(N, HIDDEN, key_dim=H, **options)
    layer.build((B, T, DQ), *shapes)
    randomize(layer)
    return layer


@each_kind
@each_set
def test_values_and_gradients(kind: str, options: str) -> None:
    cases.check_values_and_gradients(kind, options, "all", MODES[-1:])


@pytest.mark.parametrize(
    ("kind", "options", "policy"),
    [("self", "gemma", "mixed_float16"), ("cross", "t5", "mixed_bfloat16")],
)
def test_mixed_precision(kind: str, options: str, policy: str) -> None:
    _, inputs, calls = KINDS[kind]
    layer = made(kind, options, dtype=policy)
    found = layer(*inputs, **calls["all"])
    expected = cases.expect(kind, layer, "all")[0]
    tolerance = 5e-3 if policy == "mixed_float16" else 5e-2
    check_close(numbers(ops.cast(found, "float32")), expected, tolerance)


@each_kind
def test_probabilities(kind: str) -> None:
    _, inputs, calls = KINDS[kind]
    layer = made(kind, "gemma")
    expected = cases.expect(kind, layer, "all")
    found = layer(*inputs, **calls["all"], return_attention_scores=True)
    for one, other in zip(found, expected, strict=True):
        check_close(numbers(one), other, 1e-5)


@each_kind
@pytest.mark.parametrize("options", ["plain", "t5"])
def test_linear_memory_changes_no_number(kind: str, options: str) -> None:
    _, inputs, calls = KINDS[kind]
    results = []
    for flash in (True, False):
        layer = made(kind, options, flash_attention=flash, dropout=0.4, seed=3)
        upstream = normal(*layer(*inputs).shape, seed=9).astype("float64")
        call = {**calls["all"], "training": True}
        results.append(cases.run(layer, inputs, call, upstream, MODES[-1]))
    (found, gradients), (expected, others) = results
    check_close(found, expected, 1e-5)
    for one, other in zip(gradients, others, strict=True):
        check_close(one, other, 2e-5)


@each_kind
def test_dropout_follows_its_seed(kind: str) -> None:
    inputs = KINDS[kind][1]
    first, twin, other = (
        numbers(made(kind, dropout=0.4, seed=seed)(*inputs, training=True))
        for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, twin)
    assert np.abs(first - other).max() > 0.01


@each_set
def test_chunks_and_single_steps_equal_one_causal_call(options: str) -> None:
    layer = made("self", options)
    expected = layer(INPUTS, mask=LEFT_PADDED, use_causal_mask=True)
    cache, outputs, start = layer.init_cache(B, T), [], 0
    for length in (4, 1, 1, 1):
        place = slice(start, start + length)
        some, cache = layer(INPUTS[:, place], cache=cache, mask=LEFT_PADDED[:, place])
        outputs.append(numbers(some))
        start += length
    check_close(np.concatenate(outputs, axis=1), numbers(expected), 1e-5)


def test_past_max_length_the_outputs_are_nan() -> None:
    layer = made("self")
    cache = layer.init_cache(B, 4)
    _, cache = layer(INPUTS[:, :4], cache=cache)
    outputs, _ = layer(INPUTS[:, 4:5], cache=cache)
    assert np.isnan(numbers(outputs)).all()


def test_projected_keys_and_values_serve_many_queries() -> None:
    layer, (query, value, key) = made("cross", "grouped"), KINDS["cross"][1]
    cache = layer.init_cache(value, key, value_mask=cases.COLUMNS)
    found = layer(query, cache=cache)
    expected = layer(query, value, key, value_mask=cases.COLUMNS)
    check_close(numbers(found), numbers(expected), 1e-5)


@pytest.mark.parametrize("memory", [False, True], ids=["alone", "memory"])
def test_a_decoder_block_decodes(memory: bool) -> None:
    shapes = [(B, S, DV)] if memory else []
    given = [MEMORY] if memory else []
    layer = block(
        TransformerDecoderBlock, *shapes, cross_attention=memory, position="rotary"
    )
    expected = numbers(layer(INPUTS, *given))
    cache, outputs, start = layer.init_cache(B, T, *given), [], 0
    for length in (4, 1, 1, 1):
        some, cache = layer(INPUTS[:, start : start + length], cache=cache)
        outputs.append(numbers(some))
        start += length
    check_close(np.concatenate(outputs, axis=1), expected, 1e-5)


def test_a_packed_batch_gives_each_sequence_the_values_it_has_alone() -> None:
    layer = block(TransformerEncoderBlock, position="alibi", num_key_value_heads=2)
    sequences = [normal(length, DQ, seed=60 + length) for length in (3, 5, 2, 4)]
    packed = pack_sequences(sequences, row_length=T)
    outputs = layer(packed.values, segment_ids=packed.segment_ids)
    found = numbers(unpack_sequences(outputs, packed.index))
    for place, sequence in enumerate(sequences):
        expected = numbers(layer(sequence[None]))[0]
        check_close(found[place, : len(sequence)], expected, 1e-5)


@pytest.mark.parametrize(
    "layer_class", [TransformerEncoderBlock, TransformerDecoderBlock]
)
def test_a_block_trains_and_its_file_brings_it_back(
    layer_class: Any, tmp_path: Any
) -> None:
    inputs = keras.Input((T, DQ))
    layer = layer_class(N, HIDDEN, position="rotary", key_dim=H, use_sinks=True)
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.Adam(0.02), "mse")
    losses = model.fit(INPUTS, INPUTS[:, ::-1], epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    check_close(numbers(loaded(INPUTS)), numbers(model(INPUTS)), 1e-6)
