"""The dashboards *Service* and *Engine*: what clients see, and what replicas do."""

from monitoring.panels import MODEL, RATE, Dashboard, panel, quantile, rate, total

SERVICE = Dashboard(
    "Service",
    "What clients see: availability, waiting times, rejected requests.",
    (
        panel(
            "Replicas that run, of those wanted",
            (f"model:diffusion_serve_running:sum{{{MODEL}}}", "{{model}}: running"),
            (f"model:diffusion_serve_wanted:sum{{{MODEL}}}", "{{model}}: wanted"),
            kind="stat",
        ),
        panel(
            "In time, over an hour",
            (f"1 - model:diffusion_serve_missed:ratio_rate1h{{{MODEL}}}", "{{model}}"),
            unit="percentunit",
            kind="stat",
            description="Share of interactive images that were generated in time. The total "
            "includes interactive requests that were rejected or failed, each time that they came.",
        ),
        panel(
            "Load",
            (f"model:diffusion_serve_load:ratio{{{MODEL}}}", "{{model}}"),
            unit="percentunit",
            kind="stat",
            description="Interactive work that arrives, of what the replicas that run get done.",
        ),
        panel(
            "Requests ended, by outcome",
            (f"{rate('requests_total', 'outcome')} > 0", "{{outcome}}"),
            unit="reqps",
            stacked=True,
        ),
        panel(
            "Requests not completed, by Ray cluster",
            (
                "sum by (ray_io_cluster, outcome) (rate(diffusion_serve_requests_total"
                f'{{{MODEL}, outcome!="completed"}}[{RATE}])) > 0',
                "{{ray_io_cluster}} {{outcome}}",
            ),
            unit="reqps",
            stacked=True,
            description="Two clusters serve while an upgrade moves traffic from one to the other.",
        ),
        panel(
            "Requests ended, by API key",
            (f"{rate('requests_total', 'key')} > 0", "{{key}}"),
            unit="reqps",
            stacked=True,
        ),
        panel(
            "Requests open",
            (total("open_requests", "priority"), "{{priority}}"),
            stacked=True,
            description="From arrival to end, wherever they wait: with no replica as well.",
        ),
        panel(
            "Rejected",
            (rate("refusals_total", "reason"), "images: {{reason}}"),
            (
                "sum(diffusion_serve_held_requests * on (replica) group_left () "
                f"max by (replica) (diffusion_serve_gateway_info{{{MODEL}}}))",
                "waiting for a replica, at gateways",
            ),
            description="By engines, and by Serve's queue before them (`queue`). An engine's "
            "rejection reaches the client only if no other engine admits the request.",
        ),
        panel(
            "Waiting time of clients",
            (quantile(0.5, "request_seconds"), "half wait less than"),
            (quantile(0.95, "request_seconds"), "95 % wait less than"),
            (quantile(0.99, "request_seconds"), "99 % wait less than"),
            unit="s",
        ),
        panel(
            "Where the time goes, mean of a request",
            (
                f"{rate('request_part_seconds_sum', 'part')} / on () group_left () "
                f"{rate('request_seconds_count')}",
                "{{part}}",
            ),
            unit="s",
            stacked=True,
        ),
        panel(
            "To the first preview",
            (quantile(0.5, "first_partial_seconds"), "half wait less than"),
            (quantile(0.95, "first_partial_seconds"), "95 % wait less than"),
            unit="s",
        ),
        panel(
            "Late, rejected or failed, of all attempts",
            *(
                (f"model:diffusion_serve_missed:ratio_rate{window}{{{MODEL}}}", window)
                for window in ("5m", "1h", "6h")
            ),
            unit="percentunit",
            description="Attempt: an interactive image that was generated, or an interactive "
            "request that was rejected or failed. The alerts use these; the SLO allows 5 %.",
        ),
        panel(
            "Deadlines",
            (rate("deadlines_total", "outcome", "set_by"), "{{outcome}}, set by the {{set_by}}"),
            stacked=True,
        ),
        panel(
            "Server errors",
            (
                f"model:diffusion_serve_errors:ratio_rate5m{{{MODEL}}}",
                "{{model}} {{ray_io_cluster}}",
            ),
            unit="percentunit",
            description="Of interactive requests.",
        ),
    ),
)

ENGINE = Dashboard(
    "Engine",
    "What each replica does with its time.",
    (
        panel(
            "Images in a denoiser call",
            (
                f"{rate('batch_size_sum', 'replica')} / {rate('batch_size_count', 'replica')}",
                "{{replica}}",
            ),
        ),
        panel(
            "Time of a step, by size",
            (quantile(0.5, "step_seconds", "size"), "{{size}}: half"),
            (quantile(0.95, "step_seconds", "size"), "{{size}}: 95 %"),
            unit="s",
        ),
        panel(
            "Work done in a busy second",
            (f"diffusion_serve_throughput_ratio{{{MODEL}}}", "{{replica}}"),
            unit="s",
            description="In solo seconds: over 1 is the gain of batches.",
        ),
        panel(
            "Backlog",
            (total("backlog_seconds", "replica", "priority"), "{{replica}}, {{priority}}"),
            unit="s",
        ),
        panel(
            "Requests in engines",
            (total("engine_requests", "state"), "{{state}}"),
            stacked=True,
        ),
        panel(
            "Devices at work, by activity",
            (rate("device_seconds_total", "activity"), "{{activity}}"),
            stacked=True,
            description="In replicas: 1 is one that does nothing else.",
        ),
        panel("Images per second, by size", (rate("images_total", "size"), "{{size}}")),
        panel("Pixels per second", (rate("pixels_total"), "pixels"), unit="short"),
        panel(
            "How far predictions are off",
            (quantile(0.5, "forecast_error_ratio"), "half are off by less than"),
            (quantile(0.95, "forecast_error_ratio"), "95 % are off by less than"),
            unit="percentunit",
        ),
        panel(
            "Requests present, and no network runs",
            (rate("engine_stall_seconds_sum", "replica"), "{{replica}}"),
            unit="percentunit",
            description="Share of the time, of pauses over 0.1 s.",
        ),
        panel(
            "Cancelled: until the slot is free",
            (quantile(0.95, "cancellation_seconds"), "95 % take less than"),
            unit="s",
        ),
        panel(
            "Previews, LoRA switches, out of memory",
            (rate("previews_total"), "previews"),
            (rate("lora_switches_total"), "LoRA switches"),
            (rate("out_of_memory_total"), "out of memory"),
        ),
        panel(
            "Replicas, by how requests share the pipeline",
            (total("sharing", "diffusion_serve_sharing"), "{{diffusion_serve_sharing}}"),
            stacked=True,
        ),
        panel(
            "Batched against sequential, at start-up",
            (f"diffusion_serve_sharing_difference{{{MODEL}}}", "{{replica}}"),
            description="Largest difference of a pixel in [0, 1].",
        ),
        panel(
            "Memory of replicas and gateways",
            (
                "process_resident_memory_bytes * on (replica) group_left () "
                f"(diffusion_serve_engine_info{{{MODEL}}} "
                f"or diffusion_serve_gateway_info{{{MODEL}}})",
                "{{replica}}",
            ),
            unit="bytes",
        ),
    ),
)
