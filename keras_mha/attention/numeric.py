"""Says which arguments count as integers or numbers.

NumPy's scalars count as Python's do, booleans as neither. What comes back is Python's
own, so that it compares, hashes and serializes alike wherever it came from.
"""

from __future__ import annotations

import math
import numbers
from typing import Any


def plain_integer(value: Any) -> int | None:
    """Returns an integer as an `int`, and `None` for all else.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.numeric import plain_integer
    >>> [plain_integer(value) for value in (np.int64(3), 3.0, True)]
    [3, None, None]
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return None
    return int(value)


def plain_number(value: Any) -> float | None:
    """Returns a finite number as a `float`, and `None` for all else.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.numeric import plain_number
    >>> [plain_number(value) for value in (np.float32(0.5), 3, True, np.nan)]
    [0.5, 3.0, None, None]
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer beyond every float
        return None
    return number if math.isfinite(number) else None
