"""Denoiser calls of several requests as one: where they wait, and how they are merged."""
