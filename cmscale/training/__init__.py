"""Trains a run: the loop, what a step needs, logging, and checks before and during training."""
