"""`verify` on TFLite files that take texts, or that MediaPipe cuts texts for."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_mha.export import BertMetadata, RuntimeCheck, export_tflite, verify
from keras_mha.export.runtimes import litert, table
from keras_mha.text import WordpieceTokenizer
from tests.support import small_models
from tests.support.small_models import VOCABULARY

LABELS = ("bad", "good", "none")
TEXTS = ["good movie", "a badly bad movie", "", "A GOOD-movie!", "qqqq"]
RUNTIMES = ["litert", "litert_gpu", "litert_arm", "mediapipe"]

needs_mediapipe = pytest.mark.skipif(
    importlib.util.find_spec("mediapipe") is None,
    reason="mediapipe is not installed: pip install 'keras-mha[mediapipe]'",
)


def text_model(words: list[str] = VOCABULARY) -> keras.Model:
    texts = keras.Input((), dtype="string", name="text")
    tokenizer = WordpieceTokenizer(words, max_length=7)
    head = keras.layers.Identity(name="probabilities")
    return keras.Model(texts, head(small_models.ids_model()(tokenizer(texts))))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The files of all kinds of one model, by kind."""
    directory = tmp_path_factory.mktemp("files")
    report = export_tflite(
        text_model(),
        directory,
        sequence_lengths=(7,),
        samples=TEXTS,
        text=True,
        metadata=BertMetadata(LABELS),
    )
    return {file.kind: Path(file.path) for file in report.files}


def checks(
    model: keras.Model, samples: object, path: Path, **settings: object
) -> list[RuntimeCheck]:
    arguments = {"runtimes": RUNTIMES, "timed_calls": 0} | settings
    return list(verify(model, samples=samples, tflite=path, **arguments).checks[1:])


def test_strings(files: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether these could run is not what is asked.
    for name in ("litert_gpu", "litert_arm"):
        there = replace(table.RUNTIMES[name], find=lambda: None)
        monkeypatch.setitem(table.RUNTIMES, name, there)
    (cpu, *others) = checks(
        text_model(), small_models.HOSTILE, files["text"], timed_calls=1
    )
    assert (cpu.status, cpu.reason, cpu.samples) == ("ok", "", 7)
    assert cpu.max_absolute_difference is not None
    assert cpu.max_absolute_difference < 1e-6
    assert cpu.latency is not None
    assert (cpu.label_agreement, cpu.tolerance) == (1.0, 1e-5)
    for check in others[:2]:
        assert check.status == "not run"
        assert check.reason.endswith("operations, which this runtime lacks")


def test_strings_of_another_vocabulary_are_wrong(files: Mapping[str, Path]) -> None:
    words = [*VOCABULARY[:4], "bad", "good", *VOCABULARY[6:]]
    (cpu, *_) = checks(text_model(words), TEXTS, files["text"], runtimes=["litert"])
    assert cpu.status == "wrong"
    assert cpu.max_absolute_difference is not None
    assert cpu.max_absolute_difference > 1e-3


def test_strings_without_the_operations_are_not_run(
    files: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> tuple[str, ...]:
        raise FileNotFoundError("pip install 'keras-mha[text]'")

    monkeypatch.setattr(litert, "registrar", missing)
    (cpu,) = checks(text_model(), TEXTS, files["text"], runtimes=["litert"])
    assert (cpu.status, cpu.reason) == ("not run", "pip install 'keras-mha[text]'")


@needs_mediapipe
def test_mediapipe(files: Mapping[str, Path]) -> None:
    cpu, check = checks(
        text_model(),
        TEXTS,
        files["mediapipe"],
        runtimes=["litert", "mediapipe"],
        timed_calls=1,
    )
    assert (cpu.status, cpu.reason) == (
        *("not run", "the file is for MediaPipe; the file of ids has the same graph"),
    )
    assert (check.status, check.reason, check.samples) == ("ok", "", 5)
    assert check.runtime == "MediaPipe TextClassifier"
    assert (check.same_ids, check.label_agreement) == (1.0, 1.0)
    assert check.max_absolute_difference is not None
    assert check.max_absolute_difference < 1e-6
    assert check.latency is not None


@needs_mediapipe
def test_what_mediapipe_cuts_otherwise_is_told(files: Mapping[str, Path]) -> None:
    model = text_model()
    texts = small_models.HOSTILE
    report = verify(
        model,
        samples=texts,
        tflite=files["mediapipe"],
        runtimes=["mediapipe"],
        timed_calls=0,
    )
    check = report.checks[1]
    # It ends a text at a NUL, and takes UTF-8 alone.
    assert (check.status, check.samples) == ("ok", 5)
    assert check.reason.startswith("but it cuts 2 texts into other ids than the model")
    assert check.same_ids == pytest.approx(5 / 7)
    # What it refuses has no label, so that one does not agree.
    assert check.label_agreement is not None
    assert check.label_agreement <= 6 / 7
    assert "| same ids |" in report.to_markdown()
    assert "| 71.43% |" in report.to_markdown()


@needs_mediapipe
def test_another_model_in_mediapipe_is_wrong(files: Mapping[str, Path]) -> None:
    model = text_model()
    model.layers[-2].layers[-1].bias.assign_add([0.01, 0.0, 0.0])
    (check,) = checks(model, TEXTS, files["mediapipe"], runtimes=["mediapipe"])
    assert (check.status, check.same_ids) == ("wrong", 1.0)


@needs_mediapipe
def test_another_vocabulary_in_mediapipe_is_wrong(files: Mapping[str, Path]) -> None:
    words = [*VOCABULARY[:4], "movie", "good", "##ly", "bad", "a"]
    texts = ["good", "a bad movie"]
    (check,) = checks(
        text_model(words), texts, files["mediapipe"], runtimes=["mediapipe"]
    )
    assert (check.status, check.reason) == (
        *("wrong", "it cuts no text into the model's ids"),
    )


@needs_mediapipe
def test_texts_longer_than_the_file(tmp_path: Path) -> None:
    model = text_model()
    export_tflite(
        model,
        tmp_path,
        sequence_lengths=(5,),
        samples=["good", "a bad movie"],
        metadata=BertMetadata(LABELS),
    )
    texts = ["good", "a bad movie a bad movie", "bad"]
    (check,) = checks(
        model, texts, tmp_path / "mediapipe_5.tflite", runtimes=["mediapipe"]
    )
    assert (check.status, check.samples, check.same_ids) == ("ok", 2, 2 / 3)


def test_a_model_of_ids(files: Mapping[str, Path]) -> None:
    ids = np.array([[2, 4, 3]], "int32")
    for kind in ("text", "mediapipe"):
        (check,) = checks(
            small_models.ids_model(), ids, files[kind], runtimes=["litert"]
        )
        assert check.status == "not run"
        assert check.reason.startswith("it takes texts, and the model ids")
    (check,) = checks(text_model(), TEXTS, files["ids"], runtimes=["litert"])
    assert (check.status, check.reason) == ("not run", "it takes ids, and no strings")


@needs_mediapipe
def test_a_file_without_metadata(files: Mapping[str, Path]) -> None:
    ids = np.array([[2, 4, 3]], "int32")
    (check,) = checks(
        small_models.ids_model(), ids, files["ids"], runtimes=["mediapipe"]
    )
    assert check.status == "not run"
    assert check.reason.startswith("the file has no metadata")


@needs_mediapipe
def test_a_damaged_archive_fails_in_its_row(
    files: Mapping[str, Path], tmp_path: Path
) -> None:
    content = files["mediapipe"].read_bytes()
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(content[:-40])
    (check,) = checks(text_model(), TEXTS, broken, runtimes=["mediapipe"])
    assert check.status == "failed"
