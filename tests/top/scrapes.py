"""Two scrapes of one deployment, ten seconds apart, and what the tests build from scrapes."""

from serve_app.top.series import Series, parse
from serve_app.top.snapshot import History, Snapshot

BEFORE = """
# HELP diffusion_serve_replicas Replicas of the generator by their state.
# TYPE diffusion_serve_replicas gauge
diffusion_serve_replicas{model="demo",state="running"} 2.0
diffusion_serve_replicas{model="demo",state="starting"} 0.0
diffusion_serve_target_replicas{model="demo"} 3.0
diffusion_serve_gateway_info{model="demo",node="a",replica="gw",version="0.1.0"} 1.0
diffusion_serve_engine_info{device="cuda",gpu="GPU-1",model="demo",node="a",replica="r1",version="0.1.0"} 1.0
diffusion_serve_engine_info{device="cuda",gpu="GPU-2",model="demo",node="b",replica="r2",version="0.1.0"} 1.0
diffusion_serve_steps_total{model="demo",replica="r1",size="512"} 100.0
diffusion_serve_images_total{model="demo",replica="r1",size="512"} 4.0
diffusion_serve_device_seconds_total{activity="denoise",model="demo",replica="r1"} 50.0
diffusion_serve_batch_size_sum{model="demo",replica="r1"} 100.0
diffusion_serve_batch_size_count{model="demo",replica="r1"} 50.0
diffusion_serve_request_part_seconds_bucket{le="0.1",model="demo",part="queue",replica="gw"} 10.0
diffusion_serve_request_part_seconds_bucket{le="0.25",model="demo",part="queue",replica="gw"} 10.0
diffusion_serve_request_part_seconds_bucket{le="+Inf",model="demo",part="queue",replica="gw"} 10.0
diffusion_serve_deadlines_total{model="demo",outcome="met",replica="r1",set_by="server"} 4.0
"""  # noqa: E501

AFTER = """
diffusion_serve_replicas{model="demo",state="running"} 2.0
diffusion_serve_replicas{model="demo",state="starting"} 1.0
diffusion_serve_target_replicas{model="demo"} 3.0
diffusion_serve_scraped_replicas{answer="silent",deployment="Generator",model="demo"} 0.0
diffusion_serve_gateway_info{model="demo",node="a",replica="gw",version="0.1.0"} 1.0
diffusion_serve_engine_info{device="cuda",gpu="GPU-1",model="demo",node="a",replica="r1",version="0.1.0"} 1.0
diffusion_serve_engine_info{device="cuda",gpu="GPU-2",model="demo",node="b",replica="r2",version="0.1.0"} 1.0
diffusion_serve_arriving_work_ratio{model="demo",replica="r1"} 1.2
diffusion_serve_arriving_work_ratio{model="demo",replica="r2"} 0.3
diffusion_serve_requests_total{key="anonymous",model="demo",outcome="completed",priority="interactive",replica="gw"} 20.0
diffusion_serve_requests_total{key="anonymous",model="demo",outcome="invalid_value",priority="interactive",replica="gw"} 1.0
diffusion_serve_requests_total{key="other",model="demo",outcome="overloaded",priority="interactive",replica="gw"} 4.0
diffusion_serve_requests_total{key="other",model="demo",outcome="generation_failed",priority="interactive",replica="gw"} 1.0
diffusion_serve_requests_total{key="other",model="demo",outcome="unavailable",priority="interactive",replica="gw"} 0.0
diffusion_serve_requests_total{key="night",model="demo",outcome="overloaded",priority="batch",replica="gw"} 6.0
diffusion_serve_open_requests{model="demo",priority="interactive",replica="gw"} 17.0
diffusion_serve_open_requests{model="demo",priority="batch",replica="gw"} 2.0
diffusion_serve_steps_total{model="demo",replica="r1",size="512"} 150.0
diffusion_serve_steps_total{model="demo",replica="r1",size="1024"} 250.0
diffusion_serve_images_total{model="demo",replica="r1",size="512"} 14.0
diffusion_serve_images_total{model="demo",replica="r1",size="1024"} 10.0
diffusion_serve_device_seconds_total{activity="denoise",model="demo",replica="r1"} 58.5
diffusion_serve_device_seconds_total{activity="decode",model="demo",replica="r1"} 1.0
diffusion_serve_batch_size_sum{model="demo",replica="r1"} 400.0
diffusion_serve_batch_size_count{model="demo",replica="r1"} 150.0
diffusion_serve_engine_requests{model="demo",replica="r1",state="queued"} 3.0
diffusion_serve_engine_requests{model="demo",replica="r1",state="parked"} 12.0
diffusion_serve_engine_requests{model="demo",replica="r1",state="running"} 4.0
diffusion_serve_engine_requests{model="demo",replica="r2",state="queued"} 0.0
diffusion_serve_backlog_seconds{model="demo",priority="interactive",replica="r1"} 12.0
diffusion_serve_backlog_seconds{model="demo",priority="batch",replica="r1"} 888.0
diffusion_serve_backlog_seconds{model="demo",priority="interactive",replica="r2"} NaN
diffusion_serve_device_memory_bytes{kind="total",model="demo",replica="r1"} 85899345920
diffusion_serve_device_memory_bytes{kind="free",model="demo",replica="r1"} 64424509440
process_resident_memory_bytes{replica="r2"} 536870912
diffusion_serve_request_part_seconds_bucket{le="0.1",model="demo",part="queue",replica="gw"} 20.0
diffusion_serve_request_part_seconds_bucket{le="0.25",model="demo",part="queue",replica="gw"} 30.0
diffusion_serve_request_part_seconds_bucket{le="+Inf",model="demo",part="queue",replica="gw"} 30.0
diffusion_serve_deadlines_total{model="demo",outcome="met",replica="r1",set_by="server"} 22.0
diffusion_serve_deadlines_total{model="demo",outcome="missed",replica="r1",set_by="client"} 2.0
diffusion_serve_rejections_total{model="demo",reason="deadline",replica="r1"} 5.0
diffusion_serve_cancellation_seconds_count{model="demo",replica="r1"} 2.0
diffusion_serve_cancellation_seconds_bucket{le="0.01",model="demo",replica="r1"} 0.0
diffusion_serve_cancellation_seconds_bucket{le="0.03",model="demo",replica="r1"} 2.0
diffusion_serve_cancellation_seconds_bucket{le="+Inf",model="demo",replica="r1"} 2.0
diffusion_serve_cold_start_seconds{model="demo",phase="load",replica="r1"} 9.0
diffusion_serve_cold_start_seconds{model="demo",phase="certify",replica="r1"} 4.0
"""  # noqa: E501


def snapshots(*answers: str, every_s: float = 10.0) -> Snapshot:
    history = History()
    seen = [history.add(index * every_s, parse(text)) for index, text in enumerate(answers)]
    return seen[-1]


def steps(values: dict[str, float]) -> Series:
    """Build a scrape with the step counter of each replica."""
    return Series(
        {
            "diffusion_serve_steps_total": {
                frozenset({("replica", replica)}): value for replica, value in values.items()
            }
        }
    )
