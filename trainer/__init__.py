"""Batch → embeddings → loss → checkpoint."""
