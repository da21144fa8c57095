"""Shows where the trained encoders attend, and which heads they need.

Adds to train.py's directory a picture for each review, one of the heads, and a table of
the accuracy as heads are removed.

Examples:
    python examples/sentiment/explain.py
    python examples/sentiment/explain.py "A fine film." "Two hours, all of them dull."
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Set before TensorFlow is imported, to silence its notes on the hardware.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from data import LABELS, DataError, Reviews, load_reviews, split_fold
from report import figure, wilson_interval, write_text

import keras_mha

# Registers the tokenizer of the saved model.
import keras_mha.text
from keras_mha.interpret import (
    PruningCurve,
    attention_rollout,
    head_importance,
    prune_heads,
    pruning_curve,
)

TEXTS = (
    "A tender, funny film with a big heart.",
    "Two hours of clichés, and all of them dull.",
    "It is not a bad film, but far too long.",
)
LOSS = "sparse_categorical_crossentropy"
# The accuracy that the smaller model may lose on the reviews that choose it.
MAX_DROP = 0.005


@dataclass(frozen=True)
class Explained:
    """The model's answer to one text of T tokens, and its attention.

    Attributes:
        tokens: The tokens.
        answer: Probabilities of the labels `(2,)`.
        attention: Mean over encoders and heads `(T, T)`; the last axis is attended to.
        received: The attention that each token receives on average, by encoder, `(M,
            T)`.
        flow: The share of each token in the mean that the encoders answer from, by
            attention rollout, averaged over encoders, `(T,)`.
    """

    tokens: list[str]
    answer: np.ndarray
    attention: np.ndarray
    received: np.ndarray
    flow: np.ndarray


def explain(model: keras.Model, texts: Sequence[str]) -> list[Explained]:
    """Explains each text; the encoders see one at a time, so without padding."""
    tokenizer: Any = model.get_layer("tokenizer")
    explained = []
    for text in texts:
        ids = tokenizer(tf.constant([text])).numpy()[0]
        maps = keras_mha.attention_maps(model, [text])
        encoders = stacks(maps)
        means = np.stack([stack[-1].mean(axis=(0, 1)) for stack in encoders])
        flows = [attention_rollout(stack)[0].mean(axis=0) for stack in encoders]
        explained.append(
            Explained(
                [tokenizer.vocabulary[i] for i in ids],
                np.asarray(model(tf.constant([text])))[0],
                means.mean(axis=0),
                means.mean(axis=1),
                np.mean(flows, axis=0),
            )
        )
    return explained


def stacks(maps: Mapping[str, np.ndarray]) -> list[list[np.ndarray]]:
    """Groups the maps by encoder, from its first block to its last."""
    encoders: dict[str, list[np.ndarray]] = {}
    for path, scores in maps.items():
        encoders.setdefault(path.split("/")[0], []).append(scores)
    return list(encoders.values())


def draw_review(path: Path, text: str, review: Explained) -> None:
    """Draws which word attends to which, and below the total that each receives."""
    T = len(review.tokens)
    places = np.arange(T)
    with figure(
        path,
        figsize=(0.4 * T + 2.6, 0.3 * T + 4.2),
        nrows=2,
        sharex=True,
        gridspec_kw={"height_ratios": [0.3 * T, 2]},
    ) as axes:
        above, below = axes
        image = above.imshow(100 * review.attention, "Blues", vmin=0, aspect="auto")
        above.set_yticks(places, review.tokens)
        share, label = max(zip(review.answer, LABELS, strict=True))
        above.set_title(f"“{text}”\n{label}, {share:.0%}", fontsize=11)
        above.set_ylabel("this token attends ...")
        above.figure.colorbar(
            image, ax=axes, label="% of a row's attention", shrink=0.5, anchor=(0, 1)
        )
        spread = 100 * review.received
        mean = spread.mean(axis=0)
        bounds = np.abs(np.quantile(spread, [0.1, 0.9], axis=0) - mean)
        received = "attention received; line: 80 % of encoders"
        below.bar(places - 0.2, mean, 0.4, yerr=bounds, label=received, color="C0")
        below.bar(places + 0.2, 100 * review.flow, 0.4, label="rollout", color="C1")
        below.axhline(100 / T, color="grey", linestyle=":", label="equal shares")
        below.set_xticks(places, review.tokens, rotation=90)
        below.set(xlabel="... to this token", ylabel="% of all")
        below.set_ylim(0, 1.5 * float((mean + bounds[1]).max()))
        below.legend(loc="upper left", fontsize=8)


def draw_heads(
    path: Path,
    importance: Mapping[str, np.ndarray],
    curves: Mapping[str, PruningCurve],
    rows: int,
) -> None:
    """Draws each head's importance, and the accuracy on `rows` as heads are removed."""
    names = [name.removesuffix("/attention/self_attention") for name in importance]
    heads = max(map(len, importance.values()))
    table = np.full((len(names), heads), np.nan)
    for row, numbers in zip(table, importance.values(), strict=True):
        row[: len(numbers)] = numbers
    with figure(
        path,
        figsize=(10, 0.3 * len(names) + 2),
        ncols=2,
        gridspec_kw={"width_ratios": [1, 1.6]},
    ) as (left, right):
        image = left.imshow(table, cmap="Oranges", vmin=0, aspect="auto")
        left.set_xticks(range(heads))
        left.set_yticks(range(len(names)), names)
        left.set(title="Importance of the heads", xlabel="head")
        left.figure.colorbar(image, ax=left, label="slope of the loss, by layer")
        for label, curve in curves.items():
            left_over = [step.heads_left for step in curve.steps]
            scores = [100 * step.score for step in curve.steps]
            right.plot(left_over, scores, marker=".", label=label)
        whole = next(iter(curves.values())).steps[0].score
        low, high = wilson_interval(round(whole * rows), rows)
        right.axhspan(
            100 * low, 100 * high, color="grey", alpha=0.15, label="all heads, 95 %"
        )
        right.invert_xaxis()
        right.set(
            title=f"Accuracy on {rows} reviews as heads go",
            xlabel="heads left",
            ylabel="%",
        )
        right.grid(alpha=0.3)
        right.legend(loc="lower left", fontsize=8)


def prune(
    model: keras.Model, train: Reviews, test: Reviews, rows: int, picture: Path
) -> str:
    """Ranks the heads on `rows` training reviews and removes them; returns a report.

    Half of the test reviews choose how many heads remain; the other half judges.
    """
    rng = np.random.default_rng(0)
    ranked = train.take(rng.permutation(len(train))[:rows])
    order = rng.permutation(len(test))
    choosing, judging = (test.take(part) for part in np.array_split(order, 2))
    importance = head_importance(
        model, ranked.texts, ranked.labels, loss=LOSS, batch_size=64
    )
    curves = {
        label: pruning_curve(
            model,
            {path: sign * numbers for path, numbers in importance.items()},
            choosing.texts,
            choosing.labels,
        )
        for label, sign in (
            ("least important first", 1),
            ("most important first", -1),
        )
    }
    draw_heads(picture, importance, curves, len(choosing))
    curve, backwards = curves.values()
    chosen = curve.smallest(MAX_DROP)
    smaller = prune_heads(model, chosen.removed)
    before, after = (accuracy_of(each, judging) for each in (model, smaller))
    last, worst = curve.steps[-1], backwards.steps[-1]
    return (
        f"# Without {curve.steps[0].heads_left - chosen.heads_left} of "
        f"{curve.steps[0].heads_left} heads\n\n"
        f"Accuracy on {len(judging)} other test reviews: {before:.4f} with all "
        f"heads and {model.count_params():,} weights, {after:.4f} with "
        f"{chosen.heads_left} heads and {smaller.count_params():,} weights.\n\n"
        f"On the {len(choosing)} reviews that chose. With one head left in each "
        f"layer, the most important ones keep {last.score:.4f}, the least important "
        f"ones {worst.score:.4f}:"
        f"\n\n{curve.to_markdown()}"
    )


def accuracy_of(model: Any, reviews: Reviews) -> float:
    """Returns the share of reviews whose likelier label is right."""
    answers = model.predict(tf.constant(reviews.texts), verbose=0, batch_size=256)
    return float(np.mean(answers.argmax(-1) == reviews.labels))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    description, _, epilog = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="a review")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("dist/sentiment"),
        help="train.py's directory, which gets the pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=512,
        help="training reviews that rank the heads; 0 skips the heads "
        "(default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if not (options.directory / "model.keras").exists():
        parser.error(f"{options.directory} holds no model.keras: run train.py first")
    model: Any = keras.saving.load_model(options.directory / "model.keras")
    texts = options.texts or TEXTS
    for i, (text, review) in enumerate(zip(texts, explain(model, texts), strict=True)):
        draw_review(options.directory / f"explained_{i}.png", text, review)
    if options.rows:
        try:
            reviews = load_reviews()
        except DataError as error:
            print(error, file=sys.stderr)
            return 1
        figures = json.loads((options.directory / "metrics.json").read_text("utf-8"))
        split = split_fold(reviews, figures["fold"], seed=figures["seed"])
        picture = options.directory / "heads.png"
        report = prune(model, split.train, split.test, options.rows, picture)
        write_text(options.directory / "heads.md", report)
        print(report)
    print(f"Pictures are in {options.directory}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
