"""PyTorch's attention into ours, with torch running beside it.

Letters: B batch, T query length, S key length, N heads, H head size, E = N H width, F
hidden width, DK and DV widths of keys and values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from keras_mha import (
    MultiHeadAttention,
    MultiHeadSelfAttention,
    TransformerEncoderBlock,
)
from keras_mha.convert import from_torch, torch_modules, torch_weights
from tests.support.attention_cases import numbers, pairs
from tests.support.layers import normal

torch = pytest.importorskip("torch", reason="torch is not installed")
nn = torch.nn

B, T, S, N, H, F, DK, DV = 2, 5, 7, 3, 11, 17, 13, 19
E = N * H
# torch's True means "not allowed".
KEYS_HIDDEN = ~pairs(B, S, seed=1)
PADDED = np.arange(T) >= np.array([[3], [5]])
PAIRS_HIDDEN = ~pairs(T, S)
EACH_HIDDEN = ~pairs(B, N, T, S)
WIDTHS: dict[str, dict[str, int]] = {
    "packed": {},
    "separate": {"kdim": DK, "vdim": DV},
    "other keys": {"kdim": DK},
    "other values": {"vdim": DV},
}


def randomized(module: Any) -> Any:
    """The module in eval mode, with random weights, biases included."""
    with torch.no_grad():
        for place, (_, weight) in enumerate(sorted(module.named_parameters())):
            drawn = normal(*weight.shape, seed=place, scale=0.3)
            weight.copy_(torch.from_numpy(drawn))
    return module.eval()


def attention(**options: Any) -> Any:
    return randomized(nn.MultiheadAttention(E, N, **{"batch_first": True, **options}))


def encoder_layer(**options: Any) -> Any:
    return randomized(
        nn.TransformerEncoderLayer(
            E, N, F, **{"dropout": 0.0, "batch_first": True, **options}
        )
    )


def inputs_of(module: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values."""
    return (
        normal(B, T, E, seed=100),
        normal(B, S, module.kdim, seed=101),
        normal(B, S, module.vdim, seed=102),
    )


def run(module: Any, *inputs: np.ndarray, **masks: Any) -> list[np.ndarray]:
    with torch.no_grad():
        outputs = module(
            *map(torch.from_numpy, inputs),
            **{
                name: torch.from_numpy(mask) if isinstance(mask, np.ndarray) else mask
                for name, mask in masks.items()
            },
        )
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [numbers_of(each) for each in outputs]


def numbers_of(tensor: Any) -> np.ndarray:
    return tensor.double().numpy()


def state_of(module: Any, to: str = "tensors") -> dict[str, Any]:
    """A state dict of tensors or of NumPy arrays."""
    state = module.state_dict()
    return state if to == "tensors" else {n: x.numpy() for n, x in state.items()}


# Attention.

MASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "padding": ({"key_padding_mask": KEYS_HIDDEN}, {"value_mask": ~KEYS_HIDDEN}),
    "pairs": ({"attn_mask": PAIRS_HIDDEN}, {"attention_mask": ~PAIRS_HIDDEN}),
    "heads": (
        {"attn_mask": EACH_HIDDEN.reshape(B * N, T, S)},
        {"attention_mask": ~EACH_HIDDEN},
    ),
    "bias": (
        {"attn_mask": normal(T, S, seed=9)},
        {"attention_bias": normal(T, S, seed=9)},
    ),
}


def check_attention(layer: Any, module: Any, mask: str = "none") -> None:
    """Outputs and the probabilities of each head."""
    theirs, ours = MASKS[mask]
    query, key, value = inputs_of(module)
    expected = run(module, query, key, value, average_attn_weights=False, **theirs)
    found = layer(query, value, key, return_attention_scores=True, **ours)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(numbers(one), other, atol=2e-5)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", WIDTHS)
def test_attention(widths: str, bias: bool, mask: str) -> None:
    module = attention(bias=bias, **WIDTHS[widths])
    layer = from_torch(module)
    assert type(layer) is MultiHeadAttention
    assert layer.use_bias == bias
    check_attention(layer, module, mask)


@pytest.mark.parametrize("mask", ["padding", "pairs"])
def test_the_comparison_sees_masks_read_the_other_way(mask: str) -> None:
    module = attention()
    theirs, _ = MASKS[mask]
    query, key, value = inputs_of(module)
    (name, hidden) = next(iter(theirs.items()))
    expected = run(module, query, key, value, **{name: hidden})[0]
    layer = from_torch(module)
    ours = {"padding": "value_mask", "pairs": "attention_mask"}[mask]
    found = numbers(layer(query, value, key, **{ours: hidden}))
    assert np.abs(found - expected).max() > 0.05


@pytest.mark.parametrize("broken", ["heads not split", "keys and values exchanged"])
def test_the_comparison_sees_wrong_weights(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "heads not split":
        monkeypatch.setattr(
            torch_modules,
            "to_array",
            lambda _, x: np.roll(x.numpy(), 1, axis=0),
        )
    else:
        monkeypatch.setattr(torch_weights, "PARTS", ("query", "value", "key"))
    module = attention()
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_attention(from_torch(module), module)


@pytest.mark.parametrize("bias", [True, False])
def test_self_attention(bias: bool) -> None:
    module = attention(bias=bias)
    layer = from_torch(module, self_attention=True)
    assert type(layer) is MultiHeadSelfAttention
    x = normal(B, T, E)
    hidden = ~pairs(T, T)
    expected = run(module, x, x, x, key_padding_mask=PADDED, attn_mask=hidden)[0]
    found = numbers(layer(x, mask=~PADDED, attention_mask=~hidden))
    seen = ~PADDED & np.isfinite(expected).all(-1)
    assert seen.sum() > 5
    np.testing.assert_allclose(found[seen], expected[seen], atol=2e-5)


def test_time_first_is_a_matter_of_the_inputs() -> None:
    module = attention(batch_first=False)
    query, key, value = inputs_of(module)
    layer = from_torch(module)
    swapped = (np.ascontiguousarray(x.swapaxes(0, 1)) for x in (query, key, value))
    expected = run(module, *swapped)[0].swapaxes(0, 1)
    np.testing.assert_allclose(numbers(layer(query, value, key)), expected, atol=2e-5)


def test_rows_that_see_nothing_are_the_bias_where_torch_gives_nan() -> None:
    module = attention()
    query, key, value = inputs_of(module)
    hidden = PAIRS_HIDDEN.copy()
    hidden[2] = True
    expected = run(module, query, key, value, attn_mask=hidden)[0]
    layer = from_torch(module)
    found = numbers(layer(query, value, key, attention_mask=~hidden))
    assert np.isnan(expected[:, 2]).all()
    bias = numbers_of(module.out_proj.bias.detach())
    np.testing.assert_allclose(found[:, 2], np.broadcast_to(bias, (B, E)), atol=1e-6)
    seen = np.arange(T) != 2
    np.testing.assert_allclose(found[:, seen], expected[:, seen], atol=2e-5)


def test_dropout_is_that_of_the_module() -> None:
    assert from_torch(attention(dropout=0.25)).dropout == 0.25
    assert from_torch(state_of(attention()), num_heads=N, dropout=0.5).dropout == 0.5


def test_weights_are_copied() -> None:
    module = attention()
    layer = from_torch(module)
    before = layer.get_weights()
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
    for weight, expected in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)
        assert np.abs(weight).max() > 0


# Encoder layers.


def check_block(block: Any, module: Any) -> None:
    x = normal(B, T, E)
    expected = run(module, x)[0]
    np.testing.assert_allclose(numbers(block(x)), expected, atol=2e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_layer(
    norm_first: bool, activation: str, bias: bool, masked: bool
) -> None:
    module = encoder_layer(
        norm_first=norm_first, activation=activation, bias=bias, layer_norm_eps=0.03
    )
    block = from_torch(module)
    assert type(block) is TransformerEncoderBlock
    assert len(block.weights) == len(list(module.parameters()))
    if not masked:
        check_block(block, module)
        return
    x = normal(B, T, E)
    hidden = ~np.tril(np.ones((T, T), bool))
    expected = run(module, x, src_mask=hidden, src_key_padding_mask=PADDED)[0]
    found = numbers(block(x, mask=~PADDED, attention_mask=~hidden))
    np.testing.assert_allclose(found[~PADDED], expected[~PADDED], atol=2e-5)
    causal = numbers(block(x, mask=~PADDED, use_causal_mask=True))
    np.testing.assert_allclose(causal[~PADDED], expected[~PADDED], atol=2e-5)


@pytest.mark.parametrize(
    ("name", "wrong"), [("norm_first", True), ("activation", "gelu")]
)
def test_the_comparison_sees_wrong_options(name: str, wrong: Any) -> None:
    module = encoder_layer(activation="relu", layer_norm_eps=0.03)
    options: dict[str, Any] = {
        "num_heads": N,
        "norm_first": False,
        "activation": "relu",
        "layer_norm_eps": 0.03,
    }
    state = state_of(module)
    check_block(from_torch(state, **options), module)
    for change in ({name: wrong}, {"layer_norm_eps": None}):
        block = from_torch(state, **{**options, **change})
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            check_block(block, module)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [(nn.ReLU(), "relu"), (nn.GELU(), "gelu"), (torch.relu, "relu")],
)
def test_activations_that_are_modules(activation: Any, expected: str) -> None:
    module = encoder_layer(activation=activation)
    block = from_torch(module)
    assert block.get_config()["activation"] == expected
    check_block(block, module)


@pytest.mark.parametrize("activation", [nn.GELU("tanh"), nn.SiLU(), torch.tanh])
def test_other_activations_are_refused_and_can_be_given(activation: Any) -> None:
    module = encoder_layer(activation=activation)
    with pytest.raises(ValueError, match="activation"):
        from_torch(module)
    if isinstance(activation, nn.SiLU):
        options = {"num_heads": N, "norm_first": False, "activation": "silu"}
        check_block(from_torch(state_of(module), **options), module)


def test_dropouts_of_an_encoder_layer() -> None:
    module = encoder_layer(dropout=0.25)
    config = from_torch(module).get_config()
    assert (config["dropout"], config["attention_dropout"]) == (0.25, 0.25)
    module.dropout1.p = 0.5
    with pytest.raises(ValueError, match=r"dropouts \[0.25, 0.5\]"):
        from_torch(module)


def test_two_epsilons_are_refused() -> None:
    module = encoder_layer()
    module.norm2.eps = 0.5
    with pytest.raises(ValueError, match=r"epsilons \[1e-05, 0.5\]"):
        from_torch(module)


# State dicts.


@pytest.mark.parametrize("to", ["tensors", "arrays"])
def test_state_dicts(to: str) -> None:
    module = attention(kdim=DK)
    check_attention(from_torch(state_of(module, to), num_heads=N), module)
    layer = encoder_layer(norm_first=True)
    options = {"num_heads": N, "norm_first": True, "activation": "relu"}
    check_block(from_torch(state_of(layer, to), **options), layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("source", ["module", "state"])
def test_dtypes_of_tensors(dtype: Any, source: str) -> None:
    module = attention().to(dtype)
    given = {} if source == "module" else {"num_heads": N}
    layer = from_torch(module if source == "module" else state_of(module), **given)
    assert layer.dtype == "float32"
    # The same numbers, wide enough to compute with.
    check_attention(layer, module.to(torch.float32))


def test_float64_is_kept_if_asked_for() -> None:
    module = attention().double()
    layer = from_torch(module, dtype="float64", name="mixer")
    assert layer.name == "mixer"
    kernel = module.out_proj.weight.detach().numpy().T.reshape(N, H, E) + 1e-12
    module.out_proj.weight.data += 1e-12
    layer = from_torch(module, dtype="float64")
    np.testing.assert_allclose(layer.output_dense.kernel, kernel, rtol=1e-15)


def test_arrays_of_bfloat16() -> None:
    import ml_dtypes

    module = attention()
    state = {n: x.astype(ml_dtypes.bfloat16) for n, x in state_of(module, "").items()}
    layer = from_torch(state, num_heads=N)
    expected = module.out_proj.weight.detach().bfloat16().float().numpy()
    found = np.asarray(layer.output_dense.kernel).reshape(E, E).T
    np.testing.assert_array_equal(found, expected)


# What is refused.


def without(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize("name", ["out_proj.weight", "in_proj_weight", "out_proj.bias"])
def test_missing_weights_of_attention_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"must have `{name}`"):
        from_torch(without(state_of(attention()), name), num_heads=N)


@pytest.mark.parametrize("name", ["q_proj_weight", "k_proj_weight", "v_proj_weight"])
def test_missing_separate_weights_are_named(name: str) -> None:
    expected = "in_proj_weight" if name == "q_proj_weight" else name
    with pytest.raises(ValueError, match=f"must have `{expected}`"):
        from_torch(without(state_of(attention(kdim=DK)), name), num_heads=N)


OPTIONS: dict[str, Any] = {"num_heads": N, "norm_first": True, "activation": "relu"}
BLOCK_NAMES = sorted(encoder_layer().state_dict())


@pytest.mark.parametrize("name", BLOCK_NAMES)
def test_missing_and_misshapen_weights_of_blocks_are_named(name: str) -> None:
    state = state_of(encoder_layer(), "arrays")
    if name != "self_attn.in_proj_bias":
        with pytest.raises(ValueError, match=f"must have `{name}`"):
            from_torch(without(state, name), **OPTIONS)
    else:
        with pytest.raises(ValueError, match="belong nowhere.*bias"):
            from_torch(without(state, name), **OPTIONS)
    wrong = {**state, name: state[name][:-1]}
    with pytest.raises(
        ValueError, match=r"`[a-z0-9_.]+` must have the shape|divisible"
    ):
        from_torch(wrong, **OPTIONS)


def test_unexpected_weights_are_named() -> None:
    state = {**state_of(attention(), "arrays"), "scale": np.ones(3)}
    with pytest.raises(ValueError, match="belong nowhere. Received: 'scale'"):
        from_torch(state, num_heads=N)
    prefixed = {f"encoder.{n}": x for n, x in state_of(encoder_layer()).items()}
    with pytest.raises(ValueError, match=r"prefix removed.*'encoder\.linear1\.weight'"):
        from_torch(prefixed, num_heads=N)


@pytest.mark.parametrize("source", ["module", "state"])
def test_learned_keys_are_refused(source: str) -> None:
    module = attention(add_bias_kv=True)
    given = (module, {}) if source == "module" else (state_of(module), {"num_heads": N})
    with pytest.raises(ValueError, match="bias_k"):
        from_torch(given[0], **given[1])


def test_keys_of_zeros_are_refused() -> None:
    with pytest.raises(ValueError, match="add_zero_attn=True"):
        from_torch(attention(add_zero_attn=True))


@pytest.mark.parametrize("name", ["num_heads", "norm_first", "activation"])
def test_what_a_state_dict_does_not_tell_is_asked_for(name: str) -> None:
    with pytest.raises(ValueError, match=f"pass `{name}`"):
        from_torch(state_of(encoder_layer()), **without(OPTIONS, name))
    if name == "num_heads":
        with pytest.raises(ValueError, match="pass `num_heads`"):
            from_torch(state_of(attention()))
    else:
        with pytest.raises(ValueError, match=f"no such thing.*{name}"):
            from_torch(state_of(attention()), num_heads=N, **{name: OPTIONS[name]})


def test_keywords_that_a_module_tells_are_refused() -> None:
    with pytest.raises(ValueError, match="Received: num_heads, dropout"):
        from_torch(attention(), num_heads=N, dropout=0.0)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=f"num_heads=2 and out_proj.weight of .*{E}"):
        from_torch(state_of(attention()), num_heads=2)
    with pytest.raises(ValueError, match=f"widths {E}, {DK} and {DV}"):
        from_torch(attention(kdim=DK, vdim=DV), self_attention=True)
    with pytest.raises(ValueError, match="self_attention=True"):
        from_torch(encoder_layer(), self_attention=True)


def test_integers_are_refused() -> None:
    state = {**state_of(attention(), ""), "out_proj.bias": np.ones(E, int)}
    with pytest.raises(TypeError, match="out_proj.bias of dtype int64"):
        from_torch(state, num_heads=N)


def test_other_modules_are_refused() -> None:
    class Own(nn.MultiheadAttention):
        pass

    with pytest.raises(TypeError, match=r"state_dict\(\).*Own"):
        from_torch(Own(E, N))
    stack = nn.TransformerEncoder(
        encoder_layer(), num_layers=2, enable_nested_tensor=False
    )
    with pytest.raises(TypeError, match="for layer in module.layers"):
        from_torch(stack)
    for other in (nn.Linear(2, 3), np.ones(3), "model.pt"):
        with pytest.raises(TypeError, match="`source` must be"):
            from_torch(other)
