"""Weights from and to other libraries."""

from keras_mha.convert.bert import load_bert, save_bert

__all__ = ["load_bert", "save_bert"]
