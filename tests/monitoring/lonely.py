"""An application of which one replica starts and no other can: the first takes what all need."""

from pathlib import Path

from ray import serve
from ray.serve import Application


@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0})
class Lonely:
    def __init__(self, place: str) -> None:
        Path(place).mkdir()


def build(args: dict[str, str]) -> Application:
    return Lonely.bind(args["place"])
