"""The HTTP deployment: OpenAI's images API in front of the generator. No GPU, no torch."""
