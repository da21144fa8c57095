"""Attention block by block, in memory linear in the length."""
