"""The folder of a run: paths, documents, logs."""
