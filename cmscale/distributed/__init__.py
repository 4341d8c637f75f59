"""The ranks of a job, their process group and their collectives."""
