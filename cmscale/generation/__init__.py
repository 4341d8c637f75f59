"""Generates images with a trained network: samples, and edits of given images."""
