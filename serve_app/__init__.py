"""diffusion-serve: any diffusers text-to-image pipeline as a step-batched HTTP service."""

__version__ = "0.1.0"
