"""Weights of PyTorch in NumPy arrays, where no torch is installed.

Letters: B batch, T query length, S key length, N heads, H head size, E = N H width, F
hidden width, DK and DV widths of keys and values.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from keras_mha.convert import from_torch
from tests.support.attention_cases import numbers
from tests.support.layers import ROOT, normal
from tests.support.torch_encoder import encode, random_state

B, T, S, N, H, F, DK, DV = 2, 5, 7, 3, 11, 19, 13, 17
E = N * H


def expected(
    kernels: Any, bias: np.ndarray, out: Any, *inputs: np.ndarray
) -> np.ndarray:
    """`softmax(Q K^T / sqrt(H)) V` of each head, written out in float64."""
    rows = [
        each.astype("float64") @ kernel.T + part
        for each, kernel, part in zip(inputs, kernels, np.split(bias, 3), strict=True)
    ]
    mixed = np.zeros((B, T, E))
    for n in range(N):
        columns = slice(n * H, (n + 1) * H)
        query, key, value = (each[..., columns] for each in rows)
        scores = np.exp(query @ key.swapaxes(1, 2) / np.sqrt(H))
        mixed[..., columns] = scores / scores.sum(-1, keepdims=True) @ value
    weight, out_bias = out
    return mixed @ weight.T + out_bias


def weights(*widths: int) -> tuple[list[np.ndarray], np.ndarray, Any]:
    kernels = [
        normal(E, width, seed=seed, scale=0.3) for seed, width in enumerate(widths)
    ]
    out = normal(E, E, seed=5, scale=0.3), normal(E, seed=6)
    return kernels, normal(3 * E, seed=4), out


def test_packed_arrays() -> None:
    kernels, bias, out = weights(E, E, E)
    state = {
        "in_proj_weight": np.concatenate(kernels),
        "in_proj_bias": bias,
        "out_proj.weight": out[0],
        "out_proj.bias": out[1],
    }
    query, key, value = (
        normal(B, T, E),
        normal(B, S, E, seed=1),
        normal(B, S, E, seed=2),
    )
    layer = from_torch(state, num_heads=N)
    found = numbers(layer(query, value, key))
    wanted = expected(kernels, bias, out, query, key, value)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    found = numbers(from_torch(state, num_heads=N, self_attention=True)(query))
    wanted = expected(kernels, bias, out, query, query, query)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_separate_arrays() -> None:
    kernels, bias, out = weights(E, DK, DV)
    state: dict[str, Any] = {
        f"{part}_proj_weight": each for part, each in zip("qkv", kernels, strict=True)
    }
    state |= {"in_proj_bias": bias, "out_proj.weight": out[0], "out_proj.bias": out[1]}
    inputs = normal(B, T, E), normal(B, S, DK, seed=1), normal(B, S, DV, seed=2)
    query, key, value = inputs
    found = numbers(from_torch(state, num_heads=N)(query, value, key))
    np.testing.assert_allclose(found, expected(kernels, bias, out, *inputs), atol=2e-5)
    with pytest.raises(ValueError, match="Received: v_proj_weight of shape"):
        from_torch({**state, "v_proj_weight": kernels[2][1:]}, num_heads=N)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_an_encoder_layer(norm_first: bool, activation: str, bias: bool) -> None:
    state, inputs = random_state(N, H, F, bias=bias), normal(B, T, E)
    options: dict[str, Any] = {"norm_first": norm_first, "activation": activation}
    # As large as a variance: one left out, or left at its default, would show.
    block = from_torch(state, num_heads=N, layer_norm_eps=0.3, **options)
    wanted = encode(state, inputs, N, epsilon=0.3, **options)
    np.testing.assert_allclose(numbers(block(inputs)), wanted, atol=2e-5)


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_the_epsilon_of_an_encoder_layer_is_torchs(norm_first: bool) -> None:
    state, inputs = random_state(N, H, F), normal(B, T, E, scale=0.01)
    options: dict[str, Any] = {"norm_first": norm_first, "activation": "relu"}
    found = numbers(from_torch(state, num_heads=N, **options)(inputs))
    wanted = encode(state, inputs, N, epsilon=1e-5, **options)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"norm_first": False},
        {"activation": "gelu"},
        {"epsilon": 1e-5},
        {"swapped": True},
    ],
    ids=str,
)
def test_the_reference_tells_encoder_layers_apart(wrong: dict[str, Any]) -> None:
    state, inputs = random_state(N, H, F), normal(B, T, E)
    options = {"norm_first": True, "activation": "relu", "epsilon": 0.3}
    right = encode(state, inputs, N, **options)
    if "swapped" in wrong:
        state |= {
            f"norm{one}.{part}": state[f"norm{3 - one}.{part}"]
            for one in (1, 2)
            for part in ("weight", "bias")
        }
    else:
        options |= wrong
    assert np.abs(encode(state, inputs, N, **options) - right).max() > 0.05


def test_no_torch_is_loaded_for_arrays() -> None:
    program = (
        "import sys, numpy as np\n"
        "from keras_mha.convert import from_torch\n"
        "weights = {'in_proj_weight': np.ones((12, 4)),"
        " 'out_proj.weight': np.ones((4, 4))}\n"
        "layer = from_torch(weights, num_heads=2)\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n    from_torch('model.pt')\n"
        "except TypeError as error:\n    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "Received: str" in run.stdout


@pytest.mark.parametrize("name", ["key_dim", "use_bias", "output_shape"])
def test_what_the_weights_tell_is_no_keyword(name: str) -> None:
    state = {"in_proj_weight": normal(3 * E, E), "out_proj.weight": normal(E, E)}
    with pytest.raises(ValueError, match=f"decide this. Received: {name}"):
        from_torch(state, num_heads=N, **{name: 5})


def test_attention_alone_has_one_dropout() -> None:
    state = {"in_proj_weight": normal(3 * E, E), "out_proj.weight": normal(E, E)}
    with pytest.raises(ValueError, match="no such thing.*attention_dropout"):
        from_torch(state, num_heads=N, attention_dropout=0.1)
