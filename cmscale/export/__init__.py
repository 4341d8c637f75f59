"""Writes weights in formats that other programs load, with a model card."""
