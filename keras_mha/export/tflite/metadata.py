"""Labels and a tokenizer in a TFLite file, as MediaPipe's TextClassifier reads them.

Source: "TensorFlow Lite metadata", schema M001, whose fields are counted here in the
order of that schema.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatbuffers import Builder

from keras_mha.export.tflite.edit import unpack, with_inputs, with_metadata

LABELS, VOCABULARY = "labels.txt", "vocab.txt"
_IDENTIFIER = b"M001"
# The oldest reader of metadata that knows regular expressions.
_PARSER = "1.2.1"
# Values of the schema's enumerations and unions.
_AXIS_LABELS, _VOCABULARY_FILE = 2, 5
_BERT, _REGEX = 4, 6
_PAD, _START, _UNKNOWN = "<PAD>", "<START>", "<UNKNOWN>"
# MediaPipe finds these three inputs by the names in the metadata.
_IDS, _MASK, _SEGMENTS = "ids", "mask", "segment_ids"


@dataclass(frozen=True)
class BertMetadata:
    """Labels, and the wordpieces by which MediaPipe cuts a text as BERT does.

    MediaPipe gives such a file ids with `[CLS]` and `[SEP]` around them, cut off at
    the file's length, a mask and segment ids. The last two are taken and not read: the
    model knows padding by its id 0, and a text is one segment.

    MediaPipe's tokenizer is not `keras_mha.text.WordpieceTokenizer`. Both cut words
    alike, at ASCII white space, signs, Unicode's punctuation and Chinese characters,
    and lower ASCII letters. But measured with mediapipe 1.2.2:

    | in the text | `WordpieceTokenizer` | MediaPipe |
    | --- | --- | --- |
    | letters with accents | lowers them, drops accents | keeps both |
    | Unicode's spaces, `U+00A0`, `U+3000` | part words | belong to the word |
    | control characters, `U+000B` | part words or are dropped | belong to the word |
    | NUL | parts words | the text ends |
    | bytes that are no UTF-8 | unknown words | refused |

    Args:
        labels: The names of the classes, in the order of the model's outputs.
        vocabulary: The tokens in the order of their ids, with `[PAD]`, `[UNK]`, `[CLS]`
            and `[SEP]`, as a `WordpieceTokenizer` takes them. For a model of texts
            leave it out: its own tokenizer's is taken.
        texts: What the samples' ids were made from, one text for each row. For a model
            of texts leave it out: the samples are the texts.

    Raises:
        TypeError: If an argument is no sequence of strings.
        ValueError: If labels or tokens are repeated, empty or of several lines, or the
            vocabulary lacks a special token.

    Example:

    >>> from keras_mha.export import BertMetadata
    >>> BertMetadata(labels=["bad", "good"]).labels
    ('bad', 'good')
    """

    labels: Sequence[str]
    vocabulary: Sequence[str] | None = None
    texts: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _freeze(self)
        if self.vocabulary is not None:
            _check_special("[PAD]", ("[UNK]", "[CLS]", "[SEP]"), self.vocabulary)


@dataclass(frozen=True)
class RegexMetadata:
    r"""Labels, and the words into which MediaPipe cuts a text where a pattern matches.

    MediaPipe gives such a file `<START>`, if the vocabulary has it, and the ids of the
    words, cut off at the file's length. It changes no letter: "Good" is not "good". In
    RE2, `\w` is an ASCII letter, digit or underscore. A text ends at its first NUL, and
    bytes that are no UTF-8 are refused.

    Args:
        labels: The names of the classes, in the order of the model's outputs.
        vocabulary: The words in the order of their ids, `<PAD>` first, `<UNKNOWN>` and
            perhaps `<START>` among them.
        texts: What the samples' ids were made from, one text for each row.
        delimiter: A pattern of what stands between words, in the language of RE2.

    Raises:
        TypeError: If an argument is no sequence of strings, or the delimiter no string.
        ValueError: If labels or words are repeated or empty, a word has white space in
            it, the vocabulary lacks a special word, or the delimiter is empty.

    Example:

    >>> from keras_mha.export import RegexMetadata
    >>> metadata = RegexMetadata(
    ...     labels=["bad", "good"],
    ...     vocabulary=["<PAD>", "<START>", "<UNKNOWN>", "fine", "film"],
    ...     texts=["fine film", "film"],
    ... )
    >>> metadata.delimiter
    "[^\\w']+"
    """

    labels: Sequence[str]
    vocabulary: Sequence[str]
    texts: Sequence[str]
    delimiter: str = r"[^\w']+"

    def __post_init__(self) -> None:
        _freeze(self)
        _check_special(_PAD, (_UNKNOWN,), self.vocabulary)
        split = [word for word in self.vocabulary if len(word.split()) != 1]
        if split:
            raise ValueError(
                "`vocabulary` must hold words without white space: its file has the "
                f"word and its number in a line. Received: {split[:5]}"
            )
        if not isinstance(self.delimiter, str):
            raise TypeError(
                "`delimiter` must be a string, a pattern. Received: "
                f"{self.delimiter!r} of type {type(self.delimiter).__name__}"
            )
        if not self.delimiter:
            raise ValueError("`delimiter` must not be empty: it would match everywhere")


Metadata = BertMetadata | RegexMetadata


def associated_files(metadata: Metadata) -> dict[str, bytes]:
    """The files that a file with this metadata has in it, by name."""
    words = metadata.vocabulary or ()
    if isinstance(metadata, RegexMetadata):
        words = [f"{word} {number}" for number, word in enumerate(words)]
    return {LABELS: lines(metadata.labels), VOCABULARY: lines(words)}


def lines(items: Sequence[str]) -> bytes:
    """A text file with each of `items` in a line."""
    return "".join(f"{item}\n" for item in items).encode()


def add_metadata(content: bytes, metadata: Metadata, name: str) -> bytes:
    """The file with `metadata`, and with the inputs that MediaPipe gives such a file.

    Args:
        content: A file with one graph, one input of ids, and one output.
        metadata: With a vocabulary.
        name: The model's name.
    """
    model = unpack(content)
    if isinstance(metadata, BertMetadata):
        with_inputs(model, [_MASK, _SEGMENTS])
    return with_metadata(model, _encode(metadata, name), associated_files(metadata))


def further_inputs(metadata: Metadata, ids: Any) -> dict[str, Any]:
    """What `add_metadata` lets a file take beside the ids, for these ids."""
    if isinstance(metadata, RegexMetadata):
        return {}
    return {_MASK: (ids != 0).astype(ids.dtype), _SEGMENTS: 0 * ids}


def _freeze(metadata: Metadata) -> None:
    """Turns lists into tuples, which nobody can change, and checks what is in them."""
    for name in ("labels", "vocabulary", "texts"):
        items = getattr(metadata, name)
        if items is None:
            continue
        if isinstance(items, str | bytes) or not isinstance(items, Sequence):
            raise TypeError(
                f"`{name}` must be a sequence of strings. Received: {items!r} of type "
                f"{type(items).__name__}"
            )
        for item in items:
            if not isinstance(item, str):
                raise TypeError(
                    f"`{name}` must hold strings. Received: {item!r} of type "
                    f"{type(item).__name__}"
                )
        object.__setattr__(metadata, name, tuple(items))
        if name != "texts":
            _check_lines(name, tuple(items))
    if metadata.texts is not None and not metadata.texts:
        raise ValueError("`texts` must hold at least one text. Received: none")


def _check_lines(name: str, items: tuple[str, ...]) -> None:
    if not items:
        raise ValueError(f"`{name}` must hold at least one string. Received: none")
    bad = [item for item in items if not item.strip() or set(item) & {"\n", "\r"}]
    if bad:
        raise ValueError(
            f"`{name}` must hold strings of one line that are not blank. "
            f"Received: {bad[:5]}"
        )
    repeated = [item for item, count in Counter(items).items() if count > 1]
    if repeated:
        raise ValueError(
            f"`{name}` must not repeat a string. Received twice: {repeated[:5]}"
        )


def _check_special(first: str, others: Sequence[str], words: Sequence[str]) -> None:
    if words[0] != first:
        raise ValueError(
            f"`vocabulary` must begin with {first!r}: id 0 is padding. Received "
            f"first: {words[0]!r}"
        )
    missing = [word for word in others if word not in words]
    if missing:
        raise ValueError(
            f"`vocabulary` must contain {list(others)}. Missing: {missing}"
        )


class _Table:
    """A table of the metadata, by the numbers of its fields.

    Strings, tables and lists of tables are values; integers are single bytes.
    """

    def __init__(self, fields: Mapping[int, Any]) -> None:
        self._fields = fields

    def write(self, builder: Builder) -> int:
        """Writes what the table refers to, then the table; returns where it is."""
        places = {key: _write(builder, value) for key, value in self._fields.items()}
        builder.StartObject(max(places) + 1)
        for field, place in places.items():
            if isinstance(self._fields[field], int):
                builder.PrependUint8Slot(field, place, 0)
            else:
                builder.PrependUOffsetTRelativeSlot(field, place, 0)
        return builder.EndObject()


def _write(builder: Builder, value: Any) -> int:
    if isinstance(value, int):
        return value
    if isinstance(value, str):
        return builder.CreateString(value)
    if isinstance(value, _Table):
        return value.write(builder)
    places = [item.write(builder) for item in value]
    builder.StartVector(4, len(places), 4)
    for place in reversed(places):
        builder.PrependUOffsetTRelative(place)
    return builder.EndVector()


def _encode(metadata: Metadata, name: str) -> bytes:
    """The metadata's flatbuffer."""
    vocabulary = _Table({0: VOCABULARY, 2: _VOCABULARY_FILE})
    labels = _Table({0: LABELS, 2: _AXIS_LABELS})
    output = _Table({0: "score", 6: [labels]})
    if isinstance(metadata, BertMetadata):
        unit = _Table({0: _BERT, 1: _Table({0: [vocabulary]})})
        inputs = [_Table({0: given}) for given in (_IDS, _MASK, _SEGMENTS)]
        graph = _Table({2: inputs, 3: [output], 5: [unit]})
    else:
        options = _Table({0: metadata.delimiter, 1: [vocabulary]})
        unit = _Table({0: _REGEX, 1: options})
        graph = _Table({2: [_Table({0: _IDS, 4: [unit]})], 3: [output]})
    builder = Builder(1024)
    model = _Table({0: name, 3: [graph], 7: _PARSER})
    builder.Finish(model.write(builder), _IDENTIFIER)
    return bytes(builder.Output())
