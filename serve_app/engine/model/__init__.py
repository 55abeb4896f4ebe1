"""The loaded pipeline: weights, adapters, speed options, the prompt cache and previews."""
