"""Compares by value what a model and its exported file answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from keras_mha.attention.numeric import plain_number
from keras_mha.export.report import Parity

Arrays = Mapping[str, np.ndarray]


class VerificationError(RuntimeError):
    """An exported file could not be run in its fresh process; nothing was left."""


class ParityError(VerificationError):
    """An exported file answers differently from its model; nothing was left."""


def check_tolerance(tolerance: Any, name: str = "tolerance") -> None:
    """Refuses a tolerance that nothing could be compared with.

    Raises:
        ValueError: If it is not a number, negative or infinite.
    """
    number = plain_number(tolerance)
    if number is None or number < 0:
        raise ValueError(
            f"`{name}` must be a finite number of at least 0. Received: {tolerance!r}"
        )


def check_timeout(timeout: Any) -> None:
    """Refuses a time in which nothing can be done.

    Raises:
        ValueError: If it is not a number, infinite, or not above 0.
    """
    number = plain_number(timeout)
    if number is None or number <= 0:
        raise ValueError(
            "`timeout` must be a finite number of seconds above 0. "
            f"Received: {timeout!r}"
        )


def check_parity(
    expected: Sequence[Arrays],
    actual: Sequence[Arrays],
    *,
    tolerance: float,
    samples: int,
    runtime: str,
    runtime_version: str,
    drawn: int = 0,
    again: Callable[[], Sequence[Arrays]] | None = None,
) -> Parity:
    """Compares the answers run by run.

    Args:
        expected: The model's outputs by name, for each run.
        actual: The exported file's, in the same order.
        tolerance: Largest absolute difference allowed.
        samples: Number of distinct rows in the runs; reported.
        runtime: What ran the file; reported.
        runtime_version: Its version; reported.
        drawn: How many runs, the last ones, have inputs that were no samples. Where
            an output has larger values there, a difference counts in proportion.
        again: Computes the model's outputs another time, in a graph. Where a value
            differs, the error tells how far these are from `expected`.

    Returns:
        The largest differences over all runs. The relative one is taken over the
        elements whose expected value is not zero.

    Raises:
        ParityError: If a name, shape or type differs, or a value by more than
            `tolerance`. Not-a-number equals only itself, as infinity does; integers,
            booleans and strings must be equal.

    Example:

    >>> import numpy as np
    >>> from keras_mha.export.parity import check_parity
    >>> half = [{"p": np.array([0.5])}]
    >>> off = [{"p": np.array([0.5625])}]
    >>> facts = dict(samples=1, runtime="by hand", runtime_version="1")
    >>> parity = check_parity(half, off, tolerance=0.1, **facts)
    >>> parity.max_absolute_difference, parity.max_relative_difference
    (0.0625, 0.125)
    """
    if len(actual) != len(expected):
        raise ParityError(f"{len(actual)} runs were answered, not {len(expected)}.")
    absolute = relative = 0.0
    worst = ""
    of_samples = expected[: len(expected) - drawn]
    for i, (wanted, got) in enumerate(zip(expected, actual, strict=True)):
        if set(wanted) != set(got):
            raise ParityError(
                f"The model has the outputs {sorted(wanted)}, "
                f"the exported file {sorted(got)}."
            )
        for name in wanted:
            difference, share = _difference(name, wanted[name], got[name])
            if i >= len(of_samples):
                difference /= _growth(name, wanted, of_samples)
            if difference > absolute:
                absolute, worst = difference, name
            relative = max(relative, share)
    if absolute > tolerance:
        size = max(_largest(run[worst]) for run in expected)
        raise ParityError(
            f"Output {worst!r} of the exported file differs from the model's by "
            f"{absolute:.3g}; the tolerance is {tolerance:.3g} (in {runtime} "
            f"{runtime_version}, {samples} samples, values up to {size:.3g}). "
            "Nothing was written."
            f"{_doubt(expected, again, tolerance)}"
        )
    return Parity(
        max_absolute_difference=absolute,
        max_relative_difference=relative,
        tolerance=tolerance,
        samples=samples,
        batch_sizes=tuple(sorted({_rows(run) for run in expected})),
        runtime=runtime,
        runtime_version=runtime_version,
        drawn=sum(map(_rows, expected[len(of_samples) :])),
    )


def _doubt(
    expected: Sequence[Arrays],
    again: Callable[[], Sequence[Arrays]] | None,
    tolerance: float,
) -> str:
    """Says so where the model does not repeat its own answers to the tolerance."""
    if again is None:
        return ""
    own = max(
        _difference(name, wanted[name], got[name])[0]
        for wanted, got in zip(expected, again(), strict=True)
        for name in wanted
    )
    if own <= tolerance:
        return ""
    return (
        f" The model itself, run by Keras, differs by {own:.3g} between eager mode and "
        "a graph, as `predict` runs it: pass a larger `tolerance`, or take out of the "
        "model what is random or ill-conditioned."
    )


def _growth(name: str, run: Arrays, others: Sequence[Arrays]) -> float:
    """Returns how many times larger an output's values are than in other runs."""
    size = max(map(_largest, (other[name] for other in others)), default=0.0)
    return max(1.0, _largest(run[name]) / size) if size else 1.0


def _largest(array: np.ndarray) -> float:
    """Returns the largest finite size of a value, 0 for what is no number."""
    if array.dtype.kind != "f":
        return 0.0
    return float(np.max(np.abs(array), initial=0.0, where=np.isfinite(array)))


def _rows(run: Arrays) -> int:
    return next((len(array) for array in run.values() if array.ndim), 1)


def _difference(name: str, wanted: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """Returns the largest absolute and relative differences of two arrays."""
    if (wanted.shape, wanted.dtype) != (got.shape, got.dtype):
        raise ParityError(
            f"Output {name!r} of the exported file is {got.dtype} {got.shape}; "
            f"the model's is {wanted.dtype} {wanted.shape}."
        )
    if wanted.dtype.kind != "f":
        different = float(np.any(wanted != got))
        return different * np.inf if different else 0.0, different
    exact, other = wanted.astype(np.float64), got.astype(np.float64)
    same = (exact == other) | (np.isnan(exact) & np.isnan(other))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(exact - other))
    gap = np.where(np.isnan(gap), np.inf, gap)
    divisor = np.where((exact == 0) | ~np.isfinite(exact), np.inf, np.abs(exact))
    with np.errstate(invalid="ignore"):
        share = np.nan_to_num(gap / divisor, nan=0.0, posinf=np.inf)
    return float(np.max(gap, initial=0.0)), float(np.max(share, initial=0.0))
