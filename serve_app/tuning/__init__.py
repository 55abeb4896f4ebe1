"""Finds the thresholds of a model's acceleration: ``diffusion-serve tune``."""
