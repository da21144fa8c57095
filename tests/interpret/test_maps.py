"""Attention maps of whole models against NumPy, and what making them leaves behind.

Letters: B batch, T query length, S key length, N query heads, D width.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import keras_mha
from keras_mha.attention.dispatch import implementation_scope
from keras_mha.convert import from_keras
from keras_mha.interpret.paths import layer_paths
from keras_mha.layers.observer import Observer, observe
from keras_mha.text import WordpieceTokenizer
from tests.support import layer_oracle as oracle
from tests.support import score_cases
from tests.support.layers import PADDING, B, D, H, N, T, normal, randomize

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "##ly", "movie", "a"]
INPUTS = normal(B, T, D)


def expected_scores(layer: Any, *inputs: np.ndarray, **call: Any) -> np.ndarray:
    return oracle.attention(layer, oracle.weights_of(layer), *inputs, **call)[1]


def close(scores: np.ndarray, expected: np.ndarray) -> None:
    assert scores.shape == expected.shape
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)


def one_layer_model(**options: Any) -> tuple[keras.Model, Any]:
    """Vectors with a padding mask through one attention layer."""
    inputs = keras.Input((None, D), name="vectors")
    mask = keras.Input((None,), dtype="bool", name="mask")
    layer = keras_mha.MultiHeadSelfAttention(N, key_dim=H, name="heads", **options)
    model = keras.Model([inputs, mask], layer(inputs, mask=mask))
    randomize(model)
    return model, layer


def ids_model(blocks: int = 2, **options: Any) -> keras.Model:
    """Ids `(B, T)`, 0 padding, through a stack of blocks of prime sizes."""
    stack = [
        keras_mha.TransformerEncoderBlock(
            N, 17, key_dim=H, name=f"block_{i}", **options
        )
        for i in range(blocks)
    ]
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras_mha.TokenAndPositionEmbedding(len(WORDS), 19, D, name="embedding"),
            *stack,
            keras.layers.GlobalAveragePooling1D(name="mean"),
            keras.layers.Dense(2, activation="softmax", name="label"),
        ],
        name="encoder",
    )
    randomize(model)
    return model


IDS = np.random.default_rng(1).integers(1, len(WORDS), (B, T)) * PADDING


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flash_attention": True},
        {"flash_attention": False},
        {"jit_compile": True},
        {"jit_compile": True, "flash_attention": True},
        {"dropout": 0.5, "seed": 1},
    ],
)
def test_scores_are_those_of_the_oracle(options: dict[str, Any]) -> None:
    model, layer = one_layer_model(**options)
    poisoned = np.where(PADDING[..., None], INPUTS, np.nan).astype("float32")
    maps = keras_mha.attention_maps(model, [poisoned, PADDING])
    assert list(maps) == ["heads"]
    assert maps["heads"].dtype == np.float32
    close(maps["heads"], expected_scores(layer, INPUTS, mask=PADDING))
    assert not maps["heads"][~PADDING[:, None, :].repeat(N, 1)].any()  # fully masked
    assert not maps["heads"].transpose(0, 3, 1, 2)[~PADDING].any()  # masked keys


@pytest.mark.parametrize("name", score_cases.OPTIONS)
def test_every_option_of_the_scores(name: str) -> None:
    options = score_cases.OPTIONS[name]()
    shape = (score_cases.B, score_cases.T, 12)
    layer = keras_mha.MultiHeadSelfAttention(
        score_cases.N, key_dim=score_cases.H, flash_attention=True, **options
    )
    layer.build(shape)
    randomize(layer)
    inputs = normal(*shape)
    (scores,) = keras_mha.attention_maps(layer, inputs).values()
    close(scores, expected_scores(layer, inputs))


def test_the_implementation_of_a_scope_does_not_matter() -> None:
    model, layer = one_layer_model()
    with implementation_scope("blockwise"):
        maps = keras_mha.attention_maps(model, [INPUTS, PADDING])
    close(maps["heads"], expected_scores(layer, INPUTS, mask=PADDING))


def test_half_precision_gives_float32() -> None:
    model, _ = one_layer_model(dtype="mixed_bfloat16")
    scores = keras_mha.attention_maps(model, [INPUTS, PADDING])["heads"]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores.sum(-1)[PADDING[:, None].repeat(N, 1)], 1, 0.02)


def test_a_decoder_has_two_maps_of_different_shapes() -> None:
    S = 5
    target, memory = keras.Input((None, D)), keras.Input((None, 11))
    block = keras_mha.TransformerDecoderBlock(
        N, 17, key_dim=H, cross_attention=True, placement="post", name="block"
    )
    model = keras.Model([target, memory], block(target, memory))
    randomize(model)
    encoded = normal(B, S, 11, seed=2)
    maps = keras_mha.attention_maps(model, [INPUTS, encoded])
    own = "block/attention/self_attention"
    other = "block/memory_attention/cross_attention"
    assert list(maps) == [own, other]
    inner = block.attention.sublayer
    close(maps[own], expected_scores(inner, INPUTS, use_causal_mask=True))
    cross = block.memory_attention.sublayer
    middle = np.asarray(block.attention(INPUTS, use_causal_mask=True))
    close(maps[other], expected_scores(cross, middle, encoded))
    assert maps[other].shape == (B, N, T, S)


def test_layers_of_one_name_in_nested_models_are_told_apart() -> None:
    ids = keras.Input((None,), dtype="int32")
    members = [ids_model(1), ids_model(1)]
    for i, member in enumerate(members):
        member.name = f"member_{i}"
        randomize(member, seed=10 * i)
    model = keras.Model(
        ids, keras.layers.Average()([member(ids) for member in members])
    )
    maps = keras_mha.attention_maps(model, IDS)
    path = "block_0/attention/self_attention"
    assert list(maps) == [f"member_0/{path}", f"member_1/{path}"]
    for i, member in enumerate(members):
        close(maps[f"member_{i}/{path}"], keras_mha.attention_maps(member, IDS)[path])
    first, second = maps.values()
    assert np.abs(first - second).max() > 0.1


def test_a_shared_layer_has_a_map_for_each_call() -> None:
    inputs = keras.Input((None, D))
    layer = keras_mha.MultiHeadSelfAttention(N, key_dim=H, name="heads")
    model = keras.Model(inputs, layer(layer(inputs)))
    randomize(model)
    maps = keras_mha.attention_maps(model, INPUTS)
    assert list(maps) == ["heads", "heads#2"]
    close(maps["heads"], expected_scores(layer, INPUTS))
    close(maps["heads#2"], expected_scores(layer, np.asarray(layer(INPUTS))))


class Pair(keras.Model):
    """Subclassed: no `training`, two children of one name, one in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = [
            keras_mha.MultiHeadAttention(N, H, name="heads"),
            keras_mha.MultiHeadAttention(N, H, name="heads"),
        ]
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, inputs: Any) -> Any:
        self.count.assign_add(1.0)
        self.add_loss(ops.sum(inputs))
        for tower in self.towers:
            inputs = tower(inputs, inputs, use_causal_mask=True)
        return inputs


def test_a_subclassed_model_and_its_own_state() -> None:
    model = Pair()
    model(INPUTS)
    randomize(model)
    assert list(layer_paths(model))[:1] == ["heads"]
    before = float(model.count), len(model.losses)
    maps = keras_mha.attention_maps(model, INPUTS)
    assert list(maps) == ["heads", "heads_1"]
    first, second = model.towers
    close(maps["heads"], expected_scores(first, INPUTS, INPUTS, use_causal_mask=True))
    middle = np.asarray(first(INPUTS, INPUTS, use_causal_mask=True))
    close(
        maps["heads_1"], expected_scores(second, middle, middle, use_causal_mask=True)
    )
    assert (float(model.count), len(model.losses)) == before


def test_a_saved_model_with_its_tokenizer(tmp_path: Path) -> None:
    encoder = ids_model()
    texts = keras.Input((), dtype="string")
    tokenizer = WordpieceTokenizer(WORDS, max_length=19, name="tokenizer")
    model = keras.Model(texts, encoder(tokenizer(texts)))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    given = ["good movie", "a badly bad movie"]
    ids = tokenizer(tf.constant(given)).numpy()
    expected = keras_mha.attention_maps(encoder, ids)
    for inputs in (given, np.array(given), tf.constant(given), np.array(given, object)):
        maps = keras_mha.attention_maps(loaded, inputs)
        assert list(maps) == [f"encoder/{path}" for path in expected]
        for path, scores in expected.items():
            close(maps[f"encoder/{path}"], scores)


def test_inputs_by_name() -> None:
    model, _ = one_layer_model()
    maps = keras_mha.attention_maps(model, {"vectors": INPUTS, "mask": PADDING})
    close(maps["heads"], keras_mha.attention_maps(model, [INPUTS, PADDING])["heads"])


MEMORY = normal(B, 5, 11, seed=2)


def test_a_layer_of_several_inputs() -> None:
    layer = keras_mha.MultiHeadAttention(N, H, name="heads")
    layer(INPUTS, MEMORY)
    randomize(layer)
    wanted = expected_scores(layer, INPUTS, MEMORY)
    named = {"value": MEMORY, "query": INPUTS}
    for inputs in ([INPUTS, MEMORY], (INPUTS, MEMORY), named):
        maps = keras_mha.attention_maps(layer, inputs)
        assert list(maps) == ["heads"]
        close(maps["heads"], wanted)
    named["value_mask"] = np.arange(5) < np.array([3, 5, 2])[:, None]
    scores = keras_mha.attention_maps(layer, named)["heads"]
    close(
        scores, expected_scores(layer, INPUTS, MEMORY, value_mask=named["value_mask"])
    )
    (scores,) = keras_mha.attention_maps(layer, [INPUTS, INPUTS[..., :11]]).values()
    assert scores.shape == (B, N, T, T)


def test_a_layer_and_its_mask() -> None:
    layer = keras_mha.MultiHeadSelfAttention(N, key_dim=H, name="heads")
    layer.build((B, T, D))
    randomize(layer)
    wanted = expected_scores(layer, INPUTS, mask=PADDING)
    for inputs in ([INPUTS, PADDING], {"mask": PADDING, "inputs": INPUTS}):
        close(keras_mha.attention_maps(layer, inputs)["heads"], wanted)
    wanted = expected_scores(layer, INPUTS)
    for inputs in (INPUTS, [INPUTS]):
        close(keras_mha.attention_maps(layer, inputs)["heads"], wanted)


def test_a_block_and_its_memory() -> None:
    block = keras_mha.TransformerDecoderBlock(
        N, 17, key_dim=H, cross_attention=True, name="block"
    )
    target, memory = keras.Input((None, D)), keras.Input((None, 11))
    model = keras.Model([target, memory], block(target, memory))
    randomize(model)
    wanted = keras_mha.attention_maps(model, [INPUTS, MEMORY])
    for inputs in ([INPUTS, MEMORY], {"inputs": INPUTS, "memory": MEMORY}):
        maps = keras_mha.attention_maps(block, inputs)
        assert [f"block/{path}" for path in maps] == list(wanted)
        for path, scores in maps.items():
            close(scores, wanted[f"block/{path}"])


class OfOne(keras.layers.Layer):
    """Its inputs are one list or one dictionary, beside what it is seldom given."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = keras_mha.MultiHeadAttention(N, H, name="heads")

    def call(self, inputs: Any, shift: Any = None, mask: Any = None) -> Any:
        del mask
        pair = inputs.values() if isinstance(inputs, dict) else inputs
        outputs = self.heads(*pair)
        return outputs if shift is None else outputs + shift


@pytest.mark.parametrize(
    "inputs",
    [
        [INPUTS, MEMORY],
        {"query": INPUTS, "value": MEMORY},
        {"inputs": INPUTS, "mask": MEMORY},
    ],
)
def test_a_layer_that_takes_several_as_one_gets_them_so(inputs: Any) -> None:
    layer = OfOne()
    layer(inputs)
    randomize(layer)
    (scores,) = keras_mha.attention_maps(layer, inputs).values()
    close(scores, expected_scores(layer.heads, INPUTS, MEMORY))


def test_a_list_for_the_one_argument_of_a_layer() -> None:
    class Pairs(OfOne):
        def build(self) -> None:
            self.heads.build((B, T, D), MEMORY.shape)

        def call(self, inputs: Any, mask: Any = None, flag: bool = True) -> Any:
            del mask, flag
            return self.heads(*inputs)

    layer = Pairs()
    layer.build()  # tells Keras of no shape
    randomize(layer)
    (scores,) = keras_mha.attention_maps(layer, [INPUTS, MEMORY]).values()
    close(scores, expected_scores(layer.heads, INPUTS, MEMORY))


def snapshot(model: keras.Model) -> list[dict[str, Any]]:
    """Every attribute of every layer; of containers, their size."""
    return [
        {
            name: len(value) if isinstance(value, list | dict | set) else id(value)
            for name, value in vars(layer).items()
        }
        for layer in [model, *layer_paths(model).values()]
    ]


def test_nothing_is_left_behind() -> None:
    model = ids_model(dropout=0.3, seed=3, jit_compile=True)
    model.compile("sgd", "mse")
    answers = model.predict(IDS, verbose=0)
    traced: Any = model.predict_function
    traces = traced.experimental_get_tracing_count()
    weights = [np.array(variable) for variable in model.variables]
    before = snapshot(model)
    keras_mha.attention_maps(model, IDS)
    assert snapshot(model) == before
    for variable, value in zip(model.variables, weights, strict=True):
        np.testing.assert_array_equal(variable, value)
    np.testing.assert_array_equal(model.predict(IDS, verbose=0), answers)
    assert model.predict_function is traced
    assert traced.experimental_get_tracing_count() == traces


def test_a_model_traced_afterwards_is_as_one_traced_without() -> None:
    models = [ids_model(flash_attention=True) for _ in range(2)]
    keras_mha.attention_maps(models[0], IDS)
    texts = []
    for model in models:
        function = tf.function(lambda ids, model=model: model(ids, training=False))
        graph = function.get_concrete_function(
            tf.TensorSpec((None, None), "int32")
        ).graph
        texts.append([operation.type for operation in graph.get_operations()])
    assert texts[0] == texts[1]


def test_other_threads_are_not_watched() -> None:
    seen: list[str] = []

    class Names(Observer):
        wants_scores = True

        def see_scores(self, layer: keras.layers.Layer, scores: Any) -> None:
            del scores
            seen.append(layer.name)

    model, layer = one_layer_model()
    with observe(Names()):
        thread = threading.Thread(target=lambda: layer(INPUTS))
        thread.start()
        thread.join()
        assert not seen
        model([INPUTS, PADDING])
    assert seen == ["heads"]
    model([INPUTS, PADDING])
    assert seen == ["heads"]


class Traced(keras.Model):
    """Runs its layer in a `tf.function` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = keras_mha.MultiHeadSelfAttention(N, key_dim=H, name="heads")
        self.heads.build((B, T, D))
        self.built = True
        self.run = tf.function(self.heads, autograph=False)

    def call(self, inputs: Any) -> Any:
        return self.run(inputs)


def test_a_function_of_tensorflow_is_refused() -> None:
    model = Traced()
    with pytest.raises(RuntimeError, match="'heads', called inside a `tf.function`"):
        keras_mha.attention_maps(model, INPUTS)
    model(INPUTS)
    with pytest.raises(ValueError, match="called none of \\['heads'\\]"):
        keras_mha.attention_maps(model, INPUTS)


def test_wrong_models_are_named() -> None:
    with pytest.raises(TypeError, match="`model` must be a Keras model or layer"):
        keras_mha.attention_maps("model", INPUTS)  # pyright: ignore[reportArgumentType]
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)], name="plain")
    with pytest.raises(ValueError, match="no attention layer. Received: .*'plain'"):
        keras_mha.attention_maps(plain, np.ones((2, 3)))
    with pytest.raises(ValueError, match="must be built"):
        keras_mha.attention_maps(Pair(), INPUTS)
    inputs = keras.Input((None, D))
    stock = keras.layers.MultiHeadAttention(N, H, name="stock")
    with pytest.raises(ValueError, match="Keras' layers \\['stock'\\]"):
        keras_mha.attention_maps(keras.Model(inputs, stock(inputs, inputs)), INPUTS)


class Own(keras.layers.MultiHeadAttention):
    """A subclass, which may compute otherwise."""


def stock_model(*layers: keras.layers.Layer) -> keras.Model:
    """Each layer's inputs are its query and its value, in the form it takes them."""
    inputs = x = keras.Input((None, D))
    for layer in layers:
        one = isinstance(layer, keras.layers.Attention)  # of one argument
        x = layer([x, x]) if one else layer(x, x)
    return keras.Model(inputs, x)


def test_advice_on_layers_of_keras_is_true() -> None:
    """`from_keras` swaps what the error says it does, and nothing of the rest."""
    swapped = [
        keras.layers.MultiHeadAttention(N, H, name="many"),
        keras.layers.GroupQueryAttention(H, 2, 1, name="grouped"),
    ]
    kept = [
        Own(N, H, name="own"),
        keras.layers.Attention(name="dot"),
        keras.layers.AdditiveAttention(name="sum"),
    ]
    convertible = "from_keras` swaps.*: \\['many', 'grouped'\\]"
    by_hand = (
        "not converted: .* \\{'own': 'Own', 'dot': 'Attention', "
        "'sum': 'AdditiveAttention'\\}"
    )
    with pytest.raises(ValueError, match=convertible) as error:
        keras_mha.attention_maps(stock_model(*swapped), INPUTS)
    assert "not converted" not in str(error.value)
    assert len(keras_mha.attention_maps(from_keras(stock_model(*swapped)), INPUTS)) == 2
    model = stock_model(*swapped, *kept)
    with pytest.raises(ValueError, match=f"{convertible}.*{by_hand}"):
        keras_mha.attention_maps(model, INPUTS)
    with pytest.raises(ValueError, match=by_hand) as error:
        keras_mha.attention_maps(from_keras(model), INPUTS)
    assert "from_keras" not in str(error.value)


@pytest.mark.parametrize("kind", [keras.layers.MultiHeadAttention, Own])
def test_a_layer_of_keras_alone_is_refused(kind: Any) -> None:
    layer = kind(N, H, name="alone")
    layer.build((B, T, D), (B, T, D))
    with pytest.raises(ValueError, match="layers of keras_mha only.*\\['alone'\\]"):
        keras_mha.attention_maps(layer, [INPUTS, INPUTS])
