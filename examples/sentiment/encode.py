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
from collections.abc import Mapping, Sequence
from pathlib import Path

# Before TensorFlow is first imported: its notes on the hardware are not the result.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from checkpoint import load_checkpoint
from data import Reviews, load_reviews, split_fold
from domains import Rated, load_critics, load_domains
from model import encode
from rows import Rows, pack

FOLDS = 10
MAX_LENGTH = 128


def fold_numbers(reviews: Reviews, seed: int) -> np.ndarray:
    """In which fold each review is tested, `(n,)`."""
    numbered = Reviews(np.arange(len(reviews)), reviews.labels)
    folds = np.full(len(reviews), -1, np.int32)
    for fold in range(FOLDS):
        folds[split_fold(numbered, fold, folds=FOLDS, seed=seed).test.texts] = fold
    return folds


def token_arrays(
    vocabulary: list[str],
    reviews: Reviews,
    further: Reviews,
    domains: Mapping[str, Rated],
    *,
    seed: int,
) -> dict[str, np.ndarray]:
    """Everything that `finetune.cross_validate` takes, by name.

    Args:
        vocabulary: The checkpoint's tokens.
        reviews: What is trained on, and tested in folds.
        further: What may be trained on too.
        domains: What else is tested on.
        seed: Of the folds.
    """
    arrays = {"mr_folds": fold_numbers(reviews, seed)}
    for name, part in (("mr", reviews), ("extra", further)):
        ids = encode(part.texts, vocabulary, MAX_LENGTH)
        arrays |= pack(name, Rows(ids, part.labels))
    for name, rated in domains.items():
        ids = encode(rated.texts, vocabulary, MAX_LENGTH)
        arrays |= pack(name, Rows(ids, (rated.ratings > 0).astype(int)))
        arrays[f"{name}_ratings"] = rated.ratings
    return arrays


def read_vocabulary(checkpoint: Path) -> list[str]:
    """The checkpoint's tokens in the order of their ids."""
    content = (checkpoint / "vocab.txt").read_text("utf-8")
    return content.removesuffix("\n").split("\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the folds")
    options = parser.parse_args(arguments)
    reviews = load_reviews()
    arrays = token_arrays(
        read_vocabulary(load_checkpoint()),
        reviews,
        load_critics(reviews),
        load_domains(),
        seed=options.seed,
    )
    for name, lengths in arrays.items():
        if name.endswith("_lengths"):
            print(
                f"{name.removesuffix('_lengths')}: {len(lengths)} texts, "
                f"{lengths.mean():.1f} tokens on average, {lengths.max()} at most"
            )
    beside = options.output.with_name(f".{options.output.stem}.part.npz")
    np.savez_compressed(beside, **arrays)
    beside.replace(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
