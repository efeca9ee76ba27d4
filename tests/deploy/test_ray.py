"""What `ray` writes, and what it does to a cluster, whose dashboard is a stand-in here."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cluster_tools import IMAGE, VERSIONS
from conftest import Doit
from fakes import ray_dashboard
from fakes.ray_dashboard import Dashboard, node

from pipeline.commands import ray_deploy
from pipeline.deploy.ray import environment
from pipeline.serve.config import toml_form

CHAT = """
[instance.chat.control]
gpu_ids = "none"
[instance.chat.server]
model = "/models/chat.gguf"
threads = 2
parallel = 8
alias = "gpt-4o"
"""
SECOND = """
[instance.second.control]
gpu_ids = "none"
replicas = "0-4"
idle_timeout = 90
[instance.second.server]
model = "/models/second.gguf"
[gateway]
enable = true
"""


class Writer:
    """doit ray on a file of its own, with nothing built and no network."""

    def __init__(self, doit: Doit, at: Path) -> None:
        self.doit, self.file = doit, at / "my servers ü.toml"
        self.doit.env.pop("RAY_ADDRESS", None)

    def __call__(self, text: str, *more: str, status: int = 0, step: str = "ray") -> str:
        """What was printed."""
        self.file.write_text(text, encoding="utf-8")
        run = self.doit(step, f"config={self.file}", *more, status=status)
        return run.out + run.err

    @property
    def out(self) -> Path:
        (folder,) = (self.doit.home / "deploy").glob("*-ray")
        return folder

    def serve(self) -> dict[str, Any]:
        return yaml.safe_load((self.out / "serve.yaml").read_text("utf-8"))  # type: ignore[no-any-return]

    def application(self, name: str) -> dict[str, Any]:
        (found,) = (each for each in self.serve()["applications"] if each["name"] == name)
        return found  # type: ignore[no-any-return]


@pytest.fixture
def write(bare: Doit, tmp_path: Path) -> Writer:
    at = tmp_path / "a folder"
    at.mkdir()
    return Writer(bare, at)


@pytest.fixture
def board() -> Iterator[Dashboard]:
    with ray_dashboard.start() as started:
        yield started


# Where its gateway is reached


@pytest.mark.parametrize(
    ("cluster", "host", "line"),
    [
        ("http://127.0.0.1:8265", "127.0.0.1", "http://127.0.0.1:9000"),
        ("http://127.0.0.1:8265", "::1", "http://[::1]:9000"),
        (
            "http://[::1]:8265",
            "0.0.0.0",
            "http://127.0.0.1:9000 (from other machines: port 9000 of this one)",
        ),
        ("http://u:p@head.lan:8265", "0.0.0.0", "http://head.lan:9000"),
        ("https://[fd00::1]:8265/", "::", "http://[fd00::1]:9000"),
        ("http://head.lan:8265", "10.0.0.7", "http://10.0.0.7:9000"),
        (
            "http://head.lan:8265",
            "127.0.0.1",
            "http://127.0.0.1:9000 of each node, for its own programs alone",
        ),
    ],
)
def test_the_url_of_the_gateway_leads_to_it_from_here(cluster: str, host: str, line: str) -> None:
    assert ray_deploy.reached_at(cluster, host, 9000) == line


# The files


def test_each_server_is_an_application(write: Writer) -> None:
    printed = write(CHAT + SECOND)
    assert "start=1 address=http://HEAD:8265" in printed
    assert "is not here, so no memory is reserved" in printed
    chat, second = write.application("chat"), write.application("second")
    assert chat["import_path"] == "pipeline.deploy.ray.app:server"
    assert chat["route_prefix"] is None
    (replica,) = chat["deployments"]
    assert replica["num_replicas"] == 1 and "autoscaling_config" not in replica
    assert replica["max_ongoing_requests"] == 8
    assert replica["ray_actor_options"]["num_cpus"] == 2
    assert replica["ray_actor_options"]["num_gpus"] == 0
    (replica,) = second["deployments"]
    scaling = replica["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (0, 4)
    assert scaling["target_ongoing_requests"] == 3, "three quarters of the slots"
    assert scaling["downscale_delay_s"] == 90
    assert "num_replicas" not in replica
    gateway = write.application("gateway")
    assert gateway["route_prefix"] == "/"
    known = gateway["deployments"][0]["user_config"]["servers"]
    assert known["chat"]["aliases"] == ["gpt-4o"] and known["chat"]["slots"] == 8
    assert known["chat"]["start"] == "boot" and known["second"]["start"] == "demand"


def test_a_second_run_writes_nothing(write: Writer) -> None:
    write(CHAT, IMAGE)
    before = {path.name: path.stat().st_mtime_ns for path in write.out.iterdir()}
    assert before.keys() == {"serve.yaml", "rayservice.yaml"}
    assert "nothing to do" in write(CHAT, IMAGE)
    assert {path.name: path.stat().st_mtime_ns for path in write.out.iterdir()} == before
    answer = json.loads(write(CHAT, IMAGE, "format=json").partition("\n}")[0] + "\n}")
    assert not answer["changed"] and answer["folder"] == str(write.out)


def test_a_change_of_one_server_leaves_the_other_as_it_is(write: Writer) -> None:
    write(CHAT + SECOND)
    before = write.application("chat"), write.application("second")
    write((CHAT + SECOND).replace("parallel = 8", "parallel = 2"))
    assert write.application("chat") != before[0]
    assert write.application("second") == before[1]


def test_a_file_of_somebody_in_the_folder_is_kept(write: Writer) -> None:
    write(CHAT)
    (write.out / "mine.yaml").write_text("a: 1\n")
    assert "mine.yaml: would be lost" in write(CHAT, status=3)


def test_a_node_reads_the_file_of_one_server(write: Writer, tmp_path: Path) -> None:
    """What it gets is a configuration of its own, with the same options."""
    more = 'temp = 0.70\nextra_args = ["--no-warmup"]\nport = 8123\n'
    write(CHAT + more + '[instance.chat.control.env]\nOMP_PLACES = "cores"\n')
    args = write.application("chat")["args"]
    assert args["name"] == "chat"
    at = tmp_path / "node.toml"
    at.write_text(args["configuration"], encoding="utf-8")
    read = toml_form.load(at)
    (spec,) = read.enabled
    assert not read.errors
    assert spec.extra_args == ("--no-warmup",)
    options = {name: str(value) for name, value in spec.server.items()}
    assert options == {
        **{"model": "/models/chat.gguf", "threads": "2", "parallel": "8", "alias": "gpt-4o"},
        "temp": "0.70",
    }
    assert spec.control.env == {"OMP_PLACES": "cores"} and spec.control.gpu_ids == "none"


@pytest.mark.build
@pytest.mark.slow
def test_a_model_is_locked_and_its_memory_reserved(ready: Doit, gguf: Path, tmp_path: Path) -> None:
    write = Writer(ready, tmp_path)
    file = tmp_path / "own.gguf"
    os.link(gguf, file)
    printed = write(f'[instance.chat.model]\nref = "{file}"\n', "gpus=0")
    assert f"every node needs {file}" in printed
    lock = tomllib.loads((write.out / "pipeline.lock").read_text("utf-8"))
    (entry,) = lock["model"]
    assert entry["asked"] == {"model": str(file)}
    chat = write.application("chat")
    assert tomllib.loads(chat["args"]["lock"])["model"] == [entry]
    text = tomllib.loads(chat["args"]["configuration"])["instance"]["chat"]
    assert text["model"] == {"ref": str(file)} and text["server"]["ctx_size"] > 0
    memory = chat["deployments"][0]["ray_actor_options"]["memory"]
    assert memory > file.stat().st_size, "weights, context and the server itself"


# Errors, before any work


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[instance.'a b'.server]\nmodel = '/a.gguf'\n", "a name has letters, digits"),
        ("[instance.chat.server]\nmodel = 'a.gguf'\n", "a node has no folder to start at"),
        ("[instance.chat.server]\nmodel = '~/a.gguf'\n", "a node has no folder to start at"),
        (f"{CHAT}api_key = 'topsecret'\n", "server.api_key: would be in Serve's configuration"),
        (f"{CHAT}[instance.chat.control.env]\nHF_TOKEN = 'x'\n", "set it on the nodes"),
        (f"{CHAT}extra_args = ['--port', '1']\n", "--port: is decided on the cluster"),
        (f"{CHAT}ssl_cert_file = '/a'\n", "replicas speak plain HTTP"),
        (f"{CHAT}[gateway]\napi_key = 'topsecret'\n", "write api_key_file"),
        (f"{CHAT}[gateway]\nenable = true\npull = true\n", "the models of its file alone"),
        ("[instance.chat.model]\nref = 'a/b'\nquant = 'auto'\n", "depends on one machine's memory"),
    ],
)
def test_what_no_cluster_can_run(write: Writer, text: str, error: str) -> None:
    printed = write(text, status=3)
    assert error in printed and "topsecret" not in printed
    assert not (write.doit.home / "deploy").exists()


def test_all_errors_are_named_at_once(write: Writer) -> None:
    printed = write(CHAT + "api_key = 'x'\nextra_args = ['--host', '::']\n", status=3)
    assert "server.api_key" in printed and "--host" in printed


def test_what_only_one_machine_needs_is_not_used(write: Writer) -> None:
    """The same file serves one machine and a cluster, and nothing is left out silently."""
    text = CHAT.replace("[instance.chat.server]", 'log_file = "a.log"\n[instance.chat.server]')
    printed = write(text + "port = 8080\nhost = '127.0.0.1'\n")
    for key in ("server.port", "server.host", "control.log_file"):
        assert f"instance.chat.{key}: not used" in printed
    assert "8080" not in write.application("chat")["args"]["configuration"]


def test_an_open_gateway_needs_a_key(write: Writer, board: Dashboard) -> None:
    text = CHAT + "[gateway]\nhost = '0.0.0.0'\n"
    assert "API key" in write(text, f"address={board.url}", "start=1", status=3)
    assert not board.puts
    text += "api_key_file = '/etc/llama/key'\n"
    printed = write(text, f"address={board.url}", "start=1")
    assert "http://127.0.0.1:9000 (from other machines: port 9000 of this one)" in printed
    assert "with the key in /etc/llama/key" in printed
    (put,) = board.puts
    assert put["http_options"] == {"host": "0.0.0.0", "port": 9000}
    settings = put["applications"][-1]["deployments"][0]["user_config"]["settings"]
    assert settings["api_key_file"] == "/etc/llama/key"


@pytest.mark.parametrize("words", [("address=10.0.0.1:6379", "start=1"), ("address=http://a:1",)])
def test_an_address_is_a_dashboard_to_deploy_to(write: Writer, words: tuple[str, ...]) -> None:
    assert "address=" in write(CHAT, *words, status=3)


# Cards and backends


def test_cards_are_resources_of_nodes(write: Writer) -> None:
    text = CHAT + SECOND.replace('gpu_ids = "none"', 'gpu_ids = "GPU-5f"')
    write(text.replace('gpu_ids = "none"', 'gpu_ids = "2,0"'))
    chat, second = (
        write.application(name)["deployments"][0]["ray_actor_options"]
        for name in ("chat", "second")
    )
    assert chat["num_gpus"] == 2 and "resources" not in chat
    assert second["num_gpus"] == 0 and second["resources"] == {"card:GPU-5f": 1.0}
    assert "gpu_ids" not in write.application("chat")["args"]["configuration"], "Ray chooses"
    assert 'gpu_ids = "GPU-5f"' in write.application("second")["args"]["configuration"]


def test_a_device_asks_for_its_backend(write: Writer) -> None:
    write(CHAT + 'device = "Vulkan1"\n')
    options = write.application("chat")["deployments"][0]["ray_actor_options"]
    assert [*options["resources"]] == ["backend:vulkan"]


# A model that no node holds

DIVIDED = """
[instance.big.control]
engine = "vllm"
[instance.big.server]
model = "org/big"
tensor_parallel_size = 2
extra_args = ["-pp", "2"]
distributed_executor_backend = "ray"
"""


def test_vllm_on_several_nodes_has_a_placement_group(write: Writer) -> None:
    printed = write(DIVIDED, IMAGE, "gpus=2")
    assert "4 GPUs requested, on as few nodes as have them" in printed
    big = write.application("big")
    (replica,) = big["deployments"]
    first, *others = replica["placement_group_bundles"]
    assert first["GPU"] == 1 and first["CPU"] == 1 and first["memory"] > 0
    assert others == [{"GPU": 1}] * 3, "vLLM takes one GPU of each"
    assert replica["placement_group_strategy"] == "PACK"
    assert replica["ray_actor_options"]["num_gpus"] == 0, "they are for vLLM's workers"
    text = tomllib.loads(big["args"]["configuration"])
    assert text["master"]["api_server_module"] == "pipeline.deploy.ray.vllm_in_group"
    _, service = yaml.safe_load_all((write.out / "rayservice.yaml").read_text("utf-8"))
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][1:]
    assert group["replicas"] == 2 and group["rayStartParams"]["num-gpus"] == "2"
    inside = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]
    (replica,) = inside["deployments"]
    for name in ("GPU", "pod:big"):
        needed = sum(bundle[name] for bundle in replica["placement_group_bundles"])
        assert needed == 2 * of_pod(group["rayStartParams"])[name] == 4


def test_vllm_on_one_node_has_all_gpus_of_its_parts(write: Writer, tmp_path: Path) -> None:
    text = DIVIDED.replace('distributed_executor_backend = "ray"', "")
    printed = write(text.replace("org/big", str(tmp_path)))
    assert f"every node needs {tmp_path}" in printed
    (replica,) = write.application("big")["deployments"]
    assert replica["ray_actor_options"]["num_gpus"] == 4
    assert "placement_group_bundles" not in replica


def test_a_divided_model_has_to_fit_all_nodes(write: Writer, board: Dashboard) -> None:
    where = (f"address={board.url}", "start=1")
    board.nodes = [node(f"10.0.0.{number}", GPU=2.0) for number in (1, 2)]
    write(DIVIDED, *where)
    assert len(board.puts) == 1
    printed = write(DIVIDED.replace('"-pp", "2"', '"-pp", "3"'), *where, status=3)
    assert "big: needs 6 GPUs of all nodes together, and they have 4" in printed
    assert "node 10.0.0.2: has 4 CPUs, 2 GPUs" in printed
    printed = write(DIVIDED.replace('distributed_executor_backend = "ray"', ""), *where, status=3)
    assert "big: needs 1 CPU, 4 GPUs" in printed and "on one node, and no node has" in printed
    assert '[instance.big.server] distributed_executor_backend = "ray"' in printed
    assert len(board.puts) == 1


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('engine = "vllm"', 'engine = "vllm"\ngpu_ids = "0,1"', "names cards of one machine"),
        ('extra_args = ["-pp", "2"]', "data_parallel_size = 2", "write control.replicas instead"),
        (
            "\n[instance.big.c",
            "[master]\napi_server_module = 'x'\n[instance.big.c",
            "cannot be chosen",
        ),
    ],
)
def test_what_cannot_be_divided(write: Writer, old: str, new: str, error: str) -> None:
    assert error in write(DIVIDED.replace(old, new), status=3)


# Kubernetes


def test_a_rayservice(write: Writer) -> None:
    """KubeRay's own schema is on no package index: its fields are those of its API reference, and
    the pods are held against Kubernetes' schema."""
    printed = write(CHAT + SECOND, IMAGE, "namespace=llm", "storage=50Gi", "gpus=1")
    assert "kubectl create namespace llm" in printed
    assert "kubectl create secret generic" in printed and "kubectl apply -f" in printed
    claim, service = yaml.safe_load_all((write.out / "rayservice.yaml").read_text("utf-8"))
    for version in (VERSIONS[0], VERSIONS[-1]):
        kubernetes_validate.validate(claim, version, strict=True)
    assert service["apiVersion"] == "ray.io/v1" and service["kind"] == "RayService"
    assert service.keys() == {"apiVersion", "kind", "metadata", "spec"}
    spec = service["spec"]
    assert spec.keys() == {"serveConfigV2", "rayClusterConfig"}
    cluster = spec["rayClusterConfig"]
    assert cluster.keys() == {
        *("rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions"),
        *("headGroupSpec", "workerGroupSpecs"),
    }
    assert cluster["rayVersion"] == environment.version()
    assert cluster["authOptions"] == {"mode": "token"}
    groups = cluster["workerGroupSpecs"]
    assert cluster["headGroupSpec"].keys() == {"rayStartParams", "template"}
    sizes = {x["groupName"]: (x["minReplicas"], x["replicas"], x["maxReplicas"]) for x in groups}
    assert sizes == {"gateway": (2, 2, 2), "chat": (1, 1, 1), "second": (0, 0, 4)}
    for group in (cluster["headGroupSpec"], *groups):
        assert group.keys() <= {
            *("groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"),
        }
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
        pod["spec"] = group["template"]["spec"]
        for version in (VERSIONS[0], VERSIONS[-1]):
            kubernetes_validate.validate(pod, version, strict=True)
    inside = yaml.safe_load(spec["serveConfigV2"])
    assert inside["http_options"] == {"host": "0.0.0.0", "port": 9000}
    gateway = inside["applications"][-1]["deployments"][0]
    assert gateway["user_config"]["settings"]["api_key_file"] == "/etc/llama/keys/api-key"
    offered = {group["groupName"]: of_pod(group["rayStartParams"]) for group in groups}
    for app in inside["applications"]:
        (deployment,) = app["deployments"]
        options = deployment["ray_actor_options"]
        needs = {"CPU": options["num_cpus"], "memory": options["memory"], **options["resources"]}
        fits = {
            name for name, has in offered.items() if all(has.get(x, 0) >= needs[x] for x in needs)
        }
        assert fits == {app["name"]}  # it would take the room of what its pods are for


def test_pods_of_a_low_port_may_listen_there(write: Writer) -> None:
    write(CHAT + "[gateway]\nport = 80\n", IMAGE)
    _, service = yaml.safe_load_all((write.out / "rayservice.yaml").read_text("utf-8"))
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        allowed = {"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}
        assert group["template"]["spec"]["securityContext"]["sysctls"] == [allowed]


def of_pod(params: dict[str, str]) -> dict[str, float]:
    """What Ray takes a pod for."""
    custom = json.loads(json.loads(params.get("resources", '"{}"')))
    named = {"CPU": "num-cpus", "GPU": "num-gpus", "memory": "memory"}
    return {name: float(params[at]) for name, at in named.items()} | custom


def test_without_an_image_nothing_is_for_kubernetes(write: Writer) -> None:
    assert "rayservice.yaml" in write(CHAT)
    assert [path.name for path in write.out.iterdir()] == ["serve.yaml"]


# On a cluster


def theirs(name: str, route: str = "/theirs") -> dict[str, Any]:
    return {
        "name": name,
        "route_prefix": route,
        "import_path": "their.module:app",
        "runtime_env": {"env_vars": {"A": "b"}},
        "deployments": [{"name": "D", "num_replicas": 1}],
    }


def test_deployed_listed_read_and_taken_down(write: Writer, board: Dashboard) -> None:
    other = theirs("other")
    board.put({"applications": [other], "http_options": {"host": "127.0.0.1", "port": 8000}})
    where = f"address={board.url}"
    printed = write(CHAT + SECOND, where, "start=1")
    assert "chat: ready" in printed and "second: asleep" in printed
    assert "http://127.0.0.1:8000" in printed and "warning: Serve ran already" in printed
    assert [app["name"] for app in board.puts[-1]["applications"]] == [
        *("other", "chat", "second", "gateway")
    ]
    assert board.puts[-1]["applications"][0] == other, "sent back as it was"
    count = len(board.puts)
    assert "nothing to do" in write(CHAT + SECOND, where, "start=1")
    assert len(board.puts) == count

    rows = {row["name"]: row for row in json.loads(write.doit("ps", "format=json").out)}
    assert rows["chat"]["state"] == "ready" and rows["chat"]["nodes"] == ["10.0.0.2"]
    assert rows["chat"]["model"] == "gpt-4o"
    assert rows["second"]["state"] == "asleep" and rows["second"]["replicas"] == 0
    assert "other" not in rows
    assert "gpt-4o" in write.doit("ps", f"config={write.file}").out

    board.logs["serve/replica_chat_Replica_r0.log"] = "of the replica\n"
    assert write.doit("logs", f"config={write.file}", "name=chat").out == "of the replica\n"
    board.logs["serve/server_chat_Replica_r0.log"] = "one\ntwo\n"
    printed = write.doit("logs", f"config={write.file}", "name=chat", "lines=1").out
    assert printed == "two\n", "its server's comes first"
    assert "there is no such instance" in write.doit("logs", "name=chet", status=3).err

    for task in ("load", "unload"):
        printed = write.doit(task, f"config={write.file}", "name=second", status=3).err
        assert "is on a Ray cluster" in printed and "/models/load" in printed
    printed = write.doit("chat", f"config={write.file}", "name=second", "prompt=Hi", status=3).err
    assert "is on a Ray cluster" in printed and "chat url=" in printed

    write.doit("down", f"config={write.file}", "name=second")
    assert [app["name"] for app in board.puts[-1]["applications"]] == ["other", "chat", "gateway"]
    gateway = board.puts[-1]["applications"][-1]["deployments"][0]
    assert [*gateway["user_config"]["servers"]] == ["chat"]
    assert "chat" in write.doit("down", f"config={write.file}").err
    assert [app["name"] for app in board.puts[-1]["applications"]] == ["other"]
    assert "nothing is up" in write.doit("ps").err


def test_a_removed_server_goes_and_its_neighbour_stays(write: Writer, board: Dashboard) -> None:
    where = f"address={board.url}"
    write(CHAT + SECOND, where, "start=1")
    before = board.applications["chat"]["deployed_app_config"]
    printed = write(CHAT, where, "start=1")
    assert "deploying gateway, second to" in printed
    assert [*board.applications] == ["chat", "gateway"]
    assert board.applications["chat"]["deployed_app_config"] == before


def test_a_model_that_fits_no_node(write: Writer, board: Dashboard) -> None:
    text = CHAT.replace("threads = 2", "threads = 6").replace('"none"', '"0,1"')
    printed = write(text, f"address={board.url}", "start=1", status=3)
    assert "chat: needs 6 CPUs, 2 GPUs on one node, and no node has that" in printed
    assert "node 10.0.0.2: has 4 CPUs, 0 GPUs" in printed
    assert not board.puts


def test_less_than_all_need_is_a_warning(write: Writer, board: Dashboard) -> None:
    text = CHAT.replace('gpu_ids = "none"', 'gpu_ids = "none"\nreplicas = 9')
    printed = write(text, f"address={board.url}", "start=1")
    assert "warning: all servers together need 18.5 CPUs, and 2 nodes together have 8" in printed


@pytest.mark.parametrize(
    ("application", "error"),
    [
        (theirs("chat"), "chat: an application of somebody else has this name"),
        (theirs("web", "/"), "web: an application of somebody else has the route /"),
    ],
)
def test_others_are_not_touched(
    write: Writer, board: Dashboard, application: dict[str, Any], error: str
) -> None:
    board.put({"applications": [application], "http_options": {"host": "127.0.0.1", "port": 8000}})
    assert error in write(CHAT, f"address={board.url}", "start=1", status=3)
    assert len(board.puts) == 1


def test_one_cluster_serves_one_file(write: Writer, board: Dashboard, tmp_path: Path) -> None:
    write(CHAT, f"address={board.url}", "start=1")
    other = Writer(write.doit, tmp_path)
    other.file = tmp_path / "others.toml"
    printed = other(CHAT, f"address={board.url}", "start=1", status=3)
    assert "a cluster has one gateway" in printed
    assert len(board.puts) == 1


def test_one_that_fails_is_reported(write: Writer, board: Dashboard) -> None:
    board.statuses["chat"] = ("DEPLOY_FAILED", "the model is broken")
    printed = write(CHAT, f"address={board.url}", "start=1", status=1)
    assert "chat: the model is broken" in printed
    rows = json.loads(write.doit("ps", "format=json").out)
    assert [row["state"] for row in rows if row["name"] == "chat"] == ["failed"]
    board.statuses.clear()
    assert "chat: ready" in write(CHAT, f"address={board.url}", "start=1"), "tried again"


def test_a_cluster_that_is_gone(write: Writer) -> None:
    with ray_dashboard.start() as board:
        write(CHAT, f"address={board.url}", "start=1")
    printed = write.doit("ps", f"config={write.file}", status=0)
    assert "is on a cluster that is gone, or out of reach" in printed.err
    assert "no Ray dashboard answers" in write.doit("down", f"config={write.file}", status=1).err
    nowhere = write(CHAT, "start=1", "address=http://127.0.0.1:9", status=3)
    assert "is deployed to" in nowhere


def test_ray_address_names_a_cluster(write: Writer, board: Dashboard) -> None:
    write.doit.env["RAY_ADDRESS"] = board.url
    write(CHAT, "start=1")
    assert len(board.puts) == 1
    write.doit.env["RAY_ADDRESS"] = "ray://head:10001"
    assert "RAY_ADDRESS=ray://head:10001: is not a dashboard" in write(CHAT, "start=1", status=3)
