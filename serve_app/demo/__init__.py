"""The bundled text-to-image model: coloured shapes on coloured backgrounds.

It has the weights, their card and the tokenizer. The engine loads ``model/`` like any other
pipeline; ``tools/demo_model`` trains and measures it.
"""
