"""Groups of query heads that share keys, with a mask for each head.

A key that all queries of some heads do not see is still seen by others of the group,
which stand side by side: heads `n` of one group are `k * G` to `k * G + G - 1`.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, G =
N / K heads of a group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.attention_cases import (
    MODES,
    Case,
    MaskWords,
    S,
    T,
    arrays_of,
    check_close,
    draw,
    expect,
    run,
    upstream_of,
)


def hidden_from_heads(heads: int, shared: int, seed: int) -> np.ndarray:
    """Which heads see which keys, `(1, N, T, S)`, the same for all queries but one.

    Each key is hidden from some heads of a group, and the groups differ, so that no
    other order of the heads makes the same groups.
    """
    seen = draw(1, heads, 1, S, seed=seed) > 0.2
    groups = seen.reshape(shared, heads // shared, S)
    mixed = seen.reshape(heads // shared, shared, S).swapaxes(0, 1)
    assert (groups.any(axis=1) != mixed.any(axis=1)).any()
    return np.broadcast_to(seen, (1, heads, T, S)).copy()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("implementation", ["reference", "blockwise", "portable"])
@pytest.mark.parametrize("groups", [(12, 3), (6, 3), (10, 2)])
def test_a_key_hidden_from_some_heads_of_a_group(
    groups: tuple[int, int], implementation: str, mode: str
) -> None:
    case = Case(MaskWords(pairs=hidden_from_heads(*groups, seed=31)), heads=groups)
    arrays, upstream = arrays_of(case), upstream_of(case)
    expected, slopes = expect(case, arrays, upstream)
    tensors: dict[str, Any] = {name: x.astype("float32") for name, x in arrays.items()}
    found, gradients = run(case, implementation, tensors, upstream, mode)
    check_close(found[0], expected[0], 1e-5)
    for name, slope in slopes.items():
        check_close(gradients[name], slope, 1e-5)
