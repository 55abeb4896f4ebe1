"""Answers without the denoiser: exact where outputs are straight, none where they are not."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serve_app.engine.batching.extrapolation import MOST_IN_A_ROW, Extrapolator
from serve_app.engine.batching.rendezvous import Call
from serve_app.engine.model.call_hooks import report_timesteps

SITES = {"unet"}
DOWN = [float(timestep) for timestep in range(990, 0, -33)]
PROMPT = torch.ones(2)

Output = Callable[[float], Any]


class Run:
    """A request that calls its denoiser once at each of its timesteps, or more often."""

    def __init__(
        self,
        outputs: Sequence[Output],
        timesteps: Sequence[float] = DOWN,
        most_error: float = 0.04,
        sites: Sequence[str] = ("unet",),
    ) -> None:
        self.outputs = outputs
        self.timesteps = timesteps
        self.sites = sites
        self.extrapolator = Extrapolator(most_error, set(sites))
        self.made: list[int] = []
        self.step = 0

    def call(self, output: Any, prompt: Tensor, site: str = "unet") -> Any:
        def make(call: Call) -> Any:
            self.made.append(self.step)
            return output

        arguments = {"timestep": torch.ones(1), "encoder_hidden_states": prompt}
        return self.extrapolator.answer(Call(site, (torch.zeros(2),), arguments), make)

    def advance(self, prompts: Sequence[Tensor] = (PROMPT, PROMPT)) -> list[Any]:
        """Make one step; return the outputs that the pipeline gets."""
        timestep = self.timesteps[self.step]
        outputs = [
            self.call(output(timestep), prompt, site)
            for site in self.sites
            for output, prompt in zip(self.outputs, prompts, strict=False)
        ]
        self.extrapolator.stepped(timestep, self.timesteps)
        self.step += 1
        return outputs

    def finish(self) -> list[list[Any]]:
        return [self.advance() for _ in self.timesteps[self.step :]]

    @property
    def skipped(self) -> list[int]:
        return [step for step in range(len(self.timesteps)) if step not in self.made]


def straight(slope: float = 0.5) -> Output:
    return lambda timestep: (torch.tensor([3.0, -1.0]) + slope * timestep,)


def bent(bend: float) -> Output:
    return lambda timestep: (torch.tensor([1000.0, 500.0]) + bend * timestep**2,)


def test_a_straight_output_is_answered_exactly_and_at_most_three_times_in_a_row() -> None:
    run = Run([straight()])
    answers = run.finish()
    for timestep, [answer] in zip(DOWN, answers, strict=True):
        assert torch.allclose(answer[0], straight()(timestep)[0], rtol=1e-5)
    groups = [[0, 1, 2, 3], [7], [11], [15], [19], [23], [27], [29]]
    assert run.made == [step for group in groups for step in group]
    assert run.extrapolator.answered == len(DOWN) - len(run.made)
    assert MOST_IN_A_ROW == 3


def noisy(timestep: float) -> Any:
    return (torch.randn(64, generator=torch.Generator().manual_seed(int(timestep))),)


def nan(timestep: float) -> Any:
    return (torch.tensor([timestep, float("nan")]),)


@pytest.mark.parametrize(
    ("outputs", "timesteps"),
    [
        ([noisy], DOWN),  # of a sampler that adds noise at each step
        ([nan], DOWN),
        ([lambda _: (torch.zeros(2),)], DOWN),  # the error has no measure
        ([straight(), noisy], DOWN),  # one of two calls of a step
        ([straight()], DOWN[:5]),  # the first four and the last
        ([straight()], [990.0] + [one for one in DOWN[1:] for _ in range(2)]),  # Heun's method
        ([straight()], [one + way for one in DOWN for way in (33.0, 0.0)]),  # back and forth
        ([lambda timestep: (torch.ones(int(timestep)),)], DOWN),  # of another shape at each step
    ],
)
def test_what_shows_no_line_is_never_answered(
    outputs: Sequence[Output], timesteps: Sequence[float]
) -> None:
    run = Run(outputs, timesteps)
    run.finish()
    assert run.skipped == []


def test_the_predicted_error_is_that_of_the_answer() -> None:
    """Outputs with a constant bend: the error of each line follows from that of the one before."""
    for most_error in (0.002, 0.01, 0.05):
        run = Run([bent(1e-3)], most_error=most_error)
        answers = run.finish()
        errors = []
        for timestep, [answer] in zip(DOWN, answers, strict=True):
            [true] = bent(1e-3)(timestep)
            errors.append(float((answer[0] - true).norm() / true.norm()))
        # The norm is that of the output before, which is no further off than the next one.
        assert max(errors) <= 1.5 * most_error
        assert run.skipped
    assert len(Run([bent(1e-3)], most_error=0.05).finish()) == len(DOWN)


def test_more_error_allows_fewer_calls() -> None:
    made = []
    for most_error in (0.0, 0.004, 0.02, 1.0):
        run = Run([bent(1e-3)], most_error=most_error)
        run.finish()
        made.append(len(run.made))
    assert made == sorted(made, reverse=True)
    assert (made[0], made[-1]) == (30, 11)


def test_a_call_with_another_prompt_is_made() -> None:
    """Guidance in a part of the steps: then the second call of a step is missing, or the first."""
    other = torch.zeros(2)
    run = Run([straight()])
    for _ in range(6):
        run.advance([PROMPT])
    assert run.skipped[:2] == [4, 5]
    [answer] = run.advance([other])
    assert run.made[-1] == 6
    assert torch.equal(answer[0], straight()(DOWN[6])[0])
    for _ in range(3):
        run.advance([other])
    assert run.made[-4:] == [6, 7, 8, 9]
    run.advance([other])
    assert run.made[-1] == 9


def test_another_site_of_a_later_part_of_the_steps_begins_anew() -> None:
    run = Run([straight()])
    run.extrapolator._sites = {"unet", "transformer_2"}
    for _ in range(10):
        run.advance()
    run.sites = ["transformer_2"]
    run.finish()
    assert run.made[4:9] == [7, 10, 11, 12, 13]


def test_calls_of_other_sites_are_made() -> None:
    run = Run([straight()])
    for step in range(8):
        run.call(None, PROMPT, "vae")
        assert run.made[-1] == step
        run.advance()


def test_it_holds_two_outputs_for_each_call_of_a_step() -> None:
    run = Run([straight(), straight(2.0)])
    for _ in DOWN:
        run.advance()
        assert run.extrapolator.nbytes <= 2 * 2 * 8


def test_an_output_may_be_a_share_of_a_batch_and_be_written_into() -> None:
    batch = torch.zeros(8, 2)
    run = Run([lambda timestep: (batch[3].fill_(0.5 * timestep),)])
    answers = [[one[0].clone() for one in run.advance()] for _ in DOWN]
    for timestep, [answer] in zip(DOWN, answers, strict=True):
        assert torch.allclose(answer, torch.full((2,), 0.5 * timestep))
    batch.fill_(0.0)
    assert run.skipped
    assert run.extrapolator.nbytes == 2 * 2 * 4


def test_sixteen_bits_keep_their_type() -> None:
    run = Run([lambda timestep: (torch.full((4,), 100 + timestep, dtype=torch.bfloat16),)])
    answers = run.finish()
    assert run.skipped
    assert {answer[0].dtype for [answer] in answers} == {torch.bfloat16}
    for timestep, [answer] in zip(DOWN, answers, strict=True):
        assert float(answer[0][0]) == pytest.approx(100 + timestep, rel=2**-6)


Shape = st.lists(st.integers(1, 3), min_size=0, max_size=2)
Trees = st.recursive(
    st.builds(lambda shape: ("leaf", tuple(shape)), Shape),
    lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda items: ("tree", items)),
    max_leaves=4,
)


def tree_of(kind: tuple[str, Any], slope: float, start: float, dict_too: bool) -> Output:
    def output(timestep: float) -> Any:
        what, inner = kind
        if what == "leaf":
            return torch.full(inner, start + slope * timestep)
        items = [
            tree_of(one, slope + index, start, dict_too)(timestep)
            for index, one in enumerate(inner)
        ]
        return {str(index): one for index, one in enumerate(items)} if dict_too else tuple(items)

    return output


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [leaf for item in items for leaf in leaves(item)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_histories_of_requests_sites_and_places_never_mix(data: st.DataObject) -> None:
    """Requests with trees of their own advance in any order: each gets its own lines."""
    runs = []
    for number in range(data.draw(st.integers(1, 3))):
        kinds = data.draw(st.lists(Trees, min_size=1, max_size=2))
        outputs = [
            tree_of(kind, 1.0 + 7 * number + place, 100.0 * number, data.draw(st.booleans()))
            for place, kind in enumerate(kinds)
        ]
        timesteps = DOWN[: data.draw(st.integers(1, 12))]
        sites = data.draw(st.sampled_from([("unet",), ("unet", "controlnet")]))
        runs.append(Run(outputs, timesteps, data.draw(st.sampled_from([0.01, 1.0])), sites))
    waiting = list(runs)
    while waiting:
        run = data.draw(st.sampled_from(waiting))
        answers, timestep = run.advance(), run.timesteps[run.step - 1]
        for answer, output in zip(answers, [*run.outputs] * len(run.sites), strict=True):
            true = output(timestep)
            assert type(answer) is type(true)
            for one, two in zip(leaves(answer), leaves(true), strict=True):
                assert torch.allclose(one, two, rtol=1e-4, atol=1e-2)
        if run.step == len(run.timesteps):
            waiting.remove(run)
            assert set(run.made) >= {0, run.step - 1}


@pytest.mark.parametrize(
    "kind", [diffusers.DDIMScheduler, diffusers.FlowMatchEulerDiscreteScheduler]
)
def test_steps_of_a_noise_scheduler_and_of_its_copies_are_reported(kind: Any) -> None:
    noise_scheduler = kind()
    seen: list[float] = []
    report_timesteps(noise_scheduler, lambda timestep, timesteps: seen.append(timestep))
    noise_scheduler.set_timesteps(4)
    other, plain = copy.deepcopy(noise_scheduler), kind()
    plain.set_timesteps(4)
    sample = torch.ones(1, 2, 4, 4)
    for timestep in noise_scheduler.timesteps:
        results = [
            one.step(0.5 * sample, timestep, sample, return_dict=False)[0]
            for one in (noise_scheduler, other, plain)
        ]
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[2])
    assert seen == [float(one) for one in plain.timesteps for _ in range(2)]
    assert isinstance(noise_scheduler, kind)
