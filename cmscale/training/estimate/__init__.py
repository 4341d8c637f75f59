"""Estimates the cost of a config before it is run: parameters, memory, FLOP, time, price, goodput."""
