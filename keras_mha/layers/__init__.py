"""Keras layers: the weights around the functions of `keras_mha.attention`."""
