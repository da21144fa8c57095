from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha.export import (
    RuntimeCheck,
    VerificationReport,
    export_onnx,
    export_saved_model,
    export_tflite,
    verify,
)
from keras_mha.export.runtimes import descriptor, litert_arm
from keras_mha.export.runtimes.table import RUNTIMES
from tests.support import small_models

IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [5, 3, 0, 0, 0]], "int32")
LENGTH = 7
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return small_models.ids_model()


@pytest.fixture(scope="module")
def tflite(model: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tflite")
    export_tflite(model, directory, sequence_lengths=(LENGTH,), samples=IDS)
    return directory / f"model_{LENGTH}.tflite"


def statuses(report: VerificationReport) -> list[str]:
    return [check.status for check in report.checks]


def perturbed(model: keras.Model, file: Path, path: Path) -> Path:
    """The file with another bias in its head."""
    bias = model.layers[-1].bias.numpy()
    content = file.read_bytes()
    assert content.count(bias.tobytes()) == 1
    other = bias + np.array([0.01, 0, 0], "float32")
    path.write_bytes(content.replace(bias.tobytes(), other.tobytes()))
    return path


def test_the_same_values_everywhere(
    model: keras.Model, tflite: Path, tmp_path: Path
) -> None:
    export_saved_model(model, tmp_path / "served", samples=IDS)
    export_onnx(model, tmp_path / "model.onnx", samples=IDS)
    best = np.argmax(model(IDS).numpy(), axis=1)
    labels = np.where(np.arange(3) == 1, (best + 1) % 3, best)  # one is missed
    report = verify(
        model,
        samples=IDS,
        saved_model=tmp_path / "served",
        tflite=tflite,
        onnx=tmp_path / "model.onnx",
        labels=labels,
        runtimes=["saved_model", "openvino", "litert", "onnx_runtime"],
        timed_calls=3,
    )
    own, *checks = report.checks
    assert (own.status, own.latency) == ("reference", 1.0)
    assert own.accuracy == pytest.approx(2 / 3)
    assert [(Path(check.file).name, check.runtime) for check in checks] == [
        ("served", "TensorFlow C++ loader, XLA disabled"),
        ("served", "OpenVINO, CPU"),
        ("model_7.tflite", "LiteRT interpreter, CPU"),
        ("model.onnx", "OpenVINO, CPU"),
        ("model.onnx", "ONNX Runtime, CPU"),
    ]
    for check in checks:
        if check.runtime.startswith("OpenVINO") and not HAS_OPENVINO:
            assert check.status == "not run"
            continue
        assert (check.status, check.reason) == ("ok", "")
        assert check.max_absolute_difference is not None
        assert check.max_absolute_difference < 1e-5
        assert (check.samples, check.label_agreement) == (3, 1.0)
        assert check.accuracy == pytest.approx(2 / 3)
        assert check.latency is not None
        assert check.latency > 0
    assert checks[2].delegate_partitions == 1
    assert checks[2].size_bytes == tflite.stat().st_size
    assert report.passed


def test_a_perturbed_file_is_wrong_in_its_row(
    model: keras.Model, tflite: Path, tmp_path: Path
) -> None:
    report = verify(
        model,
        samples=IDS,
        tflite=[tflite, perturbed(model, tflite, tmp_path / "other.tflite")],
        runtimes=["litert"],
        timed_calls=0,
    )
    assert statuses(report) == ["reference", "ok", "wrong"]
    assert not report.passed
    wrong = report.checks[2]
    assert wrong.reason == "the tolerance is 1e-05"
    assert wrong.max_absolute_difference is not None
    assert 1e-4 < wrong.max_absolute_difference < 0.01
    assert wrong.latency is None


def test_rows_that_do_not_fit_are_left_out(model: keras.Model, tflite: Path) -> None:
    ids = np.zeros((3, 9), "int32")
    ids[0, :7] = ids[1, :8] = ids[2, :2] = 5
    labels = np.argmax(model(ids).numpy(), axis=1)
    labels[1] += 1
    report = verify(
        model,
        samples=ids,
        labels=labels % 3,
        tflite=tflite,
        runtimes=["litert"],
        timed_calls=0,
    )
    own, check = report.checks
    assert (check.status, check.samples, check.accuracy) == ("ok", 2, 1.0)
    assert own.accuracy == pytest.approx(2 / 3)
    report = verify(model, samples=ids[1:2], tflite=tflite, runtimes=["litert"])
    assert report.checks[1].status == "failed"
    assert report.checks[1].reason == "no sample has at most 7 ids"


def test_smaller_weights_have_a_tolerance_of_their_own(
    model: keras.Model, tmp_path: Path
) -> None:
    export_tflite(
        model,
        tmp_path,
        sequence_lengths=(LENGTH,),
        samples=IDS,
        quantization="float16",
    )
    (_, check) = verify(
        model,
        samples=IDS,
        tflite=tmp_path / f"model_{LENGTH}.tflite",
        runtimes=["litert"],
        timed_calls=0,
        tolerance=0.0,
        quantized_tolerance=0.03,
    ).checks
    assert (check.status, check.tolerance) == ("ok", 0.03)
    assert check.max_absolute_difference > 0


def test_an_absent_runtime_is_never_ok(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.onnx", "a.tflite"):
        (tmp_path / name).touch()
    monkeypatch.setattr(descriptor.importlib.util, "find_spec", lambda _: None)
    report = verify(
        small_models.ids_model(),
        samples=IDS,
        onnx=tmp_path / "a.onnx",
        tflite=tmp_path / "a.tflite",
    )
    assert statuses(report) == ["reference", *["not run"] * 6]
    assert [check.reason for check in report.checks[1:]] == [
        *["pip install 'keras-mha[tflite]'"] * 3,
        "pip install 'keras-mha[mediapipe]'",
        "pip install 'keras-mha[openvino]'",
        "pip install 'keras-mha[onnx]'",
    ]
    assert not report.passed
    assert "| not run: pip install 'keras-mha[onnx]' |" in report.to_markdown()


def test_what_to_install_for_emulation(
    tflite: Path, model: keras.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> Path:
        raise FileNotFoundError("apt-get install chromium")

    there = replace(RUNTIMES["litert_gpu"], find=absent)
    monkeypatch.setitem(RUNTIMES, "litert_gpu", there)
    monkeypatch.setattr(litert_arm.shutil, "which", lambda _: None)
    report = verify(
        model, samples=IDS, tflite=tflite, runtimes=["litert_gpu", "litert_arm"]
    )
    _, gpu, cpu = report.checks
    assert (gpu.status, gpu.reason) == ("not run", "apt-get install chromium")
    assert cpu.status == "not run"
    assert cpu.reason.endswith("apt-get install qemu-user-static")


def test_broken_files_fail_in_their_rows(
    model: keras.Model, tflite: Path, tmp_path: Path
) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"\xff" * 99)
    (tmp_path / "cut.tflite").write_bytes(tflite.read_bytes()[:999])
    (tmp_path / "foreign.tflite").write_bytes(b"PK\x03\x04 and so on")
    (tmp_path / "a.onnx").write_bytes(b"\x08\x07 no model")
    report = verify(
        model,
        samples=IDS,
        saved_model=tmp_path,
        tflite=[tmp_path / "cut.tflite", tmp_path / "foreign.tflite"],
        onnx=tmp_path / "a.onnx",
        runtimes=["saved_model", "litert", "onnx_runtime"],
        timed_calls=1,
    )
    assert statuses(report) == ["reference", *["failed"] * 4]
    assert not report.passed
    served, cut, foreign, onnx = (check.reason for check in report.checks[1:])
    assert "cannot be read as a SavedModel" in served
    assert "cannot be read as a TFLite file" in cut
    assert "zip archive" in foreign
    assert "onnx_runtime on a.onnx failed with exit status 1" in onnx


def test_hostile_texts_are_answered_as_by_the_model(tmp_path: Path) -> None:
    model = small_models.text_model()
    export_saved_model(model, tmp_path, samples=small_models.TEXTS)
    report = verify(
        model, samples=small_models.HOSTILE, saved_model=tmp_path, timed_calls=0
    )
    _, loader, openvino = report.checks
    assert (loader.status, loader.samples) == ("ok", len(small_models.HOSTILE))
    assert loader.max_absolute_difference < 1e-6
    assert loader.label_agreement == 1.0
    assert (openvino.status, openvino.reason) == (
        "not run",
        "it takes ids, and no strings",
    )
    # The texts do differ to the model.
    answers = model(tf.constant(small_models.HOSTILE)).numpy()
    assert len(np.unique(answers.round(4), axis=0)) >= 4


@pytest.mark.gpu_software
def test_the_gpu_delegate_is_whole_and_right(
    model: keras.Model, tflite: Path, tmp_path: Path, driver: str
) -> None:
    del driver  # skips where there is none
    other = perturbed(model, tflite, tmp_path / "other.tflite")
    report = verify(model, samples=IDS, tflite=[tflite, other], runtimes=["litert_gpu"])
    assert statuses(report) == ["reference", "ok", "wrong"]
    assert report.checks[1].fully_accelerated
    assert report.checks[1].latency is None


@pytest.mark.arm
def test_emulated_arm(model: keras.Model, tflite: Path) -> None:
    report = verify(
        model,
        samples=IDS,
        tflite=tflite,
        runtimes=["litert_arm"],
        emulated_samples=2,
    )
    (_, check) = report.checks
    assert check.status in ("ok", "not run")
    if check.status == "not run":
        pytest.skip(check.reason)
    assert (check.samples, check.label_agreement) == (2, 1.0)
    assert (check.latency, check.delegate_partitions) == (None, 1)


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (ValueError, "One of `saved_model`, `tflite` and `onnx`", {}),
        (TypeError, "of the formats .*'tflite'.* Received: .'pb'", {"pb": "a.pb"}),
        (FileNotFoundError, "`onnx`: nowhere.onnx does not", {"onnx": "nowhere.onnx"}),
        (ValueError, "`runtimes` must be .*'tvm'", {"runtimes": ["tvm"]}),
        (ValueError, "`timed_calls` must be .*-1", {"timed_calls": -1}),
        (ValueError, "`emulated_samples` .*least 1", {"emulated_samples": 0}),
        (ValueError, "`tolerance` must", {"tolerance": -1.0}),
        (ValueError, "`labels` must be 3 .*shape \\(2,\\)", {"labels": [0, 1]}),
        (ValueError, "`labels` must be .*float64", {"labels": [0.0, 1.0, 1.0]}),
    ],
)
def test_arguments_out_of_their_domain_are_refused(
    tmp_path: Path,
    model: keras.Model,
    error: type[Exception],
    text: str,
    arguments: dict[str, Any],
) -> None:
    if "labels" in arguments:
        (tmp_path / "a.onnx").touch()
        arguments = arguments | {"onnx": tmp_path / "a.onnx"}
    with pytest.raises(error, match=text):
        verify(model, samples=IDS, **arguments)


REPORT = VerificationReport(
    "tiny",
    31,
    "3.15.1",
    "2.21.0",
    ("keras_mha",),
    checks=(
        RuntimeCheck("", "Keras", "reference", samples=3, latency=1.0),
        RuntimeCheck("o/a.tflite", "LiteRT", "ok", "", "2.3", 3, 1e-5, 0.0, 0.0, 1.0),
        RuntimeCheck("o/a.onnx", "ORT", "wrong", "x|y", "1.3", 3, 1e-5, 0.5, latency=2),
        RuntimeCheck("o/a.onnx", "OpenVINO", "failed", "first\nmiddle\nlast"),
    ),
)


def test_report_as_markdown() -> None:
    lines = REPORT.to_markdown().splitlines()
    assert lines[0] == "## Verification of tiny: not passed"
    heads = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert heads[:4] == ["file", "runtime", "status", "rows"]
    assert "accuracy" not in heads  # nobody has one
    assert "| (the model) | Keras | reference | 3 |" in lines[4]
    assert "| a.tflite | LiteRT 2.3 | ok | 3 | 0 | 0 | 1e-05 | 100.00% |" in lines[5]
    assert "wrong: x\\|y" in lines[6]
    assert "failed: first [...] last" in lines[7]


def test_files_of_one_name_are_told_apart() -> None:
    files = ("float/a.tflite", "int8/a.tflite", "int8/b.tflite")
    rows = tuple(RuntimeCheck(file, "LiteRT", "ok") for file in files)
    text = VerificationReport("m", 1, "3", "2", ("x",), rows).to_markdown()
    assert "| float/a.tflite |" in text
    assert "| int8/a.tflite |" in text
    assert "| b.tflite |" in text


@pytest.mark.parametrize("suffix", ["json", "md", "png"])
def test_reports_are_written_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"report.{suffix}"
    REPORT.write(path)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    content = path.read_bytes()
    if suffix == "json":
        found = json.loads(content)
        assert (found["passed"], len(found["checks"])) == (False, 4)
        assert found["checks"][3]["reason"] == "first\nmiddle\nlast"
    elif suffix == "png":
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


def test_other_reports_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="in .json, .md or .png. Received: .*r.txt"):
        REPORT.write(tmp_path / "r.txt")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"keras-mha\[plot\]"):
        REPORT.write(tmp_path / "r.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("found", "passed"),
    [
        ("ok", True),
        ("ok ok", True),
        ("ok not_run", True),
        ("not_run", False),
        ("", False),
        ("ok wrong", False),
        ("ok failed", False),
    ],
)
def test_passed_needs_something_ok_and_nothing_else(found: str, passed: bool) -> None:
    rows = [RuntimeCheck("a", "b", one.replace("_", " ")) for one in found.split()]
    report = VerificationReport("m", 1, "3", "2", (), tuple(rows))
    assert report.passed is passed


def test_inputs_of_all_kinds(tmp_path: Path) -> None:
    x: Any = keras.Input((3,), name="x")
    ids = keras.Input((None,), dtype="int32", name="ids")
    step = keras.Input(batch_shape=(), name="step")
    pooled = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(9, 3)(ids))
    model = keras.Model({"x": x, "ids": ids, "step": step}, {"y": x * step + pooled})
    generator = np.random.default_rng(3)
    samples = {
        "x": generator.normal(size=(7, 3)).astype("float32"),
        "ids": generator.integers(1, 9, (7, 5)),
        "step": 4,
    }
    export_saved_model(model, tmp_path / "served", samples=samples)
    export_onnx(model, tmp_path / "model.onnx", samples=samples)
    export_tflite(model, tmp_path / "lite", samples=samples)
    (tflite,) = (tmp_path / "lite").glob("*.tflite")
    report = verify(
        model,
        samples=samples,
        saved_model=tmp_path / "served",
        onnx=tmp_path / "model.onnx",
        tflite=tflite,
        runtimes=["saved_model", "onnx_runtime", "litert"],
        timed_calls=1,
    )
    assert statuses(report) == ["reference", "ok", "ok", "ok"]
    assert [check.samples for check in report.checks] == [7, 7, 7, 7]


def test_a_model_for_batches_of_one_size(tmp_path: Path) -> None:
    x: Any = keras.Input((3,), batch_size=2, name="x")
    rows = keras.ops.flip(keras.ops.reshape(x, (6,)))
    model = keras.Model(x, {"y": keras.ops.reshape(rows, (2, 3))})
    samples = np.arange(15, dtype="float32").reshape(5, 3)
    export_onnx(model, tmp_path / "model.onnx", samples=samples)
    report = verify(
        model,
        samples=samples,
        onnx=tmp_path / "model.onnx",
        runtimes=["onnx_runtime"],
        timed_calls=1,
    )
    assert statuses(report) == ["reference", "ok"]
    assert report.checks[1].samples == 4  # the fifth fills no batch
