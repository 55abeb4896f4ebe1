"""Builds, checks and illustrates the documentation; not in the wheel."""
