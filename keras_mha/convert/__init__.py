"""Weights and models of Keras, PyTorch and Hugging Face into `keras_mha`, and back."""

from keras_mha.convert.hugging_face.bert import load_bert, save_bert
from keras_mha.convert.keras_models import from_keras, to_keras
from keras_mha.convert.registry import register_converter
from keras_mha.convert.stock_masks import StockMaskAttention
from keras_mha.convert.torch_modules import from_torch

__all__ = [
    "StockMaskAttention",
    "from_keras",
    "from_torch",
    "load_bert",
    "register_converter",
    "save_bert",
    "to_keras",
]
