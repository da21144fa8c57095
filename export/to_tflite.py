r"""Writes a saved Keras model as TFLite files of fixed length, and checks them.

It is the same as `keras-mha export --to tflite`.

Example:
    python export/to_tflite.py dist/sentiment/model.keras --out dist/sentiment \
        --samples ids.npy --sequence-lengths 64 128 --quantization dynamic_int8
    python export/to_tflite.py dist/sentiment/model.keras --out dist/phone \
        --samples reviews.txt --text --metadata dist/sentiment/labels.txt
"""

from __future__ import annotations

import sys

from keras_mha_cli import main

if __name__ == "__main__":
    sys.exit(main(["export", "--to=tflite", *sys.argv[1:]]))
