from __future__ import annotations

import importlib.util
import io
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mha.export import (
    BertMetadata,
    ParityError,
    RegexMetadata,
    TFLiteReport,
    VerificationError,
    export_tflite,
)
from keras_mha.export.tflite import mediapipe_file as tflite_mediapipe
from keras_mha.export.tflite.metadata import add_metadata
from keras_mha.text import WordpieceTokenizer
from tests.support import small_models
from tests.support.small_models import HOSTILE, TEXTS, VOCABULARY

LABELS = ("bad", "good", "none")
WORDS = ("<PAD>", "<START>", "<UNKNOWN>", "good", "bad", "movie", "a")
# What MediaPipe and the model's own tokenizer cut alike.
ALIKE = ["good movie", "a badly bad movie", "", "A GOOD-movie!", "qqqq"]

needs_mediapipe = pytest.mark.skipif(
    importlib.util.find_spec("mediapipe") is None,
    reason="mediapipe is not installed: pip install 'keras-mha[mediapipe]'",
)


def text_model(lowercase: bool = True) -> keras.Model:
    texts = keras.Input((), dtype="string", name="text")
    tokenizer = WordpieceTokenizer(VOCABULARY, max_length=7, lowercase=lowercase)
    head = keras.layers.Identity(name="probabilities")
    return keras.Model(texts, head(small_models.ids_model()(tokenizer(texts))))


def export_texts(directory: Path, texts: list[Any], **settings: Any) -> TFLiteReport:
    return export_tflite(
        settings.pop("model", None) or text_model(),
        directory,
        **{
            "sequence_lengths": (7,),
            "samples": texts,
            "metadata": BertMetadata(LABELS),
        }
        | settings,
    )


def classified(path: str | Path, texts: list[str]) -> list[dict[str, float]]:
    """MediaPipe's scores by label, read plainly."""
    from mediapipe.tasks.python.text.text_classifier import TextClassifier

    with TextClassifier.create_from_model_path(str(path)) as classifier:
        return [
            {
                category.category_name: category.score
                for category in classifier.classify(text).classifications[0].categories
            }
            for text in texts
        ]


def regex_ids(texts: list[str], words: list[str], length: int = 7) -> list[list[int]]:
    """By the rules of MediaPipe's tokenizer, for words parted by white space."""
    start = [words.index("<START>")] if "<START>" in words else []
    unknown = words.index("<UNKNOWN>")
    return [
        [
            *start,
            *(words.index(w) if w in words else unknown for w in text.split()),
        ][:length]
        for text in texts
    ]


# In MediaPipe.


@needs_mediapipe
def test_wordpieces(tmp_path: Path) -> None:
    model = text_model()
    report = export_texts(tmp_path, ALIKE, model=model)
    of_ids, with_labels = report.files
    assert (of_ids.kind, with_labels.kind) == ("ids", "mediapipe")
    assert with_labels.path == str(tmp_path / "mediapipe_7.tflite")
    assert [given.name for given in with_labels.inputs] == [
        *("ids", "mask", "segment_ids")
    ]
    assert with_labels.operators == of_ids.operators
    assert with_labels.delegate_partitions == of_ids.delegate_partitions == 1
    check = with_labels.mediapipe
    assert check is not None
    assert (check.status, check.reason) == ("ok", "")
    assert (check.texts, check.same_ids, check.other_ids) == (5, 5, ())
    assert check.parity is not None
    assert check.parity.max_absolute_difference < 1e-6
    assert (check.parity.runtime, check.parity.samples) == (
        *("MediaPipe TextClassifier", 5),
    )

    wanted = model.predict(np.array(ALIKE, object), verbose=0)
    assert np.ptp(wanted, axis=0).min() > 1e-3
    got = classified(with_labels.path, ALIKE)
    for scores, row in zip(got, wanted, strict=True):
        assert scores == pytest.approx(dict(zip(LABELS, row, strict=True)), abs=1e-6)
    assert (tmp_path / "labels.txt").read_text("utf-8") == "bad\ngood\nnone\n"
    assert (tmp_path / "vocab.txt").read_text("utf-8").split("\n")[:-1] == VOCABULARY


@needs_mediapipe
@pytest.mark.parametrize("start", [True, False])
def test_words_between_what_matches(tmp_path: Path, start: bool) -> None:
    model = small_models.ids_model()
    texts = ["good movie", "a bad a bad a bad a bad movie", "film", "  bad  "]
    words = [word for word in WORDS if start or word != "<START>"]
    ids = regex_ids(texts, words)
    metadata = RegexMetadata(LABELS, words, texts, delimiter=r"\s+")
    report = export_tflite(
        model, tmp_path, sequence_lengths=(7,), samples=ids, metadata=metadata
    )
    check = report.files[1].mediapipe
    assert check is not None
    assert (check.status, check.same_ids, check.texts) == ("ok", 4, 4)
    assert [given.name for given in report.files[1].inputs] == ["ids"]
    padded = np.array([row + [0] * (7 - len(row)) for row in ids], "int32")
    wanted = model.predict(padded, verbose=0)
    got = classified(report.files[1].path, texts)
    for scores, row in zip(got, wanted, strict=True):
        assert scores == pytest.approx(dict(zip(LABELS, row, strict=True)), abs=1e-6)
    assert (tmp_path / "vocab.txt").read_text("utf-8").split("\n")[:-1] == words


@needs_mediapipe
def test_hostile_texts(tmp_path: Path) -> None:
    # Control characters end a text at the first NUL, and what is no UTF-8 is refused:
    # both are told, and the scores of all others are the model's.
    with pytest.warns(UserWarning, match=r"MediaPipe cuts 2 of 7 texts.*'bad.x00"):
        report = export_texts(tmp_path, HOSTILE)
    check = report.files[1].mediapipe
    assert check is not None
    assert (check.texts, check.same_ids) == (7, 5)
    assert check.other_ids == (*(repr(HOSTILE[3]), r"'good \udcff\udcfe\udcc3 movie'"),)
    assert check.parity is not None
    assert check.parity.samples == 6
    assert check.parity.max_absolute_difference < 1e-6


@needs_mediapipe
def test_a_tokenizer_that_always_makes_as_many_ids(tmp_path: Path) -> None:
    texts = keras.Input((), dtype="string", name="text")
    tokenizer = WordpieceTokenizer(VOCABULARY, max_length=7, pad_to=7)
    head = keras.layers.Identity(name="probabilities")
    model = keras.Model(texts, head(small_models.ids_model()(tokenizer(texts))))
    report = export_texts(tmp_path, ALIKE, model=model, text=True)
    assert [file.kind for file in report.files] == ["ids", "text", "mediapipe"]
    check = report.files[2].mediapipe
    assert check is not None
    assert check.same_ids == len(ALIKE)
    with pytest.raises(ValueError, match=r"`sequence_lengths` is for .*\(None, 7\)"):
        export_texts(tmp_path / "9", ALIKE, model=model, sequence_lengths=(9,))


@needs_mediapipe
def test_where_its_wordpieces_differ(tmp_path: Path) -> None:
    # Accents are kept, only ASCII letters lowered, and no-break spaces part no words.
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "cafe", "caf\u00e9", "uber"]
    texts = ["cafe", "caf\u00e9", "\u00dcber", "cafe\u00a0cafe"]
    given = keras.Input((), dtype="string", name="text")
    tokenizer = WordpieceTokenizer(vocabulary, max_length=7)
    head = keras.layers.Identity(name="probabilities")
    model = keras.Model(given, head(small_models.ids_model()(tokenizer(given))))
    with pytest.warns(UserWarning, match="MediaPipe cuts 3 of 4 texts into other ids"):
        report = export_texts(tmp_path, texts, model=model)
    answers, _ = tflite_mediapipe.run_mediapipe(
        Path(report.files[1].path), texts, timeout=60
    )
    cut = [answer["ids"][0][answer["ids"][0] > 0].tolist() for answer in answers]
    assert cut == [[2, 4, 3], [2, 5, 3], [2, 1, 3], [2, 1, 3]]
    own = tokenizer(np.array(texts, object)).numpy()
    assert [row[row > 0].tolist() for row in own] == [
        *([2, 4, 3], [2, 4, 3], [2, 6, 3], [2, 4, 4, 3])
    ]


# What is caught.


@needs_mediapipe
def test_another_vocabulary_is_caught(tmp_path: Path) -> None:
    model = small_models.ids_model()
    tokenizer = WordpieceTokenizer(VOCABULARY, max_length=7)
    texts = ["good movie", "bad"]
    ids = tokenizer(np.array(texts, object)).numpy()
    words = [*VOCABULARY[:4], "bad", "good", *VOCABULARY[6:]]
    with pytest.raises(ParityError, match=r"none of the 2 texts.*\[2, 5, 7, 3, 0, 0"):
        export_tflite(
            model,
            tmp_path / "out",
            sequence_lengths=(7,),
            samples=ids,
            metadata=BertMetadata(LABELS, words, texts),
        )
    assert not (tmp_path / "out").exists()


def swapped(
    monkeypatch: pytest.MonkeyPatch, old: bytes, new: bytes, *, times: int
) -> None:
    """Lets the files that are written have other bytes in them."""

    def add_and_swap(*arguments: Any) -> bytes:
        content = add_metadata(*arguments)
        assert content.count(old) == times
        # The archive's checksums must be right: they are not what is tested.
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
            start = min(info.header_offset for info in archive.infolist())
        changed = io.BytesIO()
        changed.write(content[:start].replace(old, new))
        with zipfile.ZipFile(changed, "a") as archive:
            for name, data in files.items():
                archive.writestr(name, data.replace(old, new))
        return changed.getvalue()

    monkeypatch.setattr(tflite_mediapipe, "add_metadata", add_and_swap)


@needs_mediapipe
def test_labels_in_another_order_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped(monkeypatch, b"bad\ngood\nnone", b"good\nbad\nnone", times=1)
    with pytest.raises(ParityError, match=r"the labels \['good', 'bad', 'none'\], not"):
        export_texts(tmp_path / "out", TEXTS)
    assert not (tmp_path / "out").exists()


@needs_mediapipe
def test_another_weight_is_caught_by_mediapipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = text_model()
    bias = model.layers[-2].layers[-1].bias.numpy()
    other = bias + np.array([0.01, 0, 0], "float32")
    swapped(monkeypatch, bias.tobytes(), other.tobytes(), times=1)
    monkeypatch.setattr(tflite_mediapipe, "compare_runs", lambda *_, **__: None)
    with pytest.raises(ParityError, match="'probabilities' .*in MediaPipe TextClass"):
        export_texts(tmp_path / "out", ALIKE, model=model)


@needs_mediapipe
def test_metadata_without_a_tokenizer_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped(monkeypatch, b"M001", b"M000", times=1)
    with pytest.raises(VerificationError, match="mediapipe_text on mediapipe_7"):
        export_texts(tmp_path / "out", ALIKE)


# What is refused.


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: BertMetadata("ab"), TypeError, "`labels` must be a seq.*'ab' of type"),
        (lambda: BertMetadata([1]), TypeError, "`labels` must hold strings.*1 of type"),
        (lambda: BertMetadata([]), ValueError, "`labels` must hold at least one"),
        (lambda: BertMetadata(["a\nb"]), ValueError, "`labels` must hold .* one line"),
        (lambda: BertMetadata([" "]), ValueError, r"not blank. Received: \[' '\]"),
        (lambda: BertMetadata(["a", "a"]), ValueError, r"repeat a str.*twice: \['a'\]"),
        (lambda: BertMetadata(["a"], texts=[]), ValueError, "`texts` must hold at"),
        (lambda: BertMetadata(["a"], ["x"]), ValueError, r"begin with '\[PAD\]'.*'x'"),
        (
            lambda: BertMetadata(["a"], ["[PAD]", "[UNK]", "[SEP]"]),
            ValueError,
            r"`vocabulary` must contain .*Missing: \['\[CLS\]'\]",
        ),
        (
            lambda: RegexMetadata(["a"], ["<PAD>"], ["t"]),
            ValueError,
            "`vocabulary` must contain .*<UNKNOWN>.*Missing",
        ),
        (
            lambda: RegexMetadata(["a"], [*WORDS, "two words"], ["t"]),
            ValueError,
            r"without white space.*\['two words'\]",
        ),
        (
            lambda: RegexMetadata(["a"], WORDS, ["t"], delimiter=""),
            ValueError,
            "`delimiter` must not be empty",
        ),
        (
            lambda: RegexMetadata(["a"], WORDS, ["t"], delimiter=3),
            TypeError,
            "`delimiter` must be a string.*3 of type int",
        ),
    ],
)
def test_bad_metadata(make: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        make()


IDS_OF = {"model": small_models.ids_model, "samples": [[2, 4, 3], [2, 3]]}


@needs_mediapipe
@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"metadata": {"labels": LABELS}}, TypeError, "`metadata` must be a BertMeta"),
        ({"metadata": BertMetadata(["a", "b"])}, ValueError, r"has 2 labels.*\(1, 3\)"),
        (
            {"metadata": BertMetadata(LABELS, VOCABULARY)},
            ValueError,
            "must leave out `vocabulary` where .* 9 strings",
        ),
        (
            {"metadata": BertMetadata(LABELS, texts=["a"])},
            ValueError,
            "must leave out `texts` where .* 1 strings",
        ),
        (
            {"metadata": RegexMetadata(LABELS, WORDS, ["a"])},
            ValueError,
            "must be a BertMetadata where the model has a tokenizer",
        ),
        (
            {"model": lambda: text_model(lowercase=False)},
            ValueError,
            "`metadata` is for a tokenizer with `lowercase=True`",
        ),
        ({"batch_size": 2}, ValueError, "`metadata` is for files of one row.*size=2"),
        (IDS_OF, ValueError, "must hold `vocabulary` and `texts`.*None and texts=None"),
        (
            IDS_OF | {"metadata": BertMetadata(LABELS, VOCABULARY, ["a"])},
            ValueError,
            "one text for each of the samples.*1 texts and 2 samples",
        ),
    ],
)
def test_metadata_that_does_not_fit(
    tmp_path: Path, arguments: dict[str, Any], kind: type[Exception], text: str
) -> None:
    given = dict(arguments)
    make = given.pop("model", text_model)
    samples = given.pop("samples", TEXTS)
    with pytest.raises(kind, match=text):
        export_texts(tmp_path / "out", samples, model=make(), **given)
    assert not (tmp_path / "out").exists()


def test_metadata_without_mediapipe_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "mediapipe" else find(name, *rest),
    )
    text = r"`metadata` needs mediapipe.*pip install 'keras-mha\[mediapipe\]'"
    with pytest.raises(ImportError, match=text):
        export_texts(tmp_path / "out", TEXTS)
    assert not (tmp_path / "out").exists()


def test_metadata_is_frozen_and_holds_tuples() -> None:
    labels = ["a", "b"]
    metadata = BertMetadata(labels)
    labels.append("c")
    assert metadata.labels == ("a", "b")
    with pytest.raises(AttributeError):
        metadata.labels = ("c",)
