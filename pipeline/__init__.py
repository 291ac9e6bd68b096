"""URL list → shards → views with their augmentation vectors."""
