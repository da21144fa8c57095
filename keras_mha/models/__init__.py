"""Models made of the package's blocks, which take weights that others trained."""

from keras_mha.models.bert import BertEncoder

__all__ = ["BertEncoder"]
