"""``diffusion-serve doctor``: what stands between a machine or a cluster and a picture.

Looks before anything is started, and says what to do about what it finds. It changes nothing,
except with ``--rehearse``, which creates a namespace and deletes it again. Knows the configuration
and nothing else of this project; neither torch nor Ray is imported where the command runs, only in
processes that may hang or crash without harm.
"""
