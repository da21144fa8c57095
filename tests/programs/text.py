"""Programs on text and other sequences of ids."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from tests.programs.program import Program, classes, numbers, tokens

WORDS, LENGTH, WIDTH = 37, 11, 12


@keras.saving.register_keras_serializable("programs")
class TokenAndPosition(layers.Layer):
    """Adds learned positions to the embeddings of tokens."""

    def __init__(self, length: int, words: int, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.length, self.words, self.width = length, words, width
        self.tokens = layers.Embedding(words, width, mask_zero=True)
        self.positions = layers.Embedding(length, width)

    def call(self, ids: Any) -> Any:
        return self.tokens(ids) + self.positions(ops.arange(ops.shape(ids)[-1]))

    def compute_mask(self, ids: Any, mask: Any = None) -> Any:
        del mask
        return self.tokens.compute_mask(ids)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        sizes = {"length": self.length, "words": self.words, "width": self.width}
        return {**config, **sizes}


@keras.saving.register_keras_serializable("programs")
class EncoderLayer(layers.Layer):
    """A transformer's encoder layer, normalized after each part."""

    def __init__(self, width: int, heads: int, inner: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.width, self.heads, self.inner = width, heads, inner
        self.att = layers.MultiHeadAttention(num_heads=heads, key_dim=width)
        self.ffn = keras.Sequential([layers.Dense(inner, "relu"), layers.Dense(width)])
        self.norms = [layers.LayerNormalization(epsilon=1e-6) for _ in range(2)]
        self.drops = [layers.Dropout(0.1) for _ in range(2)]

    def call(self, inputs: Any, training: bool = False) -> Any:
        x = self.drops[0](self.att(inputs, inputs), training=training)
        x = self.norms[0](inputs + x)
        y = self.drops[1](self.ffn(x), training=training)
        return self.norms[1](x + y)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        sizes = {"width": self.width, "heads": self.heads, "inner": self.inner}
        return {**config, **sizes}


def text_classification() -> keras.Model:
    inputs = keras.Input((LENGTH,), name="ids")
    x = TokenAndPosition(LENGTH, WORDS, WIDTH)(inputs)
    x = EncoderLayer(WIDTH, 2, 19)(x)
    x = layers.GlobalAveragePooling1D()(x)
    x = layers.Dropout(0.1)(layers.Dense(7, activation="relu")(x))
    return keras.Model(inputs, layers.Dense(2, activation="softmax", name="label")(x))


def stacked_classifier() -> keras.Model:
    inputs = keras.Input((None,), dtype="int32", name="ids")
    x = layers.Embedding(WORDS, WIDTH, mask_zero=True)(inputs)
    for _ in range(2):
        mixed = layers.MultiHeadAttention(3, 4)(x, x)
        x = layers.LayerNormalization()(layers.Add()([x, mixed]))
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(3, activation="softmax", name="label")(x))


class Tagger(keras.Model):
    """Named entities: one label for each token, by a subclassed model."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.embedding = TokenAndPosition(LENGTH, WORDS, WIDTH)
        self.encoder = EncoderLayer(WIDTH, 2, 17)
        self.classifier = layers.Dense(labels, activation="softmax")

    def call(self, inputs: Any, training: bool = False) -> Any:
        x = self.encoder(self.embedding(inputs), training=training)
        return self.classifier(x)


def tagging() -> keras.Model:
    model = Tagger(5)
    model(np.ones((2, LENGTH), "int32"))
    return model


def masked_language_model() -> keras.Model:
    inputs = keras.Input((LENGTH,), dtype="int64", name="ids")
    words = layers.Embedding(WORDS, WIDTH, name="words")
    x = words(inputs) + layers.Embedding(LENGTH, WIDTH)(ops.arange(LENGTH))
    mixed = layers.MultiHeadAttention(3, 4, name="attention")(x, x, x)
    x = layers.LayerNormalization(name="norm")(x + layers.Dropout(0.1)(mixed))
    x = layers.Dense(WIDTH, activation="gelu")(x)
    logits = layers.Dense(WORDS, name="words_again")(x)
    return keras.Model(inputs, logits)


@keras.saving.register_keras_serializable("programs")
class LearnedPositions(layers.Layer):
    """Adds the first rows of a table, as many as there are tokens."""

    def __init__(self, longest: int, width: int) -> None:
        super().__init__()
        self.longest, self.width = longest, width

    def build(self, shape: Any) -> None:
        del shape
        self.table = self.add_weight(shape=(self.longest, self.width), name="table")

    def call(self, x: Any) -> Any:
        return x + self.table[None, : ops.shape(x)[1], :]


@keras.saving.register_keras_serializable("programs")
class CausalBlock(layers.Layer):
    """A GPT's block, with a causal mask of its own making."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.att = layers.MultiHeadAttention(heads, width // heads, dropout=0.1)
        self.norm1 = layers.LayerNormalization(epsilon=1e-5)
        self.norm2 = layers.LayerNormalization(epsilon=1e-5)
        self.up = layers.Dense(4 * width, activation=keras.activations.gelu)
        self.down = layers.Dense(width)

    def call(self, x: Any) -> Any:
        length = ops.shape(x)[1]
        places = ops.arange(length)
        mask = ops.expand_dims(places, 1) >= ops.expand_dims(places, 0)
        y = self.norm1(x)
        x = x + self.att(y, y, attention_mask=ops.expand_dims(mask, 0))
        return x + self.down(self.up(self.norm2(x)))


def small_gpt() -> keras.Model:
    inputs = keras.Input((None,), dtype="int32", name="ids")
    x = LearnedPositions(64, WIDTH)(layers.Embedding(WORDS, WIDTH)(inputs))
    for _ in range(2):
        x = CausalBlock(WIDTH, 3)(x)
    x = layers.LayerNormalization()(x)
    return keras.Model(inputs, layers.Dense(WORDS, name="logits")(x))


@keras.saving.register_keras_serializable("programs")
class DecoderLayer(layers.Layer):
    """A transformer's decoder layer, with cross-attention."""

    def __init__(self, width: int, heads: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width, self.heads = width, heads
        self.supports_masking = True
        self.own = layers.MultiHeadAttention(heads, width)
        self.cross = layers.MultiHeadAttention(heads, width)
        self.ffn = keras.Sequential([layers.Dense(23, "relu"), layers.Dense(width)])
        self.norm1 = layers.LayerNormalization()
        self.norm2 = layers.LayerNormalization()
        self.norm3 = layers.LayerNormalization()
        self.add = layers.Add()

    def call(self, inputs: Any) -> Any:
        x, memory = inputs
        x = self.norm1(self.add([x, self.own(x, x, use_causal_mask=True)]))
        x = self.norm2(self.add([x, self.cross(query=x, value=memory, key=memory)]))
        return self.norm3(self.add([x, self.ffn(x)]))

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        del inputs
        return None if mask is None else mask[0]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width, "heads": self.heads}


def translation() -> keras.Model:
    source = keras.Input((7,), dtype="int64", name="source")
    target = keras.Input((5,), dtype="int64", name="target")
    memory = EncoderLayer(WIDTH, 3, 19)(TokenAndPosition(7, WORDS, WIDTH)(source))
    x = TokenAndPosition(5, WORDS, WIDTH)(target)
    x = DecoderLayer(WIDTH, 3)([x, memory])
    outputs = layers.Dense(WORDS, activation="softmax", name="next")(x)
    return keras.Model([source, target], outputs, name="translation")


class Recommender(keras.Model):
    """Ratings from a user's history of films, given by their titles."""

    def __init__(self, titles: list[str]) -> None:
        super().__init__()
        self.lookup = layers.StringLookup(vocabulary=titles)
        self.films = layers.Embedding(len(titles) + 1, 8)
        self.places = layers.Embedding(6, 8)
        self.attention = layers.MultiHeadAttention(2, 8, dropout=0.1)
        self.norm = layers.LayerNormalization()
        self.score = keras.Sequential([layers.Dense(9, "leaky_relu"), layers.Dense(1)])

    def call(self, inputs: dict[str, Any], training: bool = False) -> Any:
        history = self.films(self.lookup(inputs["history"]))
        history = history + self.places(ops.arange(6))
        wanted = ops.expand_dims(self.films(self.lookup(inputs["film"])), 1)
        x = ops.concatenate([history, wanted], axis=1)
        x = self.norm(x + self.attention(x, x, training=training))
        age = ops.expand_dims(ops.cast(inputs["age"], "float32") / 100.0, -1)
        return self.score(ops.concatenate([ops.reshape(x, (-1, 56)), age], axis=1))


TITLES = ["Metropolis", "Stalker", "Ran", "Playtime", "Persona"]


def recommendation() -> keras.Model:
    model = Recommender(TITLES)
    model(_films(np.random.default_rng(0), 2))
    return model


def _films(rng: np.random.Generator, n: int) -> dict[str, Any]:
    titles = np.array([*TITLES, "Unknown"], object)
    return {
        "history": titles[rng.integers(len(titles), size=(n, 6))],
        "film": titles[rng.integers(len(titles), size=n)],
        "age": rng.integers(9, 90, size=n).astype("int32"),
    }


def multi_task() -> keras.Model:
    inputs = keras.Input((LENGTH,), dtype="int32", name="ids")
    x = TokenAndPosition(LENGTH, WORDS, WIDTH)(inputs)
    x = layers.MultiHeadAttention(2, 6)(x, x) + x
    first = ops.take(x, 0, axis=1)
    return keras.Model(
        inputs,
        {
            "topic": layers.Dense(4, activation="softmax", name="topic")(first),
            "tags": layers.Dense(3, activation="softmax", name="tags")(x),
        },
    )


def siamese() -> keras.Model:
    one, other = (keras.Input((LENGTH,), dtype="int32", name=n) for n in ("one", "two"))
    ids = keras.Input((LENGTH,), dtype="int32")
    x = EncoderLayer(WIDTH, 2, 13)(TokenAndPosition(LENGTH, WORDS, WIDTH)(ids))
    tower = keras.Model(ids, layers.GlobalMaxPooling1D()(x), name="tower")
    near = layers.Dot(axes=1, normalize=True)([tower(one), tower(other)])
    return keras.Model([one, other], layers.Dense(1, "sigmoid", name="same")(near))


@keras.saving.register_keras_serializable("programs")
class Switch(layers.Layer):
    """A mixture of experts: each token goes to the expert that its router prefers."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.experts = [layers.Dense(width, activation="relu") for _ in range(experts)]
        self.router = layers.Dense(experts)

    def call(self, x: Any) -> Any:
        gates = ops.softmax(self.router(x), axis=-1)
        chosen = ops.one_hot(ops.argmax(gates, axis=-1), len(self.experts))
        outputs = ops.stack([expert(x) for expert in self.experts], axis=-2)
        return ops.sum(outputs * ops.expand_dims(gates * chosen, -1), axis=-2)


def mixture_of_experts() -> keras.Model:
    inputs = keras.Input((LENGTH,), dtype="int32", name="ids")
    x = layers.Embedding(WORDS, WIDTH)(inputs)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, WIDTH)(x, x))
    x = layers.LayerNormalization()(x + Switch(3, WIDTH)(x))
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(2, activation="softmax", name="label")(x))


def speech_recognition() -> keras.Model:
    sound = keras.Input((40, 10), name="spectrogram")
    words = keras.Input((6,), dtype="int32", name="words")
    x = sound
    for _ in range(2):
        x = layers.Conv1D(WIDTH, 5, strides=2, padding="same", activation="relu")(x)
    y = layers.LayerNormalization(epsilon=1e-6)(x)
    x = x + layers.MultiHeadAttention(2, WIDTH)(y, y)
    y = TokenAndPosition(6, WORDS, WIDTH)(words)
    y = DecoderLayer(WIDTH, 2)([y, x])
    return keras.Model([sound, words], layers.Dense(WORDS, name="next")(y))


_SPARSE = {"loss": "sparse_categorical_crossentropy"}
_LOGITS = {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}

PROGRAMS = (
    Program(text_classification, tokens(WORDS, LENGTH), classes(2), _SPARSE, pads=True),
    Program(
        stacked_classifier,
        tokens(WORDS, LENGTH),
        classes(3),
        _SPARSE,
        pads=True,
        leaks=True,
    ),
    Program(
        tagging,
        tokens(WORDS, LENGTH),
        classes(5, LENGTH),
        _SPARSE,
        pads=True,
        pads_outputs=True,
        loads=False,
    ),
    Program(
        masked_language_model,
        tokens(WORDS, LENGTH, padded=False),
        classes(WORDS, LENGTH),
        _LOGITS,
        holds_constants=True,
    ),
    Program(
        small_gpt,
        tokens(WORDS, LENGTH, padded=False),
        classes(WORDS, LENGTH),
        _LOGITS,
        loads=False,
    ),
    Program(
        translation,
        lambda rng, n: [tokens(WORDS, 7)(rng, n), tokens(WORDS, 5)(rng, n)],
        classes(WORDS, 5),
        _SPARSE,
        pads=True,
        pads_outputs=True,
    ),
    Program(
        recommendation,
        _films,
        numbers(1),
        {"loss": "mse"},
        refused={
            "tflite": "takes strings",
            "onnx": "takes strings",
        },
        loads=False,
    ),
    Program(
        multi_task,
        tokens(WORDS, LENGTH),
        lambda rng, n: {
            "topic": classes(4)(rng, n),
            "tags": classes(3, LENGTH)(rng, n),
        },
        {"loss": dict.fromkeys(("topic", "tags"), _SPARSE["loss"])},
        pads=True,
        leaks=True,
    ),
    Program(
        siamese,
        lambda rng, n: {k: tokens(WORDS, LENGTH)(rng, n) for k in ("one", "two")},
        classes(2),
        {"loss": "binary_crossentropy"},
        pads=True,
        leaks=True,
    ),
    Program(
        mixture_of_experts,
        tokens(WORDS, LENGTH, padded=False),
        classes(2),
        _SPARSE,
        refused={"gpu": "`argmax` reads the bits of floats"},
        loads=False,
    ),
    Program(
        speech_recognition,
        lambda rng, n: {
            "spectrogram": numbers(40, 10)(rng, n),
            "words": tokens(WORDS, 6)(rng, n),
        },
        classes(WORDS, 6),
        _LOGITS,
        pads=True,
        pads_outputs=True,
    ),
)
