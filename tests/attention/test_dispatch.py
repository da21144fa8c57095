"""Which implementation "auto" takes."""

from __future__ import annotations

from typing import Any

import pytest
from keras import KerasTensor

from keras_mha.attention import by_length, reference
from keras_mha.attention.bias import Bias
from keras_mha.attention.dispatch import IMPLEMENTATIONS, select
from keras_mha.attention.mask_parts import MaskParts
from tests.support.attention_cases import BACKEND

CAUSAL = MaskParts(upper=0)
WINDOW = MaskParts(lower=-4, upper=4)
SEGMENTS = MaskParts(query_segments=1, key_segments=1)
PADDING = MaskParts(key_padding=1)


def chosen(
    shape: tuple[int | None, ...], S: int | None, mask: MaskParts, **options: Any
) -> str:
    """The name of what "auto" takes for queries of a shape and S keys."""
    call = {"logits_soft_cap": None, "dropout": 0.1, "return_scores": False, **options}
    query: Any = KerasTensor(shape)
    key: Any = KerasTensor((shape[0], S, *shape[2:]))
    module = select("auto", query, key, key, mask, Bias(), **call)
    return next(name for name, found in IMPLEMENTATIONS.items() if found is module)


@pytest.mark.parametrize(
    ("shape", "S", "mask", "expected"),
    [
        # Up to 2**27 scores are stored.
        ((1, 4096, 8, 64), 4096, PADDING, "reference"),
        ((1, 4096, 8, 64), 4097, PADDING, "blockwise"),
        ((33, 4096, 1, 64), 256, MaskParts(), "reference"),
        # An unknown batch is taken to be 32.
        ((None, 724, 8, 64), 724, MaskParts(), "reference"),
        ((None, 725, 8, 64), 725, MaskParts(), "blockwise"),
        # A mask that leaves out blocks changes that from a length of 1024 on.
        ((1, 1024, 1, 64), 1024, CAUSAL, "blockwise"),
        ((1, 1024, 1, 64), 1024, WINDOW, "blockwise"),
        ((1, 1024, 1, 64), 1024, SEGMENTS, "blockwise"),
        ((1, 1024, 1, 64), 1024, PADDING, "reference"),
        ((1, 1023, 1, 64), 1024, CAUSAL, "reference"),
        ((1, 1, 8, 64), 4096, CAUSAL, "reference"),
        # Unknown lengths are taken to be short.
        ((8, None, 8, 64), 8192, CAUSAL, "reference"),
        ((8, 8192, 8, 64), None, CAUSAL, "reference"),
    ],
)
def test_auto_goes_by_what_is_known_of_the_sizes(
    shape: tuple[int | None, ...], S: int | None, mask: MaskParts, expected: str
) -> None:
    assert chosen(shape, S, mask) == expected


@pytest.mark.parametrize("S", [None, 8192])
def test_training_leaves_unknown_lengths_to_the_running_graph(S: int | None) -> None:
    query: Any = KerasTensor((8, None, 8, 64))
    key: Any = KerasTensor((8, S, 8, 64))
    call = {"logits_soft_cap": None, "dropout": 0.1, "return_scores": False}
    module = select("auto", query, key, key, CAUSAL, Bias(), **call, training=True)
    assert module is (by_length if BACKEND == "tensorflow" else reference)
    named = select("reference", query, key, key, CAUSAL, Bias(), **call, training=True)
    assert named is reference
    call["return_scores"] = True
    module = select("auto", query, key, key, CAUSAL, Bias(), **call, training=True)
    assert module is reference


def test_auto_returns_scores_where_they_are_wanted() -> None:
    shape = (1, 8192, 8, 64)
    assert chosen(shape, 8192, CAUSAL) == "blockwise"
    assert chosen(shape, 8192, CAUSAL, return_scores=True) == "reference"


@pytest.mark.skipif(BACKEND != "torch", reason="needs a kernel that runs on a CPU")
def test_auto_prefers_the_backends_kernel() -> None:
    shape = (1, 16, 2, 8)
    assert chosen(shape, 16, CAUSAL, dropout=0.0) == "fused"
    assert chosen(shape, 16, PADDING, dropout=0.0) == "reference"
