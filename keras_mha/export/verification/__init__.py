"""Runs the same inputs through every runtime."""
