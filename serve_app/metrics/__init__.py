"""Declarations of every metric, one module for each part that measures.

Units are in the names: seconds, bytes, or none for counts. The values of every label come from a
closed set, which `labels` describes, so that no request can make a new series. `engine` has the
metrics of a generator replica, `gateway` those of a gateway replica, and `application` those that
the gateway that answers ``GET /metrics`` sets for all of them. `autoscaling` has Ray's gauges.
`export` reads the registries.
"""
