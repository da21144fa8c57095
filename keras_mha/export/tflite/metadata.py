"""Labels and a tokenizer in a TFLite file, as MediaPipe's TextClassifier reads them."""

from __future__ import annotations

import importlib.util
import io
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_mha.export.runtimes import tflite_schema
from keras_mha.export.tflite.edit import copied

if TYPE_CHECKING:
    from keras_mha.text import WordpieceTokenizer

LABELS, VOCABULARY = "labels.txt", "vocab.txt"
_PAD, _UNKNOWN = "<PAD>", "<UNKNOWN>"
# The oldest reader of metadata that knows regular expressions.
_PARSER = "1.2.1"
# MediaPipe also gives the model these inputs, by name.
_MASK, _SEGMENTS = "mask", "segment_ids"


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
    | bytes that are not UTF-8 | unknown words | refused |

    Args:
        labels: The names of the classes, in the order of the model's outputs.
        vocabulary: The tokens in the order of their ids, with `[PAD]`, `[UNK]`, `[CLS]`
            and `[SEP]`, as a `WordpieceTokenizer` takes them. For a model of texts
            leave it out: its tokenizer has one.
        texts: What the samples' ids were made from, one text for each row. For a model
            of texts leave it out: the samples are the texts.

    Raises:
        TypeError: If an argument is not a sequence of strings.
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
    bytes that are not UTF-8 are refused.

    Args:
        labels: The names of the classes, in the order of the model's outputs.
        vocabulary: The words in the order of their ids, `<PAD>` first, `<UNKNOWN>` and
            perhaps `<START>` among them.
        texts: What the samples' ids were made from, one text for each row.
        delimiter: A pattern of what stands between words, in the language of RE2.

    Raises:
        TypeError: If an argument is not a sequence of strings, or the delimiter not a
            string.
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


def check_metadata(metadata: Any, batch_size: int) -> None:
    """Refuses what is not metadata, and where it cannot be written.

    Raises:
        ImportError: If mediapipe is not installed.
        TypeError: If it is not metadata.
        ValueError: If the files are for several rows.
    """
    if not isinstance(metadata, BertMetadata | RegexMetadata):
        raise TypeError(
            "`metadata` must be a BertMetadata or a RegexMetadata. Received: "
            f"{metadata!r} of type {type(metadata).__name__}"
        )
    if batch_size != 1:
        raise ValueError(
            "`metadata` is for files of one row, as MediaPipe runs them. Received: "
            f"batch_size={batch_size}"
        )
    if importlib.util.find_spec("mediapipe") is None:
        raise ImportError(
            "`metadata` needs mediapipe, which writes it and runs the file before it "
            "is published: pip install 'keras-mha[mediapipe]'"
        )


def check_labels(metadata: Metadata, answer: Mapping[str, np.ndarray]) -> None:
    """Refuses labels that are not one for each score in a model's answer to a row."""
    shapes = {name: (array.dtype.name, array.shape) for name, array in answer.items()}
    if list(shapes.values()) != [("float32", (1, len(metadata.labels)))]:
        raise ValueError(
            f"`metadata` has {len(metadata.labels)} labels, for a model with one "
            f"float32 output of shape (B, {len(metadata.labels)}). Received a model "
            f"with the outputs {shapes}"
        )


def with_tokenizer(
    metadata: Metadata, tokenizer: WordpieceTokenizer, texts: np.ndarray
) -> Metadata:
    """Completes the metadata of a model of texts by its tokenizer and its samples.

    Raises:
        ValueError: If the metadata names them itself, or the tokenizer cuts texts in
            another way than MediaPipe's.
    """
    if isinstance(metadata, RegexMetadata):
        raise ValueError(
            "`metadata` must be a BertMetadata where the model has a tokenizer, "
            "which is one of wordpieces. Received: a RegexMetadata"
        )
    for name in ("vocabulary", "texts"):
        if getattr(metadata, name) is not None:
            raise ValueError(
                f"`metadata` must leave out `{name}` where the model has a "
                "tokenizer, which tells it. Received: one of "
                f"{len(getattr(metadata, name))} strings"
            )
    if not tokenizer.lowercase:
        raise ValueError(
            "`metadata` is for a tokenizer with `lowercase=True`: MediaPipe's "
            "lowers letters. Received a model whose tokenizer has lowercase=False"
        )
    # Bytes that are not UTF-8 stand for themselves until MediaPipe refuses them.
    decoded = [text.decode("utf-8", "surrogateescape") for text in texts.flat]
    return replace(metadata, vocabulary=tokenizer.get_vocabulary(), texts=decoded)


def check_complete(metadata: Metadata, samples: int) -> None:
    """Refuses metadata of a model of ids without a vocabulary, or a text a sample."""
    if metadata.vocabulary is None or metadata.texts is None:
        raise ValueError(
            "`metadata` must hold `vocabulary` and `texts` for a model of ids. "
            f"Received: vocabulary={_brief(metadata.vocabulary)} and "
            f"texts={_brief(metadata.texts)}"
        )
    if len(metadata.texts) != samples:
        raise ValueError(
            "`metadata` must hold in `texts` one text for each of the samples. "
            f"Received: {len(metadata.texts)} texts and {samples} samples"
        )


def _brief(items: Sequence[str] | None) -> str:
    return "None" if items is None else f"{len(items)} strings"


def lines(items: Sequence[str]) -> bytes:
    """A text file with each of `items` in a line."""
    return "".join(f"{item}\n" for item in items).encode()


def further_inputs(metadata: Metadata, ids: Any) -> dict[str, Any]:
    """Returns what a file with `metadata` takes in addition to these ids."""
    if isinstance(metadata, RegexMetadata):
        return {}
    return {_MASK: (ids != 0).astype(ids.dtype), _SEGMENTS: 0 * ids}


def add_metadata(ids_model: Any, metadata: Metadata, name: str) -> bytes:
    """Writes a file with `metadata`, and with the inputs that MediaPipe gives it.

    MediaPipe's own classes make the metadata. Its `MetadataWriter` would also put it
    into the file, but cannot be imported from the wheel of mediapipe 1.2.3, which lacks
    a part of it, and does not align the weights.

    Args:
        ids_model: A `ModelT` with one graph, one input of ids, and one output.
        metadata: With a vocabulary.
        name: The model's name.
    """
    model = copied(ids_model)
    words = metadata.vocabulary or ()
    if isinstance(metadata, BertMetadata):
        tflite_schema.add_unread_inputs(model, (_MASK, _SEGMENTS))
    else:
        words = [f"{word} {number}" for number, word in enumerate(words)]
    tflite_schema.add_mediapipe_metadata(model, _encode(metadata, name))
    content = io.BytesIO()
    content.write(tflite_schema.pack(model))
    files = {LABELS: lines(metadata.labels), VOCABULARY: lines(words)}
    with zipfile.ZipFile(content, "a") as archive:
        for file, data in files.items():
            # With a fixed date, the same model always gives the same file.
            archive.writestr(zipfile.ZipInfo(file), data)
    return content.getvalue()


def _encode(metadata: Metadata, name: str) -> bytes:
    """Packs the metadata as MediaPipe reads it."""
    from flatbuffers import Builder
    from mediapipe.tasks.metadata import metadata_schema_py_generated as schema
    from mediapipe.tasks.python.metadata.metadata_writers import metadata_info as info

    graph: Any = schema.SubGraphMetadataT()
    if isinstance(metadata, BertMetadata):
        names = ("ids", _MASK, _SEGMENTS)
        inputs = [info.TensorMd(name=each) for each in names]
        graph.inputProcessUnits = [info.BertTokenizerMd(VOCABULARY).create_metadata()]
    else:
        words = info.RegexTokenizerMd(metadata.delimiter, VOCABULARY)
        inputs = [info.InputTextTensorMd("ids", tokenizer_md=words)]
    scores = info.ClassificationTensorMd(
        name="score", label_files=[info.LabelFileMd(LABELS)]
    )
    graph.inputTensorMetadata = [each.create_metadata() for each in inputs]
    graph.outputTensorMetadata = [scores.create_metadata()]
    model: Any = info.GeneralMd(name=name).create_metadata()
    model.minParserVersion = _PARSER
    model.subgraphMetadata = [graph]
    builder = Builder(1024)
    builder.Finish(model.Pack(builder), b"M001")
    return bytes(builder.Output())


def _freeze(metadata: Metadata) -> None:
    """Turns lists into tuples, which nobody can change, and checks their items."""
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
