"""Blockwise attention over more than one block of the sizes that users get.

Elsewhere the blocks are small, so that short sequences have several. TensorFlow's
tiles serve eager mode and graphs, the loops XLA and the other backends.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import keras_mha
from tests.support import reference as oracle
from tests.support.attention_cases import (
    MODES,
    cast,
    check_close,
    draw,
    value_and_gradients,
)

# More than one block of 256; K of N heads share keys and values.
B, T, S, N, K, H, V = 1, 307, 331, 4, 2, 3, 5
MASKS: dict[str, tuple[Any, Any]] = {
    "causal": (
        lambda: keras_mha.CausalMask(offset=S - T),
        {"is_causal": True, "offset": S - T},
    ),
    "window": (lambda: keras_mha.SlidingWindowMask(97), {"sliding_window": 97}),
    "padding": (
        lambda: keras_mha.PaddingMask(key_lengths=np.array([271], "int32")),
        {"key_padding": np.array([271])},
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MASKS)
def test_blocks_of_real_sizes_equal_the_oracle(name: str, mode: str) -> None:
    make_mask, fields = MASKS[name]
    arrays = [draw(B, T, N, H, seed=1), draw(B, S, K, H, seed=2)]
    arrays = [*arrays, draw(B, S, K, V, seed=3)]
    upstream = draw(B, T, N, V, seed=4)
    mixed, _, gradients = oracle.attend_and_gradients(
        *arrays, oracle.visible_pairs((B, 1, T, S), **fields), upstream=upstream
    )

    def attend(*heads: Any) -> Any:
        return keras_mha.dot_product_attention(
            *heads, mask=make_mask(), implementation="blockwise"
        )

    (output,), slopes = value_and_gradients(
        attend, cast(arrays, "float32"), [upstream], mode
    )
    check_close(output, mixed, 5e-6)
    for one, other in zip(slopes, gradients[:3], strict=True):
        check_close(one, other, 5e-6)
