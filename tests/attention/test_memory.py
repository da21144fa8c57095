"""Memory grows with the length, not with its square: measured in fresh processes."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

# A training step after a short one that loads libraries and compilers.
PROGRAM = """
import sys
import tensorflow as tf
import keras_mha

implementation, length = sys.argv[1], int(sys.argv[2])
rate = float(sys.argv[3])

def kilobytes(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))

@tf.function
def step(query, key, value):
    with tf.GradientTape() as tape:
        tape.watch([query, key, value])
        mixed = keras_mha.dot_product_attention(
            query, key, value, is_causal=True, dropout=rate, seed=7,
            implementation=implementation,
        )
        loss = tf.reduce_sum(tf.square(mixed))
    return tape.gradient(loss, [query, key, value])

def heads(length):
    return [tf.random.normal((1, length, 4, 16)) for _ in range(3)]

step(*heads(16))
before = kilobytes("VmRSS")
with open("/proc/self/clear_refs", "w") as record:
    record.write("5")  # sets the record of the peak back
step(*heads(length))
print(kilobytes("VmHWM") - before)
"""


def peak(implementation: str, length: int, dropout: float) -> int:
    """Kilobytes that a training step takes above what was there."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, implementation, str(length), str(dropout)],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(run.stdout.split()[-1])


def slope(implementation: str, short: int, long: int, dropout: float) -> float:
    """By which power of the length memory grows."""
    grown = peak(implementation, long, dropout) / peak(implementation, short, dropout)
    return math.log(grown) / math.log(long / short)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_blockwise_training_takes_linear_memory(dropout: float) -> None:
    assert slope("blockwise", 1024, 8192, dropout) <= 1.15


@pytest.mark.slow
def test_stored_scores_would_be_seen() -> None:
    assert slope("reference", 1024, 8192, dropout=0.0) > 1.7
