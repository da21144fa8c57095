"""A tiny BERT checkpoint by its published names, and what it computes, in NumPy.

Written from the description of the format and of the model alone: nothing of the
package is used. Letters: V token ids, D width, F width of the network's hidden layer,
N heads, H head size, B batch, T length.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

V, D, F, N, LAYERS, LONGEST, TYPES = 31, 15, 17, 3, 2, 13, 2
CONFIG: dict[str, Any] = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.3,
    "hidden_size": D,
    "intermediate_size": F,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": LONGEST,
    "model_type": "bert",
    "num_attention_heads": N,
    "num_hidden_layers": LAYERS,
    "type_vocab_size": TYPES,
    "vocab_size": V,
}
IDS = np.random.default_rng(7).integers(1, V, (5, 11))
MASK = np.arange(11) < np.array([[11], [2], [7], [3], [1]])
TOKEN_TYPES = (np.arange(11) >= np.array([[4], [1], [0], [2], [11]])).astype("int32")


def random_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of `BertModel`, float32, none of them zero."""
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return generator.normal(0, 0.5, shape).astype(np.float32)

    tensors = {
        "embeddings.word_embeddings.weight": draw(V, D),
        "embeddings.position_embeddings.weight": draw(LONGEST, D),
        "embeddings.token_type_embeddings.weight": draw(TYPES, D),
        "pooler.dense.weight": draw(D, D),
        "pooler.dense.bias": draw(D),
    }
    dense = {
        "attention.self.query": (D, D),
        "attention.self.key": (D, D),
        "attention.self.value": (D, D),
        "attention.output.dense": (D, D),
        "intermediate.dense": (F, D),
        "output.dense": (D, F),
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
        for name, (outputs, inputs) in dense.items():
            tensors[f"{layer}.{name}.weight"] = draw(outputs, inputs)
            tensors[f"{layer}.{name}.bias"] = draw(outputs)
    for name in norms:
        tensors[f"{name}.weight"] = 1 + draw(D)
        tensors[f"{name}.bias"] = draw(D)
    return tensors


def write_checkpoint(
    directory: Path,
    tensors: dict[str, np.ndarray] | None = None,
    **config: Any,
) -> Path:
    """Writes both files; an entry of `config` that is None is left out."""
    content = {**CONFIG, **config}
    kept = {name: value for name, value in content.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    save_file(
        random_tensors() if tensors is None else tensors,
        directory / "model.safetensors",
    )
    return directory


def hidden_states(
    tensors: dict[str, np.ndarray],
    ids: np.ndarray,
    mask: np.ndarray,
    types: np.ndarray | None = None,
) -> list[np.ndarray]:
    """The embeddings and each layer's outputs, float64 `(B, T, D)`."""
    weights = {name: value.astype(np.float64) for name, value in tensors.items()}
    types = np.zeros_like(ids) if types is None else types

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        deviations = x - x.mean(-1, keepdims=True)
        variance = (deviations**2).mean(-1, keepdims=True)
        scaled = deviations / np.sqrt(variance + CONFIG["layer_norm_eps"])
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def heads(x: np.ndarray) -> np.ndarray:
        B, T, _ = x.shape
        return x.reshape(B, T, N, D // N).transpose(0, 2, 1, 3)

    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = x + weights["embeddings.token_type_embeddings.weight"][types]
    states = [norm(x, "embeddings.LayerNorm")]
    for i in range(LAYERS):
        x, layer = states[-1], f"encoder.layer.{i}"
        query, key, value = (
            heads(dense(x, f"{layer}.attention.self.{part}"))
            for part in ("query", "key", "value")
        )
        scores = query @ key.swapaxes(-1, -2) / math.sqrt(D // N)
        scores = np.where(mask[:, None, None, :], scores, -np.inf)
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        mixed = (weight @ value).transpose(0, 2, 1, 3).reshape(x.shape)
        x = x + dense(mixed, f"{layer}.attention.output.dense")
        x = norm(x, f"{layer}.attention.output.LayerNorm")
        hidden = dense(x, f"{layer}.intermediate.dense")
        hidden = hidden / 2 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        x = x + dense(hidden, f"{layer}.output.dense")
        states.append(norm(x, f"{layer}.output.LayerNorm"))
    return states


def pooled(tensors: dict[str, np.ndarray], states: np.ndarray) -> np.ndarray:
    """What the pooler makes of the last hidden states, `(B, D)`."""
    weight = tensors["pooler.dense.weight"].astype(np.float64)
    return np.tanh(states[:, 0] @ weight.T + tensors["pooler.dense.bias"])
