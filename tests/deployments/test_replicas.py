"""The observed starts of replicas."""

import pytest
from ray.exceptions import RayError

from serve_app.deployments.replicas import Replicas
from tests.fakes.serve_handle import Growing
from tests.fakes.serve_status import always, deployment_status, replica

pytestmark = pytest.mark.anyio

FAILED = "REPLICA_STARTUP_FAILED"


async def test_a_start_is_measured_only_if_its_end_is_observed(growing: Growing) -> None:
    """Seen an hour later, the start may have ended at any time before."""
    now = 1e9
    status = Replicas(growing)
    growing.start_time_s = now - 9.0
    status.observe(await growing(), now)
    growing.grown = True
    status.observe(await growing(), now + 3_600)
    assert status.cold_start_s is None
    growing.grown = False
    status.observe(await growing(), now + 79.0)
    growing.grown = True
    status.observe(await growing(), now + 81.0)
    assert status.cold_start_s == 90.0


async def test_the_expected_rest_of_an_overdue_start_grows(
    growing: Growing,
) -> None:
    now = growing.start_time_s
    status = Replicas(growing)
    assert status.observe(await growing(), now + 20.0).ready_in_s == 40.0  # none was observed yet
    status.cold_start_s = 90.0
    estimates_s = [
        status.observe(await growing(), now + age_s).ready_in_s for age_s in (30, 81, 90, 120, 300)
    ]
    assert estimates_s == [60.0, 9.0, 18.0, 48.0, 228.0]


def test_the_state_follows_from_the_replicas_and_the_last_start() -> None:
    status = Replicas(always(None))
    seen = []
    for replicas, target, trigger in (
        ([], 0, "CONFIG_UPDATE_COMPLETED"),
        ([], 1, "AUTOSCALING"),  # waits for a node
        ([replica("a", "STARTING")], 1, "AUTOSCALING"),
        ([], 1, FAILED),
        ([], 0, "DOWNSCALE_COMPLETED"),  # Serve forgets the failure, with no request left
        ([], 1, "AUTOSCALING"),  # a request makes it try again
        ([replica("b", "STARTING")], 1, "AUTOSCALING"),
        ([replica("b")], 1, "UPSCALE_COMPLETED"),
        ([replica("b"), replica("c", "STARTING")], 2, "AUTOSCALING"),
        ([replica("b", "STOPPING")], 0, "AUTOSCALING"),
    ):
        details = deployment_status(*replicas, target=target, trigger=trigger)
        found = status.observe(details, 1e9)
        assert found.given_up == (trigger == FAILED)
        seen.append(found.state)
    assert seen == [
        "at_zero", "starting", "starting", "failed", "failed", "starting", "starting", "running",
        "running", "at_zero",
    ]  # fmt: skip


async def test_the_state_is_unknown_until_the_controller_has_answered() -> None:
    answers = [RayError(), deployment_status(replica("a")), RayError()]

    async def fetch() -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    status = Replicas(fetch)
    seen = []
    for _ in range(3):
        status._refreshed_at = None  # it is old
        found = await status.refresh()
        seen.append((found.state, found.running))
    assert seen == [("unknown", 1), ("running", 1), ("running", 1)]
