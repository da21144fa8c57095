"""Runs an exported file in a fresh process that cannot import this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_mha.export.parity import VerificationError
from keras_mha.export.runtimes import exchange

_CHILD = Path(exchange.__file__).with_name("child.py")
# -P: neither the script's nor the current directory becomes importable.
_PYTHON = (sys.executable, "-P")


def run_in_fresh_process(
    runtime: str,
    path: Path,
    cases: Sequence[Mapping[str, np.ndarray]],
    *,
    blocked: Sequence[str],
    options: Mapping[str, Any],
    timeout: float,
    python: Sequence[str] = _PYTHON,
) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
    """Runs every case on the file at `path`.

    Args:
        runtime: Name of the module in `keras_mha.export.runtimes` that runs it.
        path: The exported file or directory.
        cases: Arrays by input name, for each run.
        blocked: Top-level packages that the process must be unable to import.
        options: Further arguments of the runtime's `run`.
        timeout: Seconds that the process may take.
        python: The command that starts Python, without a script.

    Returns:
        The arrays by output name for each run, and facts about the runtime.

    Raises:
        VerificationError: If the process fails, is killed or takes too long.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        request = {
            "runtime": runtime,
            "path": str(path.resolve()),
            "cases": len(cases),
            "blocked": list(blocked),
            "options": dict(options),
        }
        (directory / "request.json").write_text(json.dumps(request), "utf-8")
        for i, case in enumerate(cases):
            exchange.write_arrays(directory / f"case_{i}.npz", case)
        _start(python, directory, f"{runtime} on {path.name}", timeout)
        facts = json.loads((directory / "result.json").read_text("utf-8"))
        answers = [
            exchange.read_arrays(directory / f"answer_{i}.npz")
            for i in range(len(cases))
        ]
    return answers, facts | {"blocked": tuple(blocked)}


def _start(python: Sequence[str], directory: Path, what: str, timeout: float) -> None:
    # The comparison is one of CPU results; a visible GPU would only be occupied.
    settings = {"CUDA_VISIBLE_DEVICES": "-1"}
    if "TF_CPP_MIN_LOG_LEVEL" not in os.environ:
        settings["TF_CPP_MIN_LOG_LEVEL"] = "2"
    try:
        done = subprocess.run(
            [*python, str(_CHILD), str(directory)],
            env=os.environ | settings,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise VerificationError(
            f"{what} took longer than timeout={timeout} s.{_tail(error.stderr)}"
        ) from None
    if done.returncode != 0:
        end = (
            f"was killed by signal {-done.returncode}"
            if done.returncode < 0
            else f"failed with exit status {done.returncode}"
        )
        raise VerificationError(f"{what} {end}.{_tail(done.stderr)}")


def _tail(stderr: bytes | None) -> str:
    lines = (stderr or b"").decode("utf-8", "replace").strip().splitlines()
    return "\nIts last words:\n" + "\n".join(lines[-20:]) if lines else ""
