"""`keras-mha lint` and `keras-mha verify`."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import keras_mha.export
from keras_mha.export import (
    VerificationReport,
    export_onnx,
    export_saved_model,
    export_tflite,
    without_tokenizer,
)
from keras_mha.export.formats import FORMATS
from keras_mha_cli import main
from keras_mha_cli import verify as verify_command
from tests.support import small_models, tflite_files

EXIT_CODES = (0, 1, 2, 3, 130)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of texts, as `keras-mha export --tokens` would leave it, and samples."""
    directory = tmp_path_factory.mktemp("exported")
    model, texts = small_models.text_model(), small_models.TEXTS
    model.save(directory / "model.keras")
    (directory / "texts.txt").write_text("\n".join(texts), "utf-8")
    np.save(directory / "labels.npy", np.asarray(model(tf.constant(texts))).argmax(-1))
    export_saved_model(model, directory / "served", samples=texts)
    rest, ids = without_tokenizer(model, texts)
    export_tflite(rest, directory, sequence_lengths=(6,), samples=ids)
    export_onnx(rest, directory / "model.onnx", samples=ids)
    return directory


@pytest.fixture(scope="module")
def free_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TFLite file with a free size: a warning on the CPU, an error on GPUs."""
    path = tmp_path_factory.mktemp("lint") / "free.tflite"
    path.write_bytes(tflite_files.convert(tf.exp, tflite_files.on((None, 3))))
    return path


def lint(*arguments: object) -> int:
    return main(["lint", *map(str, arguments)])


def verify(exported: Path, *arguments: object) -> int:
    return main(
        [
            *("verify", str(exported / "model.keras")),
            *("--samples", str(exported / "texts.txt"), *map(str, arguments)),
        ]
    )


# lint.


def test_lint_prints_findings_and_their_number(
    free_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lint(free_file) == 0
    first, place, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{free_file}: warning: dynamic-shape: A size is only")
    assert place.startswith("  EXP (operator 0 of graph 0; ")
    assert last == f"{free_file}, target cpu: 0 errors, 1 warnings"
    assert lint(free_file, "--target", "gpu") == 1
    told = capsys.readouterr()
    assert told.out.startswith(f"{free_file}: error: dynamic-shape: A size")
    assert told.out.endswith("target gpu: 1 errors, 0 warnings\n")
    assert "dynamic-shape" not in told.err


def test_lint_says_a_rule_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.tflite"
    content = tflite_files.convert(
        lambda x: tf.nn.log_softmax(x[:, 0]) + tf.nn.log_softmax(x)[:, 0],
        tflite_files.on((1, 3, 5)),
    )
    path.write_bytes(content)
    assert lint(path, "--target", "gpu") == 1
    lines = capsys.readouterr().out.splitlines()
    kinds = [line.split("(")[0] for line in lines if line.startswith("  ")]
    assert sorted(kinds) == ["  LOG_SOFTMAX "] * 2 + ["  STRIDED_SLICE "] * 2
    rules = [line.split(": ")[2] for line in lines if ": error: " in line]
    assert sorted(rules) == ["gpu-operator", "strided-slice-axes"]
    assert lines[-1].endswith("target gpu: 4 errors, 0 warnings")


def test_lint_reads_all_files_though_one_is_none(
    free_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_models.dense_model().save(tmp_path / "model.keras")
    (tmp_path / "cut.tflite").write_bytes(free_file.read_bytes()[:200])
    wrong = (tmp_path / "model.keras", tmp_path / "cut.tflite")
    assert lint(*wrong, free_file, "--target", "gpu") == 2
    told = capsys.readouterr()
    for path in wrong:
        assert f"error: {path} cannot be read as a TFLite file: " in told.err
    assert "zip archive" in told.err
    assert "Traceback" not in told.err
    assert told.out.endswith(f"{free_file}, target gpu: 1 errors, 0 warnings\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.tflite"], "error: absent.tflite does not exist"),
        (["."], "error: . is not a file"),
        ([], "the following arguments are required: FILE"),
        (["x.tflite", "--target", "npu"], "invalid choice: 'npu'"),
        (["x.tflite", "--timeout", "0"], "must be above 0, not 0"),
    ],
)
def test_lint_refuses_wrong_usage_before_the_work(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        lint(*arguments)
    told = capsys.readouterr().err
    assert message in told
    assert "start Keras" not in told


def test_lint_without_its_package_ends_with_3(
    free_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    assert lint(free_file) == 3
    assert "pip install 'keras-mha[tflite]'" in capsys.readouterr().err


# verify.


def test_verify_compares_and_writes_reports(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = [tmp_path / name for name in ("r.md", "r.json", "r.png")]
    code = verify(
        exported,
        *("--saved-model", exported / "served", "--runtimes", "saved_model"),
        *("--labels", exported / "labels.npy", "--timed-calls", 0),
        *("--report", *reports),
    )
    told = capsys.readouterr()
    assert code == 0, told.err
    assert told.out.startswith("## Verification of ")
    assert reports[0].read_text() == told.out
    found = json.loads(reports[1].read_text())
    assert found["passed"] is True
    of_keras, served = found["checks"]
    assert (of_keras["status"], served["status"]) == ("reference", "ok")
    assert served["accuracy"] == served["label_agreement"] == 1
    assert served["latency"] is None
    assert served["max_absolute_difference"] <= 1e-6
    assert reports[2].read_bytes().startswith(b"\x89PNG")


def test_verify_cuts_a_model_of_texts_for_files_of_ids(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "r.json"
    code = verify(
        exported,
        "--tokens",
        *("--saved-model", exported / "served"),
        *("--tflite", exported / "model_6.tflite"),
        *("--onnx", exported / "model.onnx", "--timed-calls", 0),
        *("--runtimes", "saved_model", "litert", "onnx_runtime"),
        *("--report", report),
    )
    assert code == 0, capsys.readouterr().err
    checks = json.loads(report.read_text())["checks"]
    ran = [Path(c["file"]).name for c in checks if c["status"] == "ok"]
    assert ran == ["served", "model_6.tflite", "model.onnx"]
    assert all(c["samples"] == len(small_models.TEXTS) for c in checks)
    # Without it they are not run, and that is not right.
    files = ("--onnx", exported / "model.onnx", "--runtimes", "onnx_runtime")
    assert verify(exported, *files) == 1
    assert "not run: it takes ids, and no strings" in capsys.readouterr().out


def test_verify_ends_with_1_where_a_value_is_wrong(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_models.text_model()
    model.layers[2].layers[-1].bias.assign_add([0.1, 0.0, 0.0])
    model.save(tmp_path / "model.keras")
    (tmp_path / "texts.txt").write_text("good movie", "utf-8")
    files = ("--saved-model", exported / "served", "--runtimes", "saved_model")
    assert verify(tmp_path, *files) == 1
    assert "| wrong: the tolerance is 1e-05 |" in capsys.readouterr().out
    assert verify(tmp_path, *files, "--tolerance", 0.2) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --saved-model, --tflite and --onnx is required"),
        (["--onnx", "absent.onnx"], "absent.onnx does not exist"),
        (["--saved-model", "absent"], "absent is not a directory"),
        (["--onnx", "model.onnx", "--runtimes", "tvm"], "invalid choice: 'tvm'"),
        (["--onnx", "model.onnx", "--report", "r.txt"], ".json, .md or .png"),
        (["--onnx", "model.onnx", "--report", "no/r.md"], "no does not exist"),
        (["--onnx", "model.onnx", "--tolerance", "inf"], "must be finite"),
        (["--onnx", "model.onnx", "--emulated-samples", "0"], "at least 1, not 0"),
    ],
)
def test_verify_refuses_wrong_usage_before_the_work(
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(exported)
    with pytest.raises(SystemExit, match="2"):
        verify(Path(), *arguments)
    told = capsys.readouterr().err
    assert message in told
    assert "start Keras" not in told


def test_verify_ends_with_2_for_what_cannot_be_read(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("--onnx", exported / "model.onnx", "--tokens")
    (tmp_path / "texts.txt").write_text("a", "utf-8")
    np.savez(tmp_path / "other.npz", x=1)
    (tmp_path / "other.npz").rename(tmp_path / "model.keras")
    assert verify(tmp_path, *files) == 2  # a zip archive with something else in it
    assert "model.keras" in capsys.readouterr().err.splitlines()[-1]
    # Labels for another number of samples.
    np.save(tmp_path / "labels.npy", np.array([1, 0, 1]))
    assert verify(exported, *files, "--labels", tmp_path / "labels.npy") == 2
    told = capsys.readouterr().err
    assert "`labels` must be 5 whole numbers" in told
    assert "(On the command line: --labels)" in told
    assert "Traceback" not in told


def test_verify_ends_with_3_where_the_model_needs_a_package(
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_text", None)
    assert verify(exported, "--saved-model", exported / "served") == 3
    assert "pip install 'keras-mha[text]'" in capsys.readouterr().err


def test_verify_asks_for_what_a_picture_needs_before_the_work(
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    files = ("--saved-model", exported / "served")
    assert verify(exported, *files, "--report", tmp_path / "r.png") == 3
    told = capsys.readouterr().err
    assert "matplotlib not installed: pip install 'keras-mha[plot]'" in told
    assert "start Keras" not in told


def test_verify_has_every_argument_of_the_function() -> None:
    parameters = inspect.signature(keras_mha.export.verify).parameters
    named = set(parameters) - {"model", "samples", "files"}
    assert named | set(FORMATS) == set(verify_command.OPTIONS)


def test_a_merged_report_fails_where_a_part_does(
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = keras_mha.export.verify

    def wrong_on_ids(model: Any, **kwargs: Any) -> VerificationReport:
        if "onnx" in kwargs:
            # Weights as if the file had been rounded.
            model.weights[-1].assign_add([0.1, 0.0, 0.0])
        return original(model, **kwargs)

    monkeypatch.setattr(keras_mha.export, "verify", wrong_on_ids)
    files = ("--saved-model", exported / "served", "--onnx", exported / "model.onnx")
    runtimes = ("--runtimes", "saved_model", "onnx_runtime", "--timed-calls", 0)
    assert verify(exported, "--tokens", *files, *runtimes) == 1
    told = capsys.readouterr().out
    assert "not passed" in told
    assert "| ok |" in told


# Both.


@pytest.mark.parametrize("command", ["lint", "verify"])
def test_help_names_every_exit_code(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    told = capsys.readouterr().out
    for code in EXIT_CODES:
        assert f"\n  {code}  " in told


@pytest.mark.parametrize(
    ("command", "function"), [("lint", "lint_tflite"), ("verify", "verify")]
)
def test_interrupted_they_end_with_130(
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    function: str,
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(keras_mha.export, function, interrupted)
    code = (
        lint(exported / "model_6.tflite")
        if command == "lint"
        else verify(exported, "--saved-model", exported / "served")
    )
    assert code == 130
    assert "keras-mha: interrupted" in capsys.readouterr().err
