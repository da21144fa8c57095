from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

from keras_mha.export import export_saved_model, load_samples
from keras_mha.export.formats import FORMATS
from tests.support import small_models, tflite_files

ROOT = Path(__file__).resolve().parents[2]


class Done(NamedTuple):
    """What a command printed, and its exit status."""

    returncode: int
    stdout: str
    stderr: str


def run(command: str, *arguments: object) -> Done:
    """Runs a script in this process, where TensorFlow is loaded already."""
    out, err = io.StringIO(), io.StringIO()
    argv = [command, *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        runpy.run_path(str(ROOT / "export" / command), run_name="__main__")
    return Done(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def test_a_command_runs_from_its_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "export" / "to_tflite.py"), "--help"],
        cwd=tmp_path,
        # The checkout need not be installed.
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("usage: keras-mha export ")


def test_to_saved_model(tmp_path: Path) -> None:
    small_models.text_model().save(tmp_path / "model.keras")
    (tmp_path / "texts.txt").write_text("\n".join(small_models.TEXTS), "utf-8")
    done = run(
        "to_saved_model.py",
        tmp_path / "model.keras",
        *("--out", tmp_path, "--samples", tmp_path / "texts.txt"),
        *("--version", 7, "--warmup", 2, "--output-names", "p", "--tokens"),
        *("--report", tmp_path / "report.json"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())["saved_model"]
    assert (report["version"], report["warmup_records"]) == (7, 2)
    assert (report["inputs"][0]["name"], report["outputs"][0]["name"]) == ("text", "p")
    assert report["parity"]["samples"] == len(small_models.TEXTS)
    assert report["further_signatures"][0]["name"] == "tokens"
    assert (tmp_path / "saved_model" / "7" / "saved_model.pb").exists()


def test_to_tflite(tmp_path: Path) -> None:
    small_models.ids_model().save(tmp_path / "model.keras")
    np.save(tmp_path / "ids.npy", np.array([[3, 1, 4], [1, 5, 0]]))
    done = run(
        "to_tflite.py",
        tmp_path / "model.keras",
        *("--out", tmp_path),
        *("--samples", tmp_path / "ids.npy", "--sequence-lengths", 5, 7),
        *("--batch-size", 2, "--signature-name", "classify"),
        *("--report", tmp_path / "report.md"),
    )
    assert done.returncode == 0, done.stderr
    assert "| signature_name | classify |" in (tmp_path / "report.md").read_text()
    written = {path.name for path in (tmp_path / "tflite").iterdir()}
    assert {"model_5.tflite", "model_7.tflite"} <= written


def test_to_onnx(tmp_path: Path) -> None:
    small_models.ids_model().save(tmp_path / "model.keras")
    np.save(tmp_path / "ids.npy", np.array([[3, 1, 4], [1, 5, 0]]))
    done = run(
        "to_onnx.py",
        tmp_path / "model.keras",
        *("--out", tmp_path),
        *("--samples", tmp_path / "ids.npy", "--opset", 17, "--output-names", "p"),
        *("--report", tmp_path / "report.json"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())["onnx"]
    assert (report["opset"], report["outputs"][0]["name"]) == (17, "p")
    assert report["inputs"][0]["shape"] == [None, None]
    assert [p.name for p in (tmp_path / "onnx").iterdir()] == ["model.onnx"]


def test_lint_tflite_is_keras_mha_lint(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(
        tflite_files.convert(tf.exp, tflite_files.on((None, 3)))  # free, so not on GPUs
    )
    done = run("lint_tflite.py", path, "--target", "gpu")
    assert done.returncode == 1, done.stderr
    assert done.stdout.endswith("target gpu: 1 errors, 0 warnings\n")
    assert run("lint_tflite.py", "--help").stdout.startswith("usage: keras-mha lint ")


def test_to_tflite_quantizes(tmp_path: Path) -> None:
    small_models.ids_model().save(tmp_path / "model.keras")
    np.save(tmp_path / "ids.npy", np.array([[3, 1, 4], [1, 5, 0]]))
    done = run(
        "to_tflite.py",
        tmp_path / "model.keras",
        *("--out", tmp_path),
        *("--samples", tmp_path / "ids.npy", "--sequence-lengths", 5),
        *("--quantization", "int8_dense", "--representative-data"),
        *(tmp_path / "ids.npy", "--quantized-tolerance", 0.3),
        *("--report", tmp_path / "report.json"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())["tflite"]
    assert (report["quantization"], report["target"]) == ("int8_dense", "cpu")
    assert report["files"][0]["operators"]["QUANTIZE"] > 0
    assert report["files"][0]["parity"]["tolerance"] == 0.3


def test_to_tflite_wants_representative_data_for_ranges_only(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    done = run(
        "to_tflite.py",
        *(tmp_path / "a", "--out", tmp_path, "--samples", tmp_path / "a"),
        *("--representative-data", tmp_path / "a", "--target", "gpu"),
    )
    assert done.returncode == 2
    assert "--representative-data goes with --quantization int8_dense" in done.stderr


def test_verify_is_keras_mha_verify(tmp_path: Path) -> None:
    model = small_models.dense_model()
    model.save(tmp_path / "model.keras")
    rows = small_models.features()
    np.save(tmp_path / "rows.npy", rows)
    export_saved_model(model, tmp_path / "served", samples=rows)
    arguments = (
        *(tmp_path / "model.keras", "--samples", tmp_path / "rows.npy"),
        *("--saved-model", tmp_path / "served", "--runtimes", "saved_model"),
    )
    done = run("verify.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## Verification of sequential")
    assert run("verify.py", "--help").stdout.startswith("usage: keras-mha verify ")


@pytest.mark.parametrize("name", FORMATS)
def test_the_script_of_a_format_is_the_command(name: str) -> None:
    done = run(f"to_{name}.py", "a.keras", "--out", "out", "--samples", "x.npy")
    assert done.returncode == 2
    first, _ = done.stderr.splitlines()
    assert first == "keras-mha export: error: a.keras does not exist"


def test_samples_are_read_by_extension(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\u00fc\u2028b\nc\n\n".encode())
    assert load_samples(tmp_path / "a.txt") == ["\u00fc\u2028b", "c", ""]
    np.savez(tmp_path / "a.npz", x=np.arange(3), text=np.array(["a", "bc"]))
    arrays = load_samples(tmp_path / "a.npz")
    assert arrays["x"].tolist() == [0, 1, 2]
    assert arrays["text"].tolist() == ["a", "bc"]
    np.save(tmp_path / "o.npy", np.array([{}], object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_samples(tmp_path / "o.npy")
    with pytest.raises(ValueError, match=r"must end in .txt, .npy or .npz"):
        load_samples(tmp_path / "a.csv")
