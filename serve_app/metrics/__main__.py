"""Print the table of metrics for the README."""

from serve_app.metrics.table import table

print(table())  # noqa: T201  the purpose of the command
