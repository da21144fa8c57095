r"""Writes a saved Keras model as an ONNX file with free sizes, and checks it.

Example:
    python export/to_onnx.py dist/sentiment/classifier.keras dist/sentiment/model.onnx \
        --samples ids.npy
"""

from __future__ import annotations

import sys

from keras_mha_cli import export_one

if __name__ == "__main__":
    sys.exit(export_one("onnx", __doc__))
