r"""Runs exported files in every runtime at hand: the same as `keras-mha verify`.

Example:
    python export/verify.py dist/sentiment/model.keras --tokens --samples reviews.txt \
        --saved-model dist/sentiment/saved_model \
        --tflite dist/sentiment/model_128.tflite --report report.md
"""

from __future__ import annotations

import sys

from keras_mha_cli import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
