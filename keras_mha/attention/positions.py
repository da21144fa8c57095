"""Where tokens stand: rotary embedding, ALiBi's slopes, T5's buckets of distances.

Letters: B batch, T query length, N heads, H head size, R the rotated part of it.
"""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import KerasTensor, backend, ops

from keras_mha.attention.numeric import plain_integer, plain_number
from keras_mha.typing import Tensor

_SCALINGS: dict[str | None, tuple[str, ...]] = {
    None: (),
    "linear": ("scaling_factor",),
    "ntk": ("scaling_factor",),
    "llama3": (
        "scaling_factor",
        "original_max_length",
        "low_frequency_factor",
        "high_frequency_factor",
    ),
}
_TURN = 2**32


@dataclass(frozen=True)
class RotaryOptions:
    """The options of `rotate`, described there, checked together.

    Raises:
        ValueError: If one is out of its domain, or `scaling` needs one that is not
            given or has no use for one that is.

    Example:

    >>> from keras_mha.attention.positions import RotaryOptions
    >>> RotaryOptions(base=100.0).frequencies(4).tolist()
    [1.0, 0.1]
    """

    base: float = 10000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: str | None = None
    scaling_factor: float | None = None
    original_max_length: int | None = None
    low_frequency_factor: float | None = None
    high_frequency_factor: float | None = None

    def __post_init__(self) -> None:
        self._set("base", _as_number(self.base, "base", 1))
        fraction = plain_number(self.fraction)
        if fraction is None or not 0 < fraction <= 1:
            raise ValueError(
                "`fraction` must be a number with 0 < fraction <= 1. "
                f"Received: fraction={self.fraction!r}"
            )
        self._set("fraction", fraction)
        if self.scaling not in _SCALINGS:
            raise ValueError(
                f"`scaling` must be one of {tuple(_SCALINGS)}. "
                f"Received: scaling={self.scaling!r}"
            )
        given = {
            name: getattr(self, name)
            for name in _SCALINGS["llama3"]
            if getattr(self, name) is not None
        }
        if set(given) != set(_SCALINGS[self.scaling]):
            raise ValueError(
                f"`scaling={self.scaling!r}` takes exactly the arguments "
                f"{_SCALINGS[self.scaling]}. Received: {given}"
            )
        for name, value in given.items():
            # Factors below 1 would turn faster, not stretch what was learned.
            lowest = 0 if name.endswith("frequency_factor") else 1
            checked = _as_integer if name == "original_max_length" else _as_number
            self._set(name, checked(value, name, lowest))
        if self.scaling == "llama3" and not (
            given["low_frequency_factor"] < given["high_frequency_factor"]
        ):
            raise ValueError(
                "`low_frequency_factor` must be below `high_frequency_factor`. "
                f"Received: {given}"
            )

    def _set(self, name: str, value: float) -> None:
        object.__setattr__(self, name, value)  # frozen once it is made

    def frequencies(self, size: int) -> np.ndarray:
        """Radians that each pair of features turns per position, `(size / 2,)`.

        Args:
            size: R, an even number of features.
        """
        pairs = np.arange(0, size, 2, dtype="float64")
        frequencies = self.base ** (-pairs / size)
        factor: Any = self.scaling_factor
        if self.scaling == "linear":
            return frequencies / factor
        if self.scaling == "ntk":
            # The base is multiplied by factor^(R / (R - 2)): the fastest pair keeps its
            # frequency, the slowest has it divided by the factor.
            return frequencies * factor ** (-pairs / max(size - 2, 1))
        if self.scaling == "llama3":
            low: Any = self.low_frequency_factor
            high: Any = self.high_frequency_factor
            turns = self.original_max_length * frequencies / (2 * math.pi)
            kept = np.clip((turns - low) / (high - low), 0, 1)
            return frequencies * (kept + (1 - kept) / factor)
        return frequencies

    def size(self, head_size: int | None) -> int:
        """R, the number of features of a head that are rotated.

        Raises:
            ValueError: If it is odd or zero, or H is unknown.
        """
        size = 0 if head_size is None else int(self.fraction * head_size)
        if size == 0 or size % 2:
            raise ValueError(
                "Features turn in pairs: `fraction` times the head size H must be "
                "even and not zero once its decimals are cut. "
                f"Received: fraction={self.fraction}, H={head_size}"
            )
        return size


def rotate(
    inputs: Tensor,
    positions: Tensor,
    *,
    base: float = 10000.0,
    fraction: float = 1.0,
    interleaved: bool = False,
    scaling: str | None = None,
    scaling_factor: float | None = None,
    original_max_length: int | None = None,
    low_frequency_factor: float | None = None,
    high_frequency_factor: float | None = None,
) -> Tensor:
    """Turns pairs of features by angles proportional to their position.

    Of queries and keys so turned, the product depends only on the distance. Pair
    `i` of the R features turned moves on by `base ** (-2 i / R)` radians a position.
    Angles are exact to float32 (float64 for float64 inputs) at every int32 position,
    whatever the dtype of the inputs.

    Sources: Su et al. 2021, "RoFormer" (rotary); Black et al. 2022, "GPT-NeoX-20B"
    (part of the features); Chen et al. 2023, "Extending context window of large
    language models via positional interpolation" (linear); Peng et al. 2023, "YaRN",
    section 3.1 (NTK-aware); Grattafiori et al. 2024, "The Llama 3 herd of models".

    Args:
        inputs: Floating `(B, T, N, H)`, queries or keys.
        positions: Integers `(T,)`, `(1, T)` or `(B, T)`.
        base: At least 1; the greater, the slower the last pairs turn.
        fraction: Share of H that is rotated, `0 < fraction <= 1`: the first
            `R = int(fraction * H)` features, an even number.
        interleaved: Whether pairs are neighbors `(2 i, 2 i + 1)`, as in RoFormer, or
            stand half of R apart, `(i, i + R / 2)`, as in GPT-NeoX, Llama and Hugging
            Face.
        scaling: How the angles are stretched for sequences longer than the trained
            ones. `"linear"` divides every frequency by `scaling_factor`; `"ntk"` leaves
            the first as it is and divides the last, those between gradually, by a
            greater base; `"llama3"` divides the frequencies with fewer than
            `low_frequency_factor` turns in `original_max_length` positions, leaves
            those with more than `high_frequency_factor`, and blends between.
        scaling_factor: At least 1; for every `scaling`.
        original_max_length: Greatest length trained on; for `"llama3"`.
        low_frequency_factor: For `"llama3"`, which was published with 1.
        high_frequency_factor: For `"llama3"`, which was published with 4.

    Returns:
        A tensor of the shape and dtype of `inputs`.

    Raises:
        ValueError: If an option is out of its domain or would be ignored, or the
            shapes do not fit.
        TypeError: If `inputs` is not floating or `positions` not integer.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.positions import rotate
    >>> query, key = np.random.normal(size=(2, 1, 1, 1, 8))
    >>> near = rotate(query, [5]) * rotate(key, [3])
    >>> far = rotate(query, [70005]) * rotate(key, [70003])
    >>> bool(np.isclose(np.asarray(near).sum(), np.asarray(far).sum(), atol=1e-5))
    True
    """
    options = RotaryOptions(
        base,
        fraction,
        interleaved,
        scaling,
        scaling_factor,
        original_max_length,
        low_frequency_factor,
        high_frequency_factor,
    )
    inputs = _as_tensor(inputs)
    positions = as_integers(positions, "positions")
    check_rotary(inputs, positions, options)
    return turn(inputs, positions, options)


def turn(inputs: Tensor, positions: Tensor, options: RotaryOptions) -> Tensor:
    """Does what `rotate` says, for arguments that were checked.

    Args:
        inputs: Floating `(B, T, N, H)`.
        positions: int32 `(T,)`, `(1, T)` or `(B, T)`.
        options: The options of `rotate`.
    """
    size, steps, remainders = _steps(options, inputs.shape[-1])
    dtype = backend.standardize_dtype(inputs.dtype)
    wide = "float32" if dtype in ("float16", "bfloat16") else dtype
    # One angle for all heads.
    angles = ops.expand_dims(_angles(positions, steps, remainders, wide), axis=-2)
    cos, sin = ops.cos(angles), ops.sin(angles)

    rotated = ops.cast(inputs[..., :size], wide)
    if options.interleaved:
        # On TensorFlow twice as fast as slices with a step of two.
        shape: Any = ops.shape(rotated)
        pairs = ops.reshape(rotated, (*shape[:-1], size // 2, 2))
        unstacked: Any = ops.unstack(pairs, 2, axis=-1)
        first, second = unstacked
    else:
        first, second = rotated[..., : size // 2], rotated[..., size // 2 :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    if options.interleaved:
        rotated = ops.reshape(ops.stack(turned, axis=-1), ops.shape(rotated))
    else:
        rotated = ops.concatenate(turned, axis=-1)
    rotated = ops.cast(rotated, dtype)
    if size == inputs.shape[-1]:
        return rotated
    return ops.concatenate([rotated, inputs[..., size:]], axis=-1)


def check_rotary(
    inputs: Tensor, positions: Tensor | None, options: RotaryOptions
) -> int:
    """Returns R for inputs and positions that `rotate` can take.

    Raises:
        ValueError: If the shapes do not fit each other or `options.fraction`.
        TypeError: If `inputs` is not floating.
    """
    shape = tuple(inputs.shape)
    if len(shape) != 4:
        raise ValueError(
            "`inputs` must have the four dimensions (B, T, N, H). "
            f"Received: inputs of shape {shape}"
        )
    dtype = backend.standardize_dtype(inputs.dtype)
    if "float" not in dtype:
        raise TypeError(f"`inputs` must be floating. Received: inputs of dtype {dtype}")
    if positions is not None:
        received = tuple(positions.shape)
        fits = (
            len(received) in (1, 2)
            and _agree(received[-1], shape[1])
            and (received[:-1] in ((), (1,)) or _agree(received[0], shape[0]))
        )
        if not fits:
            raise ValueError(
                "`positions` must have the shape (T,), (1, T) or (B, T) for inputs "
                f"(B, T, N, H) of shape {shape}. "
                f"Received: positions of shape {received}"
            )
    return options.size(shape[-1])


def alibi_slopes(num_heads: int) -> np.ndarray:
    """How much each head of ALiBi takes off for a step of distance.

    For N a power of two they are `2 ** (-8 n / N)`, n from 1 to N. Otherwise, as in
    the authors' code, those of the power of two below, then every other one of the
    power of two above.

    Source: Press et al. 2022, "Train short, test long: attention with linear biases
    enables input length extrapolation".

    Args:
        num_heads: N, positive.

    Returns:
        Positive slopes `(N,)`, float64.

    Raises:
        ValueError: If `num_heads` is not a positive integer.

    Example:

    >>> from keras_mha.attention.positions import alibi_slopes
    >>> alibi_slopes(3).tolist()
    [0.0625, 0.00390625, 0.25]
    """
    num_heads = _as_integer(num_heads, "num_heads", 1)
    below = 2 ** (num_heads.bit_length() - 1)
    slopes = 0.5 ** (8 / below * np.arange(1, below + 1))
    between = 0.5 ** (4 / below * np.arange(1, 2 * below, 2))
    return np.concatenate([slopes, between[: num_heads - below]])


def relative_position_bucket(
    distances: Tensor,
    *,
    bidirectional: bool = True,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> Tensor:
    """Sorts distances into T5's buckets.

    Half of the buckets hold one distance each, the other half ranges that grow
    geometrically up to `max_distance`; the last holds all beyond. Edges are found in
    whole numbers and looked up in a table of fewer than `2 * max_distance` entries,
    so that no rounding of a logarithm can move them.

    Source: Raffel et al. 2020, "Exploring the limits of transfer learning with a
    unified text-to-text transformer", section 2.1, and its code.

    Args:
        distances: Integers of any shape, key position minus query position.
        bidirectional: Whether keys ahead of the query have buckets of their own,
            the second half of all. Otherwise they share bucket 0 with distance 0.
        num_buckets: At least 2; if `bidirectional`, at least 4 and even.
        max_distance: Above the number of the buckets of one distance: a quarter of
            `num_buckets` if `bidirectional`, else half.

    Returns:
        An int32 tensor of the shape of `distances`, from 0 to `num_buckets - 1`.

    Raises:
        ValueError: If `num_buckets` or `max_distance` is out of its domain.
        TypeError: If `distances` is not integer.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.positions import relative_position_bucket
    >>> buckets = relative_position_bucket(np.array([-200, -8, -1, 0, 1, 8, 200]))
    >>> np.asarray(buckets).tolist()
    [15, 8, 1, 0, 17, 24, 31]
    """
    num_buckets, max_distance = check_buckets(bidirectional, num_buckets, max_distance)
    table = _bucket_table(bool(bidirectional), num_buckets, max_distance)
    limit = len(table) // 2
    places = ops.clip(as_integers(distances, "distances"), -limit, limit) + limit
    return ops.take(ops.convert_to_tensor(table, dtype="int32"), places, axis=0)


def check_buckets(
    bidirectional: bool, num_buckets: int, max_distance: int
) -> tuple[int, int]:
    """Returns the sizes among the options of `relative_position_bucket`, checked.

    Raises:
        ValueError: If one is out of its domain.
    """
    num_buckets = _as_integer(num_buckets, "num_buckets", 4 if bidirectional else 2)
    if bidirectional and num_buckets % 2:
        raise ValueError(
            "`num_buckets` must be even if `bidirectional`: each direction has half. "
            f"Received: num_buckets={num_buckets}"
        )
    single = num_buckets // (4 if bidirectional else 2)
    return num_buckets, _as_integer(max_distance, "max_distance", single + 1)


def as_integers(values: Tensor, name: str) -> Tensor:
    """Returns an integer tensor as int32.

    Args:
        values: Integers of any shape.
        name: The argument's name, for the error text.

    Raises:
        TypeError: If `values` is not integer.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.positions import as_integers
    >>> np.asarray(as_integers(np.array([3, 5], "uint8"), "positions")).tolist()
    [3, 5]
    """
    values = _as_tensor(values)
    dtype = backend.standardize_dtype(values.dtype)
    if "int" not in dtype:
        raise TypeError(f"`{name}` must be integers. Received: {name} of dtype {dtype}")
    return ops.cast(values, "int32")


def _as_tensor(values: Tensor) -> Tensor:
    return values if isinstance(values, KerasTensor) else ops.convert_to_tensor(values)


def _agree(one: int | None, other: int | None) -> bool:
    return None in (one, other) or one == other


@functools.cache
def _steps(
    options: RotaryOptions, head_size: int
) -> tuple[int, np.ndarray, np.ndarray]:
    """R, and the angle a position adds as whole steps of `_angles` and remainders."""
    size = options.size(head_size)
    steps = options.frequencies(size) * (_TURN / (2 * math.pi))
    whole = np.round(steps)
    return size, whole.astype("int32"), steps - whole


def _angles(
    positions: Any, steps: np.ndarray, remainders: np.ndarray, dtype: str
) -> Tensor:
    """Angles `(..., T, R / 2)` up to whole turns, from int32 positions `(..., T)`.

    With a turn cut into 2**32 steps, int32 products wrap around as angles do: the
    whole steps are exact at any position, and floats hold but the rest. The plain
    float32 product is off by hundredths of a radian at position 1e6.
    """
    whole: Any = ops.convert_to_tensor(steps)
    below: Any = ops.convert_to_tensor(remainders, dtype=dtype)
    positions = ops.expand_dims(positions, axis=-1)
    turned = ops.cast(positions * whole, dtype) + ops.cast(positions, dtype) * below
    return turned * (2 * math.pi / _TURN)


@functools.cache
def _bucket_table(
    bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """The buckets of the distances from `-limit` to `limit`; beyond, none is new."""
    count = num_buckets // 2 if bidirectional else num_buckets
    single = count // 2
    ranges = count - single

    def starts(place: int) -> int:
        """The least n with log(n / single) / log(max / single) * ranges >= place."""
        goal = max_distance**place * single**ranges
        return single + bisect.bisect_left(
            range(single, max_distance),
            goal,
            key=lambda distance: distance**ranges * single**place,
        )

    edges = [*range(1, single), *map(starts, range(ranges))]
    limit = edges[-1]
    buckets = np.searchsorted(edges, np.arange(limit + 1), side="right")
    ahead = buckets[1:] + count if bidirectional else np.zeros(limit)
    return np.concatenate([buckets[::-1], ahead]).astype("int32")


def _as_number(value: Any, name: str, lowest: int) -> float:
    number = plain_number(value)
    if number is None or number < lowest:
        raise ValueError(
            f"`{name}` must be a finite number of at least {lowest}. "
            f"Received: {name}={value!r}"
        )
    return number


def _as_integer(value: Any, name: str, lowest: int) -> int:
    number = plain_integer(value)
    if number is None or number < lowest:
        raise ValueError(
            f"`{name}` must be an integer of at least {lowest}. "
            f"Received: {name}={value!r}"
        )
    return number
