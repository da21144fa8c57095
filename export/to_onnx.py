r"""Writes a saved Keras model as an ONNX file with free sizes, and checks it.

It is the same as `keras-mha export --to onnx`.

Example:
    python export/to_onnx.py dist/sentiment/classifier.keras --out dist/sentiment \
        --samples ids.npy
"""

from __future__ import annotations

import sys

from keras_mha_cli import main

if __name__ == "__main__":
    sys.exit(main(["export", "--to=onnx", *sys.argv[1:]]))
