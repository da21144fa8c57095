"""Compares the speed and memory of keras_mha with its rivals'; see README.md."""
