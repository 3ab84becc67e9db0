"""A store to batches of patches."""
