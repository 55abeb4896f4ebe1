"""Three models share two GPUs of Ray's own autoscaler: an idle one gives its GPU up to another."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import monotonic

import numpy as np
import pytest

from tests.e2e.model_rotation import (
    BROKEN,
    DEMO,
    DEPLOYMENTS,
    EDIT,
    NODES,
    SDXL,
    alone,
    phase,
    rotate,
    seconds,
)

pytestmark = [pytest.mark.serve, pytest.mark.nightly]

HOLD_S = 3

MAX_HOLD_S = 450
"""Most seconds that a request waits: enough for a slow machine, and not for Serve's own 600."""


def test_an_idle_model_gives_its_gpu_to_one_that_waits(
    tmp_path: Path, report: Callable[[str], None]
) -> None:
    started_at = monotonic()
    rotation = rotate(tmp_path, turns=1, hold_s=HOLD_S, max_hold_s=MAX_HOLD_S)
    took_s = monotonic() - started_at

    # Each image is the one of its own model.
    models = {model["id"]: model for model in rotation.models}
    for answer in rotation.answers:
        expected = alone(models[answer.model], answer.seed).astype(int)
        assert answer.pixels.shape == expected.shape
        # An eighth bit of a color may round in the other direction.
        assert np.abs(answer.pixels - expected).max() <= 1, answer.model
        assert expected.std() > 5, "the image shows nothing"

    # Both GPUs were taken when the third model waited for one.
    seen = [snapshot for _, snapshot in rotation.snapshots]
    assert max(one.nodes for one in seen) == NODES
    assert max(one.running for one in seen) == NODES
    assert any(one.running == NODES and phase(one, EDIT) == "waiting" for one in seen)
    # One of the others left, and came back.
    changes = {}
    for model in (DEMO, SDXL):
        running = [phase(one, model) == "running" for one in seen]
        changes[model] = [now for before, now in pairwise(running) if now != before]
    assert [True, False, True] in changes.values(), changes

    # The fourth model had its turn, and takes no other one down.
    assert rotation.broken.status_code == 503
    assert "could not be started" in rotation.broken.json()["error"]["message"]
    assert {model for model, state in rotation.states.items() if state == "failed"} == {BROKEN}
    assert set(rotation.states) == set(DEPLOYMENTS)

    waited_s = [seconds(rotation, one, "waiting") for one in rotation.answers if one.model == EDIT]
    report(
        f"three models on two fake GPUs: the third one waited {waited_s[0]:.0f} s for a GPU; "
        f"{took_s:.0f} s in all"
    )
