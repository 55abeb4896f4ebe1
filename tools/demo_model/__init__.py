"""Makes and measures the bundled demo model. Not part of what is installed."""
