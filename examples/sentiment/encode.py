"""Writes the token ids of all texts into one file, for finetune.py.

tensorflow-text cuts the texts by the checkpoint's vocabulary. The file also holds the
labels, the fold in which each movie review is tested, the texts of other domains, and
critics' sentences that share no part with the reviews.

Example:
    python examples/sentiment/encode.py --output ids.npz
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Set before TensorFlow is imported, to silence its notes on the hardware.
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
    """Returns the fold in which each review is tested, `(n,)`."""
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
    """Returns the data of `finetune.cross_validate`, by name.

    Args:
        vocabulary: The checkpoint's tokens.
        reviews: The reviews to train on, and to test on in folds.
        further: More reviews that may be trained on.
        domains: Other texts to test on.
        seed: Seed of the folds.
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
    """Returns the checkpoint's tokens in the order of their ids."""
    content = (checkpoint / "vocab.txt").read_text("utf-8")
    return content.removesuffix("\n").split("\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the folds (default: 0)"
    )
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
    temporary = options.output.with_name(f".{options.output.stem}.part.npz")
    np.savez_compressed(temporary, **arrays)
    temporary.replace(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
