"""The configuration: its models, the environment, Serve config files and model files.

It knows no torch and no Ray, so that a wrong configuration is found before either is started.
Import from the module that owns the name; the names below are here for older call sites.
"""

from serve_app.config.environment import (
    API_KEY_VARIABLE,
    KEYS_PATH_VARIABLE,
    KEYS_VARIABLE,
    api_key_in_environment,
    generation_environment,
    keys_in_environment,
    machine_environment,
)
from serve_app.config.model_files import check_model_folder, find_loras
from serve_app.config.models import (
    DEMO_MODEL_DIR,
    AppConfig,
    EngineConfig,
    GatewayConfig,
    LimitsConfig,
    ModelConfig,
    Side,
    SpeedConfig,
    is_path,
    parse_app_config,
)
from serve_app.config.serve_file import (
    IMPORT_PATH,
    SERVE_DELAYS_S,
    WORK_POLICY,
    foreign_policy,
    policy_kwargs,
    read_autoscaling,
    read_num_gpus,
    read_serve_config,
)

__all__ = [
    "API_KEY_VARIABLE",
    "DEMO_MODEL_DIR",
    "IMPORT_PATH",
    "KEYS_PATH_VARIABLE",
    "KEYS_VARIABLE",
    "SERVE_DELAYS_S",
    "WORK_POLICY",
    "AppConfig",
    "EngineConfig",
    "GatewayConfig",
    "LimitsConfig",
    "ModelConfig",
    "Side",
    "SpeedConfig",
    "api_key_in_environment",
    "check_model_folder",
    "find_loras",
    "foreign_policy",
    "generation_environment",
    "is_path",
    "keys_in_environment",
    "machine_environment",
    "parse_app_config",
    "policy_kwargs",
    "read_autoscaling",
    "read_num_gpus",
    "read_serve_config",
]
