"""Writes the token ids of all texts into one file, for finetune.py.

The checkpoint's own vocabulary cuts them, in tensorflow-text. With them go the labels,
the fold in which each movie review is tested, the texts of other domains, and the
critics' sentences that share nothing with the reviews.

Example:
    python examples/sentiment/encode.py --output ids.npz
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Before TensorFlow is first imported: its notes on the hardware are not the result.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from checkpoint import load_checkpoint
from data import Reviews, load_reviews, split_fold
from domains import load_critics, load_domains
from finetune import Rows, pack
from model import encode

FOLDS = 10
MAX_LENGTH = 128


def fold_numbers(reviews: Reviews, seed: int) -> np.ndarray:
    """In which fold each review is tested, `(n,)`."""
    numbered = Reviews(np.arange(len(reviews)), reviews.labels)
    folds = np.full(len(reviews), -1, np.int32)
    for fold in range(FOLDS):
        folds[split_fold(numbered, fold, folds=FOLDS, seed=seed).test.texts] = fold
    return folds


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the folds")
    options = parser.parse_args(arguments)
    vocabulary = load_checkpoint() / "vocab.txt"
    tokens = vocabulary.read_text("utf-8").removesuffix("\n").split("\n")
    reviews = load_reviews()
    sets = {"mr": reviews, "extra": load_critics(reviews), **load_domains()}
    arrays = {"mr_folds": fold_numbers(reviews, options.seed)}
    for name, texts in sets.items():
        rows = Rows(encode(texts.texts, tokens, MAX_LENGTH), texts.labels)
        arrays |= pack(name, rows)
        lengths = arrays[f"{name}_lengths"]
        print(
            f"{name}: {len(rows)} texts, {lengths.mean():.1f} tokens on average, "
            f"{lengths.max()} at most"
        )
    beside = options.output.with_name(f".{options.output.stem}.part.npz")
    np.savez_compressed(beside, **arrays)
    beside.replace(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
