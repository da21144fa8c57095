"""Stand-alone scripts that run or read exported files in a process of their own.

`child.py` is started by path and imports nothing of this package: it reads the
files beside it by path too. `keras_mha.export.runtimes.fresh_process` starts it.
"""
