"""Speed and memory of keras_mha beside its rivals; see README.md."""
