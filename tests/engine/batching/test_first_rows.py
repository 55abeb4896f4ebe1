"""Arguments of which a network reads one row for all are found, and must be equal to be merged."""

import torch
from torch import Tensor

from serve_app.engine.batching.axis import FirstRow
from serve_app.engine.batching.axis_json import from_json, to_json
from serve_app.engine.batching.batch import BatchSpec
from serve_app.engine.batching.first_rows import mark_first_rows
from serve_app.engine.batching.rendezvous import Call


def _careless(hidden_states: Tensor, ids: Tensor, scales: Tensor) -> Tensor:
    """Read the positions of the first row only, and every other argument row by row."""
    return hidden_states * scales + ids[0]


def _forward(call: Call) -> Tensor:
    return _careless(*call.args, **call.kwargs)


def _call(rows: int, seed: int, ids: Tensor) -> Call:
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(1, 4, generator=generator).repeat(rows, 1)
    scales = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).repeat(rows, 1)
    arguments = {"hidden_states": hidden_states, "ids": ids.repeat(rows, 1), "scales": scales}
    return Call("net", (), arguments)


def _differs(one: Tensor, two: Tensor) -> bool:
    return not torch.allclose(one, two)


def test_positions_that_are_read_from_the_first_row_must_be_equal() -> None:
    ids, others = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 2, 1, 3]])
    first, second = _call(1, 1, ids), _call(1, 2, ids)
    two = _call(2, 1, ids)
    spec = BatchSpec.learn(_careless, (first, _forward(first)), (two, _forward(two)))
    assert spec.prepare(first).key == spec.prepare(_call(1, 3, others)).key
    marked = mark_first_rows(spec, first, second, _forward, _differs)
    kinds = {name for name, axis in marked.arguments.children if isinstance(axis, FirstRow)}
    assert kinds == {"ids"}
    assert marked.prepare(first).key == marked.prepare(second).key
    assert marked.prepare(first).key != marked.prepare(_call(1, 3, others)).key
    assert from_json(to_json(marked.arguments)) == marked.arguments
