"""Trains networks that DeepSpeed spreads over ranks, and keeps a run from losing its work: checkpoints, preemption."""
