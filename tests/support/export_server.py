"""Exports in forked children that can be killed, after importing once.

    python -m tests.support.export_server

Each line on the standard input is a job `{"exporter", "seed", "target", "dies"}`. The
answer is the process id of the child that does it, on a line; the next line on the
input, whatever it holds, waits for the child and answers its exit status, negative for
a signal.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from keras_mha import export
from keras_mha.export import files
from tests.support import small_models

IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]], "int32")


def export_to(exporter: str, target: Path, seed: int) -> None:
    """Writes version `seed` of the model to `target`."""
    model = small_models.randomize(small_models.ids_model(), seed)
    if exporter == "onnx":
        export.export_onnx(model, target, samples=IDS, overwrite=True)
    elif exporter == "tflite":
        export.export_tflite(
            model,
            target.parent,
            sequence_lengths=(5,),
            batch_size=2,
            samples=IDS,
            overwrite=True,
        )
    else:
        export.export_saved_model(
            model, target.parent, samples=IDS, version=1, overwrite=True, warmup=0
        )


def die_at_renames(moment: str) -> None:
    """Ends this process right before or right after something is renamed."""

    def deadly(rename: Callable[..., Any]) -> Callable[..., Any]:
        def call(one: Any, other: Any, *rest: Any) -> Any:
            if ".staging-" not in os.fspath(one) or ".staging-" in os.fspath(other):
                return rename(one, other, *rest)
            if moment == "after":
                rename(one, other, *rest)
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        return call

    for owner, name in ((os, "rename"), (os, "replace"), (files, "_exchange")):
        setattr(owner, name, deadly(getattr(owner, name)))


def main() -> None:
    """Serves jobs until the input ends."""
    for name in ("onnx", "onnxruntime", "tf2onnx", "tensorflow.lite.python.lite"):
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        # TensorFlow has not started its threads: that is for the first operation.
        child = os.fork()
        if child == 0:
            os.setsid()  # its own children can be ended with it
            if job["dies"]:
                die_at_renames(job["dies"])
            export_to(job["exporter"], Path(job["target"]), job["seed"])
            os._exit(0)
        print(child, flush=True)
        sys.stdin.readline()
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
