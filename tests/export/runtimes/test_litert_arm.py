"""The same file on an emulated ARM processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from keras_mha.export import VerificationError
from keras_mha.export.runtimes import litert, litert_arm
from keras_mha.export.runtimes.descriptor import File, Runtime
from keras_mha.export.runtimes.fresh_process import run_in_fresh_process
from tests.support import tflite_files
from tests.support.tflite_files import D, S, convert, on, values

ROWS = ([3, 1, 4, 1, 5, 9, 2], [5, 10, 0, 0, 0, 0, 0])


@pytest.fixture(scope="module")
def arm_python() -> None:
    try:
        litert_arm.find_arm_python()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def run(
    path: Path,
    cases: Sequence[dict[str, np.ndarray]],
    runtime: Runtime = litert.RUNTIME,
) -> tuple[list[np.ndarray], dict[str, Any]]:
    answers, facts = run_in_fresh_process(
        runtime, File(path, "tflite"), cases, timeout=300.0
    )
    return [answer["y"] for answer in answers], facts


def test_what_to_install_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(litert_arm.shutil, "which", lambda _: None)
    with pytest.raises(FileNotFoundError, match="apt-get install qemu-user-static"):
        litert_arm.find_arm_python()
    monkeypatch.setattr(litert_arm.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setenv("KERAS_MHA_ARM_ROOT", str(tmp_path))
    python = tmp_path / "usr" / "bin" / "python3.11"
    python.parent.mkdir(parents=True)
    python.touch()
    with pytest.raises(FileNotFoundError, match=rf"in {tmp_path}.*arm_root\.sh"):
        litert_arm.find_arm_python()  # half made
    (tmp_path / "versions").touch()
    command = litert_arm.find_arm_python()
    assert command[0] == "/bin/qemu-aarch64-static"
    assert command[-2:] == (str(python), "-I")


def test_the_cache_holds_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KERAS_MHA_ARM_ROOT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert litert_arm.find_arm_root() == Path("/some/cache/keras-mha/arm64")


@pytest.mark.arm
@pytest.mark.parametrize("optimizations", [[], [tf.lite.Optimize.DEFAULT]])
@pytest.mark.usefixtures("arm_python")
def test_a_good_file_is_answered_as_here(
    tmp_path: Path, optimizations: list[Any]
) -> None:
    path = tmp_path / "model.tflite"
    ids = {"ids": ((1, S), tf.int32)}
    path.write_bytes(convert(tflite_files.classify, ids, optimizations=optimizations))
    cases = [{"ids": np.array([row], "int32")} for row in ROWS]
    here, here_facts = run(path, cases)
    there, facts = run(path, cases, litert_arm.RUNTIME)
    assert facts["machine"] == "aarch64"
    assert facts["version"] == here_facts["version"]
    assert facts["delegate_partitions"] == here_facts["delegate_partitions"] == 1
    for case, mine, other in zip(cases, here, there, strict=True):
        wanted = tflite_files.classify(tf.constant(case["ids"])).numpy()
        np.testing.assert_allclose(other, mine, atol=1e-6)
        np.testing.assert_allclose(other, wanted, atol=1e-5)
    assert np.max(np.abs(there[0] - there[1])) > 0.1  # it does read its input


@pytest.mark.arm
@pytest.mark.usefixtures("arm_python")
def test_dynamic_int8_is_answered_as_here(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    weights = values(D, 401)

    def dense(x: Any) -> Any:
        return tf.nn.gelu(x @ weights) @ weights.T

    content = convert(dense, on((1, S, D)), optimizations=[tf.lite.Optimize.DEFAULT])
    assert len(content) < 0.6 * len(convert(dense, on((1, S, D))))  # it is quantized
    path.write_bytes(content)
    case = {"x": values(1, S, D, seed=9)}
    (here,), _ = run(path, [case])
    (there,), facts = run(path, [case], litert_arm.RUNTIME)
    assert facts["machine"] == "aarch64"
    np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-3)


@pytest.mark.arm
@pytest.mark.usefixtures("arm_python")
def test_errors_come_through(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(convert(tf.exp, on((1, S, D))))
    with pytest.raises(VerificationError, match="(?s)litert on model.tflite.*status 1"):
        run(path, [{"z": values(1, S, D)}], litert_arm.RUNTIME)
