"""Jobs park at each call of a watched module and resume with its output."""

import inspect

import pytest
import torch
from torch import Tensor, nn

from serve_app.engine.batching.rendezvous import Job, Rendezvous


class Doubler(nn.Module):
    def forward(self, sample: Tensor, scale: float = 2.0) -> Tensor:
        return sample * scale


@pytest.fixture
def network() -> Doubler:
    return Doubler()


def test_a_job_parks_at_each_call_and_resumes_with_the_output(network: Doubler) -> None:
    rendezvous = Rendezvous({"net": network})
    job = Job(
        lambda: float(network(torch.tensor(1.0))) + float(network(torch.tensor(5.0), scale=3))
    )
    job.start()
    assert job.call is not None
    assert job.call.site == "net"
    assert rendezvous.forward(job.call) == 2
    job.resume(torch.tensor(10.0))
    assert job.call is not None
    assert job.call.kwargs == {"scale": 3}
    job.resume(torch.tensor(20.0))
    assert job.finished
    assert job.call is None
    assert job.result == 30


def test_a_call_from_outside_a_job_runs_at_once(network: Doubler) -> None:
    rendezvous = Rendezvous({"net": network})
    assert network(torch.tensor(4.0)) == 8
    assert "scale" in inspect.signature(network.forward).parameters
    rendezvous.close()
    assert "forward" not in vars(network)


def test_jobs_resume_in_any_order(network: Doubler) -> None:
    Rendezvous({"net": network})
    jobs = [
        Job(lambda n=n: [float(network(torch.tensor(float(n)))) for _ in range(3)])
        for n in range(4)
    ]
    for job in jobs:
        job.start()
    for round_ in range(3):
        for job in reversed(jobs) if round_ % 2 else jobs:
            assert job.call is not None
            job.resume(job.call.args[0] + 100)
    assert [job.result for job in jobs] == [[100.0 + n] * 3 for n in range(4)]


def test_an_error_in_the_call_is_raised_inside_the_job(network: Doubler) -> None:
    Rendezvous({"net": network})
    seen: list[str] = []

    def run() -> None:
        try:
            network(torch.tensor(1.0))
        except ValueError as error:
            seen.append(str(error))
            raise

    job = Job(run)
    job.start()
    job.fail(ValueError("no memory"))
    assert job.finished
    assert seen == ["no memory"]
    assert isinstance(job.error, ValueError)


def test_a_killed_job_runs_finally_blocks_that_call_the_network(network: Doubler) -> None:
    Rendezvous({"net": network})
    cleaned: list[str] = []

    def run() -> None:
        try:
            network(torch.tensor(1.0))
        finally:
            try:
                network(torch.tensor(2.0))
            finally:
                cleaned.append("yes")

    job = Job(run)
    job.start()
    job.kill()
    assert job.finished
    assert cleaned == ["yes"]
    job.kill()  # does nothing


def test_a_job_that_never_started_can_be_killed(network: Doubler) -> None:
    job = Job(lambda: network(torch.tensor(1.0)))
    job.kill()
    assert job.finished
