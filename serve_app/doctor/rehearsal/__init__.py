"""``diffusion-serve doctor --rehearse``: an overlay's whole life in a throw-away namespace.

`manifest` decides what is applied, `observer` reads what came of it and `image` asks for an image.
The steps are in `start`, `changes` and `cleanup`; `session` is what they share, and `run` their
order. Nothing outside the namespace is changed.
"""
