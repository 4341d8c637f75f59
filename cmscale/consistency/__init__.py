"""Owns the method: times, solvers, distances, losses, sampling and editing, on denoisers as callables."""
