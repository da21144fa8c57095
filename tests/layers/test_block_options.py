"""Options of the blocks: each reaches its parts, is saved, or is refused by name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_mha import (
    FeedForward,
    MultiHeadAttention,
    MultiHeadSelfAttention,
    RelativePositionBias,
    ResidualNorm,
    TransformerDecoderBlock,
    TransformerEncoderBlock,
)
from keras_mha.layers import transformer_block
from tests.support.layers import (
    PADDING,
    B,
    D,
    H,
    N,
    T,
    made,
    normal,
    plain_config,
    randomize,
)

HIDDEN, S, DM = 17, 5, 11
INPUTS, MEMORY = normal(B, T, D), normal(B, S, DM, seed=1)
BLOCKS = TransformerEncoderBlock, TransformerDecoderBlock
each_block = pytest.mark.parametrize("block_class", BLOCKS)


@keras.saving.register_keras_serializable(package="keras_mha_tests")
class Scaled(MultiHeadSelfAttention):
    """Self-attention of a user, with an option that the package knows nothing of."""

    def __init__(self, num_heads: int, *, factor: float = 1.0, **options: Any) -> None:
        super().__init__(num_heads, **options)
        self.factor = factor

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "factor": self.factor}

    def call(self, inputs: Any, **options: Any) -> Any:
        return super().call(inputs * self.factor, **options)


def decoder(**options: Any) -> TransformerDecoderBlock:
    """A built decoder block with cross-attention and random weights."""
    options = {"key_dim": H, "cross_attention": True, **options}
    return made(TransformerDecoderBlock(N, HIDDEN, **options), (B, T, D), (B, S, DM))


# What options reach.


@each_block
def test_an_option_of_one_part_reaches_that_part_only(block_class: Any) -> None:
    block = block_class(
        N,
        HIDDEN,
        use_bias=False,
        bias_initializer="ones",
        kernel_constraint="non_neg",
        attention={"use_bias": True, "dropout": 0.1, "seed": 5, "value_dim": 3},
        feed_forward={"kernel_constraint": None, "activation": "relu"},
    )
    attention, network = block.attention.sublayer, block.feed_forward.sublayer
    assert (attention.use_bias, network.use_bias) == (True, False)
    assert (attention.dropout, network.dropout) == (0.1, 0.0)
    assert (attention.seed, network.seed) == (5, None)
    assert attention.value_dim == 3
    assert attention.get_config()["kernel_constraint"]["class_name"] == "NonNeg"
    assert network.kernel_constraint is None
    assert network.activation is keras.activations.relu
    for part in (attention, network):
        assert part.get_config()["bias_initializer"]["class_name"] == "Ones"


def test_an_activity_regularizer_is_the_blocks_unless_a_part_is_told() -> None:
    block = TransformerEncoderBlock(
        N, HIDDEN, activity_regularizer="l1", attention={"activity_regularizer": "l2"}
    )
    assert isinstance(block.activity_regularizer, keras.regularizers.L1)
    config = block.get_config()
    assert config["activity_regularizer"]["class_name"] == "L1"
    assert config["attention"]["activity_regularizer"]["class_name"] == "L2"
    again = TransformerEncoderBlock.from_config(config)
    assert plain_config(again) == plain_config(block)


def test_layers_in_the_place_of_parts_are_copied() -> None:
    attention = Scaled(N, factor=0.3, key_dim=H, position="alibi", name="mine")
    network = layers.Dense(D, "tanh")
    block = made(TransformerEncoderBlock(attention=attention, feed_forward=network))
    copied = block.attention.sublayer
    assert isinstance(copied, Scaled)
    assert copied is not attention
    assert not attention.built
    normed = block.attention.norm(INPUTS)
    mixed = INPUTS + MultiHeadSelfAttention.call(copied, normed * 0.3)
    dense = block.feed_forward.sublayer
    expected = mixed + np.tanh(
        ops.matmul(block.feed_forward.norm(mixed), dense.kernel) + dense.bias
    )
    np.testing.assert_allclose(block(INPUTS), expected, atol=1e-5)


def test_options_of_the_cross_attention() -> None:
    block = decoder(
        use_bias=False,
        position="alibi",
        cross_attention={"num_key_value_heads": 1, "qk_norm": "rms", "use_bias": True},
    )
    crossed = block.memory_attention.sublayer
    assert (crossed.num_heads, crossed.num_key_value_heads) == (N, 1)
    assert (crossed.key_dim, crossed.use_bias) == (H, True)
    assert block.attention.sublayer.use_bias is False
    assert crossed.get_config()["position"] is None
    copied = decoder(cross_attention=MultiHeadAttention(3, 7)).memory_attention.sublayer
    assert (copied.num_heads, copied.key_dim) == (3, 7)


@each_block
def test_a_new_option_of_a_part_is_one_of_the_blocks(
    block_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(transformer_block._PARTS, "attention", Scaled)
    block = block_class(N, HIDDEN, factor=0.3)
    assert block.attention.sublayer.factor == 0.3
    assert block.get_config()["factor"] == 0.3
    assert block_class.from_config(block.get_config()).attention.sublayer.factor == 0.3


@each_block
def test_help_lists_the_options(block_class: Any) -> None:
    parameters = inspect.signature(block_class).parameters
    defaults = {
        "num_heads": None,
        "sliding_window": None,
        "gated": False,
        "placement": "pre",
        "dropout": 0.0,
        "attention": None,
    }
    assert {name: parameters[name].default for name in defaults} == defaults
    assert not {"sublayer", "output_shape", "output_dim"} & {*parameters}


# Configurations.


CHOICES: list[dict[str, Any]] = [
    {"attention": {"use_bias": False, "dropout": 0.2, "seed": 3}, "seed": 1},
    {"feed_forward": {"kernel_regularizer": "l2", "dropout": 0.1}},
    {"attention": {"activity_regularizer": "l2", "position": "alibi"}},
    {"num_heads": None, "attention": Scaled(N, factor=0.3, key_dim=H, dtype="float64")},
    {"hidden_dim": None, "feed_forward": layers.Dense(15, "tanh")},
]
CROSSED: list[dict[str, Any]] = [
    {"cross_attention": {"num_heads": 5, "key_dim": 1}},
    {"cross_attention": {"use_bias": True, "dropout": 0.2, "qk_norm": "rms"}},
    {"cross_attention": MultiHeadAttention(5, 7, position="alibi", dropout=0.2)},
    {"num_heads": None, "attention": Scaled(5), "cross_attention": True},
]


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize(
    ("block_class", "options"),
    [(kind, options) for kind in BLOCKS for options in CHOICES]
    + [(TransformerDecoderBlock, options) for options in CROSSED],
    ids=str,
)
def test_configurations_bring_parts_back(
    block_class: Any, options: dict[str, Any], built: bool
) -> None:
    sizes = {"num_heads": 3, "hidden_dim": HIDDEN, **options}
    block = block_class(**{k: v for k, v in sizes.items() if v is not None})
    unbuilt = plain_config(block)
    shapes = [(B, T, 15), (B, S, DM)][: 1 + getattr(block, "cross_attention", False)]
    if built:
        block.build(*shapes)
        assert plain_config(block) == unbuilt
    again = block_class.from_config(block.get_config())
    assert plain_config(again) == unbuilt
    again.build(*shapes)
    if not built:
        block.build(*shapes)
    for one, other in zip(
        block._flatten_layers(), again._flatten_layers(), strict=True
    ):
        assert type(one) is type(other)
        # Normalizations are named by a count.
        assert plain_config(one) | {"name": ""} == plain_config(other) | {"name": ""}


def test_parts_of_a_saved_model(tmp_path: Path) -> None:
    inputs, memory = keras.Input((None, D)), keras.Input((None, DM))
    x = TransformerEncoderBlock(
        attention=Scaled(N, factor=0.3, key_dim=H), feed_forward=layers.Dense(D)
    )(inputs)
    x = TransformerDecoderBlock(
        N,
        HIDDEN,
        key_dim=H,
        position="relative",
        feed_forward={"use_bias": False},
        cross_attention={"num_heads": 3, "num_key_value_heads": 1},
    )(x, memory)
    model = keras.Model([inputs, memory], x)
    randomize(model)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded([INPUTS, MEMORY]), model([INPUTS, MEMORY]))


# Positions of a decoder.


def test_relative_positions_of_a_decoder_are_one_sided() -> None:
    block = decoder(position="relative", cross_attention=False)
    bias = block.attention.sublayer.position_layer
    assert bias.bidirectional is False
    one_sided = RelativePositionBias(N, bidirectional=False)
    other = decoder(position=one_sided, cross_attention=False)
    other.set_weights(block.get_weights())
    long = normal(B, 41, D, seed=3)  # past the 16 distances that have their own bucket
    np.testing.assert_allclose(block(long), other(long), atol=1e-6)
    again = TransformerDecoderBlock.from_config(block.get_config())
    assert again.attention.sublayer.position_layer.bidirectional is False
    told = TransformerDecoderBlock(N, HIDDEN, attention={"position": "relative"})
    assert told.attention.sublayer.position_layer.bidirectional is False
    encoder = TransformerEncoderBlock(N, HIDDEN, position="relative")
    assert encoder.attention.sublayer.position_layer.bidirectional is True


def test_a_configuration_of_the_first_version_stays_two_sided() -> None:
    config = TransformerDecoderBlock(N, HIDDEN, dtype="mixed_bfloat16").get_config()
    old = {
        name: value
        for name, value in config.items()
        if name not in ("attention", "feed_forward")
    }
    block = TransformerDecoderBlock.from_config({**old, "position": "relative"})
    bias = block.attention.sublayer.position_layer
    assert bias.bidirectional is True
    assert bias.compute_dtype == "bfloat16"
    again = TransformerDecoderBlock.from_config(block.get_config())
    assert again.attention.sublayer.position_layer.bidirectional is True


# What is refused.


@each_block
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_nrom": "rms"}, "no argument `qk_nrom`.*Close to it is `qk_norm`"),
        ({"output_shape": 3}, "no argument `output_shape`"),
        (
            {"attention": {"gated": True}},
            "`attention` takes options of `MultiHeadSelfAttention`.*"
            "`FeedForward` takes it.*with 'gated'",
        ),
        ({"feed_forward": {"output_dim": 3}}, "`feed_forward` takes.*'output_dim'"),
        ({"attention": {"dtype": "float32"}}, "`attention` takes.*with 'dtype'"),
        ({"attention": 3}, "`attention` must be a dictionary of options.*=3"),
        ({"attention": layers.Dense(3)}, "layer of the class `MultiHeadSelfAttention`"),
        ({"feed_forward": "mlp"}, "`feed_forward` must be a dictionary.*='mlp'"),
    ],
    ids=str,
)
def test_options_that_no_part_takes(
    block_class: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        block_class(N, HIDDEN, **options)


@each_block
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"position": "alibi", "attention": {"position": "rotary"}},
            "`position` is told twice: .* by `attention`.*position='alibi'",
        ),
        (
            {"attention_dropout": 0.1, "attention": {"dropout": 0.2}},
            "`attention_dropout` is told twice.* by `attention`",
        ),
        (
            {"hidden_dropout": 0.1, "feed_forward": {"dropout": 0.2}},
            "`hidden_dropout` is told twice.* by `feed_forward`",
        ),
        ({"attention": MultiHeadSelfAttention(N)}, "`num_heads` is told twice"),
        ({"feed_forward": FeedForward(3)}, "`hidden_dim` is told twice"),
    ],
    ids=str,
)
def test_options_that_a_part_is_told_twice(
    block_class: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        block_class(N, HIDDEN, **options)


@each_block
def test_sizes_are_needed(block_class: Any) -> None:
    with pytest.raises(TypeError, match="needs `num_heads`, or a layer as `attention`"):
        block_class(hidden_dim=HIDDEN)
    with pytest.raises(TypeError, match="needs `hidden_dim`"):
        block_class(N)


def test_options_of_the_cross_attention_are_checked_when_it_is_made() -> None:
    with pytest.raises(TypeError, match="`cross_attention` takes options of"):
        TransformerDecoderBlock(N, HIDDEN, cross_attention={"gated": True})
    with pytest.raises(ValueError, match="`qk_norm` must be"):
        TransformerDecoderBlock(N, HIDDEN, cross_attention={"qk_norm": "batch"})
    with pytest.raises(TypeError, match="`cross_attention` must be a dictionary"):
        TransformerDecoderBlock(N, HIDDEN, cross_attention="yes")


@each_block
def test_arguments_once_passed_by_position(block_class: Any) -> None:
    with pytest.warns(DeprecationWarning, match="`activation`, `gated`, `placement`"):
        block = block_class(N, HIDDEN, H, "relu", True, "post")
    network = block.feed_forward.sublayer
    assert (network.gated, block.attention.placement) == (True, "post")
    assert network.activation is keras.activations.relu


# Calls.


@each_block
def test_other_ranks_are_refused(block_class: Any) -> None:
    told = r"`: `inputs` must have the shape \(B, T, D\)"
    for shape in ((B, D), (B, T, 2, D)):
        with pytest.raises(ValueError, match=f"Block{told}"):
            block_class(N, HIDDEN, key_dim=H)(normal(*shape))
    residual = ResidualNorm(MultiHeadSelfAttention(N, H))
    with pytest.raises(ValueError, match=f"Norm{told}"):
        residual(normal(B, D))


@each_block
def test_products_that_keras_takes_for_sparse(block_class: Any) -> None:
    ids = keras.Input((None,), dtype="int32")
    scaled = layers.Embedding(9, D)(ids) * D**0.5
    assert scaled.sparse
    block = block_class(N, HIDDEN, key_dim=H)
    model = keras.Model(ids, block(scaled))
    numbers = np.where(PADDING, 5, 0)
    table = model.layers[1]
    expected = block(table(numbers) * D**0.5)
    np.testing.assert_allclose(model(numbers), expected, atol=1e-5)


@each_block
def test_masked_inputs_in_a_remat_scope(block_class: Any) -> None:
    length = 1030  # long enough for blockwise attention, which pads its masks
    with keras.RematScope(mode="full"):
        ids = keras.Input((length,), dtype="int32")
        block = block_class(N, HIDDEN, key_dim=H, flash_attention=True)
        outputs = block(layers.Embedding(9, D, mask_zero=True)(ids))
    model = keras.Model(ids, outputs)
    numbers = np.where(np.arange(length) < 700, 5, 0)[None]
    plain = block_class.from_config(block.get_config())
    plain.build((1, length, D))
    plain.set_weights(block.get_weights())
    vectors = model.layers[1](numbers)
    expected = plain(vectors, mask=numbers != 0)
    np.testing.assert_allclose(model(numbers), expected, atol=1e-5)
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(numbers, np.zeros((1, length, D)), verbose=0)
