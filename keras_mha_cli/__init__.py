"""The command `keras-mha`.

It stands beside the package and not in it: importing `keras_mha` imports Keras and
TensorFlow, which takes seconds, and neither `--help` nor a mistyped option shall wait
for them.
"""

from keras_mha_cli.command_line import export_one, main

__all__ = ["export_one", "main"]
