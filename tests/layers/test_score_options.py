"""Options of the scores on both attention layers: values, gradients, packing, flash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha import (
    ALiBi,
    CausalMask,
    MultiHeadAttention,
    MultiHeadSelfAttention,
    RelativePositionBias,
    RotaryEmbedding,
    SlidingWindowMask,
    TransformerEncoderBlock,
    pack_sequences,
    unpack_sequences,
)
from keras_mha.attention.blockwise import front as blockwise
from tests.support import layer_oracle as oracle
from tests.support import score_cases as cases
from tests.support.attention_cases import check_close
from tests.support.layers import Result, assert_equal, differentiate, normal, randomize
from tests.support.score_cases import (
    CROSS_CALLS,
    DQ,
    DV,
    KINDS,
    OPTIONS,
    ROW_IDS,
    SELF_CALLS,
    SELF_INPUTS,
    B,
    H,
    K,
    N,
    S,
    T,
    made,
)

each_kind = pytest.mark.parametrize("kind", KINDS)
each_option = pytest.mark.parametrize("options", OPTIONS)
TOGETHER = ["gemma", "t5", "bloom"]


# Values and gradients, against the oracle.


@each_kind
@each_option
def test_each_option_has_the_oracles_values_and_gradients(
    kind: str, options: str
) -> None:
    cases.check_values_and_gradients(kind, options, "all", ["eager", "graph"])


@each_kind
@pytest.mark.parametrize("options", TOGETHER)
def test_options_together_in_xla(kind: str, options: str) -> None:
    cases.check_values_and_gradients(kind, options, "all", ["xla"])


@pytest.mark.parametrize(
    ("kind", "call"),
    [(kind, call) for kind in KINDS for call in KINDS[kind][2] if call != "all"],
)
def test_each_call_argument_has_the_oracles_values_and_gradients(
    kind: str, call: str
) -> None:
    cases.check_values_and_gradients(kind, "plain", call, ["eager"])


@each_kind
@each_option
def test_the_comparison_sees_every_option(kind: str, options: str) -> None:
    if options == "plain":
        return
    layer, plain = made(kind, options), made(kind)
    if options == "window":
        plain.set_weights(layer.get_weights())
    expected = cases.expect(kind, layer)[0]
    without = cases.expect(kind, plain)[0]
    assert expected.shape != without.shape or np.abs(expected - without).max() > 0.01


@each_kind
@pytest.mark.parametrize("name", sorted({*SELF_CALLS, *CROSS_CALLS} - {"plain"}))
def test_the_comparison_sees_every_call_argument(kind: str, name: str) -> None:
    layer = made(kind)
    expected = cases.expect(kind, layer, name)[0]
    assert np.abs(expected - cases.expect(kind, layer)[0]).max() > 0.01


@each_kind
@each_option
def test_probabilities(kind: str, options: str) -> None:
    _, inputs, calls = KINDS[kind]
    layer = made(kind, options)
    expected, expected_scores = cases.expect(kind, layer, "all")
    outputs, scores = layer(*inputs, **calls["all"], return_attention_scores=True)
    check_close(outputs.numpy(), expected, 1e-5)
    check_close(scores.numpy(), expected_scores, 1e-5)


@each_kind
@pytest.mark.parametrize("options", TOGETHER)
@pytest.mark.parametrize(
    ("policy", "tolerance"), [("mixed_float16", 5e-3), ("mixed_bfloat16", 5e-2)]
)
def test_mixed_precision(
    kind: str, options: str, policy: str, tolerance: float
) -> None:
    _, inputs, calls = KINDS[kind]
    layer = made(kind, options, dtype=policy)
    assert all(weight.dtype == "float32" for weight in layer.trainable_variables)
    outputs = layer(*inputs, **calls["all"])
    assert outputs.dtype == policy.removeprefix("mixed_")
    expected = cases.expect(kind, layer, "all")[0]
    check_close(tf.cast(outputs, "float64").numpy(), expected, tolerance)


@each_kind
@pytest.mark.parametrize("options", TOGETHER)
def test_the_layers_own_compilation_changes_no_value(kind: str, options: str) -> None:
    _, inputs, calls = KINDS[kind]
    layers = [
        made(kind, options, jit_compile=jit_compile) for jit_compile in (True, "auto")
    ]
    found, expected = (result_of(layer, inputs, calls["all"]) for layer in layers)
    assert_equal(found, expected)


def result_of(
    layer: Any, inputs: list[np.ndarray], call: dict[str, Any], **others: Any
) -> Result:
    """Outputs and gradients by the queries and every weight."""
    first, *rest = inputs
    return differentiate(
        lambda x: layer(x, *rest, **call, **others), first, layer.trainable_weights
    )


# Grouped heads.


@pytest.mark.parametrize("shared", [1, 2])
def test_grouped_heads_equal_repeated_weights(shared: int) -> None:
    layer = made("cross", num_key_value_heads=shared)
    full = made("cross")
    for weight, source in zip(full.weights, layer.weights, strict=True):
        array = np.asarray(source)
        if "/key/" in source.path or "/value/" in source.path:
            array = np.repeat(array, N // shared, axis=-2)
        weight.assign(array)
    _, inputs, calls = KINDS["cross"]
    np.testing.assert_allclose(
        layer(*inputs, **calls["all"]), full(*inputs, **calls["all"]), atol=1e-5
    )


@pytest.mark.parametrize("shared", [1, 2])
def test_both_layers_group_alike(shared: int) -> None:
    layer = made("self", num_key_value_heads=shared)
    assert tuple(layer.qkv_dense.kernel.shape) == (DQ, shared, (N // shared + 2) * H)
    other = MultiHeadAttention(N, H, num_key_value_heads=shared)
    other.build((B, T, DQ), (B, T, DQ))
    parts = oracle.unfused(layer, oracle.weights_of(layer))
    for weight in other.weights:
        weight.assign(parts[weight.path.removeprefix(f"{other.path}/")])
    (inputs,), call = (
        SELF_INPUTS,
        {"attention_mask": SELF_CALLS["all"]["attention_mask"]},
    )
    np.testing.assert_allclose(
        layer(inputs, **call), other(inputs, inputs, **call), atol=1e-5
    )


def test_each_part_of_a_grouped_kernel_is_drawn_as_its_own_projection() -> None:
    layer = MultiHeadSelfAttention(12, 8, num_key_value_heads=3)
    layer.build((None, None, 96))
    stock = MultiHeadAttention(12, 8, num_key_value_heads=3)
    stock.build((None, None, 96), (None, None, 96))
    parts = oracle.unfused(layer, oracle.weights_of(layer))
    for name in ("query", "key", "value"):
        found = parts[f"{name}/kernel"].std()
        wanted = np.std(getattr(stock, f"{name}_dense").kernel)
        assert abs(found / wanted - 1.0) < 0.05, name


# Positions.


@pytest.mark.parametrize("position", ["rotary", "alibi", "relative"])
def test_a_name_stands_for_the_layer_of_defaults(position: str) -> None:
    layer_class: Any = {
        "rotary": RotaryEmbedding,
        "alibi": lambda: ALiBi(N),
        "relative": lambda: RelativePositionBias(N),
    }[position]
    given = layer_class()
    named, made_of_it = made("self", position=position), made("self", position=given)
    np.testing.assert_array_equal(named(*SELF_INPUTS), made_of_it(*SELF_INPUTS))
    assert made_of_it.position_layer is not given
    assert not given.built or not given.weights


def test_layers_given_one_position_share_no_weights() -> None:
    given = RelativePositionBias(N)
    one, other = (made("self", position=given) for _ in range(2))
    assert one.position_layer.embeddings is not other.position_layer.embeddings
    assert len(one.weights) == len(made("self").weights) + 1


@pytest.mark.parametrize("position", ["rotary", "alibi", "relative"])
def test_positions_tell_an_order_that_plain_attention_does_not_know(
    position: str,
) -> None:
    (inputs,) = SELF_INPUTS
    plain, layer = made("self"), made("self", position=position)
    order = np.array([3, 0, 6, 1, 5, 2, 4])
    np.testing.assert_allclose(
        plain(inputs[:, order]), np.asarray(plain(inputs))[:, order], atol=1e-5
    )
    mixed, expected = layer(inputs[:, order]), np.asarray(layer(inputs))[:, order]
    assert np.abs(mixed - expected).max() > 0.01


def test_a_policy_reaches_what_tells_positions_and_normalizes() -> None:
    layer = made("self", "t5", dtype="mixed_bfloat16")
    for part in (layer.position_layer, layer.query_norm, layer.key_norm):
        assert part.compute_dtype == "bfloat16"


# Sinks, gate, head mask.


def test_a_large_sink_takes_all_the_weight() -> None:
    layer = made("self", use_sinks=True)
    layer.sinks.assign([1e4, -1e4, 1e4, -1e4])
    _, scores = layer(*SELF_INPUTS, return_attention_scores=True)
    np.testing.assert_allclose(scores.numpy()[:, ::2], 0.0)
    np.testing.assert_allclose(scores.numpy()[:, 1::2].sum(-1), 1.0, atol=1e-6)


def test_a_head_masked_out_has_no_gradient() -> None:
    layer, keep = made("cross"), np.array([1.0, 0.0, 1.0, 1.0], "float32")
    _, inputs, _ = KINDS["cross"]
    result = result_of(layer, inputs, {"head_mask": keep})
    kernels = {
        weight.path.split("/")[-2]: gradient
        for weight, gradient in zip(
            layer.trainable_weights, result.weights, strict=True
        )
        if weight.path.endswith("kernel")
    }
    for name in ("query", "key", "value"):
        assert np.all(kernels[name][:, 1] == 0)
        assert np.abs(kernels[name][:, 0]).max() > 1e-3
    assert np.all(kernels["attention_output"][1] == 0)


# Packing.

LENGTHS = (3, 5, 2, 4, 6)
SEQUENCES = [normal(length, DQ, seed=60 + length) for length in LENGTHS]
PACKED = pack_sequences(SEQUENCES, row_length=7)


def packed_layers() -> dict[str, Callable[[], Any]]:
    def block(**options: Any) -> TransformerEncoderBlock:
        layer = TransformerEncoderBlock(N, 17, key_dim=H, **options)
        layer.build((None, None, DQ))
        randomize(layer)
        return layer

    return {
        **{
            name: lambda name=name: made("self", name)
            for name in ("plain", "window", "gemma", "bloom")
        },
        "relative": lambda: made("self", "relative_layer"),
        "block": lambda: block(position="rotary", use_gate=True),
        "post_block": lambda: block(placement="post", num_key_value_heads=1),
    }


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", packed_layers())
def test_a_packed_batch_gives_each_sequence_the_values_it_has_alone(
    name: str, causal: bool, flash: bool
) -> None:
    layer = packed_layers()[name]()
    attention = layer if hasattr(layer, "qkv_dense") else layer.attention.sublayer
    attention._flash_attention = flash
    assert PACKED.values.shape[0] < len(LENGTHS)

    def packed_call(values: Any) -> Any:
        outputs = layer(values, segment_ids=PACKED.segment_ids, use_causal_mask=causal)
        return unpack_sequences(outputs, PACKED.index)

    def alone(padded: Any) -> Any:
        longest = max(LENGTHS)
        return tf.concat(
            [
                tf.pad(
                    layer(padded[i : i + 1, :length], use_causal_mask=causal),
                    ((0, 0), (0, longest - length), (0, 0)),
                )
                for i, length in enumerate(LENGTHS)
            ],
            axis=0,
        )

    padded = np.asarray(unpack_sequences(PACKED.values, PACKED.index))
    found = differentiate(packed_call, PACKED.values, layer.trainable_weights)
    expected = differentiate(alone, padded, layer.trainable_weights)
    unpacked = np.asarray(unpack_sequences(found.inputs, PACKED.index))
    assert_equal(found._replace(inputs=unpacked), expected)


def test_a_training_step_on_a_packed_batch_is_that_on_a_padded_one() -> None:
    """The same weights after it, though the losses are laid out differently."""

    def model_of() -> keras.Model:
        inputs = keras.Input((None, DQ))
        segments = keras.Input((None,), dtype="int32")
        block = TransformerEncoderBlock(N, 17, key_dim=H, position="relative")
        model = keras.Model([inputs, segments], block(inputs, segment_ids=segments))
        randomize(model)
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
        return model

    packed, padded = model_of(), model_of()
    values = np.asarray(unpack_sequences(PACKED.values, PACKED.index))
    targets = [normal(length, DQ, seed=80 + length) for length in LENGTHS]
    real = PACKED.index >= 0
    share = PACKED.segment_ids.size / real.sum()
    packed.train_on_batch(
        [PACKED.values, PACKED.segment_ids],
        PACKED.pack(targets),
        sample_weight=(PACKED.segment_ids > 0) * share,
    )
    filled = np.zeros(values.shape, "float32")
    filled[real] = np.concatenate(targets)
    padded.train_on_batch(
        [values, np.where(real, 0, -1)],
        filled,
        sample_weight=real * real.size / real.sum(),
    )
    for one, other in zip(packed.weights, padded.weights, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_negative_segments_see_nothing(kind: str) -> None:
    layer = made(kind)
    _, inputs, calls = KINDS[kind]
    outputs = np.asarray(layer(*inputs, **calls["segments"]))
    bias = np.asarray(layer.output_dense.bias)
    np.testing.assert_allclose(outputs[0, -1], bias, atol=1e-6)
    assert np.abs(outputs[1, -1] - bias).max() > 0.01


def test_segments_of_another_length_need_a_pair() -> None:
    layer = made("cross")
    with pytest.raises(ValueError, match=r"`segment_ids` must have the leading dim"):
        layer(*KINDS["cross"][1], segment_ids=ROW_IDS)


# Linear memory.


FLASH = [
    (kind, options, mode)
    for kind in KINDS
    for options in ("plain", *TOGETHER)
    for mode in ("eager", "graph")
]


@pytest.mark.parametrize(
    ("kind", "options", "mode"),
    [*FLASH, ("self", "gemma", "xla"), ("cross", "t5", "xla")],
)
def test_flash_attention_has_the_same_values_and_gradients(
    kind: str, options: str, mode: str
) -> None:
    _, inputs, calls = KINDS[kind]
    wrap: Any = {
        "eager": lambda call: call,
        "graph": tf.function,
        "xla": lambda call: tf.function(call, jit_compile=True),
    }[mode]
    first, *rest = inputs
    results = []
    for flash in (True, False):
        layer = made(kind, options, flash_attention=flash, dropout=0.4, seed=3)
        call = wrap(
            lambda x, layer=layer: layer(x, *rest, **calls["all"], training=True)
        )
        results.append(differentiate(call, first, layer.trainable_weights))
    assert_equal(*results)


@each_kind
def test_dropout_of_another_seed_is_seen_by_the_comparison(kind: str) -> None:
    _, inputs, calls = KINDS[kind]
    results = [
        result_of(
            made(kind, flash_attention=True, dropout=0.4, seed=seed),
            inputs,
            calls["all"],
            training=True,
        )
        for seed in (3, 4)
    ]
    with pytest.raises(AssertionError):
        assert_equal(*results)


@each_kind
@pytest.mark.parametrize("flash", [True, False, None])
def test_flash_attention_decides_who_serves(
    kind: str, flash: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[bool] = []
    attend = blockwise.attend

    def spy(*args: Any, **options: Any) -> Any:
        served.append(True)
        return attend(*args, **options)

    monkeypatch.setattr(blockwise, "attend", spy)
    layer, inputs = made(kind, flash_attention=flash), KINDS[kind][1]
    layer(*inputs)
    if flash is not None:
        assert bool(served) is flash
    served.clear()
    # Scores that are asked for are a table in any case.
    layer(*inputs, return_attention_scores=True)
    assert not served


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [True, False])
@each_kind
def test_flash_attention_trains_alike_in_fit(kind: str, jit_compile: bool) -> None:
    weights = []
    for flash in (True, False):
        inputs = keras.Input((None, DQ))
        memory = keras.Input((None, DV))
        layer_class = KINDS[kind][0]
        layer = layer_class(
            N, H, position="relative", dropout=0.3, seed=5, flash_attention=flash
        )
        given = [inputs] if kind == "self" else [inputs, memory]
        model = keras.Model(given, layer(*given, use_causal_mask=True))
        randomize(model)
        model.compile("sgd", "mse", jit_compile=jit_compile)
        arrays = [normal(B, T, DQ, seed=1), normal(B, S, DV, seed=2)][: len(given)]
        model.fit(arrays, normal(B, T, DQ, seed=3), epochs=2, verbose=0)
        weights.append(model.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


# Models.


@each_kind
def test_a_mask_value_can_be_the_attention_mask(kind: str) -> None:
    _, inputs, _ = KINDS[kind]
    layer, windowed = made(kind), made(kind, sliding_window=3)
    mask = CausalMask() & SlidingWindowMask(3)
    expected = windowed(*inputs, use_causal_mask=True)
    symbols = [keras.Input((None, array.shape[-1])) for array in inputs]
    model = keras.Model(symbols, layer(*symbols, attention_mask=mask))
    for found in (layer(*inputs, attention_mask=mask), model(inputs)):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_every_call_argument_can_be_a_symbolic_input() -> None:
    inputs, call = SELF_INPUTS[0], SELF_CALLS["all"]
    layer = made("self", "gemma")
    given = {name: call[name] for name in call if name != "use_causal_mask"}
    symbols = {
        name: keras.Input(
            (N,)
            if name == "head_mask"
            else (*[N, None][: array.ndim - 3], *[None] * 2)
            if array.ndim > 2
            else (None,),
            dtype=str(array.dtype),
        )
        for name, array in given.items()
    }
    first = keras.Input((None, DQ))
    outputs = layer(first, **symbols, use_causal_mask=True)
    assert outputs.shape == (None, None, DQ)
    model = keras.Model([first, *symbols.values()], outputs)
    found = model([inputs, *given.values()])
    check_close(found.numpy(), cases.expect("self", layer, "all")[0], 1e-5)


@each_kind
@pytest.mark.parametrize("options", TOGETHER)
def test_new_weights_keep_their_names(kind: str, options: str) -> None:
    layer = made(kind, options)
    names = {weight.path.removeprefix(f"{layer.path}/") for weight in layer.weights}
    new = {
        "gemma": {"query_norm/scale", "key_norm/scale", "sinks", "gate/kernel"},
        "t5": {"query_norm/gamma", "key_norm/beta", "sinks", "relative/embeddings"},
        "bloom": {"gate/kernel", "gate/bias"},
    }[options]
    assert new <= names
    assert layer_of_plain_names(kind) <= names | {
        name for name in layer_of_plain_names(kind) if name.endswith("bias")
    }


def layer_of_plain_names(kind: str) -> set[str]:
    layer = made(kind)
    return {weight.path.removeprefix(f"{layer.path}/") for weight in layer.weights}


# What is refused.

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "groups": (
        {"num_key_value_heads": 3},
        r"`num_heads` must be a multiple of `num_key_value_heads`\. Received: "
        r"num_heads=4 and num_key_value_heads=3",
    ),
    "no_groups": (
        {"num_key_value_heads": 0},
        r"`num_key_value_heads`, expected a positive integer.*num_key_value_heads=0",
    ),
    "position_name": (
        {"position": "absolute"},
        r"`position` must be None, one of .*Received: position='absolute'",
    ),
    "position_layer": (
        {"position": keras.layers.Identity()},
        r"`position` must be None, one of .*Received: position=<Identity",
    ),
    "position_heads": (
        {"position": ALiBi(3)},
        r"Received: position with num_heads=3 and num_heads=4",
    ),
    "qk_norm": (
        {"qk_norm": "batch"},
        r"`qk_norm` must be None or one of \['layer', 'rms'\]\. Received: "
        r"qk_norm='batch'",
    ),
    "qk_norm_epsilon": (
        {"qk_norm": "rms", "qk_norm_epsilon": -1.0},
        r"`qk_norm_epsilon` must be a positive, finite number\. Received: "
        r"qk_norm_epsilon=-1\.0",
    ),
    "epsilon_of_nothing": (
        {"qk_norm_epsilon": 0.5},
        r"`qk_norm_epsilon` belongs to .* Received: qk_norm=None, qk_norm_epsilon=0\.5",
    ),
    "soft_cap": (
        {"logits_soft_cap": 0.0},
        r"`logits_soft_cap` must be a positive, finite number\. Received: "
        r"logits_soft_cap=0\.0",
    ),
    "window": (
        {"sliding_window": 0},
        r"`sliding_window`, expected a positive integer.*sliding_window=0",
    ),
}


@each_kind
@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_options_out_of_their_domain(
    kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        KINDS[kind][0](N, H, **options)


REFUSED_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "floating_segments": (
        {"segment_ids": normal(B, T)},
        TypeError,
        r"`segment_ids` must be integers\. Received dtype float32",
    ),
    "segment_rank": (
        {"segment_ids": ROW_IDS[0]},
        ValueError,
        r"`segment_ids` must have rank 2",
    ),
    "boolean_bias": (
        {"attention_bias": np.ones((T, T), bool)},
        TypeError,
        r"bias` must be floating\. Received dtype bool",
    ),
    "bias_rank": (
        {"attention_bias": normal(T)},
        ValueError,
        r"bias` must have the shape \(T, S\), \(B, T, S\) or \(B, N, T, S\)",
    ),
    "head_mask_rank": (
        {"head_mask": normal(B, N, 1)},
        ValueError,
        r"`head_mask` must have the shape \(N,\) or \(B, N\), N=4, B=2\. Received: "
        r"head_mask of shape \(2, 4, 1\)",
    ),
    "head_mask_heads": (
        {"head_mask": normal(1)},
        ValueError,
        r"`head_mask` must have the shape.*Received: head_mask of shape \(1,\)",
    ),
    "head_mask_batch": (
        {"head_mask": normal(3, N)},
        ValueError,
        r"`head_mask` must have the shape.*Received: head_mask of shape \(3, 4\)",
    ),
    "bias_callable": (
        {"attention_bias": ALiBi(N)},
        TypeError,
        r"`attention_bias` must be a tensor; biases of distances go to the layer's "
        r"`position`\. Received: attention_bias=<ALiBi",
    ),
}


@pytest.mark.parametrize(
    ("call", "error", "message"), REFUSED_CALLS.values(), ids=REFUSED_CALLS
)
def test_call_arguments_that_do_not_fit(
    call: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        made("self")(*SELF_INPUTS, **call)


def test_segments_are_one_array_or_a_pair() -> None:
    layer, inputs = made("cross"), KINDS["cross"][1]
    with pytest.raises(ValueError, match=r"`segment_ids` must be one array, or a"):
        layer(*inputs, segment_ids=(ROW_IDS, ROW_IDS, ROW_IDS))


AXES = {"attention_axes": (1, 2)}


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"position": "rotary"}, {}, r"`position` needs a single attention axis"),
        (
            {},
            {"attention_bias": normal(T, T), "segment_ids": ROW_IDS},
            r"need a single attention axis\. Received: attention_axes=\(1, 2\) and "
            r"segment_ids, attention_bias",
        ),
    ],
    ids=["position", "call"],
)
def test_several_axes_have_no_order(
    options: dict[str, Any], call: dict[str, Any], message: str
) -> None:
    inputs = normal(B, T, 3, DQ)
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(N, H, **AXES, **options)(inputs, inputs, **call)


def test_options_without_an_order_serve_several_axes() -> None:
    options: dict[str, Any] = {
        "num_key_value_heads": K,
        "qk_norm": "rms",
        "logits_soft_cap": 2.0,
        "use_sinks": True,
        "use_gate": True,
    }
    inputs = normal(B, T, 3, DQ, seed=5)
    both = MultiHeadAttention(N, H, **AXES, **options)
    flat = MultiHeadAttention(N, H, **options)
    both.build(inputs.shape, inputs.shape)
    flat.build((B, T * 3, DQ), (B, T * 3, DQ))
    randomize(both)
    flat.set_weights(both.get_weights())
    rows, heads = inputs.reshape(B, T * 3, DQ), normal(B, N, seed=6)
    np.testing.assert_allclose(
        np.reshape(both(inputs, inputs, head_mask=heads), rows.shape),
        flat(rows, rows, head_mask=heads),
        atol=1e-5,
    )
