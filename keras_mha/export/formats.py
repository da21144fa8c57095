"""The formats that models are exported to. To add one, write its folder and its line.

A folder holds

- `declaration.py`: its `FORMAT`, which the command line reads without TensorFlow;
- `export.py`: the function `export_<name>`, which `keras_mha.export` makes public;
- `report.py`: what that function returns;
- `reader.py`: the function `open_file`, with which `verify` reads a file.

Stand-alone: the standard library.
"""

from __future__ import annotations

from importlib import import_module

from .declaration import Format

_FOLDERS = ("saved_model", "tflite", "onnx")

FORMATS: dict[str, Format] = {
    name: import_module(f".{name}.declaration", __package__).FORMAT for name in _FOLDERS
}
