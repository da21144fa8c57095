"""Attention as pure functions of tensors: no weights, no layers, no variables.

Letters used in every shape of this package: B batch, T query length, S key and
value length, N query heads, H head size of queries and keys, V head size of
values, D model width.
"""
