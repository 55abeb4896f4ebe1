"""The dashboards *Scaling* and *GPU*: the number of replicas and its reasons, and the devices."""

from monitoring.panels import (
    APPLICATION,
    MODEL,
    NAMESPACE,
    RATE,
    WHOSE,
    Dashboard,
    Query,
    of_gpu,
    panel,
    policy,
    rate,
    serve_counts,
    total,
)

SCALING = Dashboard(
    "Scaling",
    "How many replicas there are, why, and what one more would buy.",
    (
        panel(
            "Replicas",
            (policy("wanted_replicas"), f"{WHOSE}: wanted by the policy"),
            (
                f"sum by (ray_io_cluster, model) (diffusion_serve_target_replicas{{{MODEL}}})",
                "{{model}} {{ray_io_cluster}}: wanted by Serve",
            ),
            (
                "sum by (ray_io_cluster, model, state) "
                f'(diffusion_serve_replicas{{{MODEL}, state=~"running|starting"}})',
                "{{model}} {{ray_io_cluster}}: {{state}}",
            ),
        ),
        panel(
            "Replicas that the policy would need",
            (policy("needed_replicas", "by"), f"{WHOSE}: for {{{{by}}}}"),
            (policy("forecast_replicas"), f"{WHOSE}: busy when one requested now is ready"),
        ),
        panel(
            "What decided",
            (f"{policy('term', 'term')} == 1", f"{WHOSE}: {{{{term}}}}"),
        ),
        panel(
            "Arriving work and throughput",
            (total("arriving_work_ratio"), "arrives"),
            (total("throughput_ratio"), "the replicas that run can do"),
            unit="s",
            description="Solo seconds of work per second.",
        ),
        panel(
            "Load, and shared with one replica more",
            (f"model:diffusion_serve_load:ratio{{{MODEL}}}", "{{model}}: now"),
            (
                f"model:diffusion_serve_load:ratio{{{MODEL}}} * model:diffusion_serve_running:sum "
                "/ (model:diffusion_serve_running:sum + 1)",
                "{{model}}: if one more did as much as each of them",
            ),
            unit="percentunit",
            description="Above 100 % more work arrives than is done. Batches grow, and with them "
            "throughput, to its limit; work above that is rejected. One more replica makes batches "
            "smaller, so that it gains somewhat less than shown.",
        ),
        panel(
            "Work that waits",
            (total("backlog_seconds", "priority"), "{{priority}}, of all replicas"),
            (policy("waiting_seconds"), f"{WHOSE}: that the policy sees"),
            unit="s",
        ),
        panel(
            "Busy, over 30 s",
            (f"diffusion_serve_utilization_ratio{{{MODEL}}}", "{{replica}}"),
            unit="percentunit",
        ),
        panel(
            "Start of a replica",
            (
                policy("cold_start_seconds"),
                f"{WHOSE}: until it can generate, by the policy",
            ),
            (
                f"max by (phase) (diffusion_serve_cold_start_seconds{{{MODEL}}})",
                "{{phase}}, of the slowest",
            ),
            unit="s",
        ),
        panel(
            "Serve's status of each deployment",
            (
                f"min by ({', '.join(APPLICATION)}) (ray_serve_deployment_status{{{NAMESPACE}}})",
                f"{WHOSE} {{{{deployment}}}}",
            ),
            description="1 failed, 2 unhealthy, 3 updating, 4 scaling up, 5 down, 6 healthy.",
        ),
        panel(
            "Replicas that got ready, and that ended",
            (
                serve_counts("replica_startup_latency_ms_count"),
                f"{WHOSE} {{{{deployment}}}}: ready",
            ),
            (
                serve_counts("replica_shutdown_duration_ms_count"),
                f"{WHOSE} {{{{deployment}}}}: ended",
            ),
            description="Since Serve's controller began; those whose start failed have ended.",
        ),
        panel(
            "Nodes",
            *(
                (
                    f"sum by (node_type) (ray_cluster_{state}_nodes{{{NAMESPACE}}})",
                    f"{{{{node_type}}}}, {words}",
                )
                for state, words in (
                    ("active", "there"),
                    ("pending", "coming"),
                    ("failed", "failed"),
                )
            ),
        ),
        panel(
            "KubeRay's status of the service",
            (
                f'sum by (name) (kuberay_service_condition_ready{{{NAMESPACE}, condition="true"}})',
                "{{name}}",
            ),
            description="1: a gateway responds.",
        ),
        panel(
            "Replicas that did not report metrics",
            (
                f'diffusion_serve_scraped_replicas{{{MODEL}, answer="silent"}}',
                "{{deployment}} {{ray_io_cluster}}, silent",
            ),
            (
                f"diffusion_serve_scrape_seconds{{{MODEL}}}",
                "{{ray_io_cluster}} seconds of a scrape",
            ),
        ),
    ),
    annotations=(
        Query(
            f"{policy('term', 'term')} == 1 and on ({', '.join(APPLICATION)}) "
            f"max by ({', '.join(APPLICATION)}) (changes("
            f"ray_diffusion_serve_autoscaling_wanted_replicas{{{NAMESPACE}}}[{RATE}])) > 0",
            f"{WHOSE}: by {{{{term}}}}",
        ),
    ),
)

GPU = Dashboard(
    "GPU",
    "What the devices do, and for which replica: a GPU without a name has no replica.",
    (
        panel(
            "A kernel runs",
            (of_gpu("DCGM_FI_DEV_GPU_UTIL / 100"), "{{replica}} {{UUID}}"),
            unit="percentunit",
        ),
        panel(
            "Tensor cores at work",
            (of_gpu("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"), "{{replica}} {{UUID}}"),
            unit="percentunit",
        ),
        panel(
            "Power",
            (of_gpu("DCGM_FI_DEV_POWER_USAGE"), "{{replica}} {{UUID}}"),
            unit="watt",
        ),
        panel(
            "Memory used, of the device",
            (
                of_gpu("DCGM_FI_DEV_FB_USED / (DCGM_FI_DEV_FB_USED + DCGM_FI_DEV_FB_FREE)"),
                "{{replica}} {{UUID}}",
            ),
            unit="percentunit",
        ),
        panel(
            "Memory as the replica sees it",
            (total("device_memory_bytes", "replica", "kind"), "{{replica}} {{kind}}"),
            unit="bytes",
        ),
        panel(
            "Temperature",
            (of_gpu("DCGM_FI_DEV_GPU_TEMP"), "{{replica}} {{UUID}}"),
            unit="celsius",
        ),
        panel(
            "Last Xid",
            (of_gpu("DCGM_FI_DEV_XID_ERRORS"), "{{replica}} {{UUID}}"),
            description="0 is good. docs/operate/runbook.md says which codes mean what.",
        ),
        panel(
            "Network calls that found too little memory",
            (rate("out_of_memory_total", "replica"), "{{replica}}"),
        ),
        panel(
            "Seconds that networks ran, a second",
            (rate("device_seconds_total", "replica"), "{{replica}}"),
            unit="percentunit",
            description="By the engine's clock: far from 100 % under load, it waits for the host.",
        ),
    ),
)
