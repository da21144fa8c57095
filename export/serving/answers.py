"""Shared by both clients: their arguments, and labels from probabilities."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

LABELS = ("negative", "positive")


class Answer(NamedTuple):
    """The likeliest label of a text, and its probability."""

    label: str
    probability: float


def choose(rows: Sequence[object], labels: Sequence[str]) -> list[Answer]:
    """Picks the likeliest label of each row.

    Args:
        rows: One probability for each label, for each text.
        labels: The labels, in the model's order.

    Returns:
        One answer for each row.

    Raises:
        ValueError: If a row does not hold one finite number for each label.
    """
    answers = []
    for row in rows:
        if (
            not isinstance(row, Sequence)
            or len(row) != len(labels)
            or not all(isinstance(p, float | int) and math.isfinite(p) for p in row)
        ):
            raise ValueError(
                f"A row of probabilities must hold {len(labels)} finite numbers, one "
                f"for each of the labels {list(labels)}. Received: {row!r}"
            )
        best = max(range(len(labels)), key=row.__getitem__)
        answers.append(Answer(labels[best], float(row[best])))
    return answers


def read_labels(path: str) -> tuple[str, ...]:
    """Reads labels for argparse, one on each line, in the model's order."""
    try:
        labels = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"cannot read labels: {error}") from error
    classes = tuple(label.strip() for label in labels if label.strip())
    if len(classes) < 2:
        raise argparse.ArgumentTypeError(
            f"{path} must hold at least two labels, one on each line; "
            f"it holds {len(classes)}"
        )
    return classes


def positive_seconds(value: str) -> float:
    """Reads a time-out for argparse."""
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(
            f"must be a positive number of seconds; received {value!r}"
        )
    return seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that both clients share."""
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="a text to classify")
    parser.add_argument("--model", default="sentiment", help="default: %(default)s")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--version", type=int, help="default: the newest served")
    which.add_argument(
        "--label", help="a version label of models.config, such as stable"
    )
    parser.add_argument(
        "--labels",
        type=read_labels,
        default=LABELS,
        metavar="FILE",
        help=f"class labels, one on each line (default: {', '.join(LABELS)})",
    )
    parser.add_argument(
        "--timeout",
        type=positive_seconds,
        default=10.0,
        metavar="SECONDS",
        help="default: %(default)s",
    )


def show(answers: Sequence[Answer], texts: Sequence[str]) -> str:
    """Lays out label, probability and text in columns, one text on each line."""
    width = max(len(answer.label) for answer in answers)
    return "\n".join(
        f"{answer.label:<{width}}  {answer.probability:.4f}  {text}"
        for answer, text in zip(answers, texts, strict=True)
    )
