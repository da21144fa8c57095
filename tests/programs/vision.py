"""Programs on images and film."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from tests.programs.program import Program, classes, numbers, tokens

WIDTH = 12


@keras.saving.register_keras_serializable("programs")
class Patches(layers.Layer):
    """Cuts images into patches; its constructor passes nothing on."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def call(self, images: Any) -> Any:
        patches = ops.image.extract_patches(images, size=self.size)
        shape: Any = ops.shape(patches)
        batch, rows, columns, width = shape
        return ops.reshape(patches, (batch, rows * columns, width))


@keras.saving.register_keras_serializable("programs")
class PatchEncoder(layers.Layer):
    """Projects patches and adds their positions."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.count = count
        self.projection = layers.Dense(width)
        self.positions = layers.Embedding(count, width)

    def call(self, patches: Any) -> Any:
        places = ops.expand_dims(ops.arange(0, self.count, 1), 0)
        return self.projection(patches) + self.positions(places)


def _perceptron(x: Any, units: tuple[int, ...]) -> Any:
    for count in units:
        x = layers.Dense(count, activation=keras.activations.gelu)(x)
        x = layers.Dropout(0.1)(x)
    return x


def _encode(x: Any, heads: int) -> Any:
    """A block of a vision transformer, normalized before each part."""
    y = layers.LayerNormalization(epsilon=1e-6)(x)
    y = layers.MultiHeadAttention(heads, WIDTH, dropout=0.1)(y, y)
    x = layers.Add()([x, y])
    y = layers.LayerNormalization(epsilon=1e-6)(x)
    return layers.Add()([_perceptron(y, (2 * WIDTH, WIDTH)), x])


def vision_transformer() -> keras.Model:
    image = keras.Input((12, 12, 3), name="image")
    x = layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[1.0, 2.0, 3.0])(image)
    x = layers.RandomFlip("horizontal")(x)
    x = PatchEncoder(9, WIDTH)(Patches(4)(x))
    for _ in range(2):
        x = _encode(x, 3)
    x = layers.Flatten()(layers.LayerNormalization(epsilon=1e-6)(x))
    return keras.Model(image, layers.Dense(5, name="logits")(_perceptron(x, (17,))))


@keras.saving.register_keras_serializable("programs")
class ClassToken(layers.Layer):
    """Puts a learned token before the others."""

    def build(self, shape: Any) -> None:
        self.token = self.add_weight(shape=(1, 1, shape[-1]), name="token")

    def call(self, x: Any) -> Any:
        token = ops.broadcast_to(self.token, (ops.shape(x)[0], 1, ops.shape(x)[-1]))
        return ops.concatenate([token, x], axis=1)


def class_token_transformer() -> keras.Model:
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Rescaling(1 / 127.5, offset=-1.0)(image)
    x = layers.Conv2D(WIDTH, 2, strides=2)(x)
    x = ClassToken()(layers.Reshape((16, WIDTH))(x))
    x = _encode(x, 2)
    return keras.Model(image, layers.Dense(4, activation="softmax", name="p")(x[:, 0]))


def compact_convolutional_transformer() -> keras.Model:
    image = keras.Input((16, 16, 3), name="image")
    x = layers.Rescaling(1.0 / 255)(image)
    for count in (7, WIDTH):
        x = layers.Conv2D(count, 3, padding="same", use_bias=False, activation="relu")(
            x
        )
        x = layers.ZeroPadding2D(1)(x)
        x = layers.MaxPooling2D(3, 2, "same")(x)
    x = layers.Reshape((-1, WIDTH))(x)
    x = _encode(x, 2)
    x = layers.LayerNormalization(epsilon=1e-5)(x)
    weights = ops.softmax(layers.Dense(1)(x), axis=1)
    pooled = ops.squeeze(ops.matmul(ops.transpose(weights, (0, 2, 1)), x), 1)
    return keras.Model(image, layers.Dense(3, name="logits")(pooled))


@keras.saving.register_keras_serializable("programs")
class WindowAttention(layers.Layer):
    """Attention within windows of an image that are shifted by half a window."""

    def __init__(self, size: int, shift: int, heads: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size, self.shift, self.heads = size, shift, heads
        self.norm = layers.LayerNormalization(epsilon=1e-5)

    def build(self, shape: Any) -> None:
        self.attention = layers.MultiHeadAttention(self.heads, shape[-1] // self.heads)
        self.attention.build(
            (None, self.size**2, shape[-1]), (None, self.size**2, shape[-1])
        )
        self.norm.build(shape)

    def call(self, x: Any) -> Any:
        _, rows, columns, width = x.shape
        size = self.size
        y = ops.roll(self.norm(x), (-self.shift, -self.shift), axis=(1, 2))
        y = ops.reshape(y, (-1, rows // size, size, columns // size, size, width))
        y = ops.reshape(ops.transpose(y, (0, 1, 3, 2, 4, 5)), (-1, size**2, width))
        y = self.attention(y, y)
        y = ops.reshape(y, (-1, rows // size, columns // size, size, size, width))
        y = ops.transpose(y, (0, 1, 3, 2, 4, 5))
        y = ops.reshape(y, (-1, rows, columns, width))
        return x + ops.roll(y, (self.shift, self.shift), axis=(1, 2))

    def get_config(self) -> dict[str, Any]:
        sizes = {"size": self.size, "shift": self.shift, "heads": self.heads}
        return {**super().get_config(), **sizes}


def shifted_windows() -> keras.Model:
    image = keras.Input((16, 16, 3), name="image")
    x = layers.Conv2D(WIDTH, 2, strides=2)(image)
    x = WindowAttention(4, 0, 3)(x)
    x = WindowAttention(4, 2, 3)(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(3, activation="softmax", name="label")(x))


def mobile_vision_transformer() -> keras.Model:
    image = keras.Input((16, 16, 3), name="image")
    x = layers.Conv2D(WIDTH, 3, strides=2, padding="same", activation="swish")(image)
    y = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    y = layers.BatchNormalization()(y)
    local = keras.activations.silu(y)
    y = layers.Reshape((4, 16, WIDTH))(local)
    z = layers.LayerNormalization(epsilon=1e-6)(y)
    y = layers.Add()([layers.MultiHeadAttention(2, WIDTH)(z, z), y])
    y = layers.Reshape((8, 8, WIDTH))(y)
    y = layers.Concatenate(axis=-1)([x, layers.Conv2D(WIDTH, 1)(y)])
    y = layers.GlobalAveragePooling2D()(layers.Conv2D(WIDTH, 3, padding="same")(y))
    return keras.Model(image, layers.Dense(3, activation="softmax", name="label")(y))


@keras.saving.register_keras_serializable("programs")
class Tubelets(layers.Layer):
    """Cuts films into tubes of patches."""

    def __init__(self, width: int, size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.projection = layers.Conv3D(width, size, strides=size, padding="valid")
        self.flatten = layers.Reshape((-1, width))

    def call(self, films: Any) -> Any:
        return self.flatten(self.projection(films))


def video_transformer() -> keras.Model:
    film = keras.Input((8, 8, 8, 1), name="film")
    x = Tubelets(WIDTH, 4)(film)
    x = x + layers.Embedding(8, WIDTH)(ops.arange(8))
    x = _encode(x, 2)
    x = layers.GlobalAvgPool1D()(layers.LayerNormalization(epsilon=1e-6)(x))
    return keras.Model(film, layers.Dense(3, activation="softmax", name="label")(x))


@keras.saving.register_keras_serializable("programs")
class Latents(layers.Layer):
    """A perceiver's learned queries."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.count, self.width = count, width
        self.cross = layers.MultiHeadAttention(1, width)

    def build(self, shape: Any) -> None:
        del shape
        self.latents = self.add_weight(
            shape=(self.count, self.width), initializer="random_normal", name="latents"
        )

    def call(self, x: Any) -> Any:
        latents = ops.expand_dims(self.latents, 0)
        latents = ops.repeat(latents, ops.shape(x)[0], axis=0)
        return latents + self.cross(latents, x)


def perceiver() -> keras.Model:
    image = keras.Input((8, 8, 3), name="image")
    x = PatchEncoder(16, WIDTH)(Patches(2)(image))
    x = Latents(5, WIDTH)(x)
    for _ in range(2):
        x = _encode(x, 2)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(image, layers.Dense(3, name="logits")(x))


class MaskedAutoencoder(keras.Model):
    """Learns to draw hidden patches; its training step is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = Patches(4)
        self.encoder = PatchEncoder(9, WIDTH)
        self.attention = layers.MultiHeadAttention(2, WIDTH)
        self.norm = layers.LayerNormalization()
        self.decoder = layers.Dense(48)

    def call(self, images: Any) -> Any:
        x = self.encoder(self.patches(images))
        return self.decoder(self.norm(x + self.attention(x, x)))

    def train_step(self, data: Any) -> dict[str, Any]:
        import tensorflow as tf

        images = data[0] if isinstance(data, tuple) else data
        hidden = tf.cast(tf.range(9) % 3 != 0, "float32")[None, :, None]
        with tf.GradientTape() as tape:
            wanted = self.patches(images)
            loss = tf.reduce_mean(tf.square(self(images) - wanted) * hidden)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(
            zip(gradients, self.trainable_variables, strict=True)
        )
        return {"loss": loss}


def masked_autoencoder() -> keras.Model:
    model = MaskedAutoencoder()
    model(np.zeros((1, 12, 12, 3), "float32"))
    return model


@keras.saving.register_keras_serializable("programs")
class CaptionDecoder(layers.Layer):
    """Writes captions: causal attention with padding, then a look at the image."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.table = layers.Embedding(words, width, mask_zero=True)
        self.own = layers.MultiHeadAttention(2, width, dropout=0.1)
        self.look = layers.MultiHeadAttention(2, width)
        self.norm1, self.norm2 = (
            layers.LayerNormalization(),
            layers.LayerNormalization(),
        )
        self.out = layers.Dense(words, activation="softmax")

    def call(self, image: Any, ids: Any) -> Any:
        x = self.table(ids)
        mask = self.table.compute_mask(ids)
        length = ops.shape(ids)[1]
        causal = ops.tril(ops.ones((length, length), dtype="bool"))
        padding = ops.expand_dims(mask, 1)
        x = self.norm1(
            x + self.own(x, x, attention_mask=ops.logical_and(causal, padding))
        )
        x = self.norm2(x + self.look(query=x, value=image, key=image))
        return self.out(x)


def captioning() -> keras.Model:
    image = keras.Input((8, 8, 3), name="image")
    words = keras.Input((6,), dtype="int32", name="words")
    x = layers.Conv2D(WIDTH, 2, strides=2, activation="relu")(image)
    x = layers.BatchNormalization()(x)
    x = layers.Reshape((-1, WIDTH))(x)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(1, WIDTH)(x, x))
    return keras.Model([image, words], CaptionDecoder(23, WIDTH)(x, words))


def detection_by_queries() -> keras.Model:
    image = keras.Input((16, 16, 3), name="image")
    x = layers.Conv2D(WIDTH, 4, strides=4, activation="relu")(image)
    x = layers.Reshape((16, WIDTH))(x)
    x = _encode(x + layers.Embedding(16, WIDTH)(ops.arange(16)), 2)
    queries = Latents(5, WIDTH)(x)
    y = layers.LayerNormalization()(
        queries + layers.MultiHeadAttention(2, 6)(queries, queries)
    )
    y = layers.LayerNormalization()(y + layers.MultiHeadAttention(2, 6)(y, x))
    return keras.Model(
        image,
        [
            layers.Dense(4, activation="softmax", name="kind")(y),
            layers.Dense(4, activation="sigmoid", name="box")(y),
        ],
    )


@keras.saving.register_keras_serializable("programs")
class Sinusoids(layers.Layer):
    """Embeds how noisy an image is."""

    def call(self, noise: Any) -> Any:
        powers: Any = ops.exp(ops.linspace(0.0, 3.0, 6))
        waves = 2.0 * 3.14159 * powers
        angles = ops.reshape(noise, (-1, 1)) * waves
        return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)


def diffusion_denoiser() -> keras.Model:
    image = keras.Input((8, 8, 3), name="image")
    noise = keras.Input((1,), name="noise")
    words = keras.Input((5, 7), name="words")
    x = layers.Conv2D(WIDTH, 3, padding="same")(image)
    x = x + layers.Dense(WIDTH)(Sinusoids()(noise))[:, None, None, :]
    x = layers.GroupNormalization(3)(x)
    flat = layers.Reshape((64, WIDTH))(x)
    flat = flat + layers.MultiHeadAttention(2, 6)(flat, flat)
    flat = flat + layers.MultiHeadAttention(2, 6)(flat, words, words)
    x = layers.Reshape((8, 8, WIDTH))(flat)
    x = layers.UpSampling2D()(layers.AveragePooling2D(2)(x))
    x = layers.Conv2D(3, 3, padding="same", kernel_initializer="glorot_normal")(x)
    return keras.Model([image, noise, words], x, name="denoiser")


class ContrastivePairs(keras.Model):
    """Images and captions that belong together, found among those of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.image = keras.Sequential(
            [layers.Conv2D(WIDTH, 4, strides=4), layers.Reshape((4, WIDTH))]
        )
        self.words = layers.Embedding(23, WIDTH)
        self.mix = layers.MultiHeadAttention(2, 6)
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, inputs: dict[str, Any]) -> Any:
        x, y = self.image(inputs["image"]), self.words(inputs["words"])
        x, y = (ops.mean(z + self.mix(z, z), axis=1) for z in (x, y))
        x, y = (ops.normalize(z, axis=-1) for z in (x, y))
        return self.scale * ops.matmul(x, ops.transpose(y))


def contrastive_pairs() -> keras.Model:
    model = ContrastivePairs()
    model(_pairs(np.random.default_rng(0), 3))
    return model


def _pairs(rng: np.random.Generator, n: int) -> dict[str, Any]:
    return {
        "image": numbers(8, 8, 3)(rng, n),
        "words": tokens(23, 5, padded=False)(rng, n),
    }


_SPARSE = {"loss": "sparse_categorical_crossentropy"}
_LOGITS = {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}

PROGRAMS = (
    Program(vision_transformer, numbers(12, 12, 3), classes(5), _LOGITS, loads=False),
    Program(
        class_token_transformer,
        lambda rng, n: rng.integers(256, size=(n, 8, 8, 3)).astype("float32"),
        classes(4),
        _SPARSE,
    ),
    Program(
        compact_convolutional_transformer,
        lambda rng, n: rng.integers(256, size=(n, 16, 16, 3)).astype("float32"),
        classes(3),
        _LOGITS,
    ),
    Program(
        shifted_windows,
        numbers(16, 16, 3),
        classes(3),
        _SPARSE,
        refused={"gpu": "cuts windows by tensors of six axes"},
    ),
    Program(
        mobile_vision_transformer,
        numbers(16, 16, 3),
        classes(3),
        _SPARSE,
        refused={"gpu": "attention over two axes has tensors of five"},
    ),
    Program(
        video_transformer,
        numbers(8, 8, 8, 1),
        classes(3),
        _SPARSE,
        holds_constants=True,
        refused={"gpu": "convolutions in three dimensions"},
    ),
    Program(perceiver, numbers(8, 8, 3), classes(3), _LOGITS, loads=False),
    Program(masked_autoencoder, numbers(12, 12, 3), None, {"loss": "mse"}, loads=False),
    Program(
        captioning,
        lambda rng, n: [numbers(8, 8, 3)(rng, n), tokens(23, 6)(rng, n)],
        classes(23, 6),
        _SPARSE,
        pads=True,
        loads=False,
        pads_outputs=True,
    ),
    Program(
        detection_by_queries,
        numbers(16, 16, 3),
        lambda rng, n: [classes(4, 5)(rng, n), abs(numbers(5, 4)(rng, n))],
        {"loss": ["sparse_categorical_crossentropy", "mae"]},
        loads=False,
        holds_constants=True,
    ),
    Program(
        diffusion_denoiser,
        lambda rng, n: [
            numbers(8, 8, 3)(rng, n),
            rng.random((n, 1)).astype("float32"),
            numbers(5, 7)(rng, n),
        ],
        numbers(8, 8, 3),
        {"loss": "mae"},
    ),
    Program(
        contrastive_pairs, _pairs, classes(3), _LOGITS, batching=False, loads=False
    ),
)
