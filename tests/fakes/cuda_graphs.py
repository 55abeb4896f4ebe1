"""A stand-in for the capture of CUDA graphs that works on a CPU."""

from collections.abc import Callable
from typing import Any

from serve_app.engine.batching.axis import tensors
from serve_app.engine.model.graphs import Graphs
from serve_app.engine.model.pipeline import LoadedPipeline


class FakeCapture:
    """Captures a run by keeping it: a replay runs it anew, and writes to the same memory."""

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0
        self.fail_at: dict[int, Exception] = {}
        """Errors by the number of the capture that raises them, from 1."""
        self.is_stale = False
        """True if replays keep the output of the capture, as if nothing were an input."""

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captures += 1
        if self.captures in self.fail_at:
            raise self.fail_at[self.captures]
        output = run()

        def replay() -> None:
            self.replays += 1
            if not self.is_stale:
                for place, value in zip(tensors(output), tensors(run()), strict=True):
                    place.copy_(value)

        return replay, output


def with_graphs(pipeline: LoadedPipeline) -> tuple[Graphs, FakeCapture]:
    """Give the denoisers of a pipeline on a CPU graphs; use it before its engine starts."""
    capture = FakeCapture()
    graphs = Graphs(pipeline.denoisers, pipeline.device, lambda: pipeline.adapters.active, capture)
    pipeline.graphs = graphs
    return graphs, capture
