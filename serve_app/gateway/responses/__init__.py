"""OpenAI's Responses API, as far as its image tool goes: a translation to the images API."""
