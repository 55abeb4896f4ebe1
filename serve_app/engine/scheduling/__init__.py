"""Decisions about requests: order, cost, forecast and load. Pure Python, no torch."""
