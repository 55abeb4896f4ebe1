"""The dashboards *Scaling* and *GPU*: the number of replicas and its reasons, and the devices."""

from monitoring.panels import (
    APPLICATION,
    MODEL,
    NAMESPACE,
    RATE,
    WHOSE,
    Dashboard,
    Query,
    of_deployments,
    of_gpu,
    panel,
    policy,
    rate,
    serve_counts,
    total,
)

SCALING = Dashboard(
    "Scaling",
    "The number of replicas, its reasons, and the effect of one more.",
    (
        panel(
            "Replicas",
            (policy("desired_replicas"), f"{WHOSE}: target of the policy"),
            (
                f"sum by (ray_io_cluster, model) (diffusion_serve_target_replicas{{{MODEL}}})",
                "{{model}} {{ray_io_cluster}}: target of Serve",
            ),
            (
                "sum by (ray_io_cluster, model, state) "
                f'(diffusion_serve_replicas{{{MODEL}, state=~"running|starting"}})',
                "{{model}} {{ray_io_cluster}}: {{state}}",
            ),
        ),
        panel(
            "Needed replicas",
            (policy("needed_replicas", "by"), f"{WHOSE}: for {{{{by}}}}"),
            (policy("forecast_replicas"), f"{WHOSE}: forecast after a cold start"),
            description="Replicas that arriving and waiting work need, before scaling down is "
            "delayed. The forecast is for the time when a replica requested now is ready.",
        ),
        panel(
            "Deciding term",
            (f"{policy('term', 'term')} == 1", f"{WHOSE}: {{{{term}}}}"),
            description="The term that made the last decision: `min`, `max`, `arrivals`, "
            "`backlog`, `batch`, `hold` (scaling down is delayed), `blind` (a load is unknown).",
        ),
        panel(
            "Arriving work and throughput",
            (total("arriving_work_ratio", "model"), "{{model}}: arriving work"),
            (total("throughput_ratio", "model"), "{{model}}: throughput of the running replicas"),
            unit="s",
            description="Solo seconds of work per second.",
        ),
        panel(
            "Load, now and with one more replica",
            (f"model:diffusion_serve_load:ratio{{{MODEL}}}", "{{model}}: now"),
            (
                f"model:diffusion_serve_load:ratio{{{MODEL}}} * model:diffusion_serve_running:sum "
                "/ (model:diffusion_serve_running:sum + 1)",
                "{{model}}: with one more replica",
            ),
            unit="percentunit",
            description="Above 100 %, more work arrives than the replicas finish. Batches and "
            "throughput grow to a limit; the rest is rejected. The second curve assumes equal "
            "throughput per replica. The real gain is smaller, because batches shrink.",
        ),
        panel(
            "Waiting work",
            (total("backlog_seconds", "priority"), "{{priority}}, all replicas"),
            (policy("waiting_seconds"), f"{WHOSE}: input of the policy"),
            unit="s",
        ),
        panel(
            "Utilization, last 30 s",
            (f"diffusion_serve_utilization_ratio{{{MODEL}}}", "{{replica}}"),
            unit="percentunit",
        ),
        panel(
            "Cold start",
            (
                policy("cold_start_seconds"),
                f"{WHOSE}: total, as the policy assumes",
            ),
            (
                f"max by (model, phase) (diffusion_serve_cold_start_seconds{{{MODEL}}})",
                "{{model}}: {{phase}}, slowest replica",
            ),
            unit="s",
        ),
        panel(
            "Deployment status",
            (
                f"min by ({', '.join(APPLICATION)}) "
                f"({of_deployments('ray_serve_deployment_status')})",
                WHOSE,
            ),
            description="Serve's status: 1 deploy failed, 2 unhealthy, 3 updating, 4 upscaling, "
            "5 downscaling, 6 healthy.",
        ),
        panel(
            "Replicas that became ready, and that ended",
            (
                serve_counts("replica_startup_latency_ms_count"),
                f"{WHOSE}: ready",
            ),
            (
                serve_counts("replica_shutdown_duration_ms_count"),
                f"{WHOSE}: ended",
            ),
            description="Counts since Serve's controller started. A replica that fails to start "
            "counts as ended.",
        ),
        panel(
            "Nodes",
            *(
                (
                    f"sum by (node_type) (ray_cluster_{state}_nodes{{{NAMESPACE}}})",
                    f"{{{{node_type}}}}, {state}",
                )
                for state in ("active", "pending", "failed")
            ),
        ),
        panel(
            "RayService readiness",
            (
                f'sum by (name) (kuberay_service_condition_ready{{{NAMESPACE}, condition="true"}})',
                "{{name}}",
            ),
            description="1: KubeRay reports the RayService as Ready.",
        ),
        panel(
            "Silent replicas, and scrape time",
            (
                f'diffusion_serve_scraped_replicas{{{MODEL}, answer="silent"}}',
                "{{deployment}} {{ray_io_cluster}}, silent replicas",
            ),
            (
                f"diffusion_serve_scrape_seconds{{{MODEL}}}",
                "{{ray_io_cluster}} scrape time, in seconds",
            ),
        ),
    ),
    annotations=(
        Query(
            f"{policy('term', 'term')} == 1 and on ({', '.join(APPLICATION)}) "
            f"max by ({', '.join(APPLICATION)}) (changes("
            f"ray_diffusion_serve_autoscaling_desired_replicas{{{NAMESPACE}}}[{RATE}])) > 0",
            f"{WHOSE}: by {{{{term}}}}",
        ),
    ),
)

GPU = Dashboard(
    "GPU",
    "The GPUs, and the replica on each; a curve without a replica is a free GPU.",
    (
        panel(
            "GPU utilization",
            (of_gpu("DCGM_FI_DEV_GPU_UTIL / 100"), "{{replica}} {{UUID}}"),
            unit="percentunit",
        ),
        panel(
            "Tensor core utilization",
            (of_gpu("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"), "{{replica}} {{UUID}}"),
            unit="percentunit",
        ),
        panel(
            "Power",
            (of_gpu("DCGM_FI_DEV_POWER_USAGE"), "{{replica}} {{UUID}}"),
            unit="watt",
        ),
        panel(
            "Device memory in use",
            (
                of_gpu("DCGM_FI_DEV_FB_USED / (DCGM_FI_DEV_FB_USED + DCGM_FI_DEV_FB_FREE)"),
                "{{replica}} {{UUID}}",
            ),
            unit="percentunit",
        ),
        panel(
            "Device memory, as replicas report it",
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
            description="0: no error since the exporter started. The runbook explains the codes.",
        ),
        panel(
            "Network calls out of memory",
            (rate("out_of_memory_total", "replica"), "{{replica}}"),
        ),
        panel(
            "Network busy time",
            (rate("device_seconds_total", "replica"), "{{replica}}"),
            unit="percentunit",
            description="Share of time with a network call, by the engine's clock. Well below "
            "100 % under load, the GPU waits for the host.",
        ),
    ),
)
