"""Cuts texts into wordpieces and joins these, in TensorFlow's operations.

Letters: B batch, T length of the batch's longest row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from keras_mha.typing import Tensor

_FRAME = ("[PAD]", "[CLS]", "[SEP]")
# BERT's pre-tokenization cuts at white space, ASCII signs, Unicode punctuation, and
# Chinese characters, and keeps all of these but white space as pieces.
_KEPT_DELIMITER = r"[!-/]|[:-@]|[\[-`]|[{-~]|[\p{P}]|[\x{4E00}-\x{9FFF}]"
_DELIMITER = r"\s+|" + _KEPT_DELIMITER


class Cutter(tf.Module):
    """Normalizes texts and cuts them; belongs to no graph.

    Args:
        vocabulary: The tokens in the order of their ids.
        lowercase: Whether to lower letters and remove accents.
    """

    def __init__(self, vocabulary: Sequence[str], *, lowercase: bool) -> None:
        import tensorflow_text as text

        super().__init__()
        self.start, self.end = map(vocabulary.index, ("[CLS]", "[SEP]"))
        # Both keep their automata as tensors, which would belong to a single graph if
        # made in one.
        with tf.init_scope():
            # Their annotations name TensorFlow's private classes.
            int32: Any = tf.int32
            self._normalizer = text.FastBertNormalizer(
                lower_case_nfd_strip_accents=lowercase
            )
            self._tokenizer = text.FastWordpieceTokenizer(
                list(vocabulary),
                token_out_type=int32,
                unknown_token="[UNK]",  # noqa: S106 - not a password.
                support_detokenization=False,
            )

    def cut(self, texts: Tensor) -> Any:
        """Returns the ids of texts `(B,)`, a `tf.RaggedTensor`."""
        return self._tokenizer.tokenize(self._normalizer.normalize(texts))


def cut_texts(
    inputs: Any, cutter: Cutter, max_length: int, pad_to: int | None
) -> Tensor:
    """Returns int32 ids `(B, T)` of strings; see `WordpieceTokenizer`."""
    pieces = cutter.cut(_flatten(inputs))
    lengths = tf.minimum(pieces.row_lengths(), max_length - 2)
    lengths = tf.cast(lengths, tf.int32)[:, tf.newaxis]
    # The leading 0 keeps the maximum of an empty batch defined.
    length = tf.reduce_max(tf.concat([[0], lengths[:, 0]], 0)) + 2
    if pad_to is not None:
        length = tf.minimum(-(-length // pad_to) * pad_to, max_length)
    body = pieces.to_tensor(shape=(None, max_length - 2))[:, : length - 2]
    after = length - 1 - tf.shape(body)[1]
    body = tf.pad(body, tf.stack([[0, 0], [1, after]]))
    position = tf.range(length)[tf.newaxis, :]
    ids = tf.where(position <= lengths, body, 0)
    ids = tf.where(position == 0, cutter.start, ids)
    return tf.where(position == lengths + 1, cutter.end, ids)


def join_pieces(ids: Any, vocabulary: Sequence[str]) -> Tensor:
    """Returns strings `(...)` of ids `(..., T)`; see `WordpieceTokenizer`."""
    ids = tf.convert_to_tensor(ids)
    if not ids.dtype.is_integer:
        raise TypeError(f"`ids` must be integers. Received: {ids.dtype.name}")
    if ids.shape.rank == 0:
        raise ValueError("`ids` must have the shape (..., T). Received: shape ()")
    size = len(vocabulary)
    if tf.executing_eagerly() and tf.reduce_any((ids < 0) | (ids >= size)):
        raise ValueError(
            f"`ids` must be from 0 to {size - 1}, those of the vocabulary. Received: "
            f"ids from {tf.reduce_min(ids)} to {tf.reduce_max(ids)}"
        )
    texts = tf.gather(tf.constant([*map(_as_text, vocabulary)]), ids)
    return tf.strings.strip(tf.strings.reduce_join(texts, axis=-1))


def _as_text(token: str) -> str:
    """What a token adds to a text."""
    if token in _FRAME:
        return ""
    inside = token.startswith("##") and token != "##"  # noqa: S105 - not a password.
    return token[2:] if inside else f" {token}"


def no_ids(inputs: Any) -> Tensor:
    """Returns what stands for the ids of strings that cannot be cut yet."""
    return tf.zeros((tf.shape(_flatten(inputs))[0], 2), tf.int32)


def count_words(texts: Iterable[str], *, lowercase: bool) -> Counter[str]:
    """Counts words as the tokenizer splits them.

    Raises:
        TypeError: If `texts` is one string.
        ValueError: If it holds no word.
    """
    import tensorflow_text as text

    if isinstance(texts, str):
        raise TypeError(
            "`texts` must be an iterable of strings. Received: a single str; put it "
            "into a list"
        )
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


def _flatten(inputs: Any) -> Tensor:
    """Returns strings `(B,)` from `(B,)` or `(B, 1)`."""
    shape = "`inputs` must have the shape (B,) or (B, 1)"
    if isinstance(inputs, tf.RaggedTensor | tf.SparseTensor):
        raise TypeError(f"{shape}, dense. Received: a {type(inputs).__name__}")
    texts = tf.convert_to_tensor(inputs)
    if texts.dtype != tf.string:
        raise TypeError(f"`inputs` must be strings. Received: {texts.dtype.name}")
    rank = texts.shape.rank
    if rank == 1:
        return texts
    if rank == 2 and texts.shape[1] == 1:
        return texts[:, 0]
    received = "unknown rank" if rank is None else tuple(texts.shape)
    raise ValueError(f"{shape}. Received: {received}")
