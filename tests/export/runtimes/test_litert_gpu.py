"""LiteRT's GPU delegate on a software driver: where it is right, and where wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from keras_mha.export import VerificationError
from keras_mha.export.runtimes import litert_gpu
from keras_mha.export.runtimes.descriptor import File
from keras_mha.export.runtimes.fresh_process import run_in_fresh_process
from keras_mha.export.tflite.lint import lint_tflite
from tests.export.tflite.test_lint import SPLITS
from tests.support import tflite_files
from tests.support.gpu_runs import Answers, run_on_both
from tests.support.tflite_files import D, S, convert, on, values

# Without a driver.


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litert_gpu, "_MANIFESTS", (Path("/nowhere/a.json"),))
    monkeypatch.setattr(litert_gpu.ctypes.util, "find_library", lambda _: None)
    monkeypatch.setenv("VK_ICD_FILENAMES", "/nowhere/vk_swiftshader_icd.json")
    with pytest.raises(FileNotFoundError, match="SwiftShader.*Vulkan's loader") as got:
        litert_gpu.find_software_driver()
    assert "apt-get install chromium libvulkan1" in str(got.value)


def test_a_named_driver_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, named = tmp_path / "other.json", tmp_path / "vk_swiftshader_icd.json"
    for path in (other, named):
        path.write_text("{}")
    monkeypatch.setattr(litert_gpu.ctypes.util, "find_library", lambda _: "vulkan")
    monkeypatch.setenv("VK_ICD_FILENAMES", f"{other}:{named}")
    assert litert_gpu.find_software_driver() == named


# Good files.


@pytest.mark.gpu_software
@pytest.mark.parametrize("optimizations", [[], [tf.lite.Optimize.DEFAULT]])
def test_a_good_file_is_taken_whole_and_answered_rightly(
    tmp_path: Path, driver: str, optimizations: list[Any]
) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(
        convert(
            tflite_files.classify,
            {"ids": ((1, S), tf.int32)},
            optimizations=optimizations,
        )
    )
    assert lint_tflite(path, target="gpu") == ()
    several = []
    for row in ([3, 1, 4, 1, 5, 9, 2], [5, 10, 0, 0, 0, 0, 0]):
        ids = np.array([row], "int32")
        cpu, gpu, facts = run_on_both(path, ids=ids)
        wanted = tflite_files.classify(tf.constant(ids)).numpy()
        np.testing.assert_allclose(gpu, wanted, atol=1e-5)
        np.testing.assert_allclose(gpu, cpu, atol=1e-5)
        several.append(gpu)
    assert np.max(np.abs(several[0] - several[1])) > 0.1  # it does read its input
    assert facts["fully_accelerated"] is True
    assert facts["driver"] == driver
    assert facts["version"].startswith("2.")


@pytest.mark.gpu_software
def test_a_graph_that_is_not_taken_whole_is_known(
    answers: Callable[..., Answers],
) -> None:
    got = answers(lambda x: tf.nn.log_softmax(tf.exp(x)), x=values(1, S, D))
    assert got.facts["fully_accelerated"] is False
    assert got.difference < 1e-5


@pytest.mark.gpu_software
def test_another_driver_is_not_taken_for_it(tmp_path: Path, driver: str) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(convert(tf.exp, on((1, S, D))))
    assert driver
    other = {"driver": str(tmp_path / "none.json")}
    runtime = replace(
        litert_gpu.RUNTIME,
        options=lambda file: {"signature_name": file.signature_name, **other},
    )
    case = {"x": values(1, S, D)}
    with pytest.raises(VerificationError, match="(?i)driver|accelerat|gpu"):
        run_in_fresh_process(runtime, File(path, "tflite"), [case], timeout=120.0)


@pytest.mark.gpu_software
@pytest.mark.parametrize(
    ("case", "text"),
    [
        ({"y": values(1, S, D)}, r"takes \['x'\]. Received: \['y'\]"),
        ({"x": values(1, S, D + 1)}, "Input 'x' must be"),
        ({"x": values(1, S, D).astype("int32")}, "Input 'x' must be"),
    ],
)
@pytest.mark.usefixtures("driver")
def test_wrong_inputs_are_refused(
    tmp_path: Path, case: dict[str, np.ndarray], text: str
) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(convert(tf.exp, on((1, S, D))))
    with pytest.raises(VerificationError, match=text):
        run_in_fresh_process(
            litert_gpu.RUNTIME, File(path, "tflite"), [case], timeout=120.0
        )


# Errors that nothing tells but the values.


@pytest.mark.gpu_software
@pytest.mark.usefixtures("driver")
def test_a_table_of_one_scale_is_zeros_after_its_first_row(tmp_path: Path) -> None:
    by_row, by_one = tmp_path / "row.tflite", tmp_path / "one.tflite"
    by_row.write_bytes(tflite_files.lookup())
    by_one.write_bytes(tflite_files.with_one_scale(by_row.read_bytes()))
    ids = np.arange(S, dtype="int32")[None]
    good, bad = (run_on_both(path, ids=ids) for path in (by_row, by_one))
    for got in (good, bad):
        assert got.facts["fully_accelerated"] is True
    assert good.difference < 1e-5
    assert bad.difference > 0.5
    np.testing.assert_allclose(bad.gpu[0, 0], bad.cpu[0, 0], atol=1e-5)
    assert not bad.gpu[0, 1:].any()
    assert [f.rule for f in lint_tflite(by_one, "gpu")] == ["embedding-scale"]


@pytest.mark.gpu_software
@pytest.mark.parametrize(
    ("activation", "constant", "misread"),
    [
        ((S, D), (S, D), True),
        ((S, D), (S, 1), True),
        ((S, D), (1, S, D), True),
        ((D,), (D,), True),
        ((1, S, D), (2, S, D), True),
        ((2, S, D), (2, 1, 1), True),
        ((S, D), (1, D), False),
        ((S, D), (D,), False),
        ((1, S, D), (1, S, D), False),
        ((3, 2, S, D), (2, S, D), False),
    ],
)
@pytest.mark.parametrize("operation", [tf.add, tf.multiply, tf.subtract, tf.maximum])
def test_the_rule_on_constants_is_what_the_delegate_does(
    answers: Callable[..., Answers],
    tmp_path: Path,
    operation: Callable[..., Any],
    activation: tuple[int, ...],
    constant: tuple[int, ...],
    misread: bool,
) -> None:
    got = answers(
        lambda x: operation(tf.nn.relu(x), values(*constant) + 1),
        x=values(*activation, seed=9),
    )
    assert got.facts["fully_accelerated"] is True
    rules = [one.rule for one in lint_tflite(tmp_path / "model.tflite", "gpu")]
    if misread:
        assert got.difference > 0.05
        assert rules == ["elementwise-constant"]
    else:
        assert got.difference < 1e-5
        assert rules == []


@pytest.mark.gpu_software
@pytest.mark.parametrize(("function", "parts", "wrong"), SPLITS)
def test_the_rule_on_splits_is_what_the_delegate_does(
    answers: Callable[..., Answers],
    function: Callable[..., Any],
    parts: int,
    wrong: bool,
) -> None:
    got = answers(
        lambda x: function(*tf.split(tf.exp(x), parts, -1)), x=values(1, S, D, seed=9)
    )
    assert got.facts["fully_accelerated"] is True
    assert got.difference > 0.05 if wrong else got.difference < 1e-5


@pytest.mark.gpu_software
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.usefixtures("driver")
def test_full_int8_attention_is_taken_whole_and_wrong(tmp_path: Path) -> None:
    x = values(1, S, D, seed=77)
    wanted = tflite_files.masked_attention(tf.constant(x)).numpy()

    def error(**settings: Any) -> float:
        path = tmp_path / "model.tflite"
        path.write_bytes(
            convert(tflite_files.masked_attention, on((1, S, D)), **settings)
        )
        _, gpu, facts = run_on_both(path, x=x)
        assert facts["fully_accelerated"] is True
        return float(np.sqrt(np.mean((gpu - wanted) ** 2) / np.mean(wanted**2)))

    assert error() < 1e-5
    assert error(**tflite_files.int8_settings()) > 0.5
