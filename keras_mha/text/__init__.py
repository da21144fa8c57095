"""Turns text into token ids inside the model; needs the extra `text`."""

from keras_mha.text.wordpiece import WordpieceTokenizer, learn_wordpiece_vocabulary

__all__ = ["WordpieceTokenizer", "learn_wordpiece_vocabulary"]
