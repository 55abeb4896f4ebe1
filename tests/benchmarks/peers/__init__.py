"""Compares this server over HTTP with the simplest ones that a user would write.

``lock.py`` and ``batch.py`` are those servers. ``python -m tests.benchmarks.peers`` measures.
"""
