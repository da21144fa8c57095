"""Runs a TFLite file on LiteRT's GPU delegate, over a Vulkan driver in software.

It shows the delegate's own kernels and orders of axes, in float32. It does not show
the speed, half precision and faults of a phone's driver.

Stand-alone: ai_edge_litert and NumPy, no import of tensorflow.
"""

from __future__ import annotations

import ctypes.util
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .descriptor import Arrays, File, Loaded, Runtime

if TYPE_CHECKING:
    import numpy as np

# Vulkan's own variable, and where distributions put Chromium's driver.
_VARIABLE = "VK_ICD_FILENAMES"
_MANIFESTS = (
    Path("/usr/lib/chromium/vk_swiftshader_icd.json"),
    Path("/usr/lib64/chromium-browser/vk_swiftshader_icd.json"),
    Path("/opt/google/chrome/vk_swiftshader_icd.json"),
)
_LIBRARY = "libvk_swiftshader.so"


def find_software_driver() -> Path:
    """Finds the manifest of the software Vulkan driver SwiftShader.

    `VK_ICD_FILENAMES` comes first where it names one that is there.

    Raises:
        FileNotFoundError: If the driver or Vulkan's loader is missing; it says what to
            install.
    """
    named = os.environ.get(_VARIABLE, "").split(os.pathsep)
    places = [*(Path(name) for name in named if "swiftshader" in name), *_MANIFESTS]
    manifest = next((place for place in places if place.is_file()), None)
    missing = []
    if manifest is None:
        missing.append("the software Vulkan driver SwiftShader (chromium)")
    if ctypes.util.find_library("vulkan") is None:
        missing.append("Vulkan's loader (libvulkan1)")
    if manifest is None or missing:
        raise FileNotFoundError(
            f"The GPU delegate needs {' and '.join(missing)}. On Debian: apt-get "
            f"install chromium libvulkan1; or name the driver's manifest in {_VARIABLE}"
        )
    return manifest


def load(path: str, *, signature_name: str, driver: str) -> Loaded:
    """Loads the signature `signature_name` of the file at `path`.

    Args:
        path: The file.
        signature_name: The signature's name.
        driver: The manifest that `find_software_driver` returns.

    Returns:
        As every runtime. The facts hold `fully_accelerated`, whether the delegate took
        the whole graph; where it did not, the CPU ran the rest. They raise a
        RuntimeError if the driver was not used.
    """
    os.environ[_VARIABLE] = driver
    model, complete = _compile(path)

    def answer(case: Arrays) -> Arrays:
        return _answer(model, signature_name, case)

    def facts() -> dict[str, Any]:
        if _LIBRARY not in Path("/proc/self/maps").read_text("utf-8"):
            raise RuntimeError(f"The GPU delegate did not load the driver of {driver}")
        return {
            "version": version("ai-edge-litert"),
            "driver": driver,
            "fully_accelerated": complete,
        }

    return answer, facts


def _compile(path: str) -> tuple[Any, bool]:
    """Loads the file, and says whether the delegate took its whole graph."""
    from ai_edge_litert.compiled_model import (
        CompiledModel,
        GpuOptions,
        HardwareAccelerator,
        Options,
    )

    def load(accelerators: HardwareAccelerator) -> CompiledModel:
        options = Options(
            hardware_accelerators=accelerators,
            gpu_options=GpuOptions(enforce_f32=True),
        )
        return CompiledModel.from_file(path, options=options)

    # With the CPU next to it every graph counts as fully accelerated: XNNPACK is an
    # accelerator too. Without it, a graph that is not is an error.
    try:
        model = load(HardwareAccelerator.GPU)
    except RuntimeError as error:
        if "not accelerated" not in str(error):
            raise
        return load(HardwareAccelerator.GPU | HardwareAccelerator.CPU), False
    return model, model.is_fully_accelerated()


def _answer(model: Any, signature: str, case: Arrays) -> Arrays:
    import numpy as np

    details = model.get_input_tensor_details(signature)
    if set(details) != set(case):
        raise ValueError(f"The file takes {sorted(details)}. Received: {sorted(case)}")
    inputs = {}
    for name, array in case.items():
        expected = (details[name]["dtype"], tuple(details[name]["shape"]))
        if expected != (array.dtype.name, array.shape):
            raise ValueError(
                f"Input {name!r} must be {expected}. Received: "
                f"{(array.dtype.name, array.shape)}"
            )
        inputs[name] = model.create_input_buffer_by_name(signature, name)
        inputs[name].write(np.ascontiguousarray(array))
    results = model.get_output_tensor_details(signature)
    outputs = {
        name: model.create_output_buffer_by_name(signature, name) for name in results
    }
    model.run_by_name(signature, inputs, outputs)
    return {
        name: _read(outputs[name], detail["dtype"], detail["shape"])
        for name, detail in results.items()
    }


def _read(buffer: Any, dtype: str, shape: Sequence[int]) -> np.ndarray:
    import numpy as np

    kind = np.dtype(dtype).type
    return np.array(buffer.read(int(np.prod(shape)), kind)).reshape(shape)


def _options(file: File) -> Mapping[str, Any]:
    driver = str(find_software_driver())
    return {"signature_name": file.signature_name, "driver": driver}


RUNTIME = Runtime(
    "litert_gpu",
    "LiteRT GPU delegate, software Vulkan",
    ("tflite",),
    {"ai_edge_litert": "tflite"},
    find=find_software_driver,
    options=_options,
    takes_text=True,
    emulated=True,
)
