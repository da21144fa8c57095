from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from keras_mha.export import export_saved_model, load_samples
from tests.support import small_models, tflite_files

ROOT = Path(__file__).resolve().parents[2]


def run(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "export" / command), *map(str, arguments)],
        cwd=ROOT,
        # The checkout need not be installed.
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_to_saved_model(tmp_path: Path) -> None:
    small_models.text_model().save(tmp_path / "model.keras")
    (tmp_path / "texts.txt").write_text("\n".join(small_models.TEXTS), "utf-8")
    done = run(
        "to_saved_model.py",
        tmp_path / "model.keras",
        tmp_path / "served",
        *("--samples", tmp_path / "texts.txt"),
        *("--version", 7, "--warmup", 2, "--output-names", "p", "--tokens"),
        *("--report", tmp_path / "report.json"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## SavedModelReport\n")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["version"], report["warmup_records"]) == (7, 2)
    assert (report["inputs"][0]["name"], report["outputs"][0]["name"]) == ("text", "p")
    assert report["parity"]["samples"] == len(small_models.TEXTS)
    assert report["further_signatures"][0]["name"] == "tokens"
    assert (tmp_path / "served" / "7" / "saved_model.pb").exists()


def test_to_tflite(tmp_path: Path) -> None:
    small_models.ids_model().save(tmp_path / "model.keras")
    np.save(tmp_path / "ids.npy", np.array([[3, 1, 4], [1, 5, 0]]))
    done = run(
        "to_tflite.py",
        tmp_path / "model.keras",
        tmp_path,
        *("--samples", tmp_path / "ids.npy", "--sequence-lengths", 5, 7),
        *("--batch-size", 2, "--signature-name", "classify"),
        *("--report", tmp_path / "report.md"),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.md").read_text() == done.stdout
    assert "| signature_name | classify |" in done.stdout
    assert {"model_5.tflite", "model_7.tflite"} <= {p.name for p in tmp_path.iterdir()}


def test_to_onnx(tmp_path: Path) -> None:
    small_models.ids_model().save(tmp_path / "model.keras")
    np.save(tmp_path / "ids.npy", np.array([[3, 1, 4], [1, 5, 0]]))
    done = run(
        "to_onnx.py",
        tmp_path / "model.keras",
        tmp_path / "onnx" / "classifier.onnx",
        *("--samples", tmp_path / "ids.npy", "--opset", 17, "--output-names", "p"),
        *("--report", tmp_path / "report.json"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## ONNXReport\n")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["opset"], report["outputs"][0]["name"]) == (17, "p")
    assert report["inputs"][0]["shape"] == [None, None]
    assert [p.name for p in (tmp_path / "onnx").iterdir()] == ["classifier.onnx"]


def test_to_onnx_refuses_another_kind_of_file_before_the_work() -> None:
    done = run("to_onnx.py", "a.keras", "model.pb", "--samples", "x.npy")
    assert done.returncode == 2
    assert "the path to write must end in .onnx" in done.stderr


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
        tmp_path,
        *("--samples", tmp_path / "ids.npy", "--sequence-lengths", 5),
        *("--quantization", "int8_dense", "--representative-data"),
        *(tmp_path / "ids.npy", "--quantized-tolerance", 0.3),
        *("--report", tmp_path / "report.json"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["quantization"], report["target"]) == ("int8_dense", "cpu")
    assert report["files"][0]["operators"]["QUANTIZE"] > 0
    assert report["files"][0]["parity"]["tolerance"] == 0.3


def test_to_tflite_wants_representative_data_for_ranges(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    done = run(
        "to_tflite.py",
        *(tmp_path / "a", tmp_path, "--samples", tmp_path / "a"),
        *("--quantization", "int8_dense", "--target", "gpu"),
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


COMMANDS = {
    "to_onnx.py": "out.onnx",
    "to_saved_model.py": "out",
    "to_tflite.py": "out",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_report_of_another_kind_is_refused_before_the_work(command: str) -> None:
    out = COMMANDS[command]
    done = run(command, "a.keras", out, "--samples", "x.npy", "--report", "r.txt")
    assert done.returncode == 2
    assert "--report must end in .json or .md" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_file_is_named_in_one_line(command: str) -> None:
    done = run(command, "a.keras", COMMANDS[command], "--samples", "x.npy")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("error: a.keras does not exist")


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
