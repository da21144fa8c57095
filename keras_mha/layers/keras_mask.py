"""The mask that Keras attaches to tensors, read and set in one place.

Keras has no public name for this. Every Keras 3 that we support keeps these two
functions here.
"""

from __future__ import annotations

from keras.src.backend.common.masking import get_keras_mask, set_keras_mask

__all__ = ["get_keras_mask", "set_keras_mask"]
