"""Summarizes timings: medians, quartiles, ratios within one round.

The speed of a machine drifts while a comparison runs, and one round drifts
together. So a ratio is the median of the rounds' ratios, not the ratio of the medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """The middle of some values and the half of them around it."""

    lower: float
    median: float
    upper: float


class Row(NamedTuple):
    """One entry of a comparison.

    Attributes:
        label: Its name.
        seconds: For one step.
        share: Of the matrix product's rate; `None` where operations are not counted.
        times: How many times the first entry's time it takes; `None` where that
            failed.
    """

    label: str
    seconds: Spread
    share: float | None
    products: float
    times: float | None


def spread(values: Sequence[float]) -> Spread:
    """Returns the median and the quartiles."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def paired_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Returns the median of the ratios of timings of the same round."""
    return statistics.median(
        value / other for value, other in zip(values, others, strict=True)
    )


def rows(comparison: dict[str, Any], reference_operations: float) -> list[Row | str]:
    """Returns a row for each entry with timings, and a line for each that failed.

    Args:
        comparison: As `benchmarks.coordinator.run_times` returns it.
        reference_operations: Floating-point operations of the matrix product.
    """
    product = comparison["reference_seconds"]
    operations = comparison["operations"]
    first = comparison["entries"][0]["seconds"]
    table: list[Row | str] = []
    for entry in comparison["entries"]:
        label, seconds = entry["label"], entry["seconds"]
        if entry["failure"]:
            table.append(f"{label}: {entry['failure']}")
            continue
        products = paired_ratio(seconds, product)
        table.append(
            Row(
                label,
                spread(seconds),
                operations / reference_operations / products if operations else None,
                products,
                paired_ratio(seconds, first) if first else None,
            )
        )
    return table
