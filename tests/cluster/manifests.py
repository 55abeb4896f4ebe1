"""Rendered overlays, with the file of each field."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

KUBECTL = Path(sys.executable).with_name("kubectl")

Document = dict[str, Any]


class RenderError(Exception):
    """An error of kustomize, with its message."""


@dataclass(frozen=True)
class Pod:
    """A pod of a document: its path there, and its specification."""

    document: Document
    path: str
    group: str | None
    """Name of the group of Ray workers."""
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def where(self) -> str:
        return f"{self.document['kind']}/{self.document['metadata']['name']}: {self.path}"


@dataclass(frozen=True)
class Manifests:
    """One rendered kustomization."""

    folder: Path
    documents: list[Document]

    @property
    def root(self) -> Path:
        """Root of the repository, or of a copy of its cluster/ and related folders."""
        return self.folder.parents[2]

    @cached_property
    def expected(self) -> dict[str, Any]:
        """Expected nodes of the cluster."""
        text = (self.root / "cluster/platform/nodes.yaml").read_text()
        content: dict[str, Any] = yaml.safe_load(text)
        return content

    def of_kind(self, *kinds: str) -> list[Document]:
        return [one for one in self.documents if one["kind"] in kinds]

    @cached_property
    def service(self) -> Document:
        """The RayService."""
        [service] = self.of_kind("RayService")
        return service

    @property
    def cluster(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.service["spec"]["rayClusterConfig"]
        return spec

    @cached_property
    def serve(self) -> dict[str, Any]:
        """The embedded Serve config."""
        config: dict[str, Any] = yaml.safe_load(self.service["spec"]["serveConfigV2"]) or {}
        return config

    @property
    def worker_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.cluster["workerGroupSpecs"]
        return groups

    @cached_property
    def pods(self) -> list[Pod]:
        """All pods of these documents, Ray's head and workers first."""
        found = []
        head = self.cluster["headGroupSpec"]["template"]
        path = "spec.rayClusterConfig"
        found.append(self._pod(self.service, f"{path}.headGroupSpec.template", None, head))
        for group in self.worker_groups:
            name = group["groupName"]
            where = f"{path}.workerGroupSpecs[{name}].template"
            found.append(self._pod(self.service, where, name, group["template"]))
        for document in self.of_kind("Deployment", "StatefulSet", "DaemonSet", "Job"):
            template = document["spec"]["template"]
            found.append(self._pod(document, "spec.template", None, template))
        found += [self._pod(document, "", None, document) for document in self.of_kind("Pod")]
        return found

    @staticmethod
    def _pod(document: Document, path: str, group: str | None, template: dict[str, Any]) -> Pod:
        labels = template.get("metadata", {}).get("labels", {})
        return Pod(document, f"{path}.spec".lstrip("."), group, labels, template["spec"])

    def written_in(self, of: "Pod | Document", *words: str) -> str:
        """Return the file that sets a field with this text.

        It is the last in the order in which kustomize applies them, since a patch follows its
        target; only RayServices and budgets are patched.
        """
        document = of.document if isinstance(of, Pod) else of
        kind, name = document["kind"], document["metadata"]["name"]
        texts = {file: file.read_text() for file in _files(self.folder)}
        defining = [
            file for file, text in texts.items() if f"kind: {kind}\n" in text and name in text
        ]
        candidates = [*defining]
        if kind in ("RayService", "PodDisruptionBudget"):
            candidates = [
                file for file, text in texts.items() if file in defining or _PATCH.search(text)
            ]
            if isinstance(of, Pod):
                words = (*words, "headGroupSpec" if of.group is None else "workerGroupSpecs")
        patterns = [re.compile(_spelt(word)) for word in words]
        having = [
            file for file in candidates if all(pattern.search(texts[file]) for pattern in patterns)
        ]
        found = (having or defining)[-1]
        return str(found.relative_to(self.root))

    def writes_field(self, field: str) -> str:
        """Return the file that sets the RayService's ``field``, a path with names as indices."""
        parts = field.split(".")
        words = [parts[-1].partition("[")[0]]
        words += [part for part in parts if part == "headGroupSpec"]
        words += ["workerGroupSpecs" for part in parts if part.startswith("workerGroupSpecs[")]
        return self.written_in(self.service, *words)


_PATCH = re.compile(r"^\s*- \{?op: ", re.MULTILINE)


def _spelt(word: str) -> str:
    """Match it as written or in a JSON pointer, but not as the prefix of a longer one."""
    return re.escape(word).replace("/", "(/|~1)") + r"(?![\w.-])"


def _files(folder: Path) -> Iterator[Path]:
    """List the files of a kustomization, depth first; its own file after its bases."""
    own = folder / "kustomization.yaml"
    content = yaml.safe_load(own.read_text())
    for entry in [*content.get("resources", []), *content.get("components", [])]:
        path = (folder / entry).resolve()
        if path.is_dir():
            yield from _files(path)
        else:
            yield path
    for generator in content.get("configMapGenerator", []):
        yield from ((folder / file).resolve() for file in generator.get("files", []))
    for patch in content.get("patches", []):
        if "path" in patch:
            yield (folder / patch["path"]).resolve()
    yield own


def render(folder: Path) -> Manifests:
    """Run ``kubectl kustomize``. Raises `RenderError`."""
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True)
    if done.returncode:
        raise RenderError(done.stderr)
    return Manifests(folder.resolve(), list(yaml.safe_load_all(done.stdout)))
