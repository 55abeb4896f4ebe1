"""The application with replicas of which one hangs in a denoiser call, once a file exists."""

import os
import threading
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

from ray.serve import Application, Deployment

from serve_app import app
from serve_app.config.models import AppConfig
from serve_app.deployments.generator import Generator

HANG_FILE = "HANG_FILE"
"""Environment variable with the path of the file; the replica that hangs removes it."""


class Hanging(Generator.func_or_class):  # type: ignore[misc,name-defined]
    def __init__(self, config: AppConfig) -> None:
        super().__init__(config)
        [unet] = self._engine._pipeline.denoisers.values()
        unet.conv_in.register_forward_pre_hook(self._hang)

    def _hang(self, *_: object) -> None:
        try:
            Path(os.environ[HANG_FILE]).unlink()
        except FileNotFoundError:
            return
        threading.Event().wait()


def build(args: dict[str, Any]) -> Application:
    hanging = cast(Deployment, Generator).options(func_or_class=Hanging)
    with patch.object(app, "Generator", hanging):
        return app.build(args)
