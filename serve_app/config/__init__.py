"""The configuration: its models, the environment, Serve config files and model files.

It imports neither torch nor Ray, so that a wrong configuration is found before either is started.
"""
