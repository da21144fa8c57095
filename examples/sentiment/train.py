"""Trains small encoders on movie reviews from scratch, tests and exports them.

Cross-validates in ten folds, as the published figures do. By default it trains, tests
and exports the first fold; `--folds 10` goes on with the others and compares.

Examples:
    python examples/sentiment/train.py
    python examples/sentiment/train.py --folds 10 --no-export
    python examples/sentiment/train.py --tensorboard runs/first --seed 1
    python examples/sentiment/train.py --pretrained minilm --output dist/pretrained
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Set before TensorFlow is imported, to silence its notes on the hardware.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pretrained
import tensorflow as tf
from data import LABELS, DataError, Reviews, Split, load_reviews, split_fold
from model import Recipe, build_member, committee, encode
from report import (
    comparison,
    copy_file,
    draw_attention,
    draw_training,
    to_markdown,
    versions,
    wilson_interval,
    write_json,
    write_text,
)

import keras_mha
from keras_mha.export import VerificationError, export_saved_model, export_tflite
from keras_mha.text import WordpieceTokenizer, learn_wordpiece_vocabulary

ALL_FOLDS = 10
# [PAD], [UNK], [CLS] and [SEP] have the first ids.
SPECIAL_IDS = 4
UNKNOWN_ID = 1
# XLA and TensorFlow compile and trace once for each length, so use few lengths.
PAD_TO = 16
# Each member of a committee validates on a different part of the training data.
VALIDATION_PARTS = 10
SMOKE_ROWS = 400
EXPORT_SAMPLES = 32


@dataclass
class Trained:
    """One trained fold: its encoders and their figures."""

    split: Split
    vocabulary: list[str]
    members: list[keras.Sequential]
    # One for each member, as `model.fit` returns it.
    histories: list[dict[str, list[float]]]
    # The committee's, and each member's.
    test_accuracy: float
    member_accuracies: list[float]
    seconds: dict[str, float]


def train_fold(
    split: Split,
    recipe: Recipe,
    *,
    seed: int,
    tensorboard: Path | None = None,
    verbose: int = 1,
) -> Trained:
    """Learns a vocabulary and the members from the training part; tests them once."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "vocabulary"):
        vocabulary = learn_wordpiece_vocabulary(
            split.train.texts, recipe.vocabulary_size
        )
    members, histories = [], []
    with _timed(seconds, "train"):
        for i in range(recipe.members):
            print(f"Member {i + 1} of {recipe.members}", flush=True)
            # A different tenth of the training part stops each member, so that together
            # they learn from all of it.
            part = split_fold(
                split.train, i % VALIDATION_PARTS, folds=VALIDATION_PARTS, seed=seed
            )
            logs = tensorboard and tensorboard / f"member_{i}"
            # Each member starts from different weights, order and dropout.
            keras.utils.set_random_seed(1000 * seed + i)
            member = build_member(len(vocabulary), recipe, f"member_{i}")
            histories.append(
                fit_member(member, part, vocabulary, recipe, logs, verbose)
            )
            members.append(member)
    with _timed(seconds, "test"):
        ids = encode(split.test.texts, vocabulary, recipe.max_length)
        test = batches(ids, split.test.labels)
        votes = [_probabilities(member, test) for member in members]
    return Trained(
        split,
        vocabulary,
        members,
        histories,
        _accuracy(np.mean(votes, 0), split.test.labels),
        [_accuracy(vote, split.test.labels) for vote in votes],
        seconds,
    )


def fit_member(
    member: keras.Model,
    split: Split,
    vocabulary: list[str],
    recipe: Recipe,
    tensorboard: Path | None = None,
    verbose: int = 1,
) -> dict[str, list[float]]:
    """Trains one encoder on `split.train`, and stops it early by `split.test`."""
    train, validation = (
        encode(part.texts, vocabulary, recipe.max_length)
        for part in (split.train, split.test)
    )
    steps = -(-len(train) // recipe.batch_size)
    compile_member(member, recipe, steps)
    history = member.fit(
        training_batches(train, split.train.labels, recipe),
        steps_per_epoch=steps,
        validation_data=batches(validation, split.test.labels),
        epochs=recipe.epochs,
        shuffle=False,  # The dataset shuffles.
        callbacks=callbacks(recipe, tensorboard),
        verbose=verbose,  # pyright: ignore[reportArgumentType]
    )
    return history.history


def _probabilities(model: keras.Model, dataset: tf.data.Dataset) -> np.ndarray:
    return np.asarray(model.predict(dataset, verbose=0))  # pyright: ignore[reportArgumentType]


def _accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(probabilities.argmax(-1) == labels))


def compile_member(model: keras.Model, recipe: Recipe, steps: int) -> None:
    """Compiles with AdamW, a warm-up, averaged weights and smoothed labels."""
    total = steps * recipe.epochs
    warmup = int(recipe.warmup * total)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        total - warmup,
        warmup_target=recipe.learning_rate,
        warmup_steps=warmup,
        alpha=0.02,
    )
    optimizer = keras.optimizers.AdamW(
        schedule,
        weight_decay=recipe.weight_decay,
        clipnorm=1.0,
        use_ema=True,
        ema_momentum=recipe.average_momentum,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta", "scale"])
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing)
    model.compile(optimizer, loss, metrics=["accuracy"])


def callbacks(
    recipe: Recipe, tensorboard: Path | None
) -> list[keras.callbacks.Callback]:
    """Validates with averaged weights, and restores the epoch that did best."""
    chosen: list[keras.callbacks.Callback] = [
        # First, so that the callbacks after it see and keep the averaged weights.
        keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        keras.callbacks.EarlyStopping(
            "val_accuracy", patience=recipe.patience, restore_best_weights=True
        ),
    ]
    if tensorboard is not None:
        chosen.append(keras.callbacks.TensorBoard(str(tensorboard)))
    return chosen


def training_batches(
    ids: Sequence[np.ndarray], labels: np.ndarray, recipe: Recipe
) -> tf.data.Dataset:
    """Returns endless batches of rows of similar length, padded to a multiple of 16.

    Each epoch turns different tokens into `[UNK]`, so the same sentence never repeats.
    """

    def drop_tokens(row: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        dropped = tf.random.uniform(tf.shape(row)) < recipe.token_dropout
        return tf.where(dropped & (row >= SPECIAL_IDS), UNKNOWN_ID, row), label

    lengths = range(PAD_TO, recipe.max_length + 1, PAD_TO)
    return (
        _rows(ids, labels)
        .shuffle(len(ids))
        .repeat()
        .map(drop_tokens)
        .bucket_by_sequence_length(
            lambda row, _: tf.shape(row)[0],
            # Exclusive upper bounds; rows are padded to the bound less one.
            bucket_boundaries=[length + 1 for length in lengths],
            bucket_batch_sizes=[recipe.batch_size] * (len(lengths) + 1),
            pad_to_bucket_boundary=True,
        )
        .prefetch(tf.data.AUTOTUNE)
    )


def batches(
    ids: Sequence[np.ndarray], labels: np.ndarray, size: int = 256
) -> tf.data.Dataset:
    """Returns all rows once, in order, padded to a multiple of 16."""
    longest = -(-max(map(len, ids)) // PAD_TO) * PAD_TO
    return _rows(ids, labels).padded_batch(size, ([longest], [len(LABELS)])).cache()


def _rows(ids: Sequence[np.ndarray], labels: np.ndarray) -> tf.data.Dataset:
    rows = tf.ragged.constant([row.tolist() for row in ids], tf.int32)
    one_hot = tf.one_hot(labels, len(LABELS))
    dataset = tf.data.Dataset.from_tensor_slices((rows, one_hot))
    # `map` turns each ragged row into a plain tensor.
    return dataset.map(lambda row, label: (row, label))


def naive_bayes_accuracy(split: Split) -> float:
    """Tests multinomial naive Bayes on words and pairs, with default options."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(CountVectorizer(ngram_range=(1, 2)), MultinomialNB())
    classifier.fit(split.train.texts, split.train.labels)
    return float(classifier.score(split.test.texts, split.test.labels))


def metrics(
    trained: Trained, recipe: Recipe, *, fold: int, seed: int, smoke: bool
) -> dict[str, Any]:
    """Returns the figures of one fold, as `metrics.json` holds them."""
    split = trained.split
    tested = len(split.test)
    right = round(trained.test_accuracy * tested)
    parameters = sum(member.count_params() for member in trained.members)
    return {
        "test_accuracy": trained.test_accuracy,
        "test_accuracy_95": wilson_interval(right, tested),
        "majority_rate": float(np.bincount(split.test.labels).max() / tested),
        "naive_bayes_accuracy": naive_bayes_accuracy(split),
        "member_test_accuracies": trained.member_accuracies,
        "fold": fold,
        "folds": ALL_FOLDS,
        "smoke": smoke,
        "epochs": [len(history["loss"]) for history in trained.histories],
        "sizes": {
            "train": len(split.train),
            "test": tested,
            "vocabulary": len(trained.vocabulary),
            "parameters": parameters,
        },
        "seconds": trained.seconds,
        "seed": seed,
        "recipe": asdict(recipe),
        "versions": versions(),
    }


def attention_of(member: keras.Sequential, ids: np.ndarray) -> np.ndarray:
    """Returns the first block's attention for one row `(T,)`: `(N, T, T)`."""
    maps = keras_mha.attention_maps(member, ids[np.newaxis])
    return next(iter(maps.values()))[0]


def write_results(
    output: Path, trained: Trained, figures: dict[str, Any], recipe: Recipe
) -> None:
    """Writes every file of the output directory."""
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "vocab.txt", "\n".join(trained.vocabulary))
    write_text(output / "labels.txt", "\n".join(LABELS))
    draw_training(output / "training.png", trained.histories)
    rows = encode(trained.split.test.texts, trained.vocabulary, recipe.max_length)
    shown = next((row for row in rows if 12 <= len(row) <= 20), rows[0])
    draw_attention(
        output / "attention.png",
        [trained.vocabulary[i] for i in shown],
        np.stack([attention_of(member, shown) for member in trained.members]),
    )

    with _timed(trained.seconds, "export"):
        tokenizer = WordpieceTokenizer(
            trained.vocabulary, recipe.max_length, name="tokenizer"
        )
        of_texts = committee(trained.members, tokenizer)
        partial = output / ".partial.keras"
        of_texts.save(partial)
        partial.replace(output / "model.keras")
        saved_model = export_saved_model(
            of_texts,
            output / "saved_model",
            samples=trained.split.test.texts[:EXPORT_SAMPLES].tolist(),
            version=1,
            overwrite=True,
        )
        tflite = export_tflite(
            committee(trained.members),
            output,
            sequence_lengths=(recipe.max_length,),
            samples=[row.tolist() for row in rows[:EXPORT_SAMPLES]],
            overwrite=True,
        )
        copy_file(Path(tflite.files[0].path), output / "model.tflite")

    write_json(output / "metrics.json", figures)
    exports = {"saved_model": saved_model.to_dict(), "tflite": tflite.to_dict()}
    write_json(output / "report.json", {"metrics": figures, **exports})
    sections = [saved_model.to_markdown(), tflite.to_markdown()]
    write_text(output / "report.md", to_markdown(figures, sections))


def run(options: argparse.Namespace, reviews: Reviews) -> list[dict[str, Any]]:
    """Trains the requested folds, writes the results, returns each fold's figures."""
    recipe = Recipe()
    if options.smoke:
        recipe = recipe.smoke()
        # The file is sorted by label, so take rows from all of it.
        rows = np.linspace(0, len(reviews) - 1, SMOKE_ROWS).astype(int)
        reviews = reviews.take(rows)
    folds = []
    for fold in range(options.folds):
        print(f"Fold {fold + 1} of {ALL_FOLDS}", flush=True)
        trained = train_fold(
            split_fold(reviews, fold, folds=ALL_FOLDS, seed=options.seed),
            recipe,
            seed=options.seed,
            tensorboard=options.tensorboard and options.tensorboard / f"fold_{fold}",
            verbose=1 if sys.stdout.isatty() else 2,
        )
        figures = metrics(
            trained, recipe, fold=fold, seed=options.seed, smoke=options.smoke
        )
        folds.append(figures)
        if fold == 0 and options.export:
            write_results(options.output, trained, figures, recipe)
        low, high = figures["test_accuracy_95"]
        print(
            f"test accuracy {figures['test_accuracy']:.4f} "
            f"(95 %: {low:.4f} to {high:.4f}), naive Bayes "
            f"{figures['naive_bayes_accuracy']:.4f}, "
            f"{sum(trained.seconds.values()):.0f} s",
            flush=True,
        )
    return folds


def write_comparison(output: Path, folds: Sequence[dict[str, Any]]) -> str:
    """Writes the folds' figures and the published ones; returns the table."""
    ours = [figures["test_accuracy"] for figures in folds]
    bayes = [figures["naive_bayes_accuracy"] for figures in folds]
    table = comparison(
        {
            "this model, trained from scratch": ours,
            "multinomial naive Bayes, uni- and bigrams, same folds": bayes,
        }
    )
    output.mkdir(parents=True, exist_ok=True)
    write_json(
        output / "cross_validation.json",
        {
            "mean_test_accuracy": float(np.mean(ours)),
            "mean_naive_bayes_accuracy": float(np.mean(bayes)),
            "folds": list(folds),
        },
    )
    write_text(output / "cross_validation.md", f"# Cross-validation\n\n{table}")
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    description, _, epilog = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        default=Path("dist/sentiment"),
        help="directory for model, exports, figures (default: %(default)s)",
    )
    add(
        "--folds",
        type=int,
        default=1,
        choices=range(1, ALL_FOLDS + 1),
        metavar=f"1..{ALL_FOLDS}",
        help="how many of the ten folds to run; exports the first, compares several "
        "with published results (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of the split, the first weights and the training (default: %(default)s)",
    )
    add(
        "--tensorboard",
        type=Path,
        metavar="DIR",
        help="write TensorBoard logs, one folder a fold (default: none)",
    )
    add(
        "--no-export",
        dest="export",
        action="store_false",
        help="train and test only; write no model",
    )
    add(
        "--pretrained",
        choices=("minilm",),
        help="fine-tune this checkpoint of 23 million weights, downloaded at the first "
        "call, instead of training from scratch; its folds share one report",
    )
    add(
        "--smoke",
        action="store_true",
        help="run the whole program on a few reviews in under a minute; the figures "
        "mean nothing",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = parse(arguments)
    start = time.perf_counter()
    try:
        reviews = load_reviews()
        if options.pretrained:
            pretrained.run(options, reviews)
    except (DataError, VerificationError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.pretrained:
        print(f"{time.perf_counter() - start:.0f} s in all")
        return 0
    folds = run(options, reviews)
    if len(folds) > 1:
        print(write_comparison(options.output, folds))
    if options.export:
        print(f"Wrote {options.output}; try the model with predict.py.")
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


if __name__ == "__main__":
    sys.exit(main())
