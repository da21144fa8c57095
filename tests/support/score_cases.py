"""Options of the attention layers' scores, alone and together, and calls for them.

Works on every backend.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H
head size, V head size of values; DQ, DV and DK widths of queries, values and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_mha import (
    ALiBi,
    MultiHeadAttention,
    MultiHeadSelfAttention,
    RelativePositionBias,
    RotaryEmbedding,
)
from tests.support import layer_oracle as oracle
from tests.support.attention_cases import check_close, check_slopes, value_and_gradients
from tests.support.layers import normal, randomize

B, T, S, N, K, H, V = 2, 7, 5, 4, 2, 6, 3
DQ, DV, DK = 13, 11, 17

# Functions, because a layer given is copied, but its name counts up.
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "grouped": lambda: {"num_key_value_heads": K},
    "multi_query": lambda: {"num_key_value_heads": 1},
    "rotary": lambda: {"position": "rotary"},
    "rotary_layer": lambda: {
        "position": RotaryEmbedding(100.0, 2 / 3, interleaved=True)
    },
    "alibi": lambda: {"position": "alibi"},
    "relative": lambda: {"position": "relative"},
    "relative_layer": lambda: {
        "position": RelativePositionBias(N, 6, 5, bidirectional=False)
    },
    "rms": lambda: {"qk_norm": "rms"},
    "layer_norm": lambda: {"qk_norm": "layer"},
    "soft_cap": lambda: {"logits_soft_cap": 1.5},
    "sinks": lambda: {"use_sinks": True},
    "gate": lambda: {"use_gate": True},
    "window": lambda: {"sliding_window": 3},
    "gemma": lambda: {
        "num_key_value_heads": K,
        "position": "rotary",
        "qk_norm": "rms",
        "logits_soft_cap": 2.0,
        "use_sinks": True,
        "use_gate": True,
        "sliding_window": 4,
        "value_dim": V,
    },
    "t5": lambda: {
        "num_key_value_heads": 1,
        "position": "relative",
        "qk_norm": "layer",
        "logits_soft_cap": 3.0,
        "use_sinks": True,
        "use_bias": False,
        "output_shape": 5,
    },
    "bloom": lambda: {
        "num_key_value_heads": K,
        "position": ALiBi(N),
        "use_gate": True,
        "sliding_window": 3,
    },
}


def some(*shape: int, seed: int = 0) -> np.ndarray:
    """A random mask that hides about two in five, but no first column."""
    shown = np.random.default_rng(seed).random(shape) < 0.6
    shown[..., 0] = True
    return shown


ROWS = np.arange(T) < np.array([[T], [5]])
COLUMNS = np.arange(S) < np.array([[4], [S]])
ROW_IDS = np.array([[0, 0, 0, 4, 4, 4, -1], [2, 2, 1, 1, 1, 1, 1]], "int32")
COLUMN_IDS = np.array([[4, 0, 0, -1, 4], [2, 1, 1, 2, 3]], "int32")


def calls(t: int, s: int) -> dict[str, dict[str, Any]]:
    """Call arguments by name, but for padding and segments, for `(B, N, t, s)`."""
    return {
        "plain": {},
        "causal": {"use_causal_mask": True},
        "bias_TS": {"attention_bias": normal(t, s, seed=21)},
        "bias_BTS": {"attention_bias": normal(B, t, s, seed=22)},
        "bias_1N1S": {"attention_bias": normal(1, N, 1, s, seed=23)},
        "heads_N": {"head_mask": np.array([1.0, 0.0, 0.5, 2.0], "float32")},
        "heads_BN": {"head_mask": normal(B, N, seed=24)},
    }


SELF_CALLS: dict[str, dict[str, Any]] = {
    **calls(T, T),
    "segments": {"segment_ids": ROW_IDS},
    "padding": {"mask": ROWS, "attention_mask": some(B, T, T)},
    "all": {
        "mask": ROWS,
        "attention_mask": some(B, N, T, T),
        "use_causal_mask": True,
        "segment_ids": ROW_IDS,
        "attention_bias": normal(B, N, T, T, seed=25),
        "head_mask": normal(B, N, seed=24),
    },
}
CROSS_CALLS: dict[str, dict[str, Any]] = {
    **calls(T, S),
    "segments": {"segment_ids": (ROW_IDS, COLUMN_IDS)},
    "padding": {"query_mask": ROWS, "value_mask": COLUMNS, "key_mask": some(B, S)},
    "all": {
        "query_mask": ROWS,
        "value_mask": COLUMNS,
        "attention_mask": some(B, T, S),
        "use_causal_mask": True,
        "attention_bias": normal(B, N, T, S, seed=25),
        "head_mask": normal(N, seed=24),
    },
}
SELF_INPUTS = [normal(B, T, DQ, seed=1)]
CROSS_INPUTS = [
    normal(B, T, DQ, seed=1),
    normal(B, S, DV, seed=2),
    normal(B, S, DK, seed=3),
]
KINDS = {
    "self": (MultiHeadSelfAttention, SELF_INPUTS, SELF_CALLS),
    "cross": (MultiHeadAttention, CROSS_INPUTS, CROSS_CALLS),
}


def made(kind: str, options: str = "plain", **others: Any) -> Any:
    """A built layer of the kind with random weights, biases and sinks included."""
    layer_class, inputs, _ = KINDS[kind]
    given = {"num_heads": N, "key_dim": H, **OPTIONS[options](), **others}
    layer = layer_class(**given)
    layer.build(*(array.shape for array in inputs))
    randomize(layer, seed=40)
    return layer


def expect(kind: str, layer: Any, call: str = "plain") -> tuple[Any, Any]:
    """The oracle's outputs and probabilities."""
    _, inputs, by_name = KINDS[kind]
    return oracle.attention(layer, oracle.weights_of(layer), *inputs, **by_name[call])


def run(
    layer: Any,
    inputs: Sequence[Any],
    call: dict[str, Any],
    upstream: np.ndarray,
    mode: str = "eager",
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Outputs, and gradients by inputs, attention bias and trainable weights."""
    fixed = {name: call[name] for name in call if not is_trained(name, call[name])}
    trained = {name: call[name] for name in call if name not in fixed}
    weights = [weight.value for weight in layer.trainable_variables]
    state = [weight.value for weight in layer.non_trainable_variables]
    place = len(inputs) + len(trained)

    def function(*arrays: Any) -> Any:
        named = dict(zip(trained, arrays[len(inputs) : place], strict=True))
        outputs, _ = layer.stateless_call(
            list(arrays[place:]), state, *arrays[: len(inputs)], **fixed, **named
        )
        return outputs

    arrays = [ops.convert_to_tensor(each) for each in (*inputs, *trained.values())]
    (outputs,), gradients = value_and_gradients(
        function, [*arrays, *weights], [upstream], mode
    )
    return outputs, gradients


def is_trained(name: str, value: Any) -> bool:
    return name in ("attention_bias", "head_mask") and value is not None


def check_values_and_gradients(
    kind: str, options: str, call: str, modes: Sequence[str], tolerance: float = 2e-5
) -> None:
    """Compares a layer with the oracle: outputs, and the slope of every array."""
    _, inputs, by_name = KINDS[kind]
    layer, given = made(kind, options), by_name[call]
    weights = oracle.weights_of(layer)
    names = [w.path.removeprefix(f"{layer.path}/") for w in layer.trainable_variables]
    trained = [name for name in given if is_trained(name, given[name])]

    def expected(*arrays: np.ndarray) -> np.ndarray:
        moved = dict(zip(names, arrays[len(inputs) + len(trained) :], strict=True))
        changed = dict(zip(trained, arrays[len(inputs) :][: len(trained)], strict=True))
        return oracle.attention(
            layer,
            {**weights, **moved},
            *arrays[: len(inputs)],
            **{**given, **changed},
        )[0]

    arrays = [
        *inputs,
        *(given[name] for name in trained),
        *(weights[name] for name in names),
    ]
    target = expected(*arrays)
    upstream = normal(*target.shape, seed=9).astype("float64")
    first: list[np.ndarray] = []
    for mode in modes:
        outputs, gradients = run(layer, inputs, given, upstream, mode)
        check_close(outputs, target, tolerance)
        if not first:
            # The keys' bias has no slope: what is found is the rounding of a long sum.
            check_slopes(gradients, expected, arrays, upstream, 2.5 * tolerance)
            first = gradients
        for one, other in zip(gradients, first, strict=True):
            check_close(one, other, tolerance)
