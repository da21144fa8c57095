"""Pruned models against the whole ones with their heads masked.

Letters: B batch, T query length, S key length, N query heads, K key/value heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha.interpret import prune_heads
from keras_mha.interpret.curve import masked_outputs
from keras_mha.interpret.paths import as_tensors, attention_layers
from keras_mha.models import BertEncoder
from tests.support import score_cases
from tests.support.layers import H, T, normal, randomize
from tests.support.small_models import (
    IDS,
    LABELS,
    REAL,
    B,
    D,
    bert_classifier,
    bert_encoder,
    classifier,
    path_of,
)

WITH_ALIBI = ("alibi", "bloom")
PRUNABLE = [name for name in score_cases.OPTIONS if name not in WITH_ALIBI]
S = 5


def masked(model: Any, heads: Any, inputs: Any) -> np.ndarray:
    outputs = masked_outputs(model, attention_layers(model), heads, as_tensors(inputs))
    return np.asarray(outputs)


def check(model: Any, heads: dict[str, tuple[int, ...]], inputs: Any) -> Any:
    """The pruned model: equal to the masked one, other than the whole one, smaller."""
    before = [np.array(variable) for variable in model.variables]
    whole = np.asarray(model(as_tensors(inputs)))
    smaller = prune_heads(model, heads)
    answer = np.asarray(smaller(as_tensors(inputs)))
    scale = max(1.0, float(np.abs(whole).max()))
    np.testing.assert_allclose(
        answer, masked(model, heads, inputs), rtol=0, atol=1e-5 * scale
    )
    assert np.abs(answer - whole).max() > 1e-3
    assert smaller.count_params() < model.count_params()
    assert type(smaller) is type(model)
    layers, left = attention_layers(model), attention_layers(smaller)
    assert list(layers) == list(left)
    for path, layer in layers.items():
        assert left[path].num_heads == layer.num_heads - len(heads.get(path, ()))
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    shared = {id(v) for v in model.variables} & {id(v) for v in smaller.variables}
    assert not shared
    return smaller


def removable(layer: Any) -> tuple[int, ...]:
    """The first head of each group where several share keys, else heads 0 and 2."""
    size = layer.num_heads // layer.num_key_value_heads
    if size == 1:
        return (0, 2)
    return tuple(range(0, layer.num_heads, size))


@pytest.mark.parametrize("name", PRUNABLE)
def test_self_attention_of_every_option(name: str) -> None:
    inputs = keras.Input((None, D), name="vectors")
    mask = keras.Input((None,), dtype="bool", name="mask")
    options = {"key_dim": score_cases.H, **score_cases.OPTIONS[name]()}
    layer = keras_mha.MultiHeadSelfAttention(score_cases.N, name="heads", **options)
    model = keras.Model([inputs, mask], layer(inputs, mask=mask))
    randomize(model)
    given = [normal(B, 7, D), REAL]
    check(model, {"heads": removable(layer)}, given)


@pytest.mark.parametrize("name", PRUNABLE)
def test_attention_of_every_option(name: str) -> None:
    query, value = keras.Input((None, D)), keras.Input((None, 17))
    options = score_cases.OPTIONS[name]()
    layer = keras_mha.MultiHeadAttention(
        score_cases.N, score_cases.H, name="heads", **options
    )
    model = keras.Model([query, value], layer(query, value))
    randomize(model)
    given = [normal(B, 7, D), normal(B, S, 17, seed=1)]
    check(model, {"heads": removable(layer)}, given)


def test_no_biases_and_another_output_shape() -> None:
    inputs = keras.Input((None, 8))
    layer = keras_mha.MultiHeadSelfAttention(
        4, use_bias=False, output_shape=(2, 3), name="heads"
    )
    model = keras.Model(inputs, layer(inputs))
    randomize(model)
    smaller = check(model, {"heads": (1, 2, 3)}, normal(B, T, 8))
    (kernel, output) = smaller.get_weights()
    assert kernel.shape == (8, 1, 6)
    assert output.shape == (1, 2, 2, 3)


def test_several_attention_axes() -> None:
    inputs = keras.Input((3, 5, D))
    layer = keras_mha.MultiHeadAttention(3, H, attention_axes=(1, 2), name="heads")
    model = keras.Model(inputs, layer(inputs, inputs))
    randomize(model)
    check(model, {"heads": (1,)}, normal(B, 3, 5, D))


@pytest.mark.parametrize(
    ("placement", "position"),
    [("pre", "relative"), ("post", None), ("sandwich", "rotary")],
)
def test_blocks(placement: str, position: str | None) -> None:
    model = classifier(3, 5, placement=placement, position=position)
    check(model, {path_of(0): (1,), path_of(1): (0, 3, 4)}, IDS)


def test_one_block_of_two() -> None:
    model = classifier(3, 5)
    smaller = check(model, {path_of(1): (2,), path_of(0): ()}, IDS)
    assert smaller.get_layer("block_0").count_params() == (
        model.get_layer("block_0").count_params()
    )


def decoder() -> keras.Model:
    target, memory = keras.Input((None, D)), keras.Input((None, 17))
    block = keras_mha.TransformerDecoderBlock(
        3, 19, key_dim=H, cross_attention=True, name="block"
    )
    model = keras.Model([target, memory], block(target, memory))
    randomize(model)
    return model


OWN, CROSS = "block/attention/self_attention", "block/memory_attention/cross_attention"


def test_a_decoder_with_both_attentions() -> None:
    given = [normal(B, T, D), normal(B, S, 17, seed=1)]
    check(decoder(), {OWN: (0,), CROSS: (2,)}, given)


@pytest.mark.parametrize("heads", [{OWN: (0,)}, {CROSS: (1,)}], ids=str)
def test_the_attentions_of_a_decoder_may_lose_different_heads(
    heads: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    inputs = [normal(B, T, D), normal(B, S, 17, seed=1)]
    check(decoder(), heads, inputs)
    smaller = prune_heads(decoder(), heads)
    smaller.save(tmp_path / "smaller.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "smaller.keras")
    np.testing.assert_allclose(loaded(inputs), smaller(inputs), atol=1e-6)


def test_wrappers_nested_models_and_shared_layers() -> None:
    ids = keras.Input((None,), dtype="int32")
    inner = classifier(3, name="member_0")
    other = classifier(3, name="member_1")
    randomize(other, seed=50)
    vectors = keras.Input((T, 7, D), name="rows")
    each = keras.layers.TimeDistributed(
        keras_mha.ResidualNorm(
            keras_mha.MultiHeadSelfAttention(3, key_dim=H, name="heads"),
            name="residual",
        ),
        name="each",
    )
    pooled = keras.layers.GlobalAveragePooling2D()(each(each(vectors)))
    label = keras.layers.Dense(2)(pooled)
    total = keras.layers.Add()([inner(ids), other(ids), inner(ids), label])
    model = keras.Model([ids, vectors], total)
    randomize(model.get_layer("each"))
    heads = {
        f"member_0/{path_of(0)}": (0,),
        f"member_1/{path_of(0)}": (1, 2),
        "each/residual/heads": (1,),
    }
    check(model, heads, [IDS, normal(B, T, 7, D)])


def test_a_pruned_model_is_saved_trained_and_pruned_again(tmp_path: Path) -> None:
    smaller = prune_heads(classifier(5), {path_of(0): [1, 3]})
    smaller.save(tmp_path / "smaller.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "smaller.keras")
    np.testing.assert_allclose(loaded(IDS), smaller(IDS), atol=1e-6)
    check(loaded, {path_of(0): (0,)}, IDS)
    loaded.compile("sgd", "sparse_categorical_crossentropy")
    before = loaded.get_weights()
    loaded.fit(IDS, np.array([1, 0, 1, 1, 0]), verbose=0)
    assert any(
        np.any(a != b) for a, b in zip(before, loaded.get_weights(), strict=True)
    )


class Wrapped(keras.Model):
    """Subclassed, with its attention in its configuration."""

    def __init__(self, heads: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self.heads = heads or keras_mha.MultiHeadSelfAttention(3, key_dim=H, name="own")

    def build(self, shape: Any) -> None:
        if not self.heads.built:
            self.heads.build(shape)

    def call(self, inputs: Any) -> Any:
        return self.heads(inputs)

    def get_config(self) -> dict[str, Any]:
        return {"heads": keras.saving.serialize_keras_object(self.heads)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(keras.saving.deserialize_keras_object(config["heads"]))


class Hidden(Wrapped):
    """Makes its attention by itself."""

    def get_config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(**config)


def test_subclassed_models() -> None:
    vectors = normal(B, T, D)
    for cls in (Wrapped, Hidden):
        model = cls()
        model(vectors)
        randomize(model)
        if cls is Wrapped:
            check(model, {"own": (1,)}, vectors)
        else:
            with pytest.raises(ValueError, match="Hidden .*makes .'own'. by its"):
                prune_heads(model, {"own": (1,)})


BERT_INPUTS = {"input_ids": IDS, "attention_mask": REAL.astype("int32")}
# Other numbers in each block, of 11 heads.
BERT_HEADS = {path_of(0): (1, 4, 10), path_of(1): (0, 2, 3, 5, 6, 7, 8)}
BERT_SIZES: dict[str, dict[str, Any]] = {
    "an equal part": {},
    "a size of its own": {"embedding_dim": 19, "key_dim": 3},
    "a number for each": {
        "embedding_dim": 19,
        "num_heads": (11, 13),
        "key_dim": 3,
        "dtype": "float64",
    },
}


def in_bert(heads: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"bert/{path}": numbers for path, numbers in heads.items()}


def with_head_masks(
    encoder: BertEncoder, heads: dict[str, tuple[int, ...]]
) -> np.ndarray:
    """What the blocks give, called one after the other with factors of 0 and 1."""
    outputs = encoder.embed(as_tensors(BERT_INPUTS))
    for i, block in enumerate(encoder.blocks):
        factors = np.ones(block.attention.sublayer.num_heads, "float32")
        factors[list(heads[path_of(i)])] = 0.0
        outputs = block(outputs, mask=REAL, head_mask=factors)
    return np.asarray(outputs)


@pytest.mark.parametrize("sizes", BERT_SIZES.values(), ids=list(BERT_SIZES))
def test_a_bert_encoder(sizes: dict[str, Any]) -> None:
    encoder = bert_encoder(**sizes)
    smaller = check(encoder, BERT_HEADS, BERT_INPUTS)
    counts = [block.attention.sublayer.num_heads for block in encoder.blocks]
    assert smaller.num_heads == (counts[0] - 3, counts[1] - 7)
    assert smaller.key_dim == 3
    answer = np.asarray(smaller(BERT_INPUTS))
    np.testing.assert_allclose(
        answer, with_head_masks(encoder, BERT_HEADS), rtol=0, atol=1e-5
    )
    # Once more, and of one block alone.
    again = check(smaller, {path_of(0): (0, 7)}, BERT_INPUTS)
    assert again.num_heads == (counts[0] - 5, counts[1] - 7)


def test_of_a_bert_encoder_no_other_head_will_do() -> None:
    encoder = bert_encoder()
    for block, others in ((0, (1, 4, 9)), (1, (0, 2, 3, 5, 6, 7, 9))):
        smaller = prune_heads(encoder, {**BERT_HEADS, path_of(block): others})
        answer = np.asarray(smaller(BERT_INPUTS))
        difference = np.abs(answer - with_head_masks(encoder, BERT_HEADS))
        assert difference[REAL].max() > 1e-2


def test_a_bert_encoder_with_a_pooler() -> None:
    encoder = bert_encoder(pooler=True)
    smaller = prune_heads(encoder, BERT_HEADS)
    last, pooled = smaller(BERT_INPUTS)
    expected = with_head_masks(encoder, BERT_HEADS)
    np.testing.assert_allclose(last, expected, rtol=0, atol=1e-5)
    assert encoder.pooler_dense is not None
    wanted = encoder.pooler_dense(expected[:, 0])
    np.testing.assert_allclose(pooled, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", BERT_SIZES.values(), ids=list(BERT_SIZES))
def test_a_model_around_a_bert_encoder(tmp_path: Path, sizes: dict[str, Any]) -> None:
    model = bert_classifier(bert_encoder(**sizes))
    smaller = check(model, in_bert(BERT_HEADS), IDS)
    smaller.save(tmp_path / "smaller.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "smaller.keras")
    assert loaded.get_layer("bert").num_heads == smaller.get_layer("bert").num_heads
    np.testing.assert_array_equal(loaded(IDS), smaller(IDS))


def test_a_pruned_bert_encoder_is_saved_and_loaded(tmp_path: Path) -> None:
    smaller = prune_heads(bert_encoder(), BERT_HEADS)
    smaller.save(tmp_path / "smaller.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "smaller.keras")
    np.testing.assert_array_equal(loaded(BERT_INPUTS), smaller(BERT_INPUTS))
    check(loaded, {path_of(0): (2,)}, BERT_INPUTS)


def test_a_pruned_bert_encoder_is_trained() -> None:
    model = bert_classifier(bert_encoder(dropout=0.0, attention_dropout=0.0))
    smaller: Any = prune_heads(model, in_bert(BERT_HEADS))
    smaller.compile(keras.optimizers.SGD(0.001), "sparse_categorical_crossentropy")
    before = [np.array(weight) for weight in smaller.trainable_weights]
    loss = smaller.evaluate(IDS, LABELS, verbose=0)
    smaller.fit(IDS, LABELS, verbose=0)
    for weight, old in zip(smaller.trainable_weights, before, strict=True):
        assert np.abs(np.asarray(weight) - old).max() > 0, weight.path
    assert smaller.evaluate(IDS, LABELS, verbose=0) < loss


class Sized(BertEncoder):
    """Fixes its sizes, and has none in its configuration."""

    def __init__(self, **options: Any) -> None:
        super().__init__(13, 7, 33, 2, 11, 17, **options)

    def get_config(self) -> dict[str, Any]:
        return {}


def test_a_bert_encoder_that_fixes_its_sizes_is_named() -> None:
    encoder = Sized(name="sized")
    encoder.build()
    with pytest.raises(ValueError, match="Sized 'sized', which makes .'block_1'. by"):
        prune_heads(encoder, {path_of(1): [0]})


def test_wrong_heads_of_a_bert_encoder_are_named() -> None:
    encoder = bert_encoder(num_heads=(11, 3), key_dim=5)
    for heads, message in (
        ({path_of(1): [3]}, f"of '{path_of(1)}' must be integers from 0 to 2"),
        ({path_of(1): [0, 1, 2]}, f"'{path_of(1)}' without all of its 3"),
        ({path_of(2): [0]}, f"Received: '{path_of(2)}'"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_heads(encoder, heads)


def test_groups_that_share_keys() -> None:
    inputs = keras.Input((None, D))
    layer = keras_mha.MultiHeadSelfAttention(
        6, key_dim=H, num_key_value_heads=2, name="heads"
    )
    model = keras.Model(inputs, layer(inputs))
    randomize(model)
    vectors = normal(B, T, D)
    for heads, groups in (
        ((0, 5), 2),  # another one of each
        ((2, 3), 2),
        ((0, 1, 2), 1),  # a whole group
        ((0, 1, 2, 4), 1),  # a group, and one of the other
    ):
        smaller = check(model, {"heads": heads}, vectors)
        assert smaller.get_layer("heads").num_key_value_heads == groups
    for heads in ((0,), (0, 1), (0, 1, 3)):
        with pytest.raises(ValueError, match="'heads', with groups of 3, of which"):
            prune_heads(model, {"heads": heads})


def test_frozen_layers_stay_frozen() -> None:
    model = classifier(3)
    model.get_layer("block_0").trainable = False
    smaller = prune_heads(model, {path_of(0): [0]})
    assert len(smaller.trainable_weights) == len(model.trainable_weights)
    assert len(smaller.trainable_weights) < len(smaller.weights)


def test_what_is_frozen_inside_stays_frozen() -> None:
    blocks: Any = classifier(3)
    blocks.get_layer("block_0").attention.trainable = False
    encoder = bert_encoder()
    encoder.blocks[0].trainable = False
    for weight in encoder.embedding.weights:
        weight.trainable = False
    for model, heads in (
        (blocks, {path_of(0): [0]}),
        (encoder, BERT_HEADS),
        (bert_classifier(encoder), in_bert(BERT_HEADS)),
    ):
        smaller = prune_heads(model, heads)
        trained = [variable.trainable for variable in model.variables]
        assert {True, False} == {*trained}
        assert [variable.trainable for variable in smaller.variables] == trained
        assert len(smaller.trainable_weights) == len(model.trainable_weights)


def test_wrong_heads_are_named() -> None:
    model = classifier(3)
    path = path_of(0)
    for heads, message in (
        ({"block": [0]}, f"must name attention layers .*{path}.*Received: 'block'"),
        ({path: [3]}, f"of '{path}' must be integers from 0 to 2. Received: .3."),
        ({path: [-1]}, "Received: .-1."),
        ({path: [0.5]}, "Received: .0.5."),
        ({path: [0, 1, 2]}, f"Received: '{path}' without all of its 3"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_heads(model, heads)


def test_what_cannot_be_pruned_is_named() -> None:
    alibi = classifier(3, position="alibi")
    with pytest.raises(ValueError, match="ALiBi's slopes .* Received: 'block_0/"):
        prune_heads(alibi, {path_of(0): [0]})
    adapted: Any = classifier(3)
    adapted.get_layer("block_0").attention.sublayer.enable_lora(2)
    with pytest.raises(ValueError, match="'block_0/.*/qkv' with low-rank factors"):
        prune_heads(adapted, {path_of(0): [0]})
    quantized = classifier(3)
    quantized.get_layer("label").quantize("int8")
    with pytest.raises(ValueError, match="'label' with quantization 'int8'"):
        prune_heads(quantized, {path_of(0): [0]})


# What else models hold.


def own_activation(x: Any) -> Any:
    return keras.ops.multiply(keras.ops.silu(x), 2.0)


class Offset(keras.layers.Layer):
    """A layer of a user, registered nowhere, with an initializer too."""

    def __init__(self, start: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self.start = start

    def build(self, shape: Any) -> None:
        self.offset = self.add_weight(shape=(shape[-1],), initializer=self.start)

    def call(self, inputs: Any) -> Any:
        return inputs + self.offset

    def get_config(self) -> dict[str, Any]:
        start = keras.initializers.serialize(self.start)
        return {**super().get_config(), "start": start}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(**{**config, "start": keras.initializers.get(config["start"])})


class OwnStart(keras.initializers.Initializer):
    """An initializer of a user, registered nowhere."""

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        return keras.ops.zeros(shape, dtype)

    def get_config(self) -> dict[str, Any]:
        return {}


def attending(first: Any, before: Any) -> keras.Model:
    """From an input through `before`, which gives `(B, T, D)`, and attention."""
    layer = keras_mha.MultiHeadSelfAttention(3, key_dim=H, name="heads")
    model = keras.Model(first, layer(before(first)))
    randomize(layer)
    return model


def test_statistics_of_a_normalization_are_kept() -> None:
    normalization = keras.layers.Normalization()
    normalization.adapt(5.0 + 3.0 * normal(31, D))
    model = attending(keras.Input((None, D)), normalization)
    check(model, {"heads": (1,)}, 5.0 + 3.0 * normal(B, T, D, seed=1))


@pytest.mark.parametrize("mode", ["int", "multi_hot"])
def test_vocabularies_are_kept(mode: str) -> None:
    texts = np.array(["a b b", "c a d", "d d e"])
    options = {"output_sequence_length": T} if mode == "int" else {}
    vectorize = keras.layers.TextVectorization(output_mode=mode, **options)
    vectorize.adapt(texts)
    vectors: Any = keras.layers.Embedding(11, D)
    model = attending(
        keras.Input((), dtype="string"), lambda text: vectors(vectorize(text))
    )
    randomize(vectors)
    smaller = check(model, {"heads": (1,)}, texts)
    (left,) = (
        layer
        for layer in smaller.layers
        if isinstance(layer, keras.layers.TextVectorization)
    )
    assert left.get_vocabulary() == vectorize.get_vocabulary()


def test_a_lookup_of_strings_keeps_its_words() -> None:
    words = np.array([["a", "b", "b", "d"], ["c", "a", "d", "e"]])
    lookup = keras.layers.StringLookup()
    lookup.adapt(words)
    embedding = keras.layers.Embedding(11, D)
    model = attending(
        keras.Input((None,), dtype="string"), lambda given: embedding(lookup(given))
    )
    randomize(embedding)
    check(model, {"heads": (1,)}, words)


def test_functions_and_classes_of_users_are_kept() -> None:
    scale = 3.0
    model = attending(
        keras.Input((None, D)),
        keras.Sequential(
            [
                keras.layers.Dense(D, activation=own_activation),
                keras.layers.Lambda(lambda x: scale * x),
                Offset(OwnStart()),
            ]
        ),
    )
    for layer in model.layers:
        randomize(layer)
    check(model, {"heads": (1,)}, normal(B, T, D))


def test_functions_inside_what_loses_heads_are_kept() -> None:
    block = keras_mha.TransformerEncoderBlock(
        3, 17, key_dim=H, activation=own_activation, name="block"
    )
    inputs = keras.Input((None, D))
    model = keras.Model(inputs, block(inputs))
    randomize(model)
    check(model, {"block/attention/self_attention": (1,)}, normal(B, T, D))
    encoder = bert_encoder(activation=own_activation)
    check(encoder, BERT_HEADS, BERT_INPUTS)


def test_the_model_answers_as_ever_while_it_is_pruned() -> None:
    heads_told = []

    class Asking(keras_mha.TransformerEncoderBlock):
        """Asks the model's attention whenever a configuration is wanted."""

        def get_config(self) -> dict[str, Any]:
            heads_told.append(layer.get_config()["num_heads"])
            return super().get_config()

    inputs = keras.Input((None, D))
    model = keras.Model(inputs, Asking(3, 17, key_dim=H, name="block")(inputs))
    randomize(model)
    layer = attention_layers(model)["block/attention/self_attention"]
    attributes = set(vars(layer))
    check(model, {"block/attention/self_attention": (1,)}, normal(B, T, D))
    assert heads_told
    assert set(heads_told) == {3}
    assert set(vars(layer)) == attributes


def test_two_functions_of_one_name() -> None:
    def other(x: Any) -> Any:
        return -x

    other.__name__ = own_activation.__name__
    inner = keras.Sequential(
        [
            keras.Input((T, D)),
            keras.layers.Dense(D, activation=own_activation),
            keras.layers.Dense(D, activation=other),
        ]
    )
    each = keras.layers.TimeDistributed(inner)
    model = attending(keras.Input((3, T, D)), lambda rows: each(rows)[:, 0])
    randomize(model)
    check(model, {"heads": (1,)}, normal(B, 3, T, D))


def test_dropout_goes_on_where_it_was() -> None:
    model = attending(keras.Input((None, D)), keras.layers.Dropout(0.5, name="drop"))
    vectors = keras.ops.convert_to_tensor(normal(B, T, D))
    model(vectors, training=True)
    smaller: Any = prune_heads(model, {"heads": (1,)})
    first, second = (
        np.asarray(each.get_layer("drop")(vectors, training=True))
        for each in (model, smaller)
    )
    np.testing.assert_array_equal(first, second)


# Layers of one name.


def member(name: str, heads: int = 3) -> keras.Model:
    inputs = keras.Input((None, D))
    layer = keras_mha.MultiHeadSelfAttention(heads, key_dim=H, name="heads")
    return keras.Model(inputs, layer(inputs), name=name)


@pytest.mark.parametrize("path", ["heads", "a/heads", "b/heads"])
def test_layers_of_one_name_in_several_models(path: str) -> None:
    inputs = keras.Input((None, D))
    outer = keras_mha.MultiHeadSelfAttention(3, key_dim=H, name="heads")
    model = keras.Model(inputs, outer(member("a")(inputs)) + member("b")(inputs))
    randomize(model)
    check(model, {path: (1,)}, normal(B, T, D))


@pytest.mark.parametrize("path", ["own", "own_1", "inner/own"])
def test_layers_of_one_name_in_one_layer(path: str) -> None:
    inputs = keras.Input((None, D))
    first, second, third = (
        keras_mha.MultiHeadSelfAttention(3, key_dim=H, name="own") for _ in range(3)
    )
    twins = Twins([first, second, keras_mha.ResidualNorm(third, name="inner")])
    model = keras.Model(inputs, twins(inputs))
    randomize(model)
    check(model, {f"{twins.name}/{path}": (1,)}, normal(B, T, D))


class Twins(keras.layers.Layer):
    """Holds layers of one name."""

    def __init__(self, layers: Any, **options: Any) -> None:
        super().__init__(**options)
        self.twins = layers

    def build(self, shape: Any) -> None:
        for layer in self.twins:
            if not layer.built:
                layer.build(shape)

    def call(self, inputs: Any) -> Any:
        first, second, third = self.twins
        return first(inputs) + second(third(inputs))

    def get_config(self) -> dict[str, Any]:
        layers = [keras.saving.serialize_keras_object(x) for x in self.twins]
        return {**super().get_config(), "layers": layers}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        layers = [keras.saving.deserialize_keras_object(x) for x in config["layers"]]
        return cls(**{**config, "layers": layers})


def test_what_hides_its_attention_is_named_and_not_what_is_around() -> None:
    inputs = keras.Input((None, D))
    around = keras_mha.ResidualNorm(Concealing(name="concealing"), name="around")
    model = keras.Model(inputs, around(inputs))
    with pytest.raises(ValueError, match="Concealing 'concealing', which .*'own'"):
        prune_heads(model, {"around/concealing/own": (1,)})


class Concealing(keras.layers.Layer):
    """Makes its attention by itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.own = keras_mha.MultiHeadSelfAttention(3, key_dim=H, name="own")

    def build(self, shape: Any) -> None:
        self.own.build(shape)

    def call(self, inputs: Any) -> Any:
        return self.own(inputs)

    def get_config(self) -> dict[str, Any]:
        return super().get_config()
