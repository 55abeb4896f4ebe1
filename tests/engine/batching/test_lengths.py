"""Calls with prompts of different lengths return what separate calls return."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from serve_app.engine.batching.axis import Axis, Mask, NotMergeable, Rows, Shared, compare
from serve_app.engine.batching.batch import BatchSpec, MergeableCall
from serve_app.engine.batching.lengths import learn, resized
from serve_app.engine.batching.padding import SHORTEST_BUCKET, bucket_length
from serve_app.engine.batching.rendezvous import Call


def attend(sample: Tensor, *, prompts: Tensor, mask: Tensor | None = None) -> tuple[Tensor]:
    """A denoiser that adds the mean of the prompt's tokens, as its mask tells them."""
    weights = torch.ones(prompts.shape[:2]) if mask is None else mask
    weights = weights.to(prompts.dtype).unsqueeze(-1)  # [rows, tokens, 1]
    return (sample * 2 + (prompts * weights).sum(1) / weights.sum(1),)


def attend_to_lists(
    latents: list[Tensor], timestep: Tensor, *, texts: list[Tensor]
) -> tuple[list[Tensor]]:
    """A denoiser that takes lists, as Z-Image's does."""
    rows = zip(latents, timestep, texts, strict=True)
    return ([latent * 2 + time + text.mean(0) for latent, time, text in rows],)


def attend_by_length(sample: Tensor, *, prompts: Tensor, lengths: Tensor) -> tuple[Tensor]:
    """A denoiser that gets the lengths of its prompts, as ERNIE-Image's does."""
    positions = torch.arange(prompts.shape[1])
    return attend(sample, prompts=prompts, mask=positions < lengths.unsqueeze(1))


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masked(tokens: list[int], seed: int = 0) -> Call:
    """Return the call of a pipeline that pads several prompts, and passes a mask only then."""
    rows = len(tokens)
    mask = (torch.arange(max(tokens)) < torch.tensor(tokens).unsqueeze(1)).long()
    prompts = _draw(seed, rows, max(tokens), 4) * mask.unsqueeze(-1)
    none = len(set(tokens)) == 1
    kwargs = {"prompts": prompts, "mask": None if none else mask}
    return Call("net", (_draw(seed + 1, rows, 4),), kwargs)


def listed(tokens: list[int], seed: int = 0) -> Call:
    """Return the call of a pipeline that passes lists."""
    texts = [_draw(seed + row, count, 4) for row, count in enumerate(tokens)]
    latents = [_draw(seed - row, 4) for row in range(len(tokens))]
    return Call("net", (latents, _draw(seed, len(tokens))), {"texts": texts})


def counted(tokens: list[int], seed: int = 0) -> Call:
    """Return the call of a pipeline that passes the number of tokens."""
    one = masked(tokens, seed)
    return Call(
        "net", one.args, {"prompts": one.kwargs["prompts"], "lengths": torch.tensor(tokens)}
    )


NETWORKS: dict[str, tuple[Any, Any]] = {
    "mask": (attend, masked),
    "list": (attend_to_lists, listed),
    "lengths": (attend_by_length, counted),
}


def run(name: str, call: Call) -> Any:
    return NETWORKS[name][0](*call.args, **call.kwargs)


def spec_of(name: str) -> BatchSpec:
    network, call = NETWORKS[name]
    one, two, both = ((made, run(name, made)) for made in map(call, ([3], [3, 3], [3, 7])))
    return BatchSpec.learn(network, one, two).learn_prompts(one, both)


requests = st.lists(
    st.lists(st.integers(1, SHORTEST_BUCKET), min_size=1, max_size=2), min_size=1, max_size=5
)
"""Tokens of the prompts of each request: of one without guidance, or of two with."""


@pytest.mark.parametrize("name", NETWORKS)
@given(requests, st.booleans())
def test_merged_calls_return_what_separate_calls_return(
    name: str, tokens: list[list[int]], to_bucket: bool
) -> None:
    spec = spec_of(name)
    calls = [NETWORKS[name][1](one, seed) for seed, one in enumerate(tokens)]
    prepared = [spec.prepare(call) for call in calls]
    assert len({one.key for one in prepared}) == 1
    merged = spec.merge(prepared, spec.bucket(prepared) if to_bucket else None)
    for call, [output] in zip(calls, spec.split(run(name, merged), prepared), strict=True):
        [alone] = run(name, call)
        assert len(output) == len(alone)
        for row, expected in zip(output, alone, strict=True):
            torch.testing.assert_close(row, expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_only_prompts_of_one_bucket_are_merged(name: str) -> None:
    spec, (_, call) = spec_of(name), NETWORKS[name]

    def key(tokens: int) -> Any:
        return spec.prepare(call([tokens])).key

    assert key(1) == key(SHORTEST_BUCKET)
    assert key(SHORTEST_BUCKET) != key(SHORTEST_BUCKET + 1) == key(2 * SHORTEST_BUCKET)


@given(st.integers(1, 10**6))
def test_padding_to_a_bucket_is_bounded(tokens: int) -> None:
    padding = bucket_length(tokens) - tokens
    assert 0 <= padding < max(SHORTEST_BUCKET, tokens)
    assert bucket_length(bucket_length(tokens)) == bucket_length(tokens)


def test_a_mask_appears_only_with_padding() -> None:
    spec = spec_of("mask")
    short, long = (spec.prepare(masked([tokens])) for tokens in (3, 5))
    assert spec.merge([short, short]).kwargs["mask"] is None
    assert spec.merge([short, long]).kwargs["mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert spec.merge([short]) is short.call
    alone = spec.merge([short], spec.bucket([short]))
    assert alone.kwargs["prompts"].shape == (1, SHORTEST_BUCKET, 4)
    assert alone.kwargs["mask"].sum() == 3
    guided = spec.prepare(masked([2, 4]))
    assert spec.merge([guided, long]).kwargs["mask"].sum(1).tolist() == [2, 4, 5]


def test_a_network_that_takes_lists_gets_them_unpadded() -> None:
    spec = spec_of("list")
    short, long = (spec.prepare(listed([tokens])) for tokens in (3, 5))
    assert [len(text) for text in spec.merge([short, long]).kwargs["texts"]] == [3, 5]
    assert spec.bucket([short, long]) is None


@pytest.mark.parametrize("name", NETWORKS)
def test_a_call_takes_the_lengths_of_another_for_comparisons(name: str) -> None:
    spec, (_, call) = spec_of(name), NETWORKS[name]
    one, other = (spec.prepare(call([tokens], seed=tokens)) for tokens in (5, 12))

    def prompts(prepared: MergeableCall) -> Tensor:
        values = prepared.values
        return values["prompts"][0] if "prompts" in values else values["texts"][0]

    assert torch.equal(prompts(spec.resized(one, one)), prompts(one))
    longer, shorter = spec.resized(one, other), spec.resized(other, one)
    assert torch.equal(prompts(longer), prompts(one).repeat(3, 1)[:12])
    assert torch.equal(prompts(shorter), prompts(other)[:5])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_spec_survives_a_file(name: str) -> None:
    spec = spec_of(name)
    read = BatchSpec.from_json(NETWORKS[name][0], json.loads(json.dumps(spec.to_json())))
    assert read == spec
    assert read.joins_prompts


def test_a_call_of_another_structure_is_not_merged() -> None:
    spec = spec_of("mask")
    plain = masked([3])
    for change in ({"prompts": _draw(0, 1, 3)[0]}, {"mask": torch.ones(1, 3)}):
        with pytest.raises(NotMergeable):
            spec.prepare(Call("net", plain.args, plain.kwargs | change))
    spec = spec_of("list")
    plain = listed([3])
    for texts in ([], [3], [torch.tensor(1.0)]):
        with pytest.raises(NotMergeable):
            spec.prepare(Call("net", plain.args, {"texts": texts}))


def test_an_argument_that_is_left_out_has_its_default() -> None:
    """A pipeline may leave out for one task what it passes for another."""

    def forward(sample: Tensor, scale: float = 2.0, *, shift: float = 0.0) -> Tensor:
        return sample * scale + shift

    def called(rows: int, **kwargs: float) -> tuple[Call, Tensor]:
        call = Call("net", (torch.ones(rows, 2),), dict(kwargs))
        return call, forward(*call.args, **call.kwargs)

    spec = BatchSpec.learn(forward, called(1, scale=3.0), called(2, scale=3.0))
    left_out, two, three = (
        spec.prepare(called(1, **kwargs)[0]) for kwargs in ({}, {"scale": 2.0}, {"scale": 3.0})
    )
    assert left_out.key == two.key != three.key
    assert torch.equal(forward(**spec.merge([left_out, two]).kwargs), torch.full((2, 2), 2.0))
    with pytest.raises(NotMergeable):
        spec.prepare(called(1, shift=1.0)[0])


def _rows(*shape: int) -> tuple[Axis, Tensor]:
    one = torch.zeros(*shape)
    return compare("x", one, torch.cat([one, one])), one


def test_a_value_that_follows_the_prompt_in_another_way_is_named() -> None:
    axis, one = _rows(1, 3, 3)
    with pytest.raises(NotMergeable, match="x is as long as the prompt in several dimensions"):
        learn(axis, "x", one, torch.zeros(2, 5, 5))
    with pytest.raises(NotMergeable, match="x has 3 rows for two prompts"):
        learn(axis, "x", one, torch.zeros(3, 3, 3))
    with pytest.raises(NotMergeable, match="x has other dimensions"):
        learn(axis, "x", one, torch.zeros(2, 3, 3, 1))
    with pytest.raises(NotMergeable, match="x depends on the prompt, and has no row"):
        learn(Shared(Tensor), "x", torch.zeros(3), torch.zeros(5))
    with pytest.raises(NotMergeable, match=r"x depends on the prompt$"):
        learn(Rows(1), "x", [3], [3, 5])


def test_a_value_of_the_image_stays_as_it_is() -> None:
    axis, one = _rows(1, 3, 3)
    assert learn(axis, "x", one, torch.ones(2, 3, 3)) == axis == Rows(1)
    assert learn(Rows(1), "x", [(2, 2)], [(2, 2), (2, 2)]) == Rows(1)
    shared = compare("x", [(2, 2)], [(2, 2)])  # a size for each prompt, not for each image
    assert learn(shared, "x", [(2, 2)], [(2, 2), (2, 2)]) == shared
    assert learn(Shared(type(None)), "x", None, torch.zeros(2, 5, dtype=torch.bool)) == Mask(
        torch.bool
    )
    assert resized(Rows(1), one, torch.ones(1, 3, 5)) is one


def test_an_output_as_long_as_the_prompt_is_not_joined() -> None:
    def forward(sample: Tensor, prompts: Tensor) -> Tensor:
        return prompts * 2

    def called(rows: int, tokens: int) -> tuple[Call, Tensor]:
        call = Call("net", (torch.zeros(rows, 1), torch.ones(rows, tokens)), {})
        return call, forward(*call.args)

    spec = BatchSpec.learn(forward, called(1, 3), called(2, 3))
    with pytest.raises(NotMergeable, match="the output is as long as the prompt"):
        spec.learn_prompts(called(1, 3), called(2, 5))
