"""Starts a runtime in a process of its own, which cannot import this package.

A runtime is one file here and one line in `table`. The file has a `RUNTIME`, which
describes it, and a function `load`, which that process calls. `child` loads the files
by path, so they import only each other, and heavy packages only inside functions.
"""
