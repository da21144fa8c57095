"""Attention block by block: the reference's numbers in memory linear in T and S.

A block of queries meets the keys that it may see; scores are never stored, but computed
again for the gradient. What causality, windows, segments or padding rule out is left
out. In graphs and eager calls TensorFlow's own operations are fastest
(`mix_tensorflow`); XLA and the other backends have a form of their own (`loops`).

Source: Rabe and Staats 2021, "Self-attention does not need O(n^2) memory"; Dao 2024,
"FlashAttention-2".

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H head
size, V head size of the values.
"""

from __future__ import annotations

from typing import Any

from keras import backend

from keras_mha.attention.bias import Bias
from keras_mha.attention.blockwise import loops
from keras_mha.attention.mask_parts import MaskParts
from keras_mha.typing import Tensor

# Up to so many scores, half a gigabyte of float32, "auto" has them materialized.
_FEW = 2**27
# From this length on, leaving out blocks saves more than storing scores does.
_SKIPPED_FROM = 1024
# The batch that `fit` and `predict` make unless told otherwise.
_USUAL_BATCH = 32


# Masks of other kinds have no blocks.
TAKES = frozenset(MaskParts._fields) - {"others"}


def refusal(*, return_scores: bool, **call: Any) -> str | None:
    """Says why a call cannot be served, if so."""
    del call
    return "computes no table of scores" if return_scores else None


def is_preferred(query: Tensor, key: Tensor, mask: MaskParts) -> bool:
    """Whether "auto" should take this: where scores are many, or some left out.

    A batch of unknown size is taken to be as large as `fit` makes it, and an unknown
    length to be short; in training `by_length` decides on that.

    Args:
        query: `(B, T, N, H)`.
        key: `(B, S, K, H)`.
        mask: What may attend to what.
    """
    # JAX has dimensions that are neither known nor None.
    sizes = (*query.shape[:3], key.shape[1])
    B, T, N, S = [size if isinstance(size, int) else None for size in sizes]
    if T is None or N is None or S is None:
        return False
    count = (_USUAL_BATCH if B is None else B) * T * N * S
    return pays(mask, count, min(T, S))


def pays(mask: MaskParts, count: Any, shorter: Any) -> Any:
    """Whether blocks are better than stored scores, by numbers or by scalar tensors.

    Few scores are faster stored than computed twice (`benchmarks/results`), unless the
    mask leaves out whole blocks.

    Args:
        mask: What may attend to what.
        count: The number of scores.
        shorter: The smaller of T and S.

    Example:

    >>> from keras_mha.attention.blockwise.front import pays
    >>> from keras_mha.attention.mask_parts import MaskParts
    >>> pays(MaskParts(), 2**20, 1024), pays(MaskParts(upper=0), 2**20, 1024)
    (False, True)
    """
    leaves_out = mask.is_ordered or mask.query_segments is not None
    return (count > _FEW) | (leaves_out & (shorter >= _SKIPPED_FROM))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MaskParts,
    bias: Bias,
    *,
    scale: float,
    logits_soft_cap: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    keys_are_finite: bool = False,
) -> tuple[Tensor, None]:
    """Mixes the values by the similarity of queries and keys.

    Args:
        query: `(B, T, N, H)`.
        key: `(B, S, K, H)`; query head `n` reads key head `n // (N / K)`.
        value: `(B, S, K, V)`.
        mask: What may attend to what.
        bias: What joins the scores.
        scale: Factor of the scores.
        logits_soft_cap: `c` turns scores `x` into `c tanh(x / c)`, before the bias.
        dropout: Share of the probabilities to drop, `0 <= dropout < 1`.
        seed: Seed tensor `(2,)`; needed where `dropout > 0`.
        keys_are_finite: Whether hidden keys and values need not be cleared.

    Returns:
        The mixed values `(B, T, N, V)` in the dtype of `query`, and `None`.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.bias import Bias
    >>> from keras_mha.attention.blockwise.front import attend
    >>> from keras_mha.attention.mask_parts import MaskParts
    >>> one, value = np.ones((1, 2, 1, 1)), np.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> mixed, _ = attend(one, one, value, MaskParts(upper=0), Bias(), scale=1.0)
    >>> np.asarray(mixed).ravel().tolist()
    [1.0, 2.0]
    """
    del keys_are_finite  # clearing a block costs little next to its products
    call: dict[str, Any] = {
        "scale": scale,
        "logits_soft_cap": logits_soft_cap,
        "dropout": dropout,
        "seed": seed,
    }
    tensors = (query, key, value, mask, bias)
    if backend.backend() == "tensorflow":
        from keras_mha.attention.blockwise import loops_tensorflow, mix_tensorflow

        if not loops_tensorflow.in_xla():
            return mix_tensorflow.attend(*tensors, **call), None
    return loops.attend(*tensors, **call), None
