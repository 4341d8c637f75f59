"""Trains, samples and evaluates consistency models at 256 px, on one machine or a Slurm cluster."""

__version__ = "0.1.0"
