"""Stored images: links in responses, and the files behind them."""
