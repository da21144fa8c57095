from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from dataclasses import fields as dataclass_fields
from pathlib import Path

import pytest

from keras_mha.export import (
    ExportReport,
    MediaPipeCheck,
    ONNXReport,
    Parity,
    SavedModelReport,
    SignatureReport,
    TensorInfo,
    TFLiteFile,
    TFLiteReport,
)

PARITY = Parity(1.234e-7, 2.5e-6, 1e-5, 5, (1, 5), "some runtime", "2.3")
IDS = TensorInfo("ids", "int32", (1, 7))
SAVED = SavedModelReport(
    model="tiny",
    parameters=31,
    keras="3.15.1",
    tensorflow="2.21.0",
    blocked=("keras_mha",),
    path="out/2",
    version=2,
    size_bytes=999,
    inputs=(TensorInfo("x|y", "float32", (None, 3)),),
    outputs=(TensorInfo("free", "string", None),),
    warmup_records=5,
    compiled_marks_removed=0,
    custom_operations=(),
    batch_difference=1e-8,
    parity=PARITY,
    gpu_note="Not run on a GPU.",
    further_signatures=(SignatureReport("tokens", (IDS,), (IDS,), PARITY),),
)
LITE = TFLiteReport(
    model="tiny",
    parameters=31,
    keras="3.15.1",
    tensorflow="2.21.0",
    blocked=("keras_mha", "keras"),
    signature_name="classify",
    quantization=None,
    target="cpu",
    notes=("layer 'a' (Rare) has no device form",),
    files=tuple(
        TFLiteFile(
            path=f"out/model_{length}.tflite",
            kind="ids",
            sequence_length=length,
            batch_size=1,
            size_bytes=10 * length,
            inputs=(IDS,),
            outputs=(IDS,),
            operators={"ADD": 3, "MUL": 1},
            custom_operations=(),
            min_runtime_version="2.4.0",
            delegate_partitions=None,
            parity=PARITY,
            mediapipe=MediaPipeCheck("ok", "", 5, 3, ("'caf\\xe9'",), PARITY)
            if length == 11
            else None,
        )
        for length in (7, 11)
    ),
    companions=("out/manifest.json",),
)

ONNX = ONNXReport(
    model="tiny",
    parameters=31,
    keras="3.15.1",
    tensorflow="2.21.0",
    blocked=("keras_mha",),
    path="out/model.onnx",
    opset=18,
    size_bytes=999,
    inputs=(IDS,),
    outputs=(IDS,),
    operators={"MatMul": 3, "Add": 1},
    free_sizes={"batch": (1, 5), "ids_1": (4, 7)},
    parity=PARITY,
)


def test_an_onnx_report_says_which_sizes_were_run() -> None:
    assert ONNX.to_dict()["free_sizes"] == {"batch": [1, 5], "ids_1": [4, 7]}
    assert "| operators | MatMul 3, Add 1 |" in ONNX.to_markdown()
    assert "| free_sizes | batch: 1, 5; ids_1: 4, 7 |" in ONNX.to_markdown()


def test_reports_are_export_reports_and_frozen() -> None:
    assert isinstance(SAVED, ExportReport)
    assert isinstance(LITE, ExportReport)
    with pytest.raises(FrozenInstanceError):
        SAVED.version = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_dictionary_and_json_hold_every_field() -> None:
    fields = SAVED.to_dict()
    assert fields["inputs"] == [{"name": "x|y", "dtype": "float32", "shape": [None, 3]}]
    assert fields["parity"]["max_absolute_difference"] == 1.234e-7
    assert fields["parity"]["batch_sizes"] == [1, 5]
    assert json.loads(SAVED.to_json()) == fields
    assert set(fields) == {one.name for one in dataclass_fields(SavedModelReport)}
    assert LITE.to_dict()["files"][1]["operators"] == {"ADD": 3, "MUL": 1}


def test_markdown() -> None:
    lines = SAVED.to_markdown().splitlines()
    assert lines[0] == "## SavedModelReport"
    for line in (
        "| inputs | x\\|y float32 [None, 3] |",
        "| outputs | free string None |",
        "| custom_operations | none |",
        "| max_absolute_difference | 1.23e-07 |",
        "| batch_sizes | 1, 5 |",
    ):
        assert line in lines
    lines = LITE.to_markdown().splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "## TFLiteReport",
        "### model_7.tflite",
        "### model_11.tflite",
        "#### in MediaPipe",
    ]
    assert "| notes | layer 'a' (Rare) has no device form |" in lines
    assert lines.count("| operators | ADD 3, MUL 1 |") == 2


def test_write(tmp_path: Path) -> None:
    SAVED.write(tmp_path / "report.json")
    SAVED.write(tmp_path / "report.md")
    assert (tmp_path / "report.json").read_text() == SAVED.to_json() + "\n"
    assert (tmp_path / "report.md").read_text() == SAVED.to_markdown() + "\n"
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match=r"must end in .json or .md. .*report.txt"):
        SAVED.write(tmp_path / "report.txt")
