"""Learns a wordpiece vocabulary from texts, and cuts texts by it in a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
from keras.src.backend.common.symbolic_scope import in_symbolic_scope
from typing_extensions import override

from keras_mha.text.vocabulary import SPECIAL_TOKENS, Vocabulary, as_vocabulary
from keras_mha.typing import Shape, Tensor

# The file in the layer's part of a `.keras` file.
_ASSET = "vocabulary.txt"


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

    A `.keras` file holds the vocabulary as an asset, `vocabulary.txt`. What is made of
    a serialized configuration, such as a model's JSON, has none before `load_assets`.

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
        ValueError: If the vocabulary lacks a special token, repeats a token or was not
            loaded, a length is too small, or the inputs have another shape.

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
        _tensorflow_text()
        self.max_length = _check_length("max_length", max_length, at_least=2)
        self.lowercase = lowercase
        self.pad_to = pad_to
        if pad_to is not None and _check_length("pad_to", pad_to) > max_length:
            raise ValueError(
                "`pad_to` must not be greater than `max_length`. "
                f"Received: pad_to={pad_to} and max_length={max_length}"
            )
        # Neither XLA nor Keras' dtype policy knows strings.
        self.supports_jit = False
        self.autocast = False
        # Take lists of strings too.
        self._convert_input_args = False
        self._allow_non_tensor_positional_args = True
        self._set_vocabulary(as_vocabulary(vocabulary))

    @property
    def vocabulary(self) -> list[str]:
        """The tokens in the order of their ids."""
        return self._vocabulary.tokens

    @override
    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            # Copies share it; what saves the layer leaves it to `save_assets`.
            "vocabulary": self._vocabulary,
            "max_length": self.max_length,
            "lowercase": self.lowercase,
            "pad_to": self.pad_to,
        }

    @classmethod
    @override
    def from_config(cls, config: dict[str, Any]) -> Any:
        vocabulary = config["vocabulary"]
        if isinstance(vocabulary, Mapping):
            vocabulary = keras.saving.deserialize_keras_object(vocabulary)
        return cls(**{**config, "vocabulary": vocabulary})

    def save_assets(self, directory: str) -> None:
        """Writes the vocabulary into a directory; `model.save` calls it.

        Raises:
            ValueError: If there is none yet.
        """
        if not self._vocabulary:
            raise ValueError(self._missing())
        self._vocabulary.write(Path(directory) / _ASSET)

    def load_assets(self, directory: str | None) -> None:
        """Reads what `save_assets` wrote; `keras.saving.load_model` calls it.

        A model that version 0.1.0 saved has its vocabulary already.

        Raises:
            ValueError: If there is no vocabulary, or one of another size than that
                of the configuration.
        """
        path = None if directory is None else Path(directory) / _ASSET
        if path is not None and path.is_file():
            self._set_vocabulary(self._vocabulary.read(path))
        elif not self._vocabulary:
            raise ValueError(self._missing())

    def get_vocabulary(self) -> list[str]:
        """Returns the tokens in the order of their ids."""
        return list(self._vocabulary)

    def detokenize(self, ids: Any) -> Tensor:
        """Returns the texts of token ids, as far as the ids tell them.

        Pieces of a word are joined, words and signs are separated by spaces, and
        `[PAD]`, `[CLS]` and `[SEP]` are left out. Upper case, accents and white space
        do not come back where the tokenizer drops them, nor what became `[UNK]`.

        Args:
            ids: Integers `(..., T)`.

        Returns:
            Strings `(...)`.

        Raises:
            TypeError: If the ids are not integers.
            ValueError: If an id is not in the vocabulary, or there is none yet.

        Example:

        >>> from keras_mha.text import WordpieceTokenizer
        >>> vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "film", "##s", "good"]
        >>> tokenizer = WordpieceTokenizer(vocabulary)
        >>> tokenizer.detokenize(tokenizer(["Good films", "film?"])).numpy().tolist()
        [b'good films', b'film [UNK]']
        """
        from keras_mha.text import wordpiece_tensorflow

        if not self._vocabulary:
            raise ValueError(self._missing())
        return wordpiece_tensorflow.join_pieces(ids, self._vocabulary)

    @override
    def call(self, inputs: Tensor) -> Tensor:
        from keras_mha.text import wordpiece_tensorflow

        if self._cutter is None:
            # Keras traces layers while it loads a file, before it reads their assets.
            if not in_symbolic_scope():
                raise ValueError(self._missing())
            return wordpiece_tensorflow.no_ids(inputs)
        ids = wordpiece_tensorflow.cut_texts(
            inputs, self._cutter, self.max_length, self.pad_to
        )
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

    def _set_vocabulary(self, vocabulary: Vocabulary) -> None:
        from keras_mha.text import wordpiece_tensorflow

        self._vocabulary = vocabulary
        self._cutter = (
            wordpiece_tensorflow.Cutter(vocabulary, lowercase=self.lowercase)
            if vocabulary
            else None
        )

    def _missing(self) -> str:
        return (
            f"The tokenizer '{self.name}' has no vocabulary: a configuration holds "
            f"only its size, {self._vocabulary.size}. Load a `.keras` file, whose "
            f"assets hold it, or call `load_assets` with a folder that has {_ASSET}"
        )


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

    from keras_mha.text import wordpiece_tensorflow

    _check_length("vocabulary_size", vocabulary_size)
    _check_length("min_count", min_count)
    counts = wordpiece_tensorflow.count_words(texts, lowercase=lowercase)
    # The search need not start above the count of the vocabulary_size-th word, at which
    # that many pieces pass already.
    ranked = sorted(counts.values(), reverse=True)
    highest = ranked[min(vocabulary_size, len(ranked)) - 1]
    alphabet = sorted({character for word in counts for character in word})
    learned = wordpiece_tokenizer_learner_lib.learn(
        counts,
        vocabulary_size,
        list(SPECIAL_TOKENS),
        lower_thresh=min_count,
        upper_thresh=max(highest, min_count),
        max_unique_chars=len(alphabet),
    )
    # Without every character at the start and inside of words, some words become
    # unknown.
    characters = [*alphabet, *(f"##{character}" for character in alphabet)]
    essential = [*SPECIAL_TOKENS, *characters]
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
    first = len(SPECIAL_TOKENS)
    ordered = [*learned[:first], *skipped, *learned[first:]]
    return [piece for piece in ordered if piece in chosen]


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
