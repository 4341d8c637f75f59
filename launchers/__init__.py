"""Starts jobs on Slurm or on this machine. Imports no torch; workers are named by string."""
