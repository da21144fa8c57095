"""The command `keras-mha`.

It is a package of its own: importing `keras_mha` imports Keras and TensorFlow, which
takes seconds, and neither `--help` nor a mistyped option should wait for them.
"""

from keras_mha_cli.command_line import main

__all__ = ["main"]
