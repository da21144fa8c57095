from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mha.export import VerificationError
from keras_mha.export.runtimes import exchange, fresh_process
from keras_mha.export.runtimes.descriptor import File, Runtime

CASES = [{"x": np.array([[1.5]], "float32")}, {"x": np.array([[2.5]], "float32")}]


def probe(
    runtime: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    blocked: tuple[str, ...] = ("keras_mha",),
) -> tuple[Runtime, File]:
    """Puts a runtime written for the test next to the real child."""
    source = Path(exchange.__file__).parent
    for name in ("child.py", "exchange.py", "descriptor.py"):
        shutil.copy(source / name, tmp_path / name)
    (tmp_path / "probe.py").write_text(runtime, "utf-8")
    monkeypatch.setattr(fresh_process, "_CHILD", tmp_path / "child.py")
    described = Runtime(
        "probe", "Probe", ("any",), options=lambda _: {"factor": 3}, blocked=blocked
    )
    return described, File(tmp_path / "model", "any")


def run(
    runtime: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    blocked: tuple[str, ...] = ("keras_mha",),
    timeout: float = 60.0,
) -> tuple[list[Mapping[str, np.ndarray]], dict[str, Any]]:
    described, file = probe(runtime, tmp_path, monkeypatch, blocked)
    return fresh_process.run_in_fresh_process(described, file, CASES, timeout=timeout)


DOUBLE = """
from .descriptor import Loaded

def load(path: str, *, factor: int) -> Loaded:
    assert path.endswith("model")
    return lambda case: {"y": case["x"] * factor}, lambda: {"version": "7"}
"""


def test_arrays_go_in_and_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, facts = run(DOUBLE, tmp_path, monkeypatch)
    assert [answer["y"].tolist() for answer in answers] == [[[4.5]], [[7.5]]]
    assert facts == {"version": "7", "runtime": "Probe", "blocked": ("keras_mha",)}


@pytest.mark.parametrize("name", ["keras_mha", "keras_mha.export", "json.tool"])
def test_blocked_packages_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # It could be without the blocker.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    importing = f"import {name}\n{DOUBLE}"
    run(importing.replace(name, "decimal"), tmp_path, monkeypatch)
    blocked = (name.partition(".")[0],)
    if blocked == ("json",):  # the child itself needs it: it sees that it has it
        with pytest.raises(VerificationError, match="json could be imported in spite"):
            run(importing, tmp_path, monkeypatch, blocked)
    else:
        with pytest.raises(VerificationError, match=f"{blocked[0]}.* is blocked here"):
            run(importing, tmp_path, monkeypatch, blocked)


def test_what_was_imported_all_the_same_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sneaking = f"import sys\nsys.modules['keras_mha'] = sys\n{DOUBLE}"
    with pytest.raises(VerificationError, match=r"\['keras_mha'\] were imported"):
        run(sneaking, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("body", "text", "timeout"),
    [
        ("import os; os.kill(os.getpid(), 11)", r"killed by signal 11", 60.0),
        ("import os; os._exit(3)", r"failed with exit status 3", 60.0),
        (
            "raise RuntimeError('the third wheel')",
            "status 1.(?s:.*)the third wheel",
            60.0,
        ),
        ("import time; time.sleep(60)", r"took longer than timeout=2\.0 s", 2.0),
    ],
)
def test_an_end_of_the_child_is_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    text: str,
    timeout: float,
) -> None:
    failing = f"def load(path, *, factor):\n    {body}\n"
    with pytest.raises(VerificationError, match=f"probe on model .*{text}"):
        run(failing, tmp_path, monkeypatch, timeout=timeout)


SLOW_AT_TWO = """
import time

def load(path, *, factor):
    calls = []

    def answer(case):
        calls.append(case)
        if case["x"][0, 0] == 2.5:
            time.sleep(0.2)
        return {"y": case["x"] * (factor + len(calls) - 1)}

    return answer, lambda: {"calls": len(calls)}
"""
DIES_AT_THREE = """
import os

def load(path, *, factor):
    calls = []

    def answer(case):
        if len(calls) == 3:
            os._exit(5)
        calls.append(case)
        return {}

    return answer, lambda: {}
"""


def in_turns(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> fresh_process.FreshProcess:
    described, file = probe(runtime, tmp_path, monkeypatch)
    return fresh_process.FreshProcess(described, file, CASES, in_turns=True)


def test_the_last_case_is_timed_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_turns(SLOW_AT_TWO, tmp_path, monkeypatch) as process:
        process.wait_for_values(60.0)
        assert all(process.time_call(60.0) >= 0.2 for _ in range(2))
        answers, facts = process.finish(60.0)
    # The answers and facts are those of the first time.
    assert [answer["y"].tolist() for answer in answers] == [[[4.5]], [[10.0]]]
    assert (facts["calls"], facts["blocked"]) == (2, ("keras_mha",))


def test_an_end_in_a_turn_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_turns(DIES_AT_THREE, tmp_path, monkeypatch) as process:
        process.wait_for_values(60.0)
        process.time_call(60.0)
        with pytest.raises(VerificationError, match="probe on .* exit status 5"):
            process.time_call(60.0)


def test_an_unfinished_process_ends_with_its_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_turns(SLOW_AT_TWO, tmp_path, monkeypatch) as process:
        process.wait_for_values(60.0)
        with pytest.raises(VerificationError, match="longer than timeout=0.01 s"):
            process.time_call(0.01)
    assert process._process.returncode == -9


def test_arrays_survive_the_exchange(tmp_path: Path) -> None:
    strings = np.empty((2, 2), object)
    strings[:] = [[b"", b"a\0b\0"], ["\u00fc".encode(), b"\xff"]]
    arrays = {
        "file": np.arange(6, dtype="int64").reshape(2, 3),
        "bytes:x": strings,
        "half": np.array(0.5, "float16"),
        "none": np.zeros((0, 3), bool),
        "no strings": np.empty((0,), object),
    }
    exchange.write_arrays(tmp_path / "a.npz", arrays)
    back = exchange.read_arrays(tmp_path / "a.npz")
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert back[name].tolist() == array.tolist()


def test_other_arrays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'z' of dtype complex128"):
        exchange.write_arrays(tmp_path / "a.npz", {"z": np.array([1j])})


def test_importing_the_exporters_loads_no_runtime() -> None:
    program = (
        "import sys, keras_mha.export\n"
        "print(*({'tensorflow_text', 'ai_edge_litert', 'tf2onnx'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parents[3],
        env=os.environ,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == []
