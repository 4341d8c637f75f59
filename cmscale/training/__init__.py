"""Trains a run: the loop and the parts that it turns."""
