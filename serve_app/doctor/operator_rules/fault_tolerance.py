"""Rules for GCS fault tolerance, which keeps the head's state outside the head."""

from collections.abc import Iterator

from serve_app.doctor.operator_rules.rule import RayCluster, Refusal, Rule

_ENABLED = "ray.io/ft-enabled"
_NAMESPACE = "ray.io/external-storage-namespace"
_OPTIONS = "gcsFaultToleranceOptions"


def fault_tolerance_is_requested_in_one_place(cluster: RayCluster) -> Iterator[Refusal]:
    if cluster.fault_tolerance is not None and cluster.annotations.get(_ENABLED):
        yield Refusal(
            "fault_tolerance_is_requested_in_one_place",
            f"metadata.annotations.{_ENABLED}",
            f"is set beside {_OPTIONS}",
            f"Remove the annotation, and keep {cluster.path}.{_OPTIONS}.",
        )


def the_redis_password_is_an_option(cluster: RayCluster) -> Iterator[Refusal]:
    if cluster.fault_tolerance is None:
        return
    for field, used in (
        (
            f"{cluster.head.path}.rayStartParams.redis-password",
            cluster.head.start_params.get("redis-password"),
        ),
        (
            f"{cluster.head.variables_path}.REDIS_PASSWORD",
            "REDIS_PASSWORD" in cluster.head.variables,
        ),
    ):
        if used:
            yield Refusal(
                "the_redis_password_is_an_option",
                field,
                f"is set beside {_OPTIONS}",
                f"Move it to {cluster.path}.{_OPTIONS}.redisPassword.",
            )


def the_redis_address_is_an_option(cluster: RayCluster) -> Iterator[Refusal]:
    """Reject the variable of the head, unless the annotation allows it without the options."""
    by_annotation = str(cluster.annotations.get(_ENABLED, "")).lower() == "true"
    if "RAY_REDIS_ADDRESS" in cluster.head.variables and (
        cluster.fault_tolerance is not None or not by_annotation
    ):
        beside = "beside" if cluster.fault_tolerance is not None else "without"
        yield Refusal(
            "the_redis_address_is_an_option",
            f"{cluster.head.variables_path}.RAY_REDIS_ADDRESS",
            f"is set {beside} {_OPTIONS}",
            f"Move it to {cluster.path}.{_OPTIONS}.redisAddress.",
        )


def the_storage_namespace_is_an_option(cluster: RayCluster) -> Iterator[Refusal]:
    if cluster.fault_tolerance is not None and cluster.annotations.get(_NAMESPACE):
        yield Refusal(
            "the_storage_namespace_is_an_option",
            f"metadata.annotations.{_NAMESPACE}",
            f"is set beside {_OPTIONS}",
            f"Move it to {cluster.path}.{_OPTIONS}.externalStorageNamespace.",
        )


def the_redis_user_is_an_option(cluster: RayCluster) -> Iterator[Refusal]:
    head = cluster.head
    for field, used in (
        (f"{head.path}.rayStartParams.redis-username", head.start_params.get("redis-username")),
        (f"{head.variables_path}.REDIS_USERNAME", "REDIS_USERNAME" in head.variables),
    ):
        if used:
            yield Refusal(
                "the_redis_user_is_an_option",
                field,
                "is set",
                f"Move it to {cluster.path}.{_OPTIONS}.redisUsername.",
            )


def rocksdb_needs_no_redis(cluster: RayCluster) -> Iterator[Refusal]:
    options = cluster.fault_tolerance or {}
    if options.get("backend") != "rocksdb":
        return
    for field in ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"):
        if options.get(field):
            yield Refusal(
                "rocksdb_needs_no_redis",
                f"{cluster.path}.{_OPTIONS}.{field}",
                "is set, with backend rocksdb",
                f"Remove {field}, or set backend to redis.",
            )


def storage_is_for_rocksdb(cluster: RayCluster) -> Iterator[Refusal]:
    options = cluster.fault_tolerance or {}
    if options.get("storage") is not None and options.get("backend") != "rocksdb":
        yield Refusal(
            "storage_is_for_rocksdb",
            f"{cluster.path}.{_OPTIONS}.storage",
            f"is set, with backend {options.get('backend', 'redis')}",
            "Remove storage, or set backend to rocksdb.",
        )


RULES: list[Rule] = [
    fault_tolerance_is_requested_in_one_place,
    the_redis_password_is_an_option,
    the_redis_address_is_an_option,
    the_storage_namespace_is_an_option,
    the_redis_user_is_an_option,
    rocksdb_needs_no_redis,
    storage_is_for_rocksdb,
]
