"""The tables and figures of the documentation are those of the result files."""

import statistics
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import jinja2
import pytest

from tools.docs import scaling, tables
from tools.docs.macros import MACROS
from tools.docs.results import RESULTS, results

TABLES = [
    macro
    for macro in MACROS
    if macro.__name__.endswith("_table") and not signature(macro).parameters
]


def cells_of(table: str) -> list[list[str]]:
    """Return the cells of a Markdown table, without its header."""
    lines = [line.strip("|").split("|") for line in table.splitlines()]
    return [[cell.strip() for cell in line] for line in lines[2:]]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_a_table_has_a_header_and_rows_of_the_same_width(table: Callable[[], str]) -> None:
    header, rule, *rows = table().splitlines()
    assert set(rule) == {"|", " ", "-"}
    assert rows
    assert {line.count("|") for line in rows} == {header.count("|")} == {rule.count("|")}


@pytest.mark.parametrize("load", [None, 1.5])
def test_the_engines_table_shows_all_ways_of_the_file(load: float | None) -> None:
    found = cells_of(tables.engine_table(load))
    rows = [
        row for row in results("engine-demo-cpu")["rows"] if load is None or row["load"] == load
    ]
    assert len(found) == len(rows)
    ways = {(row["load"], tables.WAYS[row["way"]]): row for row in rows}
    for share, name, *values in found:
        row = ways[float(share), name]
        assert values[0] == f"{row['images_per_s']:.2f}"
        seconds = [row["p50_s"], row["p95_s"], row["short_p95_s"]]
        assert values[1:4] == [f"{value:.2f} s" for value in seconds]
        assert values[4] == f"{100 * row['slo']:.0f} %"


def test_the_peers_table_has_each_server_under_each_load() -> None:
    content = results("peers-demo-cpu")
    found = cells_of(tables.peers_table())
    pairs = [(load["name"], server) for load in content["loads"] for server in content["psnr_db"]]
    assert [(load, name) for load, name, *_ in found] == [
        (load, tables.SERVERS[server]) for load, server in pairs
    ]
    for (load, server), cells in zip(pairs, found, strict=True):
        rows = [row for row in content["rows"] if (row["load"], row["server"]) == (load, server)]
        assert len(rows) == content["rounds"]
        times_s = [row["p95_s"] for row in rows]
        span = f"{min(times_s):.2f} to {max(times_s):.2f}"
        assert cells[4] == f"{statistics.median(times_s):.2f} ({span}) s"
    verdicts = [cells[2] for cells in cells_of(tables.peers_targets_table())]
    assert verdicts == ["met" if one["met"] else "missed" for one in content["aims"]]


def test_the_overload_table_sums_the_rounds() -> None:
    rows = [row for row in results("overload-demo-cpu")["rows"] if row["load"] == 3.0]
    assert tables.overload_table().splitlines()[0].endswith(" 3.0 |")
    cells = {name: values[-1] for name, *values in cells_of(tables.overload_table())}
    goodput = ", ".join(f"{row['goodput_per_s']:.2f}" for row in rows)
    assert cells["goodput, images/s"] == goodput
    longest_s = max(row["retry_after_max_s"] for row in rows)
    assert cells["longest `Retry-After`"] == f"{longest_s:.0f} s"
    reserved = sum(row["reservations"] for row in rows)
    assert cells["admitted on retry"].endswith(f" of {reserved:,}")


def test_the_plans_table_takes_the_cheapest_setting_that_meets_the_slo() -> None:
    content = results("plan-4to32")
    counts = [row for row in content["rows"] if row["family"] == "count"]
    good = [row["gpu_hours"] for row in counts if row["attainment"] >= content["slo"]]
    cells = {name: values for name, *values in cells_of(scaling.plan_table())}
    assert cells["best by count"][0].startswith(f"{min(good):.2f}\N{NO-BREAK SPACE}(")
    assert cells["the work itself"][0] == f"{content['rows'][0]['work_hours']:.2f}"


def test_a_share_in_time_is_rounded_down() -> None:
    assert tables.in_time(0.9495) == "94.9\N{NO-BREAK SPACE}%"
    assert tables.in_time(0.95) == "95.0\N{NO-BREAK SPACE}%"
    assert tables.in_time(1.0) == "100.0\N{NO-BREAK SPACE}%"


def test_the_speed_table_has_every_option_and_marks_what_was_not_measured() -> None:
    found = {cells[0]: cells for cells in cells_of(tables.speed_table())}
    rows = results("speed-demo-cpu")["rows"]
    assert len(found) == len(rows)
    bfloat16 = next(row for row in rows if row["option"] == "bfloat16")
    assert found["`dtype: bfloat16`"][1] == f"{tables.TIMES} {bfloat16['ratio']['1']:.2f}"
    assert found["`speed.offload: model`"][1] == "not measured"


def test_the_layers_of_several_runs_are_their_medians() -> None:
    runs = results("layers-demo-cpu")["runs"]
    eight = [row for run in runs for row in run["rows"] if run["label"] == "before"][1::2]
    policy = sorted(row["layers_ms"]["policy"] for row in eight)
    found = tables.layers_ms("before", 8, "layers_ms")
    assert len(policy) == 3
    assert found["policy"] == policy[1]
    rest = found["all but the networks"]
    assert 0 < rest < found["denoiser"]
    assert found["pipeline between its calls"] + found["noise scheduler"] < rest
    cells = {name: values for name, *values in cells_of(tables.layers_table("layers_ms"))}
    assert cells["policy"][2] == f"{policy[1]:.1f} ms"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_result_states_its_command(path: Path) -> None:
    text = tables.source(path.stem)
    first = results(path.stem)
    command = first.get("command", first.get("runs", [{}])[0].get("command"))
    assert command in text.replace(" \\\n    ", " ")
    assert f"`tests/benchmarks/results/{path.name}`" in text


def test_the_hardware_is_that_of_the_file() -> None:
    content: dict[str, Any] = results("engine-demo-cpu")["hardware"]
    text = tables.hardware("engine-demo-cpu")
    assert text.startswith(content["device"])
    assert f"{content['cores']} cores, {content['threads']} thread of torch" in text
    assert f"torch {content['torch']}" in text


def test_a_row_is_found_by_its_values() -> None:
    assert tables.row("engine-demo-cpu", way="engine, fifo", load=1.5)["way"] == "engine, fifo"
    with pytest.raises(LookupError, match="0 rows"):
        tables.row("engine-demo-cpu", way="no such way")
    with pytest.raises(LookupError, match=r"\d rows"):
        tables.row("engine-demo-cpu", load=1.5)
    with pytest.raises(KeyError):
        tables.row("engine-demo-cpu", no_such_key=1)


def test_an_unknown_file_or_key_fails() -> None:
    """Pages are rendered with strict lookups (``on_undefined`` in mkdocs.yml)."""
    with pytest.raises(FileNotFoundError):
        results("no-such-result")
    page = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(
        '{{ results("engine-demo-cpu").no_such_key }}'
    )
    with pytest.raises(jinja2.UndefinedError):
        page.render(results=results)


def test_the_site_is_rendered_with_strict_lookups() -> None:
    text = (Path(__file__).parents[2] / "mkdocs.yml").read_text()
    assert "on_undefined: strict" in text
    assert "on_error_fail: true" in text


def test_the_table_of_few_gpus_has_each_request_of_each_run() -> None:
    found = cells_of(scaling.few_gpus_table())
    runs = results("models-on-few-gpus")["runs"]
    for number, run in enumerate(runs):
        first = 2 + 3 * number
        assert [(cells[1], cells[first]) for cells in found] == [
            (one["model"], f"{one['waited_s']:.1f} s") for one in run["requests"]
        ]
