"""Stand-ins that several packages of tests share, one file per concern."""
