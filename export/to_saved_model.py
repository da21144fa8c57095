r"""Writes a saved Keras model as a SavedModel version for TF Serving, and checks it.

It is the same as `keras-mha export --to saved_model`.

Example:
    python export/to_saved_model.py dist/sentiment/model.keras --out dist/sentiment \
        --samples reviews.txt --report report.json
"""

from __future__ import annotations

import sys

from keras_mha_cli import main

if __name__ == "__main__":
    sys.exit(main(["export", "--to=saved_model", *sys.argv[1:]]))
