"""Reads and writes files: storages (local folders, S3), cached downloads, durable writes, locks, images."""
