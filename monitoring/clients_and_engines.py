"""The dashboards *Service* and *Engine*: what clients see, and what replicas do."""

from monitoring.panels import MODEL, RATE, Dashboard, panel, quantile, rate, total

SERVICE = Dashboard(
    "Service",
    "Requests as clients see them: availability, duration, rejections.",
    (
        panel(
            "Replicas: running and target",
            (f"model:diffusion_serve_running:sum{{{MODEL}}}", "{{model}}: running"),
            (f"model:diffusion_serve_wanted:sum{{{MODEL}}}", "{{model}}: target"),
            kind="stat",
        ),
        panel(
            "Attempts in time, last hour",
            (f"1 - model:diffusion_serve_missed:ratio_rate1h{{{MODEL}}}", "{{model}}"),
            unit="percentunit",
            kind="stat",
            description="Interactive images that were generated in time, as a share of all "
            "attempts. Each rejected or failed interactive request is an attempt, too.",
        ),
        panel(
            "Load",
            (f"model:diffusion_serve_load:ratio{{{MODEL}}}", "{{model}}"),
            unit="percentunit",
            kind="stat",
            description="Arriving interactive work, as a share of the throughput of running "
            "replicas.",
        ),
        panel(
            "Ended requests, by outcome",
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
            description="During an upgrade, two Ray clusters serve.",
        ),
        panel(
            "Ended requests, by API key",
            (f"{rate('requests_total', 'key')} > 0", "{{key}}"),
            unit="reqps",
            stacked=True,
        ),
        panel(
            "Open requests",
            (total("open_requests", "priority"), "{{priority}}"),
            stacked=True,
            description="Requests that have arrived and not ended, also while no replica runs.",
        ),
        panel(
            "Rejected images, and waiting requests",
            (rate("rejections_total", "reason"), "rejected images: {{reason}}"),
            (
                total("requests_waiting_for_replica", "model"),
                "{{model}}: requests that wait for a starting replica",
            ),
            description="Engines reject by `deadline` and `backlog`; `queue` is Serve's own queue. "
            "A rejected request may still be admitted by another replica.",
        ),
        panel(
            "Request duration",
            (quantile(0.5, "request_seconds", "model"), "{{model}}: p50"),
            (quantile(0.95, "request_seconds", "model"), "{{model}}: p95"),
            (quantile(0.99, "request_seconds", "model"), "{{model}}: p99"),
            unit="s",
        ),
        panel(
            "Mean request duration, by part",
            (
                f"{rate('request_part_seconds_sum', 'part')} / on () group_left () "
                f"{rate('request_seconds_count')}",
                "{{part}}",
            ),
            unit="s",
            stacked=True,
        ),
        panel(
            "Time to the first preview",
            (quantile(0.5, "first_partial_seconds", "model"), "{{model}}: p50"),
            (quantile(0.95, "first_partial_seconds", "model"), "{{model}}: p95"),
            unit="s",
        ),
        panel(
            "Late, rejected or failed attempts",
            *(
                (
                    f"model:diffusion_serve_missed:ratio_rate{window}{{{MODEL}}}",
                    f"{{{{model}}}}: {window}",
                )
                for window in ("5m", "1h", "6h")
            ),
            unit="percentunit",
            description="Share of all interactive attempts, over three windows. The SLO allows "
            "5 %. The alerts SloBurnFast and SloBurnSlow use these series.",
        ),
        panel(
            "Deadlines met and missed",
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
            description="Share of interactive requests that fail with a server error.",
        ),
    ),
)

ENGINE = Dashboard(
    "Engine",
    "The work of each replica: batches, steps, backlog, memory.",
    (
        panel(
            "Batch size of denoiser calls",
            (
                f"{rate('batch_size_sum', 'replica')} / {rate('batch_size_count', 'replica')}",
                "{{replica}}",
            ),
        ),
        panel(
            "Step time, by image size",
            (quantile(0.5, "step_seconds", "model", "size"), "{{model}} {{size}}: p50"),
            (quantile(0.95, "step_seconds", "model", "size"), "{{model}} {{size}}: p95"),
            unit="s",
        ),
        panel(
            "Throughput of a busy replica",
            (f"diffusion_serve_throughput_ratio{{{MODEL}}}", "{{replica}}"),
            unit="s",
            description="Solo seconds of work per busy second. Values over 1 come from batching.",
        ),
        panel(
            "Backlog",
            (total("backlog_seconds", "replica", "priority"), "{{replica}}, {{priority}}"),
            unit="s",
            description="Predicted time to finish all accepted work.",
        ),
        panel(
            "Requests in engines, by state",
            (total("engine_requests", "state"), "{{state}}"),
            stacked=True,
        ),
        panel(
            "Busy devices, by activity",
            (rate("device_seconds_total", "activity"), "{{activity}}"),
            stacked=True,
            description="1 is one device that is busy all the time.",
        ),
        panel("Images per second, by size", (rate("images_total", "size"), "{{size}}")),
        panel("Pixels per second", (rate("pixels_total"), "pixels"), unit="short"),
        panel(
            "Prediction error of durations",
            (quantile(0.5, "forecast_error_ratio", "model"), "{{model}}: p50"),
            (quantile(0.95, "forecast_error_ratio", "model"), "{{model}}: p95"),
            unit="percentunit",
        ),
        panel(
            "Engine stalls",
            (rate("engine_stall_seconds_sum", "replica"), "{{replica}}"),
            unit="percentunit",
            description="Share of time in gaps of over 0.1 s between network calls, with "
            "requests present.",
        ),
        panel(
            "Time to free a cancelled slot",
            (quantile(0.95, "cancellation_seconds"), "p95"),
            unit="s",
        ),
        panel(
            "Previews, LoRA switches, flagged, out of memory",
            (rate("previews_total"), "previews"),
            (rate("lora_switches_total"), "LoRA switches"),
            (rate("images_flagged_total"), "flagged images"),
            (rate("out_of_memory_total"), "out of memory"),
        ),
        panel(
            "LoRA adapters on demand, per second",
            (rate("lora_loads_total", "result"), "loads: {{result}}"),
            (rate("lora_hits_total"), "found in memory"),
            (rate("lora_evictions_total"), "removed from memory"),
        ),
        panel(
            "Replicas, by sharing mode",
            (total("sharing", "diffusion_serve_sharing"), "{{diffusion_serve_sharing}}"),
            (total("sharing_limited"), "batched, only for prompts of the same length"),
        ),
        panel(
            "Certification difference",
            (f"diffusion_serve_sharing_difference{{{MODEL}}}", "{{replica}}"),
            description="Largest pixel difference, in [0, 1], between batched and sequential at "
            "start-up.",
        ),
        panel(
            "Process memory",
            (
                "process_resident_memory_bytes * on (replica) group_left () max by (replica) "
                f"(diffusion_serve_engine_info{{{MODEL}}} "
                f"or diffusion_serve_gateway_info{{{MODEL}}})",
                "{{replica}}",
            ),
            unit="bytes",
        ),
    ),
)
