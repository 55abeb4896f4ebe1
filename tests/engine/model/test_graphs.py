"""CUDA graphs: which calls share one, and what a replay must not change. On a CPU, with a fake.

`tests/gpu/test_graphs.py` captures real ones.
"""

import gc
import inspect
import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from serve_app.engine.model.graphs import Graphs, NotCapturable, reads_of
from tests.fakes.cuda_graphs import FakeCapture

CPU = torch.device("cpu")


@dataclass
class _Output(BaseOutput):
    sample: Tensor
    count: int


class _Network(nn.Module):
    """A network whose output depends on each of its arguments."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        texts: list[Tensor] | None = None,
        options: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        output = sample * 2 + torch.as_tensor(timestep).reshape(-1, 1)
        for text in texts or ():
            output = output + text.sum()
        for value in (options or {}).values():
            output = output * value
        return _Output(output, len(texts or ())) if return_dict else (output,)


class _Subject:
    """A network with graphs, and the same one without."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.plain, self.network = _Network(), _Network()
        self.state = "no adapters"
        self.capture = FakeCapture()
        self.graphs = Graphs({"unet": self.network}, device, lambda: self.state, self.capture)

    def learn(self, *args: Any, **kwargs: Any) -> None:
        with self.graphs.mode("capture"):
            self.network(*args, **kwargs)

    def replays(self, *args: Any, **kwargs: Any) -> bool:
        """Compare the output with that of the plain network; return True if a graph gave it."""
        before = self.capture.replays
        expected, output = self.plain(*args, **kwargs), self.network(*args, **kwargs)
        assert type(output) is type(expected)
        pair = zip(
            *([one["sample"]] if isinstance(one, dict) else one for one in (expected, output)),
            strict=True,
        )
        assert all(torch.equal(one, two) for one, two in pair)
        assert (self.graphs.replayed is not None) == (self.capture.replays > before)
        return self.capture.replays > before


@pytest.fixture
def subject() -> _Subject:
    return _Subject()


def _sample(rows: int = 2, value: float = 1.0) -> Tensor:
    return torch.full((rows, 3), value)


def test_a_captured_call_is_repeated_with_other_inputs(subject: _Subject) -> None:
    subject.learn(_sample(), torch.tensor([5.0, 6.0]))
    assert subject.replays(_sample(value=4.0), torch.tensor([1.0, 2.0]))
    assert len(subject.graphs) == 1


def test_a_call_that_was_not_captured_runs_as_always(subject: _Subject) -> None:
    assert not subject.replays(_sample(), 5)
    assert len(subject.graphs) == 0
    assert subject.capture.captures == 0


def test_an_output_stays_as_it_is_when_the_next_replay_overwrites_its_memory(
    subject: _Subject,
) -> None:
    subject.learn(_sample(), 5)
    first = subject.network(_sample(value=1.0), 5).sample
    kept = first.clone()
    subject.network(_sample(value=9.0), 5)
    assert torch.equal(first, kept)


def test_inputs_may_change_after_the_call(subject: _Subject) -> None:
    sample = _sample()
    subject.learn(sample, 5)
    sample.fill_(7.0)
    assert subject.replays(_sample(value=3.0), 5)
    assert (sample == 7.0).all()


TEXTS = [torch.ones(4), torch.ones(2)]


@pytest.mark.parametrize(
    ("arguments", "is_alike"),
    [
        ({"sample": _sample(value=8.0)}, True),
        ({"timestep": torch.tensor([9.0, 9.0])}, True),
        ({"texts": [torch.zeros(4), torch.zeros(2)]}, True),
        ({"options": {"scale": 2.0, "of": torch.tensor(9.0)}}, True),
        ({"sample": _sample(rows=3), "timestep": torch.ones(3)}, False),
        ({"sample": _sample().double()}, False),
        ({"timestep": torch.tensor([9, 9])}, False),
        ({"timestep": 9.0}, False),
        ({"texts": TEXTS[:1]}, False),
        ({"texts": (*TEXTS,)}, False),
        ({"texts": [torch.ones(5), torch.ones(2)]}, False),
        ({"options": {"scale": 3.0, "of": torch.tensor(4.0)}}, False),
        ({"options": {"scale": 2, "of": torch.tensor(4.0)}}, False),
        ({"options": {"other": 2.0, "of": torch.tensor(4.0)}}, False),
        ({"options": None}, False),
        ({"return_dict": False}, False),
    ],
)
def test_calls_share_a_graph_if_they_differ_in_the_values_of_tensors_only(
    subject: _Subject, arguments: dict[str, Any], is_alike: bool
) -> None:
    known: dict[str, Any] = {
        "sample": _sample(),
        "timestep": torch.tensor([5.0, 6.0]),
        "texts": TEXTS,
        "options": {"scale": 2.0, "of": torch.tensor(4.0)},
        "return_dict": True,
    }
    subject.learn(**known)
    assert subject.replays(**(known | arguments)) == is_alike


@pytest.mark.parametrize(
    ("learned", "other"), [(5, 7), (0.5, 0.25), (torch.tensor(5), torch.tensor(7))]
)
def test_a_timestep_is_an_input_even_as_a_number(
    subject: _Subject, learned: Any, other: Any
) -> None:
    subject.learn(_sample(), learned)
    assert subject.replays(_sample(), other)


def test_arguments_by_name_and_by_position_are_alike(subject: _Subject) -> None:
    subject.learn(_sample(), 5)
    assert subject.replays(timestep=6, sample=_sample(value=2.0))


def test_other_adapters_have_other_graphs(subject: _Subject) -> None:
    subject.learn(_sample(), 5)
    subject.state = "an adapter"
    assert not subject.replays(_sample(), 5)
    subject.state = "no adapters"
    assert subject.replays(_sample(), 5)


def test_graphs_can_be_off_and_discarded(subject: _Subject) -> None:
    subject.learn(_sample(), 5)
    key = subject.graphs.replayed
    with subject.graphs.mode("off"):
        assert not subject.replays(_sample(), 5)
    assert subject.replays(_sample(), 5)
    subject.graphs.discard(key)
    assert not subject.replays(_sample(), 5)


def test_a_capture_that_fails_leaves_no_graph(subject: _Subject) -> None:
    subject.capture.fail_at[1] = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError):
        subject.learn(_sample(), 5)
    assert not subject.replays(_sample(), 5)
    subject.learn(_sample(), 5)
    assert subject.replays(_sample(), 5)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"options": {"scale": object()}}, "scale is a object"),
        ({"texts": {torch.ones(2)}}, "texts is a set"),
    ],
)
def test_arguments_that_are_neither_inputs_nor_constants_are_not_captured(
    subject: _Subject, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(NotCapturable, match=reason):
        subject.learn(sample=_sample(), timestep=5, **arguments)


def test_a_tensor_elsewhere_is_not_captured_and_its_call_runs() -> None:
    subject = _Subject(torch.device("cuda"))  # the tensors are on the CPU
    with pytest.raises(NotCapturable, match="sample is a tensor on the cpu"):
        subject.learn(_sample(), 5)
    assert not subject.replays(_sample(), 5)


def test_a_network_with_replaced_attention_is_not_captured() -> None:
    class Attending(_Network):
        attn_processors: dict[str, object] = {"mid": object()}  # noqa: RUF012

    network = Attending()
    graphs = Graphs({"unet": network}, CPU, tuple, FakeCapture())
    network.attn_processors = {"mid": object()}
    with graphs.mode("capture"), pytest.raises(NotCapturable, match="replaces the attention"):
        network(_sample(), 5)


def test_the_signature_of_a_network_stays_visible(subject: _Subject) -> None:
    assert inspect.signature(subject.network.forward) == inspect.signature(subject.plain.forward)


def test_a_wrong_argument_raises_what_the_network_would(subject: _Subject) -> None:
    with pytest.raises(TypeError, match="unexpected"):
        subject.network(_sample(), 5, colour="red")


class _Cached(nn.Module):
    """A network that keeps one table, of the last length that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.table = torch.empty(0)

    def forward(self, sample: Tensor) -> Tensor:
        if len(self.table) != len(sample):
            self.table = torch.arange(len(sample)).float().unsqueeze(1)
        hidden = self.layer(sample)
        return (hidden + self.table).relu_()


@pytest.mark.parametrize(
    "backend",
    [
        None,
        "eager",
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(
                shutil.which("g++") is None and "CI" not in os.environ,
                reason="torch compiles for a CPU with g++",
            ),
        ),
    ],
)
def test_what_a_graph_reads_outlives_the_cache_that_held_it(backend: str | None) -> None:
    network = _Cached()
    run: Callable[[Tensor], Tensor] = network
    if backend is not None:
        run = torch.compile(network, backend=backend, dynamic=False)
    sample = torch.ones(4, 3)
    with torch.no_grad():
        run(sample)  # fills the cache, and compiles
        kept = reads_of(lambda: run(sample))
        table = weakref.ref(network.table.untyped_storage())
        run(torch.ones(5, 3))
    gc.collect()
    assert table() is not None
    storages = {tensor.untyped_storage().data_ptr() for tensor in kept}
    expected = [sample, network.layer.weight, network.layer.bias]
    assert {tensor.untyped_storage().data_ptr() for tensor in expected} < storages
    assert len(kept) == 4  # and no intermediate result
