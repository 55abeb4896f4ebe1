"""The API of AUTOMATIC1111's web UI, below /sdapi/v1: a translation onto the images API."""
