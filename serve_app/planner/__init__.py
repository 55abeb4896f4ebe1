"""Simulates scaling policies on arrival traces: ``diffusion-serve plan``."""
