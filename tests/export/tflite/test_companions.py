"""What stands beside TFLite files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from keras_mha.export import TFLiteReport, export_tflite
from keras_mha.export.runtimes.tflite_schema import (
    min_runtime_version,
    pack,
    unpack,
)
from keras_mha.export.tflite.edit import join
from tests.support import small_models, tflite_files

ROWS = [[3, 1, 4], [1, 5]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def report(directory: Path) -> TFLiteReport:
    return export_tflite(
        small_models.ids_model(),
        directory,
        sequence_lengths=(5, 7),
        batch_size=3,
        samples=ROWS,
        signature_name="classify",
    )


@pytest.fixture
def manifest(report: TFLiteReport, directory: Path) -> dict[str, Any]:
    del report
    return json.loads((directory / "manifest.json").read_text("utf-8"))


def test_all_are_in_the_report(report: TFLiteReport, directory: Path) -> None:
    paths = [Path(path).relative_to(directory).as_posix() for path in report.companions]
    # No tokenizer, and no labels. The manifest comes last.
    assert paths == ["snippets/litert.kt", "snippets/litert.swift", "manifest.json"]
    assert all(Path(path).is_file() for path in report.companions)
    there = {p.relative_to(directory).as_posix() for p in directory.rglob("*.*")}
    assert there == {*paths, "model_5.tflite", "model_7.tflite"}


def test_hashes_tell_what_is_of_this_export(
    manifest: dict[str, Any], directory: Path
) -> None:
    hashes = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    hashes |= manifest["companions"]
    assert set(hashes) == {
        *("model_5.tflite", "model_7.tflite"),
        *("snippets/litert.kt", "snippets/litert.swift"),
    }
    for name, expected in hashes.items():
        content = (directory / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == expected


def test_what_a_program_must_know(
    manifest: dict[str, Any], report: TFLiteReport
) -> None:
    assert manifest["signature_name"] == "classify"
    entry = manifest["files"]["model_7.tflite"]
    assert entry["inputs"] == [{"name": "ids", "dtype": "int32", "shape": [3, 7]}]
    assert entry["outputs"][0]["name"] == "probabilities"
    assert (entry["kind"], entry["custom_operations"]) == ("ids", [])
    assert entry["min_runtime_version"] == report.files[1].min_runtime_version


def test_snippets_name_this_export(directory: Path, report: TFLiteReport) -> None:
    del report
    for suffix in (".kt", ".swift"):
        text = (directory / "snippets" / f"litert{suffix}").read_text("utf-8")
        assert "NOT RUN" in text.splitlines()[0]
        assert "model_5" in text
        assert '"probabilities"' in text
        assert "${" not in text
    kotlin = (directory / "snippets" / "litert.kt").read_text("utf-8")
    for fact in ('"classify"', '"ids" to 15', '"probabilities" to FloatBuffer', "(9)"):
        assert fact in kotlin
    assert '["ids": 60]' in (directory / "snippets/litert.swift").read_text("utf-8")


def test_the_oldest_runtime_is_the_files_own(tmp_path: Path) -> None:
    # GELU came with 2.9, and in 2.3 there is none.
    ids = keras.Input((None,), dtype="int32", name="ids")
    hidden = keras.layers.Embedding(11, 3)(ids)
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)

    def exported(activation: str) -> str:
        model = keras.Model(ids, keras.layers.Dense(2, activation=activation)(pooled))
        (file,) = export_tflite(
            model, tmp_path / activation, sequence_lengths=(3,), samples=ROWS
        ).files
        return file.min_runtime_version

    plain, gelu = ([*map(int, exported(name).split("."))] for name in ("relu", "gelu"))
    assert plain < gelu
    assert gelu >= [2, 9]


# Files put together.


def test_one_file_behind_another() -> None:
    weights = tflite_files.values(5, 3)

    def back(x: Any) -> Any:
        return tf.nn.softmax(x @ weights)

    first = tflite_files.convert(
        lambda x: tf.nn.relu(x) * 2.0 + tflite_files.values(5), tflite_files.on((2, 5))
    )
    second = tflite_files.convert(back, tflite_files.on((2, 5)))
    joined = pack(join(unpack(first), unpack(second)))
    runner = Interpreter(model_content=joined).get_signature_runner()
    given = tflite_files.values(2, 5, seed=9)
    wanted = back(np.maximum(given, 0) * 2 + tflite_files.values(5)).numpy()
    assert np.ptp(wanted) > 0.01
    np.testing.assert_allclose(runner(x=given)["y"], wanted, atol=1e-6)
    assert list(runner(x=given)) == ["y"]


def test_what_is_put_behind_another_stays_as_it_is() -> None:
    content = tflite_files.convert(tf.nn.gelu, tflite_files.on((2, 5)))
    back, front = unpack(content), unpack(content)
    before = pack(back)
    join(front, back)
    assert pack(back) == before
    assert pack(front) != before


def test_the_newer_of_two_parts_tells_the_oldest_runtime() -> None:
    plain = tflite_files.convert(tf.nn.relu, tflite_files.on((2, 5)))
    gelu = tflite_files.convert(tf.nn.gelu, tflite_files.on((2, 5)))
    newer = min_runtime_version(unpack(gelu))
    assert newer != min_runtime_version(unpack(plain))
    for parts in ((plain, gelu), (gelu, plain)):
        joined = pack(join(*map(unpack, parts)))
        assert min_runtime_version(unpack(joined)) == newer


def test_taken_apart_and_put_together_a_file_is_the_same() -> None:
    content = tflite_files.convert(
        tflite_files.classify, {"ids": ((1, tflite_files.S), "int32")}
    )
    ids = np.array([[3, 1, 4, 1, 5, 0, 0]], "int32")
    answers = [
        Interpreter(model_content=file).get_signature_runner()(ids=ids)["y"]
        for file in (content, pack(unpack(content)))
    ]
    np.testing.assert_array_equal(*answers)
