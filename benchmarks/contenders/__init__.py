"""The contenders: each module builds steps of one library.

A builder takes the settings of an entry in `benchmarks.cases` as keyword arguments and
returns a `Step`. A worker process imports it, and so imports no other library.
Letters: B batch, T length, N heads, H head size, D model width.
"""
