"""The gateway of a cluster, KEDA's autoscalers, image volumes and the route: as manifests, and as
far as they run without a cluster."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import httpx2
import pytest
import yaml
from cluster_tools import (
    CHAT,
    Documents,
    Writer,
    documents,
    keys_of,
    kubectl,
    of,
    require_sound,
    require_valid,
    require_valid_crds,
    server_of,
)
from cluster_tools import write as write
from conftest import Doit, free_port, wait_for
from gateway_tools import NO_TLS, UPSTREAM, reached

GATEWAY = "[gateway]\nenable = true\n"
SCALED = '[instance.chat.control]\nreplicas = "0-4"\n'
EMBED = '[instance.search.server]\nmodel = "/models/e.gguf"\nport = 8081\nembeddings = true\n'
ROUTE = ("route=chat.example.com", "route_parent=infra/public:https")


def file_of(found: Documents) -> dict[str, Any]:
    """The gateway's file."""
    return tomllib.loads(of(found, "ConfigMap", "gateway")["data"]["servers.toml"])


def test_a_port_below_1024(write: Writer) -> None:
    """No capability is left, and not every container runtime opens these ports to all users."""
    write(GATEWAY + "port = 80\n" + CHAT + "port = 443\n" + EMBED)
    found = write.found()
    opened = {
        name: of(found, "Deployment", name)["spec"]["template"]["spec"]["securityContext"].get(
            "sysctls", []
        )
        for name in ("gateway", "chat", "search")
    }
    start = [{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}]
    assert opened == {"gateway": start, "chat": start, "search": []}


def test_the_gateway_and_what_asks_it(write: Writer) -> None:
    models = '[gateway.models]\n"claude-*" = "chat"\n'
    said = write(GATEWAY + models + SCALED + CHAT + EMBED, "namespace=llm", *ROUTE)
    found = write.found()
    require_valid_crds(found)
    assert "kubectl label namespace keda llama-pipeline/client=true" in said
    assert "kubectl create secret generic gateway-api-key -n llm" in said
    deployment = of(found, "Deployment", "gateway")["spec"]
    pod = deployment["template"]
    assert deployment["replicas"] == 2
    labels = pod["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    # one set of labels, one port
    service = of(found, "Service", "gateway")["spec"]
    policy = of(found, "NetworkPolicy", "gateway")["spec"]
    budget = of(found, "PodDisruptionBudget", "gateway")["spec"]
    for selector in (
        deployment["selector"]["matchLabels"],
        service["selector"],
        policy["podSelector"]["matchLabels"],
        budget["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
        assert not selector.items() <= server_labels(found, "chat").items()
    (opened,), (port,) = service["ports"], container["ports"]
    assert opened["targetPort"] == port["name"] and opened["port"] == port["containerPort"] == 9000
    # the servers let it in
    (rule,) = of(found, "NetworkPolicy", "chat")["spec"]["ingress"]
    assert any(
        each.get("podSelector", {}).get("matchLabels", {"": 1}).items() <= labels.items()
        for each in rule["from"]
    )
    # what it reads is mounted, and leads to the Services
    content = file_of(found)
    volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
    mounts = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
    (argument,) = [word for word in container["args"] if "=" in word]
    assert argument == "servers=/etc/llama/gateway/servers.toml"
    assert mounts["/etc/llama/gateway"]["configMap"]["name"] == "gateway"
    secrets = {
        f"/etc/llama/keys/{source['secret']['items'][0]['path']}": source["secret"]["name"]
        for source in mounts["/etc/llama/keys"]["projected"]["sources"]
    }
    assert secrets[content["gateway"]["api_key_file"]] == "gateway-api-key"
    assert content["gateway"]["models"] == {"claude-*": "chat"}
    for name, server in content["servers"].items():
        to = of(found, "Service", name)["spec"]["ports"][0]["port"]
        assert server["url"] == f"http://{name}:{to}"
        assert secrets[server["api_key_file"]] == f"{name}-api-key"
    assert content["servers"]["chat"]["start"] == "demand"
    assert content["servers"]["search"]["start"] == "boot"
    assert content["servers"]["search"]["kind"] == "embedding"
    stop = pod["spec"]["terminationGracePeriodSeconds"]
    assert stop > content["gateway"]["stop_timeout"]
    # KEDA
    scaled = of(found, "ScaledObject", "chat")["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (0, 4)
    (trigger,) = scaled["triggers"]
    assert trigger["metadata"]["url"] == "http://gateway.llm.svc:9000/scaling/chat"
    (peers,) = content["gateway"]["peers"]
    assert peers == "http://gateway-pods:9000"
    pods = of(found, "Service", "gateway-pods")["spec"]
    assert pods["clusterIP"] == "None" and pods["selector"] == service["selector"]
    authentication = of(found, "TriggerAuthentication", trigger["authenticationRef"]["name"])
    (token,) = authentication["spec"]["secretTargetRef"]
    assert token == {"parameter": "token", "name": "gateway-api-key", "key": "api-key"}
    assert not [one for one in found if one["kind"] == "HorizontalPodAutoscaler"]
    # the route
    route = of(found, "HTTPRoute", "gateway")["spec"]
    (parent,) = route["parentRefs"]
    assert parent == {"name": "public", "namespace": "infra", "sectionName": "https"}
    (rule,) = route["rules"]
    assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}
    assert rule["backendRefs"] == [{"name": "gateway", "port": 9000}]


def server_labels(found: Documents, name: str) -> dict[str, str]:
    template = of(found, "Deployment", name)["spec"]["template"]
    return dict(template["metadata"]["labels"])


def test_the_schemas_refuse_what_is_wrong(write: Writer) -> None:
    write(GATEWAY + SCALED + CHAT, "namespace=llm", *ROUTE)
    found = write.found()
    of(found, "ScaledObject", "chat")["spec"]["minReplicaCount"] = "0"
    with pytest.raises(AssertionError, match="minReplicaCount"):
        require_valid_crds(found)
    found = write.found()
    of(found, "HTTPRoute", "gateway")["spec"]["rules"][0]["timeout"] = "0s"
    with pytest.raises(AssertionError, match="'timeout'"):
        require_valid_crds(found)
    assert "timeouts" in keys_of({"rules": [{"timeouts": 1}]})


def test_autoscalers(write: Writer) -> None:
    """KEDA from 0, Kubernetes' own else; the command line wins over the file."""
    namespace = "namespace=llm"
    write(GATEWAY + SCALED + CHAT, namespace, "replicas=1-3")
    found = documents(write.out)
    assert of(found, "HorizontalPodAutoscaler", "chat")["spec"]["maxReplicas"] == 3
    write(GATEWAY + SCALED + CHAT, namespace, "replicas=1-3", "autoscaler=keda")
    assert of(documents(write.out), "ScaledObject", "chat")["spec"]["minReplicaCount"] == 1
    idle = "idle_timeout = 90\n"
    no_key = 'api_key = "none"\n'
    write(
        GATEWAY + no_key + SCALED + idle + CHAT + "parallel = 8\n", namespace, "gateway_replicas=1"
    )
    found = write.found()
    scaled = of(found, "ScaledObject", "chat")["spec"]
    assert scaled["cooldownPeriod"] == 90
    (trigger,) = scaled["triggers"]
    assert trigger["metadata"]["targetValue"] == "6", "three quarters of the slots"
    assert "authMode" not in trigger["metadata"] and "authenticationRef" not in trigger
    assert not [one for one in found if one["kind"] == "TriggerAuthentication"]
    assert file_of(found)["gateway"]["without_key"]
    write(GATEWAY + "[instance.chat.control]\nreplicas = 3\n" + CHAT)
    assert of(documents(write.out), "Deployment", "chat")["spec"]["replicas"] == 3


@pytest.mark.parametrize(
    ("text", "more", "line"),
    [
        (GATEWAY + SCALED + CHAT, [], "pass namespace="),
        (GATEWAY + CHAT, ["route=a.example"], "route= and route_parent= belong together"),
        (GATEWAY + CHAT, ["route=10.0.0.1", "route_parent=p"], "a host name in small letters"),
        (
            GATEWAY + 'api_key_file = "keys"\n' + SCALED + CHAT,
            ["namespace=a"],
            "leave one key in it",
        ),
        (SCALED.replace("0-4", "4-0") + CHAT, [], 'replicas = "4-0": must be a number of pods'),
        (SCALED.replace("0-4", "x") + CHAT, [], "must be a number of pods"),
        (SCALED.replace('"0-4"', "true") + CHAT, [], "must be a number of pods"),
        ('[instance.a.server]\nhf_repo = "o/m"\n', ["model_image=a/b"], "names a file in /models"),
    ],
)
def test_mistakes(write: Writer, text: str, more: list[str], line: str) -> None:
    (write.folder / "keys").write_text("one\ntwo\n")
    assert line in write(text, *more, status=3)
    assert not write.out.exists(), "nothing is written"


def test_replicas_on_one_machine(bare: Doit, tmp_path: Path) -> None:
    """Said, and not used."""
    file = tmp_path / "x.toml"
    file.write_text(
        '[instance.v.control]\nengine = "vllm"\nreplicas = "0-4"\n'
        '[instance.v.server]\nmodel = "org/m"\n'
    )
    run = bare("plan", f"config={file}")
    assert (
        'instance.v.control.replicas = "0-4": for a cluster; one server runs here'
        in run.err + run.out
    )


def test_a_model_in_an_image(write: Writer) -> None:
    """In the place of the claim, also for several pods; vLLM has none."""
    vllm = '[instance.v.control]\nengine = "vllm"\n[instance.v.server]\nmodel = "o/m"\nport = 1\n'
    words = ("model_image=registry.example/models/{name}:1.0", "vllm_image=a/vllm", "replicas=2")
    said = write(CHAT + vllm, *words)
    found = require_sound(write.out, oldest="1.31.0")
    assert "not used: model_image" in said
    assert "registry.example/models/chat:1.0 has to hold chat.gguf" in said
    pod = of(found, "Deployment", "chat")["spec"]["template"]["spec"]
    (image,) = [each["image"] for each in pod["volumes"] if "image" in each]
    assert image == {"reference": "registry.example/models/chat:1.0", "pullPolicy": "IfNotPresent"}
    assert {"name": "models", "mountPath": "/data/models", "readOnly": True} in server_of(found)[
        "volumeMounts"
    ]
    claims = [one["metadata"]["name"] for one in found if one["kind"] == "PersistentVolumeClaim"]
    assert claims == ["v-models"]


def test_each_instance_has_its_own_files(write: Writer) -> None:
    """A second run changes nothing, a change of one instance nothing of another."""

    def texts() -> dict[str, str]:
        return {path.name: path.read_text("utf-8") for path in write.out.iterdir()}

    words = ("namespace=llm", *ROUTE)
    write(GATEWAY + SCALED + CHAT + EMBED, *words)
    before = texts()
    assert "nothing to do" in write(GATEWAY + SCALED + CHAT + EMBED, *words)
    assert texts() == before
    write(GATEWAY + SCALED + CHAT + EMBED + "threads = 3\n", *words)
    after = texts()
    assert {name for name in before if before[name] != after[name]} == {"search.server.yaml"}


def test_no_key_is_written(write: Writer) -> None:
    (write.folder / "mine").write_text("topsecret\n")
    for line in ('api_key = "topsecret"\n', 'api_key_file = "mine"\n'):
        said = write(GATEWAY + line + SCALED + CHAT, "namespace=llm")
        assert "topsecret" not in write.text() + said
    (command,) = (line for line in said.splitlines() if "secret generic gateway" in line)
    assert "tr -d" in command, "KEDA would send the line's end"
    assert str(write.folder / "mine") in shlex.split(command)


def test_kustomize_and_kubectl_take_it(write: Writer) -> None:
    write(GATEWAY + SCALED + CHAT + EMBED, "namespace=llm", *ROUTE)
    program, env = kubectl(), {**os.environ, "KUBECONFIG": os.devnull}

    def run(*words: str) -> str:
        return subprocess.run(
            [program, *words], env=env, capture_output=True, encoding="utf-8", check=True
        ).stdout

    made = list(yaml.safe_load_all(run("kustomize", str(write.out))))
    assert len(made) == len(documents(write.out))
    assert {one["metadata"]["namespace"] for one in made} == {"llm"}
    require_valid(made)
    require_valid_crds(made)
    listed = run("label", "--local", "-f", str(write.out / "gateway.yaml"), "a=b", "-o", "name")
    assert len(listed.split()) == 8, "kubectl itself decodes every object"


# What runs


class Keda:
    """Does what KEDA does with a ScaledObject from 0 to 1 replica: asks the gateways' address, and
    runs the server while the answer is above the activation, and for the cooldown after it."""

    def __init__(
        self, spec: dict[str, Any], gateway: str, token: str, server: Callable[[], Any]
    ) -> None:
        (trigger,) = spec["triggers"]
        self.metadata = trigger["metadata"]
        self.url = re.sub(r"^http://[^/]+", gateway, self.metadata["url"])
        self.headers = {"authorization": f"Bearer {token}"}
        self.server, self.cooldown = server, spec["cooldownPeriod"]
        self.process: Any = None
        self.starts = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._poll, daemon=True)

    def value(self) -> float:
        answer = httpx2.get(self.url, headers=self.headers, verify=NO_TLS, timeout=3)
        return float(answer.raise_for_status().json()[self.metadata["valueLocation"]])

    def _poll(self) -> None:
        active_at = float("-inf")
        while not self.stopped.wait(0.1):  # pollingInterval, in a test's time
            if self.value() > float(self.metadata["activationTargetValue"]):
                active_at = time.monotonic()
                if self.process is None:
                    self.process = self.server()
                    self.starts += 1
            elif self.process and time.monotonic() - active_at > self.cooldown:
                self._stop()

    def _stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __enter__(self) -> Keda:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.thread.join()
        self._stop()


@pytest.fixture
def started() -> Iterator[list[Any]]:
    processes: list[Any] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


class Cluster:
    """Two gateways as their pods start them, and the address and keys of one server."""

    def __init__(self, write: Writer, folder: Path, started: list[Any]) -> None:
        self.folder, self.started = folder, started
        self.found = write.found()
        self.port, self.key = free_port(), "of-the-clients"
        keys = folder / "keys"
        keys.mkdir()
        (keys / "gateway").write_text(self.key)
        (keys / "chat").write_text("of-the-server")
        text = of(self.found, "ConfigMap", "gateway")["data"]["servers.toml"]
        text = text.replace("http://chat:8080", f"http://127.0.0.1:{self.port}")
        ports = [free_port(), free_port()]
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        assert "http://gateway-pods:9000" in text
        text = text.replace('"http://gateway-pods:9000"', json.dumps(self.urls)[1:-1])
        text = text.replace("/etc/llama/keys", keys.as_posix()).replace("0.0.0.0", "127.0.0.1")
        (folder / "servers.toml").write_text(text, encoding="utf-8")
        for port in ports:
            self._gateway(port)

    def _gateway(self, port: int) -> None:
        (container,) = of(self.found, "Deployment", "gateway")["spec"]["template"]["spec"][
            "containers"
        ]
        pod = Doit(self.folder / f"home {port}")
        words = [word.replace("/etc/llama/gateway", str(self.folder)) for word in container["args"]]
        command = pod.command(*words, f"port={port}")
        with (self.folder / f"gateway.{port}").open("wb") as out:
            env = {**os.environ, **pod.env}
            self.started.append(forked.start(command[1:], out.fileno(), out.fileno(), env))
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: reached(url + container["readinessProbe"]["httpGet"]["path"]))

    def keda(self, server: Callable[[], Any]) -> Keda:
        spec = of(self.found, "ScaledObject", "chat")["spec"]
        return Keda(spec, self.urls[0], self.key, server)

    def ask(self, gateway: int, **more: Any) -> httpx2.Response:
        body = {"model": "chat", "messages": [{"role": "user", "content": "x"}], **more}
        headers = {"authorization": f"Bearer {self.key}"}
        path = f"{self.urls[gateway]}/v1/chat/completions"
        return httpx2.post(path, json=body, headers=headers, timeout=60, verify=NO_TLS)


def test_from_zero_and_back(write: Writer, started: list[Any], tmp_path: Path) -> None:
    """A server that a stand-in for KEDA starts for a request that waits, and stops after the
    cooldown."""
    write(GATEWAY + SCALED + "idle_timeout = 2\n" + CHAT, "namespace=llm")
    cluster = Cluster(write, tmp_path, started)
    record = tmp_path / "record"
    words = [str(UPSTREAM), "--port", str(cluster.port), "--name", "chat", "--record", str(record)]

    def server() -> Any:
        with Path(os.devnull).open("wb") as null:
            return forked.start(words, null.fileno(), null.fileno(), os.environ)

    with cluster.keda(server) as keda:
        assert not reached(f"http://127.0.0.1:{cluster.port}/health"), "no replica"
        assert cluster.ask(1).json()["name"] == "chat", "held until there is one"
        assert keda.starts == 1
        assert cluster.ask(0, do={"slow": 3}).status_code == 200, "longer than the cooldown"
        assert keda.starts == 1, "not stopped under a request"
        wait_for(lambda: keda.process is None, 30)
        assert cluster.ask(0).status_code == 200
        assert keda.starts == 2
    (line, *_) = [json.loads(line) for line in record.read_text("utf-8").splitlines()]
    assert line["headers"]["authorization"] == "Bearer of-the-server"


@pytest.mark.build
@pytest.mark.slow
def test_a_real_server_from_zero(
    write: Writer, started: list[Any], built: Path, gguf: Path, tmp_path: Path
) -> None:
    """llama-server with the arguments of its pod, for clients of two APIs."""
    write(GATEWAY + SCALED + "idle_timeout = 2\n" + CHAT, "namespace=llm", "gpus=0")
    cluster = Cluster(write, tmp_path, started)
    key_file = tmp_path / "keys" / "chat"
    here = {
        "0.0.0.0": "127.0.0.1",
        "8080": str(cluster.port),
        "/data/models/chat.gguf": str(gguf),
        "/etc/llama/key/api-key": str(key_file),
    }
    words = [here.get(word, word) for word in server_of(cluster.found)["args"]]
    program = next(built.glob("*/llama-server*"))

    def server() -> Any:
        with (tmp_path / "server.log").open("ab") as log:
            return subprocess.Popen([program, *words], stdout=log, stderr=log)

    with cluster.keda(server) as keda:
        answer = cluster.ask(0, max_tokens=3)
        assert answer.json()["usage"]["completion_tokens"] > 0
        wait_for(lambda: keda.process is None, 30)
        body = {"model": "chat", "messages": [], "stream": False, "options": {"num_predict": 3}}
        body["messages"] = [{"role": "user", "content": "x"}]
        headers = {"authorization": f"Bearer {cluster.key}"}
        url = f"{cluster.urls[1]}/api/chat"
        answer = httpx2.post(url, json=body, headers=headers, timeout=60, verify=NO_TLS)
        assert answer.json()["done"] and keda.starts == 2
