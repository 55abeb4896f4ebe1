"""The registries that the metrics belong to.

None is the default registry: an engine embedded in another program must not add to its exports.
"""

from prometheus_client import CollectorRegistry, ProcessCollector

ENGINE = CollectorRegistry()
GATEWAY = CollectorRegistry()
APPLICATION = CollectorRegistry()

for _registry in (ENGINE, GATEWAY):  # process_*: memory, processor time, open files
    ProcessCollector(registry=_registry)
