"""What reaches a backend's own kernel. Its values are in `test_contract.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from keras_mha import dot_product_attention
from keras_mha.attention.fused import cudnn_jax as fused_jax
from tests.support.attention_cases import (
    BACKEND,
    KEY_PADDING,
    B,
    Case,
    MaskWords,
    S,
    T,
    cast,
    heads,
)

pytestmark = pytest.mark.skipif(BACKEND != "jax", reason="is about cuDNN on JAX")
LENGTHS = np.array([6, S], "int32")


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What JAX' function is called with; it gives the queries back."""
    import jax  # pyright: ignore[reportMissingImports] - where it is the backend

    calls = []

    def record(query: Any, key: Any, value: Any, **words: Any) -> Any:
        calls.append({"query": query, "key": key, "value": value, **words})
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    monkeypatch.setattr(fused_jax, "largest_head_size", lambda: 128)
    return calls


def attend(mask: MaskWords, lengths: tuple[int, int] = (T, S)) -> Any:
    arrays = cast(heads(Case(lengths=lengths)), "bfloat16")
    return dot_product_attention(*arrays, mask=mask.value(), implementation="fused")


@pytest.mark.parametrize("mask", [MaskWords(), MaskWords(key_padding=KEY_PADDING)])
def test_lengths_are_even_and_head_sizes_multiples_of_eight(
    received: list[dict[str, Any]], mask: MaskWords
) -> None:
    attend(mask)
    (call,) = received
    assert call["query"].shape == (B, T + 1, 3, 8)
    assert call["key"].shape == call["value"].shape == (B, S + 1, 3, 8)
    assert call["implementation"] == "cudnn"


@pytest.mark.parametrize(
    ("mask", "lengths", "expected"),
    [
        (MaskWords(), (12, 14), {}),
        # The key that is filled in is hidden.
        (MaskWords(), (T, S), {"key_value_seq_lengths": [S, S]}),
        (MaskWords(is_causal=True), (T, T), {"is_causal": True}),
        (
            MaskWords(is_causal=True),
            (S, T),
            {"is_causal": True, "key_value_seq_lengths": [T, T]},
        ),
        (
            MaskWords(is_causal=True, sliding_window=4),
            (T, T),
            {"is_causal": True, "local_window_size": (3, 0)},
        ),
        (
            MaskWords(key_padding=np.array([40, 3], "int32")),
            (T, S),
            {"key_value_seq_lengths": [S, 3]},
        ),
        (
            MaskWords(query_padding=LENGTHS, is_causal=True),
            (T, T),
            {"is_causal": True, "query_seq_lengths": [6, T]},
        ),
    ],
)
def test_what_the_kernel_knows_is_not_spelled_out(
    received: list[dict[str, Any]],
    mask: MaskWords,
    lengths: tuple[int, int],
    expected: dict[str, Any],
) -> None:
    assert fused_jax.is_native(mask.parts())
    attend(mask, lengths)
    found = {
        name: word.tolist() if hasattr(word, "tolist") else word
        for name, word in received[0].items()
        if name not in ("query", "key", "value", "scale", "implementation")
        and word is not None
        and word is not False
    }
    assert found == expected


@pytest.mark.parametrize(
    "mask",
    [
        MaskWords(key_padding=KEY_PADDING),
        MaskWords(pairs=np.ones((T, S), bool)),
        MaskWords(query_segments=np.zeros((1, T)), key_segments=np.zeros((1, S))),
        MaskWords(sliding_window=3),
        MaskWords(is_causal=True, offset=2),
    ],
)
def test_what_the_kernel_does_not_know_goes_elsewhere_by_default(
    mask: MaskWords,
) -> None:
    assert not fused_jax.is_native(mask.parts())


def test_heads_that_are_too_large_are_refused(
    received: list[dict[str, Any]],
) -> None:
    arrays = np.zeros((3, 1, 2, 1, 136), "float16")
    text = "takes head sizes up to 128, not 136"
    with pytest.raises(ValueError, match=text):
        dot_product_attention(*arrays, implementation="fused")
    with pytest.raises(ValueError, match=text):
        dot_product_attention(*arrays[:2, ..., :8], arrays[2], implementation="fused")
    assert not received
