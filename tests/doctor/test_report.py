"""Findings as a table and as JSON."""

from serve_app.doctor.report import as_json, failed, gib, ok, table, warning


def test_each_advice_stands_once_below_the_table() -> None:
    text = table(
        [
            ok("one", "fine"),
            failed("two", "broken " * 30, "Do this:\n  a: {command: " + "x" * 120 + "}"),
            warning("three", "odd", "Do that."),
            failed("four", "broken, too", "Do that."),
        ]
    )
    lines = text.splitlines()
    assert lines[0] == "check  outcome  found"
    assert lines[1] == "one    ok       fine"
    assert lines[3].startswith(" " * 16 + "broken")
    assert text.count("Do that.") == 1
    assert "\nthree, four:\n  Do that." in text
    assert f"    a: {{command: {'x' * 120}}}" in lines  # to be copied whole


def test_advice_on_what_failed_comes_before_advice_on_warnings() -> None:
    text = table([warning("one", "odd", "Do that."), failed("two", "broken", "Do this.")])
    assert text.index("two:\n  Do this.") < text.index("one:\n  Do that.")


def test_json_has_the_overall_result() -> None:
    assert as_json([ok("one", "fine"), warning("two", "odd", "Do.")])["ok"]
    document = as_json([failed("one", "broken", "Do.")])
    assert not document["ok"]
    assert document["findings"] == [
        {"check": "one", "outcome": "failed", "found": "broken", "advice": "Do."}
    ]


def test_sizes() -> None:
    assert [gib(size) for size in (0, 2**20, 2**30, 3 * 2**29)] == [
        "0 MiB", "1 MiB", "1.0 GiB", "1.5 GiB",
    ]  # fmt: skip
