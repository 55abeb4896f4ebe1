"""Batching of denoiser calls: jobs park at the denoiser, and their calls are merged."""
