"""Checkpoint → numbers that others can check."""
