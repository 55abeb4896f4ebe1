"""Dashboards and rules as code, and what makes files of them. The server does not import it."""
