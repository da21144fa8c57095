"""Runs a TFLite file in LiteRT's interpreter on an emulated ARM processor.

It is the aarch64 build of ai-edge-litert, whose kernels are not those of x86; its speed
says nothing. Stand-alone: the standard library.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from . import litert
from .descriptor import Runtime

_EMULATOR = "qemu-aarch64-static"
_VARIABLE = "KERAS_MHA_ARM_ROOT"
# Has the dot products and half precision of today's phones.
_PROCESSOR = "cortex-a76"


def find_arm_root() -> Path:
    """Returns the folder with an arm64 Python that `.ci/arm_root.sh` makes.

    It is the environment's `KERAS_MHA_ARM_ROOT`, else `keras-mha/arm64` in the user's
    cache.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(_VARIABLE) or cache / "keras-mha" / "arm64")


def find_arm_python() -> tuple[str, ...]:
    """Returns the command that starts an arm64 Python under emulation.

    That Python sees none of this machine's packages.

    Raises:
        FileNotFoundError: If the emulator or the Python is missing; it says what to
            install.
    """
    emulator = shutil.which(_EMULATOR)
    if emulator is None:
        raise FileNotFoundError(
            f"Running on ARM needs {_EMULATOR}. On Debian: apt-get install "
            "qemu-user-static"
        )
    root = find_arm_root()
    python = root / "usr" / "bin" / "python3.11"
    # Written last: without it the folder is something else.
    if not python.is_file() or not (root / "versions").is_file():
        raise FileNotFoundError(
            f"Running on ARM needs an arm64 Python in {root}. Make it by "
            f"`.ci/arm_root.sh`, or name its folder in {_VARIABLE}"
        )
    return (emulator, "-cpu", _PROCESSOR, "-L", str(root), str(python), "-I")


RUNTIME = Runtime(
    "litert",
    "LiteRT interpreter, emulated ARM",
    ("tflite",),
    {"ai_edge_litert": "tflite"},  # it reads the file's shapes on this machine
    find=find_arm_python,
    options=litert.options,
    python=find_arm_python,
    takes_text=True,
    emulated=True,
)
