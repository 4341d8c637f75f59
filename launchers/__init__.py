"""Starts the project's jobs on Slurm or on this machine; imports layer 0 only and names workers by string."""
