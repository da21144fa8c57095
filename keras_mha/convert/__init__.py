"""Weights and models from other layers into those of `keras_mha`, and back."""

from keras_mha.convert.keras_models import from_keras, to_keras
from keras_mha.convert.torch_modules import from_torch

__all__ = ["from_keras", "from_torch", "to_keras"]
