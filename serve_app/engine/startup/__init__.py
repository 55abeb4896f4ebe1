"""Work done once before the first request: certification, warm-up and the profile."""
