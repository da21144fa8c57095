"""Texts as users should not send them: the same answer in every runtime.

What the tokenizer must make of each is written down by hand; a model of ids, asked in
Keras, says what all others must answer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mha
from keras_mha.export import (
    VerificationReport,
    export_onnx,
    export_saved_model,
    export_tflite,
    verify,
    without_tokenizer,
)
from keras_mha.export.runtimes import cpp_loader
from keras_mha.export.runtimes.fresh_process import run_in_fresh_process
from keras_mha.export.saved_model.reader import describe_file, read_meta_graph
from keras_mha.text import WordpieceTokenizer
from tests.support import small_models

HEBREW = "\u05d8\u05d5"
CLAPPER, MAN, WOMAN, JOINER = "\U0001f3ac", "\U0001f468", "\U0001f469", "\u200d"
LENGTH = 9
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "##bad", "film", "a"]
VOCABULARY += ["[", "]", "31", "##m", "pad", HEBREW, "##\u05d1", CLAPPER]

# By what they are: the text, and its pieces between [CLS] and [SEP].
TEXTS: dict[str, tuple[str | bytes, str]] = {
    "an ordinary one": ("A good film", "a good film"),
    "empty": ("", ""),
    "white space": (" \t\r\n\u2003\u00a0\u2028", ""),
    "no visible character": ("\u200b\ufeff\x00\x1b", ""),
    "unknown words": ("qqqqq \u4e00\u4e01", "[UNK] [UNK] [UNK]"),
    "100,000 characters": ("a good bad film " * 6250, "a good bad film a good bad"),
    "100,000 characters in a word": ("good" * 25000, "[UNK]"),
    "control characters": ("bad\x00\x01\x1b[31m\r\n\tfilm", "bad [ 31 ##m film"),
    "a NUL at the end": ("bad\x00", "bad"),
    "bytes of no character": (b"good \xff\xfe\xc3 film", "good [UNK] film"),
    "a character cut off": (b"good\xf0\x9f film", "[UNK] film"),
    "half a surrogate pair": (b"\xed\xa0\x80 bad", "[UNK] bad"),
    "an overlong NUL": (b"\xc0\x80 good", "[UNK] good"),
    "the replacement character": ("\ufffd good", "[UNK] good"),
    "right to left": (f"\u202e{HEBREW}\u05d1 film\u202c", f"{HEBREW} ##\u05d1 film"),
    "emoji": (f"{CLAPPER} {MAN}{JOINER}{WOMAN} bad", f"{CLAPPER} [UNK] bad"),
    "accents apart": ("go\u0301od B\u0300ad", "good bad"),
    "a soft hyphen": ("good\u00adbad", "good ##bad"),
    "special tokens": ("[PAD] good", "[ pad ] good"),
}
GIVEN: list[Any] = [text for text, _ in TEXTS.values()]


def ids_by_hand() -> np.ndarray:
    """What the tokenizer must give for all of `TEXTS`."""
    rows = [["[CLS]", *pieces.split(), "[SEP]"] for _, pieces in TEXTS.values()]
    rows = [row + ["[PAD]"] * (LENGTH - len(row)) for row in rows]
    return np.array([[VOCABULARY.index(piece) for piece in row] for row in rows])


@pytest.fixture(scope="module")
def model() -> keras.Model:
    """Strings (B,) to probabilities (B, 3), by our layers."""
    texts = keras.Input((), dtype="string", name="text")
    ids = WordpieceTokenizer(VOCABULARY, max_length=LENGTH)(texts)
    hidden = keras_mha.TokenAndPositionEmbedding(len(VOCABULARY), LENGTH, 10)(ids)
    hidden = keras_mha.TransformerEncoderBlock(2, 7)(hidden)
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    head = keras.layers.Dense(3, activation="softmax", name="probabilities")
    built = small_models.randomize(keras.Model(texts, head(pooled)))
    # Else one of the probabilities would be 0 for all.
    head.kernel.assign(0.2 * np.asarray(head.kernel))
    return built


@pytest.fixture(scope="module")
def wanted(model: keras.Model) -> np.ndarray:
    """The right answers, of ids that no tokenizer made."""
    rest, _ = without_tokenizer(model, ["good"])
    answers = np.asarray(rest([ids_by_hand()]))
    # Texts that differ in their pieces differ in their answers.
    different = {pieces for _, pieces in TEXTS.values()}
    assert len(np.unique(answers.round(4), axis=0)) == len(different)
    return answers


@pytest.fixture(scope="module")
def exported(model: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exported")
    export_saved_model(model, directory / "served", samples=["a good film", "bad"])
    rest, ids = without_tokenizer(model, ["a good film", "bad"])
    export_tflite(rest, directory, sequence_lengths=(LENGTH,), samples=ids)
    export_onnx(rest, directory / "model.onnx", samples=ids)
    return directory


Ask = Callable[[list[Any]], np.ndarray]


def asked_in_keras(model: keras.Model, _: Path) -> Ask:
    return lambda texts: np.asarray(model(tf.constant(texts)))


def asked_by_predict(model: keras.Model, _: Path) -> Ask:
    return lambda texts: np.asarray(model.predict(tf.constant(texts), verbose=0))


def asked_in_a_graph(model: keras.Model, _: Path) -> Ask:
    function = tf.function(model, autograph=False)
    return lambda texts: function(tf.constant(texts)).numpy()


def asked_in_the_python_loader(_: keras.Model, directory: Path) -> Ask:
    loaded = tf.saved_model.load(directory / "served" / "1")
    serve = loaded.signatures["serving_default"]
    return lambda texts: serve(text=tf.constant(texts))["probabilities"].numpy()


def asked_in_the_cpp_loader(_: keras.Model, directory: Path) -> Ask:
    path = directory / "served" / "1"

    def ask(texts: list[Any]) -> np.ndarray:
        as_bytes = [t.encode() if isinstance(t, str) else t for t in texts]
        case = {"text": np.array(as_bytes, object)}
        file = describe_file(path, read_meta_graph(path))
        (answer,), facts = run_in_fresh_process(
            cpp_loader.RUNTIME, file, [case], timeout=300.0
        )
        assert facts["runtime"] == "TensorFlow C++ loader, XLA disabled"
        return answer["probabilities"]

    return ask


def test_the_tokenizer_cuts_as_written_down_by_hand() -> None:
    tokenizer = WordpieceTokenizer(VOCABULARY, max_length=LENGTH, pad_to=LENGTH)
    got = tokenizer(tf.constant(GIVEN)).numpy()
    for name, row, wanted in zip(TEXTS, got, ids_by_hand(), strict=True):
        assert row.tolist() == wanted.tolist(), name


@pytest.mark.parametrize(
    "runtime",
    [
        asked_in_keras,
        asked_by_predict,
        asked_in_a_graph,
        asked_in_the_python_loader,
        asked_in_the_cpp_loader,
    ],
)
def test_strings_get_the_same_answer_in_every_runtime(
    model: keras.Model,
    exported: Path,
    wanted: np.ndarray,
    runtime: Callable[[keras.Model, Path], Ask],
) -> None:
    ask = runtime(model, exported)
    np.testing.assert_allclose(ask(GIVEN), wanted, atol=1e-6)
    # Alone as in company.
    for i in (1, 5, 9):
        np.testing.assert_allclose(ask([GIVEN[i]]), wanted[i : i + 1], atol=1e-6)


def test_ids_get_the_same_answer_in_every_runtime(
    model: keras.Model, exported: Path, wanted: np.ndarray
) -> None:
    rest, ids = without_tokenizer(model, GIVEN)
    np.testing.assert_array_equal(ids, ids_by_hand())
    np.testing.assert_allclose(rest([ids]), wanted, atol=1e-6)
    report = verify(
        rest,
        samples=ids,
        tflite=exported / f"model_{LENGTH}.tflite",
        onnx=exported / "model.onnx",
        runtimes=["litert", "onnx_runtime", "openvino"],
        tolerance=1e-6,
        timed_calls=0,
    )
    assert statuses(report) == {
        "LiteRT interpreter, CPU": "ok",
        "ONNX Runtime, CPU": "ok",
        "OpenVINO, CPU": "ok",
    }
    assert all(check.samples == len(TEXTS) for check in report.checks)


def statuses(report: VerificationReport) -> dict[str, str]:
    return {check.runtime: check.status for check in report.checks[1:]}


def test_openvino_says_that_it_takes_no_strings(
    model: keras.Model, exported: Path
) -> None:
    report = verify(
        model,
        samples=GIVEN,
        saved_model=exported / "served",
        runtimes=["saved_model", "openvino"],
        timed_calls=0,
    )
    served, openvino = report.checks[1:]
    assert served.status == "ok"
    assert (openvino.status, openvino.reason) == (
        "not run",
        "it takes ids, and no strings",
    )


@pytest.mark.parametrize("text", ["good \ud800", "\udcff"])
def test_what_is_no_text_is_refused_by_all_alike(
    model: keras.Model, exported: Path, tmp_path: Path, text: str
) -> None:
    """Half of a surrogate pair in a `str` has no bytes to give to a runtime."""
    with pytest.raises(ValueError, match="Error converting unicode string"):
        model(tf.constant([text]))
    said = r"`samples` for input 'text' must be text.*surrogates not allowed"
    with pytest.raises(ValueError, match=said):
        export_saved_model(model, tmp_path / "out", samples=["good", text])
    with pytest.raises(ValueError, match=said):
        verify(model, samples=[text], saved_model=exported / "served")
    with pytest.raises(ValueError, match=said):
        without_tokenizer(model, [text])
    assert not (tmp_path / "out").exists()
