"""The pods of rayservice.yaml, each a container that is started, probed and given its Serve
configuration as KubeRay's operator does it (1.5: controllers/ray/common/pod.go)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from conftest import wait_for, with_programs
from container_tools import PORT, Containers, containers
from engines import Docker
from gateway_tools import NO_TLS
from ray_tools import hub_folder

from pipeline.core.errors import PipelineError
from pipeline.deploy.ray.cluster import FAILED, RUNNING

pytestmark = [
    pytest.mark.build,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.xdist_group("images"),
]

KEY = "key-of-the-gateway"
SERVERS = """[gateway]
enable = true
api_key_file = "{key}"
[instance.small.control]
gpu_ids = "none"
[instance.small.model]
ref = "org/small"
[instance.small.server]
ctx_size = 512
threads = 1
"""
# What the operator adds to the parameters and to the variables of each pod.
USUAL = {"block": "true", "dashboard-agent-listen-port": "52365", "metrics-export-port": "8080"}
PROBE = "wget --tries 1 -T 10 -q -O- http://localhost:{} | grep success"
AGENT, GCS = "52365/api/local_raylet_healthz", "8265/api/gcs_healthz"
PROXY = f"{PORT}/-/healthz"
DATA, SECRET = "persistentVolumeClaim", "secret"


@pytest.fixture
def pods(
    docker: Docker, ray_image: str, built: Path, gguf: Path, tmp_path: Path
) -> Iterator[Containers]:
    """None yet, and a hub that they will reach."""
    with containers(docker, ray_image, hub_folder(built, gguf, tmp_path), tmp_path) as made:
        yield made


def start(pods: Containers, name: str, group: Mapping[str, Any], key: Path) -> None:
    """One pod of a group; the first is the head."""
    spec = group["template"]["spec"]
    (container,) = spec["containers"]
    assert not {"livenessProbe", "readinessProbe"} & container.keys()  # the operator's own
    places = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    user = spec["securityContext"]
    flags = [f"--user={user['runAsUser']}:{user['runAsGroup']}", "--entrypoint=/bin/bash"]
    for volume in spec["volumes"]:
        at = places[volume["name"]]
        if DATA in volume:
            flags.append(f"--volume={pods.name}-data:{at}")
        elif SECRET in volume:
            flags.append(f"--volume={key}:{at}/api-key:ro")
        else:
            flags.append(f"--volume={at}")  # an empty folder of its own
    flags += [
        f"--env={each['name']}={each['value']}" for each in container["env"] if "value" in each
    ]
    head = pods.addresses.get("head")
    params = group["rayStartParams"] | USUAL | ({"address": f"{head}:6379"} if head else {})
    flags += [f"--env=RAY_AUTH_TOKEN={pods.token}", "--env=RAY_AUTH_MODE=token"]
    words = [f"--{x}" if value == "true" else f"--{x}={value}" for x, value in params.items()]
    ray = " ".join(["ray start", *([] if head else ["--head"]), *words])
    pods.run(name, *flags, words=("-c", "--", f"ulimit -n 65536; {ray}"))


def runs(pods: Containers) -> bool:
    """Whether all applications do. An application that cannot run fails the test."""
    with contextlib.suppress(PipelineError):  # the dashboard is busy
        apps = pods.cluster.serves().applications.values()
        assert not [each for each in apps if each.status == FAILED]
        return {each.status for each in apps} == {RUNNING}
    return False


def test_a_rayservice(pods: Containers, built: Path, tmp_path: Path) -> None:
    key, file = tmp_path / "key", tmp_path / "servers.toml"
    key.write_text(KEY)
    key.chmod(0o644)
    file.write_text(SERVERS.format(key=key))
    doit = with_programs(built, tmp_path / "hôme")
    doit.env |= {"HF_ENDPOINT": pods.hub}
    doit("prepare", f"config={file}")
    doit("ray", f"config={file}", f"image={pods.image}", "storage=1Gi", "gateway_replicas=1")
    (written,) = (doit.home / "deploy").glob("*-ray/rayservice.yaml")
    _, service = yaml.safe_load_all(written.read_text("utf-8"))
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}  # why they get a token

    start(pods, "head", cluster["headGroupSpec"], key)
    wait_for(lambda: pods.succeeds("head", f"{PROBE.format(AGENT)} && {PROBE.format(GCS)}"), 120)
    workers = [group["groupName"] for group in cluster["workerGroupSpecs"]]
    for group in cluster["workerGroupSpecs"]:
        start(pods, group["groupName"], group, key)
    for name in workers:
        wait_for(lambda name=name: pods.succeeds(name, PROBE.format(AGENT)), 120)

    with httpx2.Client(verify=NO_TLS, trust_env=False, timeout=180) as client:
        config = yaml.safe_load(service["spec"]["serveConfigV2"])
        at = f"{pods.dashboard}/api/serve/applications/"
        assert client.put(at, json=config).status_code == 401
        headers = {"Authorization": f"Bearer {pods.token}"}
        client.put(at, json=config, headers=headers).raise_for_status()

        wait_for(lambda: runs(pods), 240)
        for name in workers:
            wait_for(lambda name=name: pods.succeeds(name, PROBE.format(PROXY)), 60)
        (gateway,) = (pods.addresses[name] for name in workers if name == "gateway")
        chat = f"http://{gateway}:{PORT}/v1/chat/completions"
        asked = {"model": "small", "max_tokens": 4, "messages": [{"role": "user", "content": "x"}]}
        assert client.post(chat, json=asked).status_code == 401
        answer = client.post(chat, json=asked, headers={"Authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 4
