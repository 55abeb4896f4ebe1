"""Nouns that gateway, deployments and engine share. No torch, no Ray, no HTTP."""
