"""Rotary embedding, ALiBi's slopes and T5's buckets, against the papers' formulas."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha.attention.positions import (
    RotaryOptions,
    alibi_slopes,
    as_integers,
    relative_position_bucket,
    rotate,
)
from tests.support.attention_cases import check_gradients, draw, numbers

B, T, N, H = 2, 5, 3, 14
LLAMA3: dict[str, Any] = {
    "scaling": "llama3",
    "scaling_factor": 8.0,
    "original_max_length": 8192,
    "low_frequency_factor": 1.0,
    "high_frequency_factor": 4.0,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "base": {"base": 500000.0},
    "interleaved": {"interleaved": True},
    "partial": {"fraction": 3 / 7},
    "partial interleaved": {"fraction": 4 / 7, "interleaved": True},
    "linear": {"scaling": "linear", "scaling_factor": 4},
    "ntk": {"scaling": "ntk", "scaling_factor": 4.0, "fraction": 6 / 7},
    "llama3": LLAMA3,
}
ROWS = np.array([[0, 1, 2, 3, 4], [907, 3, 11, 11, 4099]])
FAR = np.array([123457, 500009, 777787, 999983, 1000000])
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
each_mode = pytest.mark.parametrize("mode", ["graph", "xla"])
needs_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="graphs and tapes of TensorFlow"
)
needs_float64 = pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX has float64 only where switched on"
)


def frequencies_of(
    size: int,
    base: float = 10000.0,
    scaling: str | None = None,
    scaling_factor: float = 1.0,
    original_max_length: int = 0,
    low_frequency_factor: float = 0.0,
    high_frequency_factor: float = 0.0,
) -> np.ndarray:
    """The papers' formulas, one pair at a time, by wavelength for Llama 3."""
    if scaling == "ntk":
        base *= scaling_factor ** (size / (size - 2))
    found = []
    for pair in range(size // 2):
        frequency = 1 / base ** (2 * pair / size)
        if scaling == "linear":
            frequency /= scaling_factor
        if scaling == "llama3":
            wavelength = 2 * math.pi / frequency
            longest = original_max_length / low_frequency_factor
            shortest = original_max_length / high_frequency_factor
            if wavelength > longest:
                frequency /= scaling_factor
            elif wavelength >= shortest:
                smooth = original_max_length / wavelength - low_frequency_factor
                smooth /= high_frequency_factor - low_frequency_factor
                frequency *= (1 - smooth) / scaling_factor + smooth
        found.append(frequency)
    return np.array(found)


def rotated(
    inputs: np.ndarray,
    positions: np.ndarray,
    fraction: float = 1.0,
    interleaved: bool = False,
    **options: Any,
) -> np.ndarray:
    """Each pair is a complex number, multiplied by exp(i * position * frequency)."""
    outputs = inputs.astype("float64")
    size = round(fraction * inputs.shape[-1])
    positions = np.broadcast_to(positions, inputs.shape[:2]).astype("float64")
    for pair, frequency in enumerate(frequencies_of(size, **options)):
        real, imaginary = (
            (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + size // 2)
        )
        number = inputs[..., real] + 1j * inputs[..., imaginary]
        number = number * np.exp(1j * positions * frequency)[..., None]
        outputs[..., real], outputs[..., imaginary] = number.real, number.imag
    return outputs


def heads(dtype: str = "float64") -> np.ndarray:
    return draw(B, T, N, H).astype(dtype)


# Rotary embedding.


@each_option
@pytest.mark.parametrize(
    "positions", [np.arange(T), ROWS[1:], ROWS, FAR], ids=["T", "1T", "BT", "far"]
)
def test_rotary_values(positions: np.ndarray, options: dict[str, Any]) -> None:
    inputs = heads("float32")
    found = rotate(inputs, positions, **options)
    assert found.dtype == keras.ops.convert_to_tensor(inputs).dtype
    expected = rotated(inputs, positions, **options)
    np.testing.assert_allclose(numbers(found), expected, rtol=0, atol=3e-6)
    assert np.abs(expected - inputs)[:, 1:, :, 0].max() > 0.1


@needs_float64
@each_option
@pytest.mark.parametrize(
    ("positions", "tolerance"), [(ROWS, 1e-11), (FAR, 2e-9)], ids=["near", "far"]
)
def test_rotary_values_in_float64(
    positions: np.ndarray, tolerance: float, options: dict[str, Any]
) -> None:
    found = rotate(heads(), positions, **options)
    expected = rotated(heads(), positions, **options)
    np.testing.assert_allclose(numbers(found), expected, rtol=0, atol=tolerance)


def test_float32_products_would_be_wrong_far_out() -> None:
    products = FAR.astype("float32")[:, None] * frequencies_of(H).astype("float32")
    exact = FAR[:, None] * frequencies_of(H)
    assert np.abs(products - exact).max() > 0.01
    found = rotate(heads("float32"), FAR)
    np.testing.assert_allclose(
        numbers(found), rotated(heads("float32"), FAR), rtol=0, atol=3e-6
    )


def test_the_last_position_of_int32() -> None:
    positions = np.array([0, 1, -1, 2**31 - 2, 2**31 - 1])
    found = rotate(heads("float32"), positions)
    expected = rotated(heads("float32"), positions)
    np.testing.assert_allclose(numbers(found), expected, rtol=0, atol=3e-6)


@each_option
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_inputs_are_rounded_once(dtype: str, options: dict[str, Any]) -> None:
    inputs = keras.ops.cast(heads("float32"), dtype)
    found = rotate(inputs, FAR, **options)
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    expected = rotated(numbers(inputs), FAR, **options)
    step = 2.0**-11 if dtype == "float16" else 2.0**-8
    np.testing.assert_allclose(numbers(found), expected, rtol=step, atol=1e-5)


@pytest.mark.parametrize("shift", [1, 1009, 999_983])
@each_option
def test_scores_depend_on_the_distance_alone(
    options: dict[str, Any], shift: int
) -> None:
    query, key = draw(2, 1, 1, N, H, seed=3).astype("float32")

    def score(query_position: int, key_position: int) -> np.ndarray:
        turned = [
            numbers(rotate(each, np.array([position]), **options))
            for each, position in ((query, query_position), (key, key_position))
        ]
        return np.sum(turned[0] * turned[1], axis=-1)

    near, far = score(17, 6), score(17 + shift, 6 + shift)
    np.testing.assert_allclose(far, near, atol=2e-5)
    assert np.abs(score(17 + shift, 6) - near).max() > 1e-3


def test_what_is_not_rotated_is_untouched() -> None:
    inputs = heads("float32")
    found = numbers(rotate(inputs, FAR, fraction=3 / 7))
    np.testing.assert_array_equal(found[..., 6:], inputs[..., 6:])
    np.testing.assert_array_equal(numbers(rotate(inputs, [0] * T)), inputs)


@needs_tensorflow
@each_option
def test_rotary_gradients(options: dict[str, Any]) -> None:
    check_gradients(
        lambda inputs: rotate(inputs, ROWS, **options),
        lambda inputs: rotated(inputs, ROWS, **options),
        [heads()],
    )


@needs_tensorflow
@each_mode
@each_option
@pytest.mark.parametrize("shape", [(None, None, N, H), (B, T, N, H)])
def test_rotary_compiled(
    shape: tuple[int | None, ...], options: dict[str, Any], mode: str
) -> None:
    function = tf.function(
        lambda inputs, positions: rotate(inputs, positions, **options),
        input_signature=[
            tf.TensorSpec(shape, tf.float32),
            tf.TensorSpec(shape[:2], tf.int32),
        ],
        jit_compile=mode == "xla",
    )
    assert tuple(function.get_concrete_function().outputs[0].shape) == shape
    positions = np.stack([FAR, ROWS[1]]).astype("int32")
    expected = rotated(heads("float32"), positions, **options)
    found = function(heads("float32"), positions)
    np.testing.assert_allclose(numbers(found), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64"])
def test_positions_of_every_integer_kind(dtype: str) -> None:
    found = rotate(heads("float32"), np.arange(T).astype(dtype))
    expected = rotate(heads("float32"), np.arange(T))
    np.testing.assert_array_equal(numbers(found), numbers(expected))


# Frequencies.


@pytest.mark.parametrize("size", [4, 6, 64, 128])
@each_option
def test_frequencies(options: dict[str, Any], size: int) -> None:
    names = ("fraction", "interleaved")
    formula = {name: options[name] for name in options if name not in names}
    found = RotaryOptions(**options).frequencies(size)
    assert found.dtype == "float64"
    np.testing.assert_allclose(found, frequencies_of(size, **formula), rtol=1e-13)


def test_a_greater_base_keeps_the_fastest_and_divides_the_slowest() -> None:
    plain = RotaryOptions().frequencies(64)
    ratio = RotaryOptions(scaling="ntk", scaling_factor=4).frequencies(64) / plain
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(1 / 4)
    assert (np.diff(ratio) < 0).all()
    alone = RotaryOptions(scaling="ntk", scaling_factor=4).frequencies(2)
    np.testing.assert_array_equal(alone, [1])


def test_llama3_has_three_bands() -> None:
    plain = RotaryOptions(500000.0).frequencies(128)
    ratio = RotaryOptions(500000.0, **LLAMA3).frequencies(128) / plain
    turns = 8192 * plain / (2 * math.pi)
    np.testing.assert_allclose(ratio[turns > 4], 1, rtol=1e-14)
    np.testing.assert_allclose(ratio[turns < 1], 1 / 8, rtol=1e-14)
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) > 3
    assert ((between > 1 / 8) & (between < 1)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": 0.5}, "`base` must be a finite number of at least 1. .*base=0.5"),
        ({"base": math.nan}, "`base` must be a finite number .*base=nan"),
        ({"base": "10000"}, "`base` must be a finite number .*base='10000'"),
        ({"base": True}, "`base` must be a finite number .*base=True"),
        ({"fraction": 0.0}, "`fraction` must be .* 0 < fraction <= 1.*fraction=0.0"),
        ({"fraction": 1.5}, "`fraction` must be .* 0 < fraction <= 1.*fraction=1.5"),
        ({"scaling": "yarn"}, "`scaling` must be one of .*llama3.*scaling='yarn'"),
        ({"scaling": "linear"}, r"`scaling='linear'` takes exactly .*Received: \{\}"),
        (
            {"scaling_factor": 2.0},
            r"`scaling=None` takes exactly the arguments \(\).*'scaling_factor': 2.0",
        ),
        (
            {"scaling": "ntk", "scaling_factor": 2.0, "original_max_length": 7},
            "`scaling='ntk'` takes exactly .*'original_max_length': 7",
        ),
        (
            {**LLAMA3, "high_frequency_factor": None},
            "`scaling='llama3'` takes exactly .*high_frequency_factor.* Received: ",
        ),
        (
            {"scaling": "linear", "scaling_factor": 0.5},
            "`scaling_factor` must be .* at least 1. .*scaling_factor=0.5",
        ),
        (
            {**LLAMA3, "original_max_length": 0},
            "`original_max_length` must be .* at least 1. .*original_max_length=0",
        ),
        (
            {**LLAMA3, "low_frequency_factor": -1.0},
            "`low_frequency_factor` must be .* at least 0. .*=-1.0",
        ),
        (
            {**LLAMA3, "low_frequency_factor": 4.0},
            "`low_frequency_factor` must be below `high_frequency_factor`",
        ),
    ],
)
def test_options_out_of_their_domain(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotaryOptions(**options)
    with pytest.raises(ValueError, match=message):
        rotate(heads("float32"), np.arange(T), **options)


@pytest.mark.parametrize("fraction", [5 / 14, 1 / 14, 0.01])
def test_features_are_rotated_in_pairs(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"even and not zero.*={fraction}, H=14"):
        rotate(heads("float32"), np.arange(T), fraction=fraction)


def test_inputs_have_four_dimensions() -> None:
    with pytest.raises(ValueError, match=r"`inputs`.*\(B, T, N, H\).*\(5, 3, 14\)"):
        rotate(heads("float32")[0], np.arange(T))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, T), (B, 1), (1, 1), (1, B, T)])
def test_positions_fit_their_inputs(shape: tuple[int, ...]) -> None:
    text = (
        rf"`positions` .*\(2, 5, 3, 14\).*Received: .* \({', '.join(map(str, shape))}"
    )
    with pytest.raises(ValueError, match=text):
        rotate(heads("float32"), np.zeros(shape, "int32"))


def test_wrong_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="`positions` must be integers.*float32"):
        rotate(heads("float32"), np.arange(T, dtype="float32"))
    with pytest.raises(TypeError, match="`inputs` must be floating.*int32"):
        rotate(heads().astype("int32"), np.arange(T))
    with pytest.raises(TypeError, match="`mine` must be integers.*mine of dtype bool"):
        as_integers(np.array([True]), "mine")


# ALiBi.


def slopes_of_the_authors(count: int) -> list[float]:
    """The recursion of the paper's code, in its own terms."""
    if math.log2(count).is_integer():
        start = 2 ** (-(2 ** -(math.log2(count) - 3)))
        return [start * start**place for place in range(count)]
    below = 2 ** math.floor(math.log2(count))
    return (
        slopes_of_the_authors(below)
        + slopes_of_the_authors(2 * below)[0::2][: count - below]
    )


def test_slopes_of_eight_heads_are_those_of_the_paper() -> None:
    expected = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(8).tolist() == expected
    np.testing.assert_allclose(alibi_slopes(16)[:3], [2**-0.5, 2**-1, 2**-1.5])


@pytest.mark.parametrize("num_heads", [*range(1, 20), 31, 33, 40, 64, 96])
def test_slopes_are_those_of_the_code(num_heads: int) -> None:
    found = alibi_slopes(num_heads)
    assert found.shape == (num_heads,)
    np.testing.assert_allclose(found, slopes_of_the_authors(num_heads), rtol=1e-13)


@pytest.mark.parametrize("num_heads", [0, -2, 2.0, True, None])
def test_slopes_need_a_number_of_heads(num_heads: Any) -> None:
    text = f"`num_heads` must be an integer of at least 1. .*num_heads={num_heads}"
    with pytest.raises(ValueError, match=text):
        alibi_slopes(num_heads)


# T5's buckets.

BUCKETS = [
    (True, 32, 128),
    (False, 32, 128),
    (True, 64, 256),
    (True, 320, 800),
    (False, 16, 1024),
    (False, 10, 4096),
    (True, 8, 1000),
    (True, 32, 9),  # ranges so narrow that some hold no distance
    (True, 4, 2),
    (False, 2, 2),
    (False, 7, 29),
]
each_bucketing = pytest.mark.parametrize("bucketing", BUCKETS, ids=str)
DISTANCES = np.arange(-4999, 5003)


def bucket_of(
    distance: int, bidirectional: bool, num_buckets: int, max_distance: int
) -> int:
    """The formula of T5's code."""
    bucket = 0
    if bidirectional:
        num_buckets //= 2
        bucket += num_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = -min(distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return bucket + distance
    large = math.log(distance / exact) / math.log(max_distance / exact)
    return bucket + min(exact + int(large * (num_buckets - exact)), num_buckets - 1)


def buckets(distances: Any, bucketing: tuple[bool, int, int]) -> Any:
    bidirectional, num_buckets, max_distance = bucketing
    return relative_position_bucket(
        distances,
        bidirectional=bidirectional,
        num_buckets=num_buckets,
        max_distance=max_distance,
    )


@each_bucketing
def test_buckets_follow_the_formula(bucketing: tuple[bool, int, int]) -> None:
    found = buckets(DISTANCES, bucketing)
    assert keras.backend.standardize_dtype(found.dtype) == "int32"
    expected = [bucket_of(distance, *bucketing) for distance in DISTANCES.tolist()]
    np.testing.assert_array_equal(numbers(found), expected)


@pytest.mark.parametrize(
    ("bucketing", "starts"),
    [
        ((True, 32, 128), {8: 8, 16: 10, 32: 12, 64: 14}),
        ((False, 32, 128), {16: 16}),
        ((False, 9, 128), {4: 4, 8: 5, 16: 6, 32: 7, 64: 8}),
        ((False, 5, 2 * 7**3), {2: 2, 14: 3, 98: 4}),
        ((False, 6, 3 * 7**3), {3: 3, 21: 4, 147: 5}),
    ],
)
def test_edges_that_are_whole_numbers(
    bucketing: tuple[bool, int, int], starts: dict[int, int]
) -> None:
    # Rounded logarithms, in float32 or in float64, put some of these a bucket lower.
    distances = np.array(list(starts))
    found, before = (
        numbers(buckets(-each, bucketing)) for each in (distances, distances - 1)
    )
    np.testing.assert_array_equal(found, list(starts.values()))
    np.testing.assert_array_equal(before, found - 1)


def test_options_may_be_numpy_integers() -> None:
    # Their powers would wrap around.
    sizes = np.array([318, 801], "int32")
    found = buckets(DISTANCES, (True, *sizes))
    expected = buckets(DISTANCES, (True, 318, 801))
    np.testing.assert_array_equal(numbers(found), numbers(expected))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 5)])
def test_buckets_of_every_shape_and_kind(shape: tuple[int, ...], dtype: str) -> None:
    distances = np.random.default_rng(1).integers(-128, 128, shape).astype(dtype)
    found = numbers(relative_position_bucket(distances))
    assert found.shape == shape
    expected = [bucket_of(int(each), True, 32, 128) for each in distances.ravel()]
    np.testing.assert_array_equal(found.ravel(), expected)


def test_the_greatest_distances() -> None:
    extreme = np.array([-(2**31), 2**31 - 1], "int32")
    np.testing.assert_array_equal(numbers(relative_position_bucket(extreme)), [15, 31])


@needs_tensorflow
@each_mode
@each_bucketing
def test_buckets_compiled(bucketing: tuple[bool, int, int], mode: str) -> None:
    function = tf.function(
        lambda distances: buckets(distances, bucketing),
        input_signature=[tf.TensorSpec([None], tf.int32)],
        jit_compile=mode == "xla",
    )
    found, expected = function(DISTANCES), buckets(DISTANCES, bucketing)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("bucketing", "message"),
    [
        ((True, 2, 128), "`num_buckets` .*at least 4. Received: num_buckets=2"),
        ((False, 1, 128), "`num_buckets` .*at least 2. Received: num_buckets=1"),
        ((True, 33, 128), "`num_buckets` must be even.*Received: num_buckets=33"),
        ((True, 32.0, 128), "`num_buckets` must be an integer.*num_buckets=32.0"),
        ((True, 32, 8), "`max_distance` .*at least 9. Received: max_distance=8"),
        ((False, 32, 16), "`max_distance` .*at least 17. Received: max_distance=16"),
        ((True, 32, 128.0), "`max_distance` must be an integer.*max_distance=128.0"),
    ],
)
def test_buckets_out_of_their_domain(bucketing: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        buckets(DISTANCES, bucketing)


def test_distances_are_whole() -> None:
    with pytest.raises(TypeError, match="`distances` must be integers.*float32"):
        relative_position_bucket(np.zeros(3, "float32"))
