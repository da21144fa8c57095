"""Learns a wordpiece vocabulary from texts, and cuts texts by it in a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import tensorflow as tf
from typing_extensions import override

from keras_mha.typing import Shape, Tensor

_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
# BERT's pre-tokenization cuts at white space, ASCII signs, Unicode punctuation, and
# Chinese characters, and keeps all of these but white space as pieces.
_KEPT_DELIMITER = r"[!-/]|[:-@]|[\[-`]|[{-~]|[\p{P}]|[\x{4E00}-\x{9FFF}]"
_DELIMITER = r"\s+|" + _KEPT_DELIMITER


@keras.saving.register_keras_serializable(package="keras_mha")
class WordpieceTokenizer(keras.layers.Layer):
    """Turns strings into padded token ids: `[CLS]`, the text's pieces, `[SEP]`.

    Normalizes a text as tensorflow-text does for BERT, splits it at white space and
    punctuation, and cuts each word greedily into the longest pieces of the vocabulary.
    A word that cannot be cut, or has over 100 bytes, becomes `[UNK]`. A text that is
    too long loses its end but never its `[SEP]`, so each row has at least two ids and
    no attention row is empty. No text can produce a special token: `"[PAD]"` written in
    a review is three words. A word of invalid UTF-8 is unknown; a control character
    separates words. TensorFlow refuses a `str` with half a surrogate pair, which has no
    bytes, with a ValueError.

    BERT's original tokenizer differs in three points: it keeps characters that
    `lowercase` writes out here, such as U+2026 (three dots), U+00B2 (2) and U+00DF
    (ss); it drops control characters; and its limit is 100 letters instead of 100
    bytes.

    Its operations are TensorFlow's and tensorflow-text's. They run in a SavedModel
    under TF Serving (without XLA), and in TFLite with tensorflow-text's operations.

    Sources: Devlin et al. 2019, "BERT" (normalization, special tokens); Song et al.
    2021, "Fast WordPiece tokenization" (the algorithm).

    Letters: B batch, T length of the batch's longest row.

    Args:
        vocabulary: The tokens in the order of their ids, or the path of a UTF-8 text
            file with one token on each line. Must begin with `[PAD]` and contain
            `[UNK]`, `[CLS]` and `[SEP]`; pieces inside a word begin with `##`.
        max_length: The largest T, including `[CLS]` and `[SEP]`.
        lowercase: Whether to lower letters and remove accents.
        pad_to: Rounds T up to a multiple of this, at most to `max_length`; with
            `pad_to=max_length` every batch has the same T. Defaults to no rounding.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name`.

    Call arguments:
        inputs: Strings `(B,)` or `(B, 1)`.

    Returns:
        int32 ids `(B, T)`, padded with 0, the id of `[PAD]`.

    Raises:
        ImportError: If tensorflow-text is not installed.
        TypeError: If the vocabulary or the inputs are not strings.
        ValueError: If the vocabulary lacks a special token or repeats a token, a
            length is too small, or the inputs have another shape.

    Example:

    >>> import numpy as np
    >>> from keras_mha.text import WordpieceTokenizer
    >>> vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "film", "##s", "good", "."]
    >>> tokenizer = WordpieceTokenizer(vocabulary, max_length=8)
    >>> tokenizer(np.array(["Good films.", ""])).numpy().tolist()
    [[2, 6, 4, 5, 7, 3], [2, 3, 0, 0, 0, 0]]
    """

    def __init__(
        self,
        vocabulary: Sequence[str] | str | Path,
        max_length: int = 128,
        lowercase: bool = True,
        pad_to: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        text = _tensorflow_text()
        self.max_length = _check_length("max_length", max_length, at_least=2)
        self.lowercase = lowercase
        self.pad_to = pad_to
        if pad_to is not None and _check_length("pad_to", pad_to) > max_length:
            raise ValueError(
                "`pad_to` must not be greater than `max_length`. "
                f"Received: pad_to={pad_to} and max_length={max_length}"
            )
        self.vocabulary = _check_vocabulary(vocabulary)
        self._start, self._end = map(self.vocabulary.index, ("[CLS]", "[SEP]"))
        # Neither XLA nor Keras' dtype policy knows strings.
        self.supports_jit = False
        self.autocast = False
        # Take lists of strings too.
        self._convert_input_args = False
        self._allow_non_tensor_positional_args = True
        # Both keep their automata as tensors, which would belong to a single graph if
        # made in one.
        with tf.init_scope():
            self._normalizer = text.FastBertNormalizer(
                lower_case_nfd_strip_accents=lowercase
            )
            self._tokenizer = text.FastWordpieceTokenizer(
                self.vocabulary,
                token_out_type=tf.int32,
                unknown_token="[UNK]",  # noqa: S106 - not a password.
                support_detokenization=False,
            )

    @override
    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "vocabulary": list(self.vocabulary),
            "max_length": self.max_length,
            "lowercase": self.lowercase,
            "pad_to": self.pad_to,
        }

    def get_vocabulary(self) -> list[str]:
        """Returns the tokens in the order of their ids."""
        return list(self.vocabulary)

    @override
    def call(self, inputs: Tensor) -> Tensor:
        texts = _flatten(tf.convert_to_tensor(inputs))
        pieces = self._tokenizer.tokenize(self._normalizer.normalize(texts))
        lengths = tf.minimum(pieces.row_lengths(), self.max_length - 2)
        lengths = tf.cast(lengths, tf.int32)[:, tf.newaxis]
        # The leading 0 keeps the maximum of an empty batch defined.
        longest = tf.reduce_max(tf.concat([[0], lengths[:, 0]], 0))
        length = self._padded(longest + 2)
        body = pieces.to_tensor(shape=(None, self.max_length - 2))[:, : length - 2]
        after = length - 1 - tf.shape(body)[1]
        body = tf.pad(body, tf.stack([[0, 0], [1, after]]))
        position = tf.range(length)[tf.newaxis, :]
        ids = tf.where(position <= lengths, body, 0)
        ids = tf.where(position == 0, self._start, ids)
        ids = tf.where(position == lengths + 1, self._end, ids)
        # Not an operation: TFLite has none for it.
        ids.set_shape((None, self._static_length()))
        return ids

    @override
    def compute_output_spec(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        shape = self.compute_output_shape(inputs.shape)
        return keras.KerasTensor(shape, dtype="int32")

    @override
    def compute_output_shape(self, input_shape: Shape) -> tuple[int | None, ...]:
        return (input_shape[0], self._static_length())

    def _static_length(self) -> int | None:
        return self.max_length if self.pad_to == self.max_length else None

    def _padded(self, length: tf.Tensor) -> tf.Tensor:
        if self.pad_to is None:
            return length
        return tf.minimum(-(-length // self.pad_to) * self.pad_to, self.max_length)


def learn_wordpiece_vocabulary(
    texts: Iterable[str],
    vocabulary_size: int,
    *,
    lowercase: bool = True,
    min_count: int = 2,
) -> list[str]:
    """Learns the vocabulary of a `WordpieceTokenizer` from texts.

    The special tokens come first, then the characters, then pieces from frequent to
    rare. Every character is included, once for the start and once for the inside of
    words. The same texts in the same order always give the same vocabulary. Pieces that
    occur often enough enter; a search sets this count so that about `vocabulary_size`
    pieces do. The vocabulary may therefore be smaller, and is never larger.

    Source: the learner that tensorflow-text ships (top-down wordpiece generation).

    Args:
        texts: The texts; for an honest evaluation only the training part.
        vocabulary_size: The largest number of tokens, including `[PAD]`, `[UNK]`,
            `[CLS]` and `[SEP]`.
        lowercase: The tokenizer's `lowercase`.
        min_count: Leaves out pieces that occur less often, except single characters.

    Returns:
        The tokens in the order of their ids.

    Raises:
        ImportError: If tensorflow-text is not installed.
        TypeError: If `texts` is one string.
        ValueError: If the texts contain no word, a number is not positive, or
            `vocabulary_size` is too small for the texts' characters.

    Example:

    >>> from keras_mha.text import learn_wordpiece_vocabulary
    >>> learn_wordpiece_vocabulary(["ab ab ab", "ab b"], 9)
    ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'a', 'b', 'ab', '##a', '##b']
    """
    _tensorflow_text()
    from tensorflow_text.tools.wordpiece_vocab import wordpiece_tokenizer_learner_lib

    _check_length("vocabulary_size", vocabulary_size)
    _check_length("min_count", min_count)
    counts = _count_words(texts, lowercase=lowercase)
    # The search need not start above the count of the vocabulary_size-th word, at which
    # that many pieces pass already.
    ranked = sorted(counts.values(), reverse=True)
    highest = ranked[min(vocabulary_size, len(ranked)) - 1]
    alphabet = sorted({character for word in counts for character in word})
    learned = wordpiece_tokenizer_learner_lib.learn(
        counts,
        vocabulary_size,
        list(_SPECIAL_TOKENS),
        lower_thresh=min_count,
        upper_thresh=max(highest, min_count),
        max_unique_chars=len(alphabet),
    )
    # Without every character at the start and inside of words, some words become
    # unknown.
    characters = [*alphabet, *(f"##{character}" for character in alphabet)]
    essential = [*_SPECIAL_TOKENS, *characters]
    if len(essential) > vocabulary_size:
        raise ValueError(
            "`vocabulary_size` must leave room for the special tokens and for each "
            f"character at the start and inside of words, here {len(essential)}. "
            f"Received: vocabulary_size={vocabulary_size}"
        )
    spare = vocabulary_size - len(essential)
    others = [piece for piece in learned if piece not in set(essential)][:spare]
    chosen = {*essential, *others}
    # The learner skips words of more than 50 letters, with characters that only they
    # have.
    skipped = [piece for piece in characters if piece not in set(learned)]
    first = len(_SPECIAL_TOKENS)
    ordered = [*learned[:first], *skipped, *learned[first:]]
    return [piece for piece in ordered if piece in chosen]


def _count_words(texts: Iterable[str], *, lowercase: bool) -> Counter[str]:
    """Counts words as the tokenizer splits them."""
    if isinstance(texts, str):
        raise TypeError(
            "`texts` must be an iterable of strings. Received: a single str; put it "
            "into a list"
        )
    text = _tensorflow_text()
    normalizer = text.FastBertNormalizer(lower_case_nfd_strip_accents=lowercase)
    strings = tf.constant(list(texts), tf.string)
    words = text.regex_split(
        normalizer.normalize(strings), _DELIMITER, _KEPT_DELIMITER
    ).flat_values.numpy()
    counts = Counter(word.decode("utf-8", "ignore") for word in words.tolist())
    del counts[""]
    if not counts:
        raise ValueError("`texts` must contain at least one word. Received: none")
    return counts


def _tensorflow_text() -> ModuleType:
    try:
        import tensorflow_text
    except ImportError as error:
        raise ImportError(
            "keras_mha.text needs tensorflow-text: pip install 'keras-mha[text]'"
        ) from error
    return tensorflow_text


def _check_length(name: str, value: int, at_least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(
            f"`{name}` must be an integer of at least {at_least}. "
            f"Received: {name}={value!r}"
        )
    return value


def _check_vocabulary(vocabulary: Sequence[str] | str | Path) -> list[str]:
    if isinstance(vocabulary, str | Path):
        content = Path(vocabulary).read_text(encoding="utf-8")
        # Not splitlines(): a token may be a separator that it also splits at.
        tokens = content.removesuffix("\n").replace("\r\n", "\n").split("\n")
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
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if repeated:
        raise ValueError(
            f"`vocabulary` must not repeat a token. Received twice: {repeated[:5]}"
        )
    missing = [token for token in _SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise ValueError(
            f"`vocabulary` must contain {list(_SPECIAL_TOKENS)}. Missing: {missing}"
        )
    if tokens[0] != "[PAD]":
        raise ValueError(
            "`vocabulary` must begin with '[PAD]': id 0 is padding. "
            f"Received first: {tokens[0]!r}"
        )
    return tokens


def _flatten(texts: tf.Tensor) -> tf.Tensor:
    """Returns strings `(B,)` from `(B,)` or `(B, 1)`."""
    if texts.dtype != tf.string:
        raise TypeError(f"`inputs` must be strings. Received: {texts.dtype.name}")
    rank = texts.shape.rank
    if rank == 1:
        return texts
    if rank == 2 and texts.shape[1] == 1:
        return texts[:, 0]
    raise ValueError(
        f"`inputs` must have the shape (B,) or (B, 1). Received: {tuple(texts.shape)}"
        if rank is not None
        else "`inputs` must have the shape (B,) or (B, 1). Received: unknown rank"
    )
