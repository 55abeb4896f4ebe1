"""Everything that the first GPU machine should tell, in under ten minutes.

``python -m tests.benchmarks.first_day --minutes 9`` needs one NVIDIA GPU, no Ray, and no installed
project. `sections` has the order of the sections, `run` the processes, `results` the file.
"""
