"""What is measured: each module builds steps of one library.

A builder takes the settings of an entry in `benchmarks.cases` as keyword arguments and
returns a `Step`. It is imported in a worker process, which imports that library alone.
Letters: B batch, T length, N heads, H head size, D model width.
"""
