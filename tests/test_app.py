"""The application as Serve builds it, without running it."""

from serve_app.app import GRACE_S, build


def test_replicas_that_go_away_may_finish_what_they_took_in() -> None:
    gateway = build({"engine": {"limits": {"max_deadline_s": 45}}})._bound_deployment
    [_, generator] = gateway.init_args
    for deployment in (gateway, generator._bound_deployment):
        assert deployment._deployment_config.graceful_shutdown_timeout_s == 45 + GRACE_S


def test_gateways_keep_off_nodes_that_come_and_go() -> None:
    gateway = build({})._bound_deployment
    assert gateway.ray_actor_options["label_selector"] == {"diffusion-serve/gateway": "!no"}
