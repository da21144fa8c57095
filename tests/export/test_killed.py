"""Exports killed at any moment leave the old version or the new one, whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from tests.support import small_models
from tests.support.export_server import IDS

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"onnx": "model.onnx", "saved_model": "1", "tflite": "model_5.tflite"}
KILLS = {"onnx": 17, "saved_model": 17, "tflite": 16}  # 50 in all

pytestmark = pytest.mark.slow


class Server:
    """The process of `export_server`."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.export_server"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def export(
        self,
        exporter: str,
        target: Path,
        seed: int,
        *,
        seconds: float | None = None,
        dies: str = "",
    ) -> int:
        """Exports, killed after `seconds`, and returns the exit status."""
        job = {"exporter": exporter, "seed": seed, "dies": dies, "target": str(target)}
        self._write(json.dumps(job))
        child = int(self._read())
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        self._write("")
        status = int(self._read())
        with suppress(ProcessLookupError):  # what it had started itself
            os.killpg(child, signal.SIGKILL)
        return status


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.process.communicate()
    assert made.process.returncode == 0


def answer(exporter: str, target: Path) -> np.ndarray:
    """What the exported file says to `IDS`, in a runtime of its own."""
    if exporter == "onnx":
        session = onnxruntime.InferenceSession(
            str(target), providers=["CPUExecutionProvider"]
        )
        return np.asarray(session.run(None, {"ids": IDS})[0])
    if exporter == "tflite":
        runner = Interpreter(model_path=str(target)).get_signature_runner()
        return runner(ids=IDS)["probabilities"]
    signature = tf.saved_model.load(str(target)).signatures["serving_default"]
    return signature(ids=tf.constant(IDS))["probabilities"].numpy()


def version_in(exporter: str, target: Path, seeds: list[int]) -> int | None:
    """Which version is at `target`, by its values; `None` if nothing is."""
    if not target.exists():
        return None
    got = answer(exporter, target)
    wanted = {
        seed: small_models.randomize(small_models.ids_model(), seed)(IDS)
        for seed in seeds
    }
    assert len({np.round(w, 4).tobytes() for w in wanted.values()}) == len(seeds)
    (found,) = (s for s, w in wanted.items() if np.abs(got - w).max() < 1e-5)
    return found


def left_in(directory: Path) -> list[str]:
    # What stands beside TFLite files is of either version.
    beside = {"manifest.json", "snippets"}
    return sorted({path.name for path in directory.iterdir()} - beside)


@pytest.mark.parametrize("exporter", KILLS)
def test_at_random_times(tmp_path: Path, server: Server, exporter: str) -> None:
    target = tmp_path / TARGETS[exporter]
    start = time.perf_counter()
    assert server.export(exporter, target, 0) == 0
    whole = time.perf_counter() - start
    held, killed = 0, 0
    generator = np.random.default_rng()
    for seed in range(1, KILLS[exporter] + 1):
        moment = generator.uniform(0, 1.1 * whole)
        status = server.export(exporter, target, seed, seconds=moment)
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
        found = version_in(exporter, target, [held, seed])
        assert found is not None
        assert found == seed or status != 0
        held = found
    assert killed > 0
    # What was left disturbs nobody, and the next export takes it away.
    assert server.export(exporter, target, 99) == 0
    assert version_in(exporter, target, [99]) == 99
    assert left_in(tmp_path) == [target.name]


@pytest.mark.parametrize("exporter", KILLS)
def test_around_the_last_step(tmp_path: Path, server: Server, exporter: str) -> None:
    target = tmp_path / TARGETS[exporter]

    def die(seed: int, moment: str) -> int | None:
        status = server.export(exporter, target, seed, dies=moment)
        assert status == -signal.SIGKILL
        return version_in(exporter, target, [1, 2, 3])

    assert die(1, "before") is None
    assert die(1, "after") == 1
    assert die(2, "before") == 1
    assert die(3, "after") == 3
    assert server.export(exporter, target, 2) == 0
    assert left_in(tmp_path) == [target.name]
