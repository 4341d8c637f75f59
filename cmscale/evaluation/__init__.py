"""Measures how close generated images are to a reference: features, statistics, metrics, results."""
