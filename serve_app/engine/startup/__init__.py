"""Work before the first request: certification, warm-up and the profile of earlier starts."""
