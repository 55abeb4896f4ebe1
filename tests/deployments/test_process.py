import gc
import platform
import subprocess
import sys
import weakref

import pytest

from serve_app.deployments.process import freeze_garbage_collector

FAULTS = """
import resource
import threading

import torch

from serve_app.deployments.process import keep_freed_memory

{first}

def step():
    return torch.ones(10 * 2**20)  # 40 MiB

def steps():
    for _ in range(20):  # the first ones allocate
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=steps)  # as the engine has one
thread.start()
thread.join()
"""
"""Prints the page faults of five steps that need the same memory."""


def test_collections_pass_over_the_objects_of_the_start_and_not_over_later_ones() -> None:
    class Cyclic:
        def __init__(self) -> None:
            self.itself = self

    def dropped() -> "weakref.ref[Cyclic]":
        return weakref.ref(Cyclic())

    of_the_start = dropped()
    try:
        freeze_garbage_collector()
        assert of_the_start() is None, "garbage of the start would be kept for ever"
        assert gc.get_freeze_count() > 10_000
        later = dropped()
        gc.collect()
        assert later() is None
    finally:
        gc.unfreeze()


def faults(first: str) -> int:
    script = FAULTS.format(first=first)
    return int(subprocess.check_output([sys.executable, "-c", script], text=True))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not changed")
def test_a_step_uses_the_memory_again_that_the_last_one_freed() -> None:
    assert faults("keep_freed_memory()") < 1_000
    assert faults("") > 10_000  # else there is nothing to do
