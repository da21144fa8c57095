r"""Writes a saved Keras model as a SavedModel version for TF Serving, and checks it.

Example:
    python export/to_saved_model.py dist/sentiment/model.keras \
        dist/sentiment/saved_model --samples reviews.txt --report report.json
"""

from __future__ import annotations

import sys

from keras_mha_cli import export_one

if __name__ == "__main__":
    sys.exit(export_one("saved_model", __doc__))
