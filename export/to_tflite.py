r"""Writes a saved Keras model as TFLite files of fixed length, and checks them.

Example:
    python export/to_tflite.py dist/sentiment/model.keras dist/sentiment \
        --samples ids.npy --sequence-lengths 64 128 --quantization dynamic_int8
    python export/to_tflite.py dist/sentiment/model.keras dist/sentiment/phone \
        --samples reviews.txt --text --metadata dist/sentiment/labels.txt
"""

from __future__ import annotations

import sys

from keras_mha_cli import export_one

if __name__ == "__main__":
    sys.exit(export_one("tflite", __doc__))
