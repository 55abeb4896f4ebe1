"""Documents against the schemas of those who read them, strictly: an unknown field is an error.

KubeRay's resources against its CRDs, which are not part of this repository: the folder that
``KUBERAY_CRD_DIR`` names, or `CRD_DIR`. Kubernetes' own against its OpenAPI, from a package. Kinds
of other projects (monitors, Gateway API) have no schema here.
"""

import os
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.cluster.manifests import Document

CRD_DIR = Path(os.environ.get("KUBERAY_CRD_DIR", "../shared/kuberay-crds-v1.7.0"))
KUBERNETES_VERSION = "1.37"

# The parser in C reads the CRDs, 2 MB of YAML, ten times as fast.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

WITHOUT_SCHEMA = {
    "monitoring.coreos.com",
    "gateway.networking.k8s.io",
    "gateway.envoyproxy.io",
}


def check_schema(document: Document) -> Iterator[tuple[str, str]]:
    """What is wrong with it: the field, or the one that holds it, and what."""
    group = document["apiVersion"].rpartition("/")[0]
    if group in WITHOUT_SCHEMA:
        return
    if group == "ray.io":
        kind, version = document["kind"], document["apiVersion"].rpartition("/")[2]
        validator = jsonschema.Draft7Validator(_crd_schema(kind, version))
        for error in validator.iter_errors(document):
            yield _path(error.absolute_path), error.message
        return
    try:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield _path(error.path), error.message
    except kubernetes_validate.SchemaNotFoundError:
        yield "kind", f"{document['apiVersion']} {document['kind']} is not known to Kubernetes"


def _path(parts: Any) -> str:
    return ".".join(str(part) for part in parts)


@cache
def _crd_schema(kind: str, version: str) -> dict[str, Any]:
    for file in sorted(CRD_DIR.glob("*.yaml")):
        definition = yaml.load(file.read_text(), LOADER)
        if definition["spec"]["names"]["kind"] != kind:
            continue
        [found] = [one for one in definition["spec"]["versions"] if one["name"] == version]
        schema = _strict(deepcopy(found["schema"]["openAPIV3Schema"]))
        # The API server's, which CRDs leave out.
        schema["properties"]["metadata"] = {"type": "object"}
        return schema
    raise LookupError(f"{CRD_DIR} has no {kind}")


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """As JSON schema, without the fields that the API server would refuse."""
    schema.pop("x-kubernetes-int-or-string", None)  # anyOf says it as well
    if "properties" in schema:
        for name, child in schema["properties"].items():
            schema["properties"][name] = _strict(child)
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = _strict(schema["additionalProperties"])
    if isinstance(schema.get("items"), dict):
        schema["items"] = _strict(schema["items"])
    # Formats of the Go types; values of a wrong type are found without them.
    schema.pop("format", None)
    return schema
