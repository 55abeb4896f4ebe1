"""``diffusion-serve doctor``: what keeps a machine or a cluster from serving images.

The checks run before anything is started, and each failure comes with advice. They change nothing,
except with ``--rehearse``, which creates a namespace and deletes it again. They import only the
configuration of this project; neither torch nor Ray is imported where the command runs, only in
processes that may hang or crash without harm.
"""
