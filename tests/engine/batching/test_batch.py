"""Merged calls return what separate calls return, for any tree of arguments."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from serve_app.engine.batching.axis import NotMergeable
from serve_app.engine.batching.batch import BatchSpec
from serve_app.engine.batching.rendezvous import Call


def network(
    sample: Tensor,
    timestep: Tensor | float,
    *,
    embeds: Tensor,
    ids: Tensor | None = None,
    added: dict[str, Any] | None = None,
    shapes: list[tuple[int, int]] | None = None,
    mode: str = "plain",
) -> tuple[Tensor, dict[str, Tensor]]:
    """A denoiser whose every row depends on every argument, and on no other row."""
    rows = sample.shape[0]
    out = sample * 2 + torch.as_tensor(timestep).float().reshape(-1, 1) * 0.1
    out = out + embeds.sum(dim=1)
    if ids is not None:
        out = out + ids.float().sum()
    if added is not None:
        out = out + added["text"].sum(dim=1, keepdim=True)
    if shapes is not None:
        assert len(shapes) == rows
        height, width = shapes[0]  # some networks read only the first
        out = out + height + 3 * width
    return out, {"extra": out[:, :1] * 3}


def call(
    images: int,
    guided: bool,
    seed: int,
    timestep: Any,
    width: int = 4,
    shape: tuple[int, int] = (2, 8),
) -> Call:
    generator = torch.Generator().manual_seed(seed)
    rows = images * (2 if guided else 1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Call(
        "net",
        (draw(rows, width), timestep),
        {
            "embeds": draw(rows, 3, width),
            "ids": torch.arange(5),
            "added": {"text": draw(rows, 2), "none": None},
            "shapes": [shape] * rows,
        },
    )


def run(one: Call) -> Any:
    return network(*one.args, **one.kwargs)


@pytest.fixture(scope="module")
def spec() -> BatchSpec:
    one, two = (call(images, True, 0, torch.tensor(7)) for images in (1, 2))
    return BatchSpec.learn(network, (one, run(one)), (two, run(two)))


timesteps = st.one_of(
    st.integers(0, 999).map(torch.tensor),
    st.floats(0, 999, width=32).map(torch.tensor),
    st.floats(0, 999, width=32),
    st.integers(0, 999),
)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 10**6), timesteps), min_size=1, max_size=6))
def test_merged_calls_return_what_separate_calls_return(
    spec: BatchSpec, rows: list[tuple[bool, int, Any]]
) -> None:
    calls = [call(1, guided, seed, timestep) for guided, seed, timestep in rows]
    prepared = [spec.prepare(one) for one in calls]
    assert len({one.key for one in prepared}) == 1
    outputs = spec.split(run(spec.merge(prepared)), prepared)
    for one, (main, extra) in zip(calls, outputs, strict=True):
        separate_main, separate_extra = run(one)
        torch.testing.assert_close(main, separate_main)
        torch.testing.assert_close(extra["extra"], separate_extra["extra"])


def test_calls_that_differ_in_more_than_rows_have_different_keys(spec: BatchSpec) -> None:
    def key(one: Call) -> Any:
        return spec.prepare(one).key

    plain = call(1, True, 1, torch.tensor(1))
    assert key(plain) == key(call(1, False, 2, torch.tensor(2)))
    assert key(plain) != key(call(1, True, 1, torch.tensor(1), width=8))
    # The same number of tokens, in another shape.
    assert key(plain) != key(call(1, True, 1, torch.tensor(1), shape=(8, 2)))
    other_ids = Call("net", plain.args, plain.kwargs | {"ids": torch.arange(5) + 1})
    assert key(plain) != key(other_ids)
    other_mode = Call("net", plain.args, plain.kwargs | {"mode": "wild"})
    with pytest.raises(NotMergeable):
        key(other_mode)  # an argument that the learned call did not have
    half = Call("net", (plain.args[0].half(), plain.args[1]), plain.kwargs)
    assert key(plain) != key(half)


def test_an_in_place_change_of_a_shared_tensor_changes_the_key(spec: BatchSpec) -> None:
    one = call(1, True, 1, torch.tensor(1))
    before = spec.prepare(one).key
    one.kwargs["ids"].add_(1)
    assert spec.prepare(one).key != before


def test_calls_with_another_structure_are_not_merged(spec: BatchSpec) -> None:
    plain = call(1, True, 1, torch.tensor(1))
    for change in (
        {"added": None},
        {"added": {"text": plain.kwargs["added"]["text"]}},
        {"embeds": plain.kwargs["embeds"][:1]},  # one row where the others have two
        {"added": {"text": plain.kwargs["added"]["text"], "none": torch.zeros(2)}},
    ):
        with pytest.raises(NotMergeable):
            spec.prepare(Call("net", plain.args, plain.kwargs | change))
    with pytest.raises(NotMergeable):
        spec.prepare(Call("net", (plain.args[0], torch.tensor([1, 2])), plain.kwargs))


def test_an_axis_that_does_not_double_with_the_images_is_no_batch_axis() -> None:
    def frames(sample: Tensor) -> Tensor:
        return sample

    one, two = Call("net", (torch.zeros(3, 4),), {}), Call("net", (torch.zeros(5, 4),), {})
    with pytest.raises(NotMergeable, match="sample has shape"):
        BatchSpec.learn(frames, (one, one.args[0]), (two, two.args[0]))
    same = Call("net", (torch.zeros(3, 4),), {})
    with pytest.raises(NotMergeable, match="no tensor"):
        BatchSpec.learn(frames, (same, same.args[0]), (same, same.args[0]))


def test_a_single_call_stays_as_it_is(spec: BatchSpec) -> None:
    one = call(1, True, 3, torch.tensor(5))
    prepared = [spec.prepare(one)]
    assert spec.merge(prepared) is one
    assert spec.split("anything", prepared) == ["anything"]
