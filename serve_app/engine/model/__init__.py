"""The loaded pipeline: weights, adapters, speed options, caches and previews."""
