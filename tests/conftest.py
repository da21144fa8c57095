"""Settings for every test: backend, threads, seeds, hypothesis.

The environment is set before Keras and TensorFlow are first imported, hence no import
of them at the head of this file.
"""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import settings

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# One computing thread for each pytest worker: the tests are small, and as many workers
# run as there are cores. Two operations may still wait side by side, as the replicas of
# a distribution strategy do.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "2")

# The same examples at every run, and no deadline: nothing here depends on time.
settings.register_profile("default", deadline=None, derandomize=True, database=None)
settings.load_profile("default")


@pytest.fixture(autouse=True, scope="module")
def _settled() -> None:
    """Takes what imports and earlier tests left out of the garbage collector's sight.

    TensorFlow and Keras hold half a million objects, and walking over them again and
    again takes a quarter of the time of the tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Starts every test from the same random state, whatever ran before it."""
    import keras

    keras.utils.set_random_seed(20)
