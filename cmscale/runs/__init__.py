"""A run on disk: its paths, documents, logs and committed checkpoints."""
