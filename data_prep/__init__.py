"""Prepares data sets: turns image sources into verified shards and computes reference statistics of them."""
