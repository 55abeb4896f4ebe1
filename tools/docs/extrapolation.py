"""The tables of extrapolated denoiser calls, from the file of `tests.benchmarks.extrapolation`."""

from typing import Any

from tools.docs.markdown import table
from tools.docs.results import results

_FAMILIES = {
    "sdxl": "SDXL",
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX.1",
    "qwen-image": "Qwen-Image",
    "sana": "Sana",
    "pixart-sigma": "PixArt-Sigma",
}


def extrapolation_table() -> str:
    """Show calls, speed and distances of each way to generate the same pairs."""
    header = ["way", "calls", "speed", "PSNR to `none`, in dB", "PSNR to the truth, in dB"]
    header += ["marks, in %"]
    lines = [
        [
            _way(row),
            f"{row['calls']:.1f}",
            f"{row['speedup']:.2f}x",
            _to_none(row),
            f"{row['psnr_to_truth_db']:.1f}",
            ", ".join(f"{100 * share:.1f}" for share in row["marks"].values()),
        ]
        for row in results("extrapolation-demo-cpu")["rows"]
    ]
    return table(header, lines)


def _way(row: dict[str, Any]) -> str:
    if row["noise_scheduler"] is not None:
        return f"{row['steps']} steps of `{row['noise_scheduler']}`"
    if row["level"] == "none" and row["name"] != "none":
        return f"{row['steps']} steps"
    return f"`{row['level']}`"


def _to_none(row: dict[str, Any]) -> str:
    if row["name"] == "none":
        return "equal"
    return f"{row['psnr_to_none_db']:.1f} ({row['least_psnr_to_none_db']:.1f})"


def extrapolation_deadlines_table() -> str:
    """Compare one trace of arrivals with and without extrapolation."""
    rows = [
        [
            f"{row['load']:g}",
            f"`{row['way']}`",
            f"{row['images_per_s']:.2f}",
            f"{100 * row['slo']:.0f} %",
            f"{row['p50_s']:.2f} s",
            f"{row['p95_s']:.2f} s",
        ]
        for row in results("extrapolation-demo-cpu")["deadlines"]
    ]
    return table(["load", "acceleration", "images/s", "in time", "p50", "p95"], rows)


def extrapolation_families_table() -> str:
    """Show calls and distances of tiny pipelines with random weights."""
    rows = results("extrapolation-demo-cpu")["families"]
    levels = list(dict.fromkeys(row["level"] for row in rows))
    shown = [f"`{level}`" if " " not in level else level for level in levels]
    lines = []
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = {row["level"]: row for row in rows if row["family"] == family}
        lines.append(
            [
                _FAMILIES[family],
                f"{mine[levels[0]]['all_calls']:.0f}",
                *(_calls(mine[level]) for level in levels),
            ]
        )
    return table(["family", "all calls", *shown], lines)


def _calls(row: dict[str, Any]) -> str:
    if row["calls"] == row["all_calls"]:
        return "all"
    return f"{row['calls']:.0f} calls, {row['psnr_to_none_db']:.0f} dB"
