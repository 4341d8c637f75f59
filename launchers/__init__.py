"""Launchers: one command to run training or evaluation, on Slurm or on this machine."""
