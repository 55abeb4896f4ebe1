"""``diffusion-serve doctor --rehearse``: an overlay's whole life in a throw-away namespace.

`manifest` prepares the objects, `observer` reads the results and `image` requests an image. The
steps are in `start`, `changes` and `cleanup`; `session` is their shared state, and `run` their
order. Nothing outside the namespace is changed.
"""
