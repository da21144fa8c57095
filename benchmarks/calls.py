"""Counts the frames and files that a call of the layer enters, and times it.

python -m benchmarks.calls [--rounds 40]

Counts the Python frames of keras_mha that eager calls enter, and the files they are in,
and times calls of `MultiHeadSelfAttention` and of Keras' layer in turns, eagerly and in
a `tf.function`. On Python 3.11 a comprehension is a frame of its own.

Letters: B batch, T length, D model width.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

import keras_mha

PACKAGE = str(Path(inspect.getfile(keras_mha)).parent) + os.sep
HEADS = 4
SHAPES = ((2, 16, 64), (32, 128, 256))


class Count(NamedTuple):
    """Files and frames of keras_mha that one call enters."""

    files: int
    frames: int


def count(call: Callable[[], Any]) -> Count:
    """Counts what `call` enters, once all that is made only once has been made."""
    files: list[str] = []

    def enter(frame: Any, event: str, argument: object) -> None:
        del argument
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            files.append(frame.f_code.co_filename)

    for _ in range(2):
        call()
    previous = sys.getprofile()
    sys.setprofile(enter)
    try:
        call()
    finally:
        sys.setprofile(previous)
    return Count(len(set(files)), len(files))


def inputs_of(shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """Inputs `(B, T, D)`, and padding `(B, T)` that hides some of each sequence."""
    B, T, _ = shape
    rng = np.random.default_rng(7)
    lengths = rng.integers(T // 2, T, B)
    return (
        tf.constant(rng.normal(size=shape), "float32"),
        tf.constant(np.arange(T) < lengths[:, None]),
    )


def counts() -> dict[str, Count]:
    """The counts of three eager calls."""
    inputs, padding = inputs_of(SHAPES[0])
    plain = keras_mha.MultiHeadSelfAttention(HEADS)
    rotary = keras_mha.MultiHeadSelfAttention(
        HEADS, position="rotary", flash_attention=True
    )
    masks: dict[str, Any] = {"mask": padding, "use_causal_mask": True}
    return {
        "plain": count(lambda: plain(inputs)),
        "padding, causal": count(lambda: plain(inputs, **masks)),
        "rotary, blockwise, padding, causal": count(lambda: rotary(inputs, **masks)),
    }


class Times(NamedTuple):
    """Milliseconds of one call, medians of the rounds, and the median of the ratios."""

    ours: float
    keras: float
    ratio: float


def times(rounds: int) -> Iterator[tuple[str, Times]]:
    """Times our layer and Keras' in turns, for each shape and way of calling."""
    for shape in SHAPES:
        inputs, padding = inputs_of(shape)
        ours = keras_mha.MultiHeadSelfAttention(HEADS)
        stock = keras.layers.MultiHeadAttention(HEADS, shape[-1] // HEADS)
        masks = {"mask": padding, "use_causal_mask": True}
        stock_masks = {
            "query_mask": padding,
            "value_mask": padding,
            "use_causal_mask": True,
        }
        for name, (one, other) in {
            "plain": (ours, lambda x, layer=stock: layer(x, x)),
            "padding, causal": (
                functools.partial(ours, **masks),
                lambda x, layer=stock, masks=stock_masks: layer(x, x, **masks),
            ),
        }.items():
            traced = tf.function(one), tf.function(other)
            for way, pair in (("eager", (one, other)), ("traced", traced)):
                yield f"{shape}, {name}, {way}", in_turns(*pair, inputs, rounds)


def in_turns(one: Any, other: Any, inputs: Any, rounds: int) -> Times:
    """Times two functions of `inputs`, each first in every other round."""
    found: dict[Any, list[float]] = {one: [], other: []}
    for function in found:
        for _ in range(3):
            function(inputs)
    start = time.perf_counter()
    one(inputs)
    calls = max(1, min(30, int(0.02 / (time.perf_counter() - start))))
    for turn in range(rounds):
        for function in (one, other) if turn % 2 else (other, one):
            start = time.perf_counter()
            for _ in range(calls - 1):
                function(inputs)
            function(inputs).numpy()
            found[function].append((time.perf_counter() - start) / calls * 1e3)
    ratios = [a / b for a, b in zip(found[one], found[other], strict=True)]
    medians = [statistics.median(values) for values in (*found.values(), ratios)]
    return Times(*medians)


def main() -> None:
    """Prints both tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="default 40")
    arguments = parser.parse_args()
    print("| eager call | files | frames |\n|---|---|---|")
    for name, (files, frames) in counts().items():
        print(f"| {name} | {files} | {frames} |")
    print("\n| call | ours, ms | Keras, ms | ours / Keras |\n|---|---|---|---|")
    for name, (ours, stock, ratio) in times(arguments.rounds):
        print(f"| {name} | {ours:.3f} | {stock:.3f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
