"""The doctor beside a running Ray cluster."""

import pytest

from serve_app.doctor.gpus import Place
from serve_app.doctor.software import check_ray_cluster
from tests.e2e.conftest import Server

pytestmark = pytest.mark.serve


def test_the_doctor_compares_the_versions_of_a_running_cluster(server: Server) -> None:
    place = Place({"RAY_ADDRESS": server.ray_address}, device_files=False, container=False)
    finding = check_ray_cluster(place)
    assert finding.outcome == "ok", finding
    assert finding.found.startswith(f"{server.ray_address}: Ray 2.")
