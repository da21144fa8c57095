"""A tokenizer's vocabulary, which files hold once and configurations not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import keras
from typing_extensions import override

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@keras.saving.register_keras_serializable(package="keras_mha")
class Vocabulary(Sequence[str]):
    """Tokens in the order of their ids.

    Its serialized form is its size: what is made of that is empty until `read`.

    Example:

    >>> from keras_mha.text.vocabulary import as_vocabulary
    >>> vocabulary = as_vocabulary(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "film"])
    >>> len(vocabulary), vocabulary[4], vocabulary.get_config()
    (5, 'film', {'size': 5})
    """

    def __init__(self, tokens: Iterable[str] = (), size: int | None = None) -> None:
        #: The tokens; none before they were read.
        self.tokens = list(tokens)
        #: How many tokens there are, or will be.
        self.size = len(self.tokens) if size is None else size

    def get_config(self) -> dict[str, Any]:
        """Returns the size only."""
        return {"size": self.size}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Vocabulary:
        """Makes one that has no tokens yet."""
        return cls(**config)

    def write(self, path: Path) -> None:
        """Writes a UTF-8 text file with one token on each line."""
        text = "".join(f"{token}\n" for token in self.tokens)
        path.write_bytes(text.encode())

    def read(self, path: Path) -> Vocabulary:
        """Returns the vocabulary in a file, which must be of this size.

        Raises:
            ValueError: If it is not, or does not fit a tokenizer.
        """
        vocabulary = as_vocabulary(path)
        if len(vocabulary) != self.size:
            raise ValueError(
                f"The vocabulary of the configuration has {self.size} tokens. "
                f"Received: {path.name} with {len(vocabulary)}"
            )
        return vocabulary

    @override
    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    @override
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self.tokens[index]

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.tokens == other.tokens

    @override
    def __hash__(self) -> int:
        return hash(tuple(self.tokens))


def as_vocabulary(vocabulary: Sequence[str] | str | Path) -> Vocabulary:
    """Returns a vocabulary that fits a tokenizer.

    Args:
        vocabulary: The tokens in the order of their ids, or the path of a UTF-8 text
            file with one on each line.

    Raises:
        TypeError: If a token is not a string.
        ValueError: If a special token is missing, `[PAD]` is not the first, or a token
            is empty, holds a line break or comes twice.
    """
    if isinstance(vocabulary, Vocabulary):
        return vocabulary  # checked before, or without tokens as yet
    if isinstance(vocabulary, str | Path):
        content = Path(vocabulary).read_text(encoding="utf-8")
        # Not splitlines(): a token may be a separator that it also splits at.
        tokens = content.removesuffix("\n").split("\n")
    else:
        tokens = list(vocabulary)
    for token in tokens:
        if not isinstance(token, str):
            raise TypeError(
                "`vocabulary` must contain only strings. "
                f"Received: {token!r} of type {type(token).__name__}"
            )
        if not token:
            raise ValueError("`vocabulary` must not contain an empty token")
        if "\n" in token or "\r" in token:
            raise ValueError(
                "`vocabulary` must not contain line breaks, which separate tokens in "
                f"its file. Received: {token!r}"
            )
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if repeated:
        raise ValueError(
            f"`vocabulary` must not repeat a token. Received twice: {repeated[:5]}"
        )
    missing = [token for token in SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise ValueError(
            f"`vocabulary` must contain {list(SPECIAL_TOKENS)}. Missing: {missing}"
        )
    if tokens[0] != "[PAD]":
        raise ValueError(
            "`vocabulary` must begin with '[PAD]': id 0 is padding. "
            f"Received first: {tokens[0]!r}"
        )
    return Vocabulary(tokens)
