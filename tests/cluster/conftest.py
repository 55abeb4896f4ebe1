"""What tests of rendered manifests need."""

import os

import pytest

from tests.cluster.schemas import CRD_DIR


@pytest.fixture
def crds() -> None:
    """Skip the test without KubeRay's CRDs; in CI, fail."""
    if not CRD_DIR.is_dir():
        reason = f"KUBERAY_CRD_DIR: no folder {CRD_DIR} with the CRDs of KubeRay 1.7.0"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
