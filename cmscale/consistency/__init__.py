"""Implements the mathematics of the methods: times, solvers, distances, losses, samplers and zero-shot editing.

Networks are callables (x, sigma) -> estimate here, so that everything can be tested with closed-form denoisers.
"""
