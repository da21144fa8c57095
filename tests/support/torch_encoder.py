"""What `torch.nn.TransformerEncoderLayer` computes, in NumPy float64.

Written from its formula alone; neither torch nor the package is used. Letters: B batch,
T length, N heads, H head size, E = N H width, F hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

State = Mapping[str, np.ndarray]


def random_state(N: int, H: int, F: int, *, bias: bool = True) -> dict[str, np.ndarray]:
    """Every weight of a layer by torch's name, none of them zero or like another."""
    generator, E = np.random.default_rng(0), N * H
    shapes = {
        "self_attn.in_proj_weight": (3 * E, E),
        "self_attn.in_proj_bias": (3 * E,),
        "self_attn.out_proj.weight": (E, E),
        "self_attn.out_proj.bias": (E,),
        "linear1.weight": (F, E),
        "linear1.bias": (F,),
        "linear2.weight": (E, F),
        "linear2.bias": (E,),
        "norm1.weight": (E,),
        "norm1.bias": (E,),
        "norm2.weight": (E,),
        "norm2.bias": (E,),
    }
    return {
        name: generator.normal(0, 0.3, shape).astype("float32")
        for name, shape in shapes.items()
        if bias or "bias" not in name
    }


def encode(
    state: State,
    inputs: np.ndarray,
    num_heads: int,
    *,
    norm_first: bool,
    activation: str,
    epsilon: float,
) -> np.ndarray:
    """`(B, T, E)` through the layer.

    Pre: `y = x + A(n1(x))`, then `y + F(n2(y))`; post: `y = n1(x + A(x))`, then
    `n2(y + F(y))`.
    """
    wide = {name: np.asarray(value, "float64") for name, value in state.items()}

    def norm(name: str) -> Callable[[np.ndarray], np.ndarray]:
        def normalize(x: np.ndarray) -> np.ndarray:
            x = x - x.mean(-1, keepdims=True)
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
            return x * wide[f"{name}.weight"] + wide.get(f"{name}.bias", 0.0)

        return normalize

    def attend(x: np.ndarray) -> np.ndarray:
        return _attend(wide, x, num_heads)

    def network(x: np.ndarray) -> np.ndarray:
        hidden = x @ wide["linear1.weight"].T + wide.get("linear1.bias", 0.0)
        hidden = np.vectorize({"relu": _relu, "gelu": _gelu}[activation])(hidden)
        return hidden @ wide["linear2.weight"].T + wide.get("linear2.bias", 0.0)

    x = np.asarray(inputs, "float64")
    for branch, normalize in ((attend, norm("norm1")), (network, norm("norm2"))):
        x = x + branch(normalize(x)) if norm_first else normalize(x + branch(x))
    return x


def _attend(state: State, x: np.ndarray, num_heads: int) -> np.ndarray:
    B, T, E = x.shape
    rows = x @ state["self_attn.in_proj_weight"].T
    rows = rows + state.get("self_attn.in_proj_bias", 0.0)
    rows = rows.reshape(B, T, 3, num_heads, E // num_heads)
    query, key, value = rows.transpose(2, 0, 3, 1, 4)  # (B, N, T, H) each
    scores = query @ key.swapaxes(2, 3) / math.sqrt(E // num_heads)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ value
    mixed = mixed.transpose(0, 2, 1, 3).reshape(B, T, E)
    outputs = mixed @ state["self_attn.out_proj.weight"].T
    return outputs + state.get("self_attn.out_proj.bias", 0.0)


def _relu(x: float) -> float:
    return max(x, 0.0)


def _gelu(x: float) -> float:
    return 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0)))
