from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from keras_mha.export import Parity, ParityError
from keras_mha.export.parity import check_parity, check_timeout, check_tolerance

INF, NAN = float("inf"), float("nan")


def check(wanted: Any, got: Any, tolerance: float = 1e-5) -> Parity:
    return check_parity(
        [{"p": np.asarray(wanted)}],
        [{"p": np.asarray(got)}],
        tolerance=tolerance,
        samples=2,
        runtime="by hand",
        runtime_version="1",
    )


def test_the_largest_differences_are_found() -> None:
    parity = check([[0.5, 0.25], [0.0, -2.0]], [[0.5, 0.28125], [0.125, -2.25]], 0.25)
    assert parity.max_absolute_difference == 0.25
    # 0.03125 / 0.25 and 0.25 / 2; the zero is left out.
    assert parity.max_relative_difference == 0.125
    assert parity.batch_sizes == (2,)


def test_every_run_counts() -> None:
    runs = [{"p": np.full(3, 0.5)}, {"p": np.full(1, 0.5)}]
    off = [{"p": np.full(3, 0.5)}, {"p": np.full(1, 0.75)}]
    facts: Any = {"samples": 3, "runtime": "by hand", "runtime_version": "1"}
    with pytest.raises(ParityError, match="'p' .* by 0.25; the tolerance is 0.1"):
        check_parity(runs, off, tolerance=0.1, **facts)
    with pytest.raises(ParityError, match="1 runs were answered, not 2"):
        check_parity(runs, off[:1], tolerance=1.0, **facts)


@pytest.mark.parametrize(
    ("wanted", "got"),
    [
        ([NAN], [NAN]),
        ([INF, -INF], [INF, -INF]),
        ([3, 4], [3, 4]),
        ([True], [True]),
        (np.array([b"a"], object), np.array([b"a"], object)),
    ],
)
def test_equal_values_are_equal(wanted: Any, got: Any) -> None:
    parity = check(wanted, got)
    assert (parity.max_absolute_difference, parity.max_relative_difference) == (0, 0)


@pytest.mark.parametrize(
    ("wanted", "got"),
    [
        ([0.5, NAN], [0.5, 0.5]),
        ([0.5, 0.5], [0.5, NAN]),
        ([INF], [-INF]),
        ([INF], [1.0]),
        ([1.0], [INF]),
        ([3, 4], [3, 5]),
        ([True], [False]),
        (np.array([b"a"], object), np.array([b"a\0"], object)),
    ],
)
def test_values_that_no_tolerance_covers(wanted: Any, got: Any) -> None:
    with pytest.raises(ParityError, match="by inf; the tolerance is 1e\\+03"):
        check(wanted, got, 1e3)


@pytest.mark.parametrize(
    ("wanted", "got", "text"),
    [
        (np.zeros(2), np.zeros(3), r"is float64 \(3,\); the model's is float64 \(2,\)"),
        (np.zeros(2), np.zeros(2, "float32"), r"is float32 .* is float64"),
    ],
)
def test_other_shapes_and_types(wanted: Any, got: Any, text: str) -> None:
    with pytest.raises(ParityError, match=text):
        check(wanted, got)


def test_other_names() -> None:
    with pytest.raises(ParityError, match=r"has the outputs \['p'\].*file \['q'\]"):
        check_parity(
            [{"p": np.zeros(1)}],
            [{"q": np.zeros(1)}],
            tolerance=1.0,
            samples=1,
            runtime="by hand",
            runtime_version="1",
        )


@pytest.mark.parametrize("value", [-1, np.nan, np.inf, None, "1", True])
def test_tolerances_and_times_are_finite_numbers(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"`quantized_tolerance` must be a finite numb"
    ):
        check_tolerance(value, "quantized_tolerance")
    with pytest.raises(ValueError, match=r"`timeout` must be a finite number of sec"):
        check_timeout(value)


def test_a_time_of_zero_is_refused_and_a_tolerance_is_not() -> None:
    check_tolerance(np.float32(0.0))
    check_timeout(np.int64(3))
    with pytest.raises(ValueError, match=r"`timeout` .* Received: 0"):
        check_timeout(0)


def test_a_difference_of_drawn_inputs_counts_in_proportion() -> None:
    runs = [{"p": np.array([1.0, -2.0])}, {"p": np.array([5.0, 8.0])}]
    off = [runs[0], {"p": np.array([5.0, 8.25])}]
    facts: Any = {"samples": 2, "runtime": "by hand", "runtime_version": "1"}
    parity = check_parity(runs, off, tolerance=0.1, drawn=1, **facts)
    assert parity.max_absolute_difference == 0.25 / 4  # 8 is four times 2
    assert (parity.samples, parity.drawn) == (2, 2)
    with pytest.raises(ParityError, match=r"by 0\.25; .*values up to 8\)"):
        check_parity(runs, off, tolerance=0.1, **facts)


def test_a_model_that_does_not_repeat_itself_is_told() -> None:
    runs, off = [{"p": np.array([1.0])}], [{"p": np.array([2.0])}]
    facts: Any = {"samples": 1, "runtime": "by hand", "runtime_version": "1"}
    again = [{"p": np.array([1.5])}]
    with pytest.raises(ParityError, match="run by Keras, differs by 0.5 between eager"):
        check_parity(runs, off, tolerance=0.1, again=lambda: again, **facts)
    with pytest.raises(ParityError, match=r"Nothing was written\.$"):
        check_parity(runs, off, tolerance=0.1, again=lambda: runs, **facts)
