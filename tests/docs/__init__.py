"""The documentation and its tools."""
