r"""Finds what a TFLite file's target refuses: the same as `keras-mha lint`.

Example:
    python export/lint_tflite.py dist/sentiment/model_128.tflite --target gpu
"""

from __future__ import annotations

import sys

from keras_mha_cli import main

if __name__ == "__main__":
    sys.exit(main(["lint", *sys.argv[1:]]))
