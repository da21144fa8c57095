"""The same inputs through every runtime."""
