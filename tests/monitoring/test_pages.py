"""The files that Grafana imports."""

import json
from pathlib import Path

from monitoring.dashboards import DASHBOARDS, write


def test_each_file_has_all_queries_of_its_dashboard_and_a_place_for_each_panel(
    tmp_path: Path,
) -> None:
    write(tmp_path)
    pages = [json.loads((tmp_path / f"{one.name.lower()}.json").read_text()) for one in DASHBOARDS]
    assert len(list(tmp_path.iterdir())) == len({page["uid"] for page in pages}) == len(DASHBOARDS)
    for page, dashboard in zip(pages, DASHBOARDS, strict=True):
        shown = [target["expr"] for panel in page["panels"] for target in panel["targets"]]
        marks = [mark["expr"] for mark in page["annotations"]["list"]]
        assert [*shown, *marks] == [query.expr for query in dashboard.queries]
        places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in page["panels"]}
        assert len(places) == len({panel["id"] for panel in page["panels"]}) == len(page["panels"])
