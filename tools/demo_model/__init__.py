"""Trains and measures the bundled demo model; not part of the installed package."""
