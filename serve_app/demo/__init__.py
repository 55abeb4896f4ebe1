"""The bundled text-to-image model: coloured shapes on coloured backgrounds.

Owns the scenes that the model was trained on, the program that trained it, and the check that
measures it. Knows nothing of the engine; the engine loads ``model/`` like any other pipeline.
"""
