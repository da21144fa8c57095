"""Hugging Face's checkpoints into this package's models, and back."""
