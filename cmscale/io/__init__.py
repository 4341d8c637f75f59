"""Reads and writes files: local folders and S3, fetched weights, locks, pictures."""
