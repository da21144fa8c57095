"""Chooses between stored scores and blocks when a graph runs, for unknown lengths.

"auto" takes this in training only: it keeps both forms in the graph, and what converts
models, which it does for inference, takes no such graph.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H head
size, V head size of the values.
"""

from __future__ import annotations

from typing import Any

from keras import backend

from keras_mha.attention.bias import Bias
from keras_mha.attention.blockwise import front as blockwise
from keras_mha.attention.mask_parts import MaskParts
from keras_mha.typing import Tensor

TAKES = blockwise.TAKES
refusal = blockwise.refusal


def is_preferred(query: Tensor, key: Tensor, mask: MaskParts) -> bool:
    """Whether only the running graph will know a length.

    XLA compiles a function anew for each length, but both forms each time.

    Args:
        query: `(B, T, N, H)`.
        key: `(B, S, K, H)`.
        mask: What may attend to what.
    """
    del mask  # any may be long
    if backend.backend() != "tensorflow" or None not in (query.shape[1], key.shape[1]):
        return False
    from keras_mha.attention.blockwise.loops_tensorflow import in_xla

    return not in_xla()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MaskParts,
    bias: Bias,
    **options: Any,
) -> tuple[Tensor, None]:
    """Mixes the values by the similarity of queries and keys.

    Args are those of `keras_mha.attention.reference.attend`. Returns the mixed values
    `(B, T, N, V)`, and `None`.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.bias import Bias
    >>> from keras_mha.attention.by_length import attend
    >>> from keras_mha.attention.mask_parts import MaskParts
    >>> one, value = np.ones((1, 2, 1, 1)), np.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> mixed, _ = attend(one, one, value, MaskParts(upper=0), Bias(), scale=1.0)
    >>> np.asarray(mixed).ravel().tolist()
    [1.0, 2.0]
    """
    from keras_mha.attention import by_length_tensorflow

    return by_length_tensorflow.attend(query, key, value, mask, bias, **options), None
