"""Fine-tunes the pretrained encoder fully, by low-rank factors, or not at all.

Trains three times, on the same reviews and in as many steps: only the classification
head; the head and low-rank factors in the attention's query and value projections;
every weight. Prints test accuracies, numbers of trained parameters and seconds as a
table.

Examples:
    python examples/sentiment/lora.py
    python examples/sentiment/lora.py --rows 9544 --epochs 3 --rank 16
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

# Set before TensorFlow is imported, to silence its notes on the hardware.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from checkpoint import load_checkpoint
from data import DataError, Split, load_reviews, split_fold
from finetune import FineTuning, build_classifier, compile_classifier, steps_of
from model import encode
from rows import Batches, Rows, accuracy, predict

from keras_mha.convert import load_bert
from keras_mha.models import BertEncoder

# Batches hold reviews of similar length, padded to one of these.
LENGTHS = (16, 24, 32, 48, 80)
Prepare = Callable[[BertEncoder], None]


@dataclass(frozen=True)
class Result:
    """The result of one way of fine-tuning."""

    way: str
    trained: int
    accuracy: float
    seconds: float


def freeze(encoder: BertEncoder) -> None:
    """Freezes every weight of the encoder."""
    for weight in encoder.weights:
        weight.trainable = False


def adapt(encoder: BertEncoder, rank: int) -> None:
    """Freezes the encoder, and adds factors to its query and value projections."""
    freeze(encoder)
    for block in encoder.blocks:
        block.attention.sublayer.enable_lora(rank, targets=("query", "value"))


def run(
    way: str,
    prepare: Prepare,
    train: Rows,
    test: Rows,
    recipe: FineTuning,
    *,
    seed: int,
) -> Result:
    """Fine-tunes a fresh copy of the checkpoint."""
    keras.utils.set_random_seed(seed)
    encoder = load_bert(load_checkpoint(), seed=seed)
    prepare(encoder)
    model = build_classifier(encoder, recipe)
    compile_classifier(model, encoder, recipe, steps_of(len(train), recipe))
    trained = sum(int(np.prod(weight.shape)) for weight in model.trainable_variables)
    start = time.perf_counter()
    model.fit(
        Batches(train, recipe.batch_size, LENGTHS, seed),
        epochs=recipe.epochs,
        shuffle=False,  # `Batches` shuffles the rows.
        verbose=2,
    )
    seconds = time.perf_counter() - start
    share = accuracy(predict(model, test, LENGTHS, size=64), test.labels)
    print(f"{way}: {trained:,} parameters, {100 * share:.1f} %", flush=True)
    return Result(way, trained, share, seconds)


def rows_of(split: Split, rows: int, seed: int) -> tuple[Rows, Rows]:
    """Returns token ids of some training reviews, and of the whole test part."""
    vocabulary = (load_checkpoint() / "vocab.txt").read_text("utf-8")
    tokens = vocabulary.removesuffix("\n").split("\n")
    drawn = np.random.default_rng(seed).permutation(len(split.train))[:rows]
    train, test = (
        Rows(encode(part.texts, tokens, LENGTHS[-1]), part.labels)
        for part in (split.train.take(drawn), split.test)
    )
    return train, test


def to_markdown(results: Sequence[Result]) -> str:
    """Returns a table with a line for each way."""
    lines = [
        "| what is trained | parameters trained | test accuracy % | training, s |",
        "|---|--:|--:|--:|",
        *(
            f"| {each.way} | {each.trained:,} | {100 * each.accuracy:.1f} "
            f"| {each.seconds:.0f} |"
            for each in results
        ),
    ]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    description, _, epilog = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rows", type=int, default=1000, help="training reviews (default: 1000)")
    add("--epochs", type=int, default=2, help="default: %(default)s")
    add(
        "--rank", type=int, default=8, help="rank of the factors (default: %(default)s)"
    )
    add(
        "--rate",
        type=float,
        default=1e-4,
        help="learning rate for every weight (default: 1e-4)",
    )
    add(
        "--lora-rate",
        type=float,
        default=2e-3,
        help="learning rate for factors (default: 2e-3)",
    )
    add("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = parse(arguments)
    try:
        split = split_fold(load_reviews(), 0, seed=options.seed)
        train, test = rows_of(split, options.rows, options.seed)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    slow = FineTuning(options.epochs, batch_size=32, learning_rate=options.rate)
    fast = replace(slow, learning_rate=options.lora_rate)
    ways: dict[str, tuple[Prepare, FineTuning]] = {
        "only the head": (freeze, fast),
        f"the head, and LoRA of rank {options.rank} in queries and values": (
            lambda encoder: adapt(encoder, options.rank),
            fast,
        ),
        "every weight": (lambda _: None, slow),
    }
    results = [
        run(way, prepare, train, test, recipe, seed=options.seed)
        for way, (prepare, recipe) in ways.items()
    ]
    print(f"{len(train)} training reviews, {options.epochs} epochs, {len(test)} tested")
    print(to_markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
