"""Is the attention faster compiled by XLA? Decides `jit_compile="auto"`.

    python benchmarks/xla_boundary.py

Times one layer forward, and forward with backward, in a TensorFlow graph: with
`jit_compile` "auto" (TensorFlow's own kernels), with True (the attention compiled),
with "auto" in a step compiled as a whole, which `supports_jit` permits; and
`keras.layers.MultiHeadAttention` beside them, with the step in a graph and compiled.
Interleaved; prints medians as ratios to "auto".
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from typing_extensions import override

import keras_mha

# (B, T, D, N): short reviews up to one long document
SHAPES = ((32, 32, 128, 4), (32, 128, 256, 4), (8, 512, 512, 8), (1, 2048, 512, 8))


class StockSelfAttention(keras.layers.Layer):
    """`keras.layers.MultiHeadAttention` called with one input."""

    def __init__(self, num_heads: int, key_dim: int) -> None:
        super().__init__()
        self.attention = keras.layers.MultiHeadAttention(num_heads, key_dim)

    @override
    def call(self, inputs: Any) -> Any:
        return self.attention(inputs, inputs)


def steps(layer: Any, compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the layer's forward and forward-backward step as graphs."""

    def forward(inputs: Any) -> Any:
        return layer(inputs)

    def backward(inputs: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(tf.square(layer(inputs)))
        return tape.gradient(loss, [inputs, *layer.trainable_variables])

    return tuple(
        tf.function(step, jit_compile=compiled) for step in (forward, backward)
    )


def seconds(step: Callable[..., Any], inputs: Any) -> float:
    """Returns the wall time of one call."""
    start = time.perf_counter()
    step(inputs)
    return time.perf_counter() - start


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timings of each step")
    rounds = parser.parse_args().rounds
    print(
        f"Keras {keras.__version__}, TensorFlow {tf.__version__}, "
        f"{os.cpu_count()} cores of {platform.machine()}; time relative to auto"
    )
    for B, T, D, N in SHAPES:
        inputs = tf.random.normal((B, T, D))
        ours = keras_mha.MultiHeadSelfAttention
        rivals = {
            "auto": steps(ours(N), compiled=False),
            "True": steps(ours(N, jit_compile=True), compiled=False),
            "auto, whole step in XLA": steps(ours(N), compiled=True),
            "Keras, graph": steps(StockSelfAttention(N, D // N), compiled=False),
            "Keras, XLA": steps(StockSelfAttention(N, D // N), compiled=True),
        }
        for place, kind in enumerate(("forward", "forward + backward")):
            times: dict[str, list[float]] = {name: [] for name in rivals}
            for name in rivals:
                seconds(rivals[name][place], inputs)  # traces and compiles
            for _ in range(rounds):
                for name in rivals:
                    times[name].append(seconds(rivals[name][place], inputs))
            medians = {name: statistics.median(taken) for name, taken in times.items()}
            ratios = "  ".join(
                f"{name} {median / medians['auto']:.2f}"
                for name, median in medians.items()
            )
            print(f"B={B} T={T} D={D} N={N} {kind:18}  {ratios}", flush=True)


if __name__ == "__main__":
    main()
