"""The arguments of `serve_app.build_openai_app`.

They are those of a config file, with the options of each deployment beside its model. In a config
file these are not in ``args``: Serve reads them below ``deployments``.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from serve_app.config.deployment_names import GATEWAY
from serve_app.config.models import AppConfig, ModelEntry


class DeployedModel(ModelEntry):
    """A model and the options of its deployment."""

    deployment_config: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the model's deployment, as `Deployment.options` of Ray Serve takes "
        "them, such as `ray_actor_options` and `autoscaling_config`. Default: one replica with one "
        "GPU.",
    )


class OpenAIAppConfig(AppConfig):
    """Several models, or one, with the options of their deployments and of the gateway's."""

    models: tuple[DeployedModel, ...] = Field(
        min_length=1,
        description="The models. Requests that name no model go to the first one.",
    )
    ingress_deployment_config: dict[str, Any] = Field(
        default_factory=dict, description="Options of the gateway's deployment."
    )

    @property
    def deployment_options(self) -> Mapping[str, Mapping[str, Any]]:
        """Options of each deployment, by its name."""
        given = [entry.deployment_config for entry in self.models]
        return {
            **dict(zip(self.generators, given, strict=True)),
            GATEWAY: self.ingress_deployment_config,
        }
