"""What `doit kubernetes` writes: held against the official schemas, against itself, and run."""

from __future__ import annotations

import base64
import contextlib
import json
import math
import re
import shlex
import shutil
import subprocess
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from cluster_tools import (
    CHAT,
    IMAGE,
    VERSIONS,
    Writer,
    documents,
    every,
    kubectl,
    of,
    page,
    require_sound,
    server_of,
)
from cluster_tools import write as write
from conftest import REPOSITORY, Doit, free_port, wait_for
from fakes import hub

from pipeline.deploy.kubernetes import folder, manifests, workload
from pipeline.deploy.kubernetes.options import LABEL, Options, options

EXAMPLES = (
    *("one-chat", "cpu-only", "two-models-two-gpus", "chat-embed-rerank"),
    *("mixed-engines", "vllm-pixi"),
)
WITH_DEMO = ("chat-embed-rerank", "mixed-engines")


# The examples


@pytest.fixture
def user(doit: Doit, gguf: Path, converter: Path, tmp_path: Path) -> Iterator[Doit]:
    """Somebody whose hub has what the examples ask for."""
    for example in EXAMPLES:
        told = tomllib.loads((REPOSITORY / "configs" / f"{example}.toml").read_text("utf-8"))
        for table in told["instance"].values():
            if "model" in table and table["model"]["ref"] != "demo-embed":
                at = tmp_path / "hub" / table["model"]["ref"]
                at.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(gguf, at / f"tiny-{table['model']['quant']}.gguf")
    with hub.start(tmp_path / "hub") as site:
        doit.env |= {
            "HF_ENDPOINT": site.endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "NO_PROXY": "127.0.0.1",
        }
        yield doit


@pytest.mark.build
@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example(user: Doit, example: str, tmp_path: Path) -> None:
    config = f"config={REPOSITORY / 'configs' / example}.toml"
    if example in WITH_DEMO:
        wanting = user("kubernetes", config, IMAGE, status=3)
        assert "doit prepare model=demo-embed" in wanting.err + wanting.out
        user("prepare", "model=demo-embed")
    user("kubernetes", config, IMAGE)
    at = user.home / "deploy" / example
    found = require_sound(at)
    before = {path.name: path.read_bytes() for path in at.iterdir()}
    again = user("kubernetes", config, IMAGE, "format=json").json()
    assert again["folder"] == str(at) and not again["changed"]
    assert {path.name: path.read_bytes() for path in at.iterdir()} == before
    deployments = [one for one in found if one["kind"] == "Deployment"]
    assert len(again["secrets"]) == len(deployments)
    for one in deployments:
        inside = one["spec"]["template"]["spec"]
        for container in inside.get("initContainers", ()):
            assert container["args"][0] == "prepare"
            if "model=demo-embed" not in container["args"]:
                assert any(re.fullmatch("revision=[0-9a-f]{40}", x) for x in container["args"])


@pytest.mark.build
@pytest.mark.slow
def test_gpus_of_the_examples(user: Doit) -> None:
    user("kubernetes", f"config={REPOSITORY}/configs/two-models-two-gpus.toml", IMAGE)
    text = "".join(p.read_text("utf-8") for p in (user.home / "deploy").rglob("*.yaml"))
    assert text.count("nvidia.com/gpu: '1'") == 2
    assert "CUDA_VISIBLE_DEVICES" not in text, "the device plugin numbers them"
    user("kubernetes", f"config={REPOSITORY}/configs/cpu-only.toml", IMAGE)
    text = (user.home / "deploy" / "cpu-only" / "chat.server.yaml").read_text("utf-8")
    assert "nvidia.com/gpu" not in text and "value: void" in text


@pytest.mark.build
@pytest.mark.slow
def test_the_pod_runs(user: Doit, tmp_path: Path) -> None:
    """Its init container's command, then its server's, with the paths of the pod moved here."""
    config = f"config={REPOSITORY}/configs/cpu-only.toml"
    user("kubernetes", config, IMAGE)
    found = documents(user.home / "deploy" / "cpu-only")
    inside = of(found, "Deployment", "chat")["spec"]["template"]["spec"]
    (prepare,), (server,) = inside["initContainers"], inside["containers"]
    data, keys = tmp_path / "claim ü", tmp_path / "key"
    bins = next(path for path in (user.home / "bins").iterdir() if (path / "llama-server").exists())
    keys.mkdir()
    (keys / "api-key").write_text("of the secret")

    def here(word: str) -> str:
        word = word.replace(workload.KEYS, str(keys))
        return re.sub(r"^/data(?=/|$)", str(data).replace("\\", r"\\"), word).replace("$$", "$")

    told = of(found, "ConfigMap", "llama-pipeline")["data"]
    image = Doit(tmp_path / "home of the image")
    image.env |= {n: user.env[n] for n in ("HF_ENDPOINT", "NO_PROXY")}
    image.env |= {"LLAMA_SERVER_BINS_DIR": str(bins)} | {n: here(v) for n, v in told.items()}
    assert prepare["command"] == ["doit"]
    image(*map(here, prepare["args"]))
    again = image(*map(here, prepare["args"]))
    assert not {"fetch", "convert", "quantize"} & {*again.steps}, "a pod that restarts finds it"

    port = free_port()
    assert server["command"] == ["llama-server"]
    words = [here(word) for word in server["args"]]
    words[words.index("--port") + 1] = str(port)
    words[words.index("--host") + 1] = "127.0.0.1"
    health = server["startupProbe"]["httpGet"]["path"]
    env = {one["name"]: one["value"] for one in server["env"]}
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    seen: list[int] = []

    def asked(path: str, key: str = "") -> int:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                texts[path] = answer.read().decode()
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def is_ready() -> bool:
        seen.append(asked(health))
        return seen[-1] == 200

    texts: dict[str, str] = {}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [bins / "llama-server", *words],
            env={**env, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "xdg")},
            stdout=log,
            stderr=log,
        )
        try:
            wait_for(is_ready, 60)
            assert {*seen} <= {0, 503, 200}, "not ready until it is"
            assert asked("/v1/models") == 401 and asked("/v1/models", "of the secret") == 200
            assert asked("/metrics") == 401 and asked("/metrics", "of the secret") == 200
            for metric in ("llamacpp:requests_processing", "llamacpp:requests_deferred"):
                assert re.search(rf"^{metric} ", texts["/metrics"], re.M)
            process.terminate()
            assert process.wait(inside["terminationGracePeriodSeconds"]) == 0
        finally:
            process.kill()
            process.wait()


@pytest.mark.build
@pytest.mark.slow
def test_a_profile(user: Doit, gguf: Path, tmp_path: Path) -> None:
    """Its model lands where `prepare` has it, whatever its folder on this machine."""
    repository = tmp_path / "hub" / "Qwen" / "Qwen2.5-0.5B-Instruct-GGUF"
    shutil.copyfile(gguf, repository / "qwen2.5-0.5b-instruct-q4_k_m.gguf")
    user("kubernetes", "profile=small-chat", IMAGE)
    found = require_sound(user.home / "deploy" / "small-chat")
    words = server_of(found, "small-chat")["args"]
    assert words[words.index("--model") + 1].startswith("/data/models/gguf/Qwen__")
    inside = of(found, "Deployment", "small-chat")["spec"]["template"]["spec"]
    assert "filename=qwen2.5-0.5b-instruct-q4_k_m.gguf" in inside["initContainers"][0]["args"]


@pytest.mark.build
@pytest.mark.slow
def test_a_reference_to_a_file_of_this_machine(write: Writer, gguf: Path) -> None:
    shutil.copyfile(gguf, write.folder / "own.gguf")
    said = write('[instance.chat.model]\nref = "own.gguf"\n', "gpus=0")
    assert "own.gguf to /data/models/own.gguf on the claim chat-models" in said
    found = write.found()
    inside = of(found, "Deployment", "chat")["spec"]["template"]["spec"]
    assert "initContainers" not in inside
    assert "/data/models/own.gguf" in server_of(found)["args"]
    assert server_of(found)["resources"] == {"requests": {"cpu": "1", "memory": "1Gi"}}
    refused = write('[instance.chat.model]\nref = "own.gguf"\nquant = "q2_k"\n', status=3)
    assert "would cost quality" in refused


def test_the_page_holds_what_a_cluster_takes() -> None:
    found = page()
    assert [one.get("kind") for one in found] == ["Kustomization", "PodMonitor", None, "Pod"]
    kubernetes_validate.validate(found[-1], VERSIONS[-1], strict=True)
    (volume,) = found[-1]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"] == {"claimName": "chat-models"}
    (rule,) = found[2]["rules"]
    (series,) = re.findall(r'__name__=~"([^"]+)"', rule["seriesQuery"])
    for name in (
        *("llamacpp:requests_processing", "llamacpp:requests_deferred"),
        *("vllm:num_requests_running", "vllm:num_requests_waiting"),
    ):
        assert re.fullmatch(series, name), "the adapter finds it"
        as_python = re.sub(r"\$\{(\d)\}", r"\\\1", rule["name"]["as"])
        renamed = re.sub(rule["name"]["matches"], as_python, name)
        assert renamed in (*manifests.LLAMA_METRICS, *manifests.VLLM_METRICS)


# What the command line and the file can say


def test_a_model_that_is_on_the_volume_needs_no_preparing(write: Writer) -> None:
    said = write(CHAT)
    found = write.found()
    inside = of(found, "Deployment", "chat")["spec"]["template"]["spec"]
    assert "initContainers" not in inside
    words = server_of(found)["args"]
    assert words[words.index("--model") + 1] == "/data/models/chat.gguf"
    assert "--metrics" in words
    assert "100Gi" in said and "one GPU is requested" in said
    assert "kubectl create secret generic chat-api-key" in said and "kubectl apply -k" in said


def test_a_model_of_this_machine_is_to_be_copied(write: Writer) -> None:
    (write.folder / "own ü.gguf").write_bytes(b"GGUF" * 10)
    said = write('[instance.chat.server]\nmodel = "own ü.gguf"\n')
    assert "on the claim chat-models" in said and "own ü.gguf to /data/models/" in said
    assert "/data/models/own ü.gguf" in server_of(write.found())["args"]


def test_every_file_of_this_machine_is_to_be_copied(write: Writer) -> None:
    """Whatever the option, alone, in a list, with commas or with a scale."""
    for name in ("draft", "a", "b", "c"):
        (write.folder / f"{name}.gguf").write_bytes(b"GGUF")
    options = """
    spec_draft_model = "draft.gguf"
    lora = ["a.gguf", "/models/x.gguf"]
    control_vector = "a.gguf,b.gguf"
    lora_scaled = "b.gguf:0.5,c.gguf:1"
    """
    said = write(CHAT + options)
    words = server_of(write.found())["args"]
    own = {word for word in words if ".gguf" in word and word != "/data/models/chat.gguf"}
    assert own == {
        *("/data/models/draft.gguf", "/data/models/a.gguf", "/data/models/x.gguf"),
        "/data/models/a.gguf,/data/models/b.gguf",
        "/data/models/b.gguf:0.5,/data/models/c.gguf:1",
    }
    for name in ("draft", "a", "b", "c"):
        assert said.count(f"{name}.gguf to /data/models/{name}.gguf") == 1


def test_two_files_of_one_name_cannot_be_copied(write: Writer) -> None:
    for at in (write.folder / "one", write.folder / "two"):
        at.mkdir()
        (at / "x.gguf").write_bytes(b"GGUF")
    text = '[instance.chat.server]\nmodel = "one/x.gguf"\nlora = "two/x.gguf"\n'
    assert "another file of this name" in write(text, status=3)


def test_no_key_is_written(write: Writer) -> None:
    text = '[instance.chat.server]\nmodel = "/models/a.gguf"\napi_key = "topsecret"\n'
    said = write(f'[gateway]\nenable = true\napi_key = "topsecret"\n{text}')
    assert "topsecret" not in write.text() + said
    for name in ("chat", "gateway"):  # the command beside it makes another one
        assert f"api_key: is not copied; put it into the Secret {name}-api-key" in said
    (write.folder / "keys").write_text("topsecret\n")
    said = write('[instance.chat.server]\nmodel = "/models/a.gguf"\napi_key_file = "keys"\n')
    (command,) = (line for line in said.splitlines() if "create secret" in line)
    assert f"--from-file=api-key={write.folder / 'keys'}" in shlex.split(command)
    assert "topsecret" not in write.text() + said
    assert workload.KEY_FILE in server_of(write.found())["args"]


def test_without_a_key_where_the_file_says_so(write: Writer) -> None:
    said = write('[instance.chat.server]\nmodel = "/models/a.gguf"\napi_key = "none"\n')
    assert "secret" not in said and "without a key" not in said
    assert "--api-key-file" not in server_of(write.found())["args"]


def test_small_texts_become_a_config_map(write: Writer) -> None:
    (write.folder / "vorlage ü.jinja").write_text("{{ 'ü' }}\n\n  $(HOME)\n", encoding="utf-8")
    write(CHAT + 'chat_template_file = "vorlage ü.jinja"\n')
    found = write.found()
    (data,) = of(found, "ConfigMap", "chat-files")["data"].values()
    assert data == "{{ 'ü' }}\n\n  $(HOME)\n"
    assert f"{workload.TEXTS}/chat-template-file" in server_of(found)["args"]
    before = of(found, "Deployment", "chat")["spec"]["template"]["metadata"]["annotations"]
    (write.folder / "vorlage ü.jinja").write_text("other", encoding="utf-8")
    write(CHAT + 'chat_template_file = "vorlage ü.jinja"\n')
    after = of(write.found(), "Deployment", "chat")["spec"]["template"]["metadata"]["annotations"]
    assert before != after, "the pods start anew"


def test_words_reach_the_server_as_they_are(write: Writer) -> None:
    hard = [
        "1e3",
        "0x1f",
        "0o17",
        "y",
        "no",
        "~",
        "null",
        "$(HOME)",
        "$$x",
        " a ",
        "#b",
        "ü: 1",
        "",
    ]
    write(CHAT + f"extra_args = {json.dumps(hard, ensure_ascii=False)}\n")
    args = server_of(write.found())["args"]
    assert args[-len(hard) :] == [word.replace("$", "$$") for word in hard]
    for word in ("1e3", "0x1f", "0o17", "y", "no"):  # readers of YAML 1.2 take these for others
        assert f"'{word}'\n" in write.text()


def test_several_pods_and_autoscaling(write: Writer) -> None:
    write(CHAT, "replicas=3", "storage=50Gi", "storage_class=fast", "namespace=llm")
    found = write.found()
    assert of(found, "Deployment", "chat")["spec"]["replicas"] == 3
    # a node that is emptied does not take all of them at once
    budget = of(found, "PodDisruptionBudget", "chat")["spec"]
    pods = of(found, "Deployment", "chat")["spec"]["selector"]
    assert budget == {"maxUnavailable": 1, "selector": pods}
    claim = of(found, "PersistentVolumeClaim", "chat-models")["spec"]
    assert claim["storageClassName"] == "fast"
    assert claim["resources"]["requests"]["storage"] == "50Gi"
    assert "namespace: llm" in (write.out / "kustomization.yaml").read_text("utf-8")
    said = write(CHAT + "parallel = 8\n", "replicas=1-5", "namespace=llm")
    assert "-n llm" in said
    scaler = of(write.found(), "HorizontalPodAutoscaler", "chat")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (1, 5)
    assert scaler["scaleTargetRef"]["name"] == "chat"
    targets = {
        one["pods"]["metric"]["name"]: one["pods"]["target"]["averageValue"]
        for one in scaler["metrics"]
    }
    assert targets == {"llamacpp_requests_processing": "6", "llamacpp_requests_deferred": "1"}


def test_times(write: Writer) -> None:
    control = "[instance.chat.control]\nready_timeout = 1801\nstop_timeout = 42.5\n"
    write(CHAT + control)
    found = write.found()
    start = server_of(found)["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 1801
    inside = of(found, "Deployment", "chat")["spec"]["template"]["spec"]
    assert inside["terminationGracePeriodSeconds"] >= 43 + manifests.DRAIN
    assert "PodDisruptionBudget" not in write.text(), "it is about several"


@pytest.mark.parametrize("gpu_ids", ['gpu_ids = "0,1"', ""])
def test_vllm(write: Writer, gpu_ids: str) -> None:
    write(
        f'[instance.big.control]\nengine = "vllm"\n{gpu_ids}\n'
        '[instance.big.server]\nmodel = "org/model"\nport = 8000\ntensor_parallel_size = 2\n',
        "vllm_image=vllm/vllm-openai@sha256:" + "0" * 64,
        "replicas=1-2",
    )
    server = server_of(write.found(), "big")
    assert server["command"] == ["python3"] and server["args"][0] == "-m"
    assert server["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    env = {one["name"]: one for one in server["env"]}
    assert env["VLLM_API_KEY"]["valueFrom"]["secretKeyRef"]["name"] == "big-api-key"
    looks = server["startupProbe"]
    assert looks["failureThreshold"] * looks["periodSeconds"] >= 3600, "it downloads first"
    assert "doit" not in server["command"] and "api-key" not in " ".join(server["args"])


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm"])
def test_variables_of_the_file(write: Writer, engine: str) -> None:
    """Each once, as written: what looks like a variable of Kubernetes is none."""
    env = "env = {OMP_NUM_THREADS = 4, HOME = '/data', SAID = 'a $(HOME)'}\n"
    server = CHAT if engine == "llama.cpp" else '[instance.chat.server]\nmodel = "org/model"\n'
    write(f"[instance.chat.control]\nengine = '{engine}'\ngpu_ids = 'none'\n{env}{server}")
    told = server_of(write.found())["env"]
    found = {one["name"]: one.get("value") for one in told}
    assert len(found) == len(told)
    assert (found["OMP_NUM_THREADS"], found["HOME"]) == ("4", "/data")
    assert found["SAID"] == "a $$(HOME)" and found["CUDA_VISIBLE_DEVICES"] == ""


def test_a_credential_that_gets_into_a_manifest_is_named(write: Writer) -> None:
    env = "env = {HF_TOKEN = 'hf_x', OMP_NUM_THREADS = 4}\n"
    said = write(f"[instance.chat.control]\ngpu_ids = 'none'\n{env}{CHAT}")
    (line,) = [line for line in said.splitlines() if "can be read in the manifest" in line]
    assert line.startswith("warning: ") and "instance.chat.control.env: HF_TOKEN can be" in line


@pytest.mark.parametrize(
    ("text", "more", "line"),
    [
        (CHAT, ["image="], "image=: must be an image"),
        (CHAT, ["image=Upper Case"], "must be an image"),
        (CHAT, ["namespace=Not_One"], "namespace=Not_One: must be"),
        (CHAT, ["replicas=4-2"], "replicas=4-2: must be"),
        (CHAT, ["replicas=0"], "replicas=0: must be"),
        (CHAT, ["replicas=0-2", "autoscaler=hpa"], "an HPA keeps one pod"),
        (CHAT, ["replicas=0-2"], "KEDA asks the gateway for its requests"),
        (CHAT, ["route=a.example", "route_parent=p"], "leads to the gateway"),
        (CHAT, ["model_image=Not One"], "model_image=Not One: must be"),
        (CHAT, ["storage=lots"], "storage=lots: must be"),
        (
            CHAT,
            ["storage_class=Fast"],
            "must be a storage class: small letters",
        ),
        (CHAT, ["gpus=-1"], "gpus=-1: must be"),
        (CHAT, ["name=other"], "there is no such instance"),
        (CHAT, ["port=8081"], "port=: is for one server"),
        ("[master]\nenable = false\n", [], "nothing to write"),
        (
            CHAT + 'ssl_key_file = "/k"\nssl_cert_file = "/c"\n',
            [],
            "TLS is terminated in front of the pods",
        ),
        (CHAT + "metrics = false\n", ["replicas=1-4"], "the autoscaler"),
        (CHAT + "[instance.control]\nsandbox = 'strict'\n", [], "by its securityContext alone"),
        (CHAT + 'api_prefix = "/x"\n', [], "which no probe has"),
        (CHAT + 'extra_args = ["--host", "::1"]\n', [], "no Service could reach it"),
        (CHAT + 'extra_args = ["--api-key-file", "keys"]\n', [], "write api_key_file = "),
        (CHAT + "chat_template_file = 'zeros'\n", [], "cannot be read as text"),
        (CHAT.replace("/models/chat", "nowhere/chat"), [], "is not a file"),
        ('[instance.a.model]\nref = "o/m"\nquant = "auto"\n', [], "name a quant"),
        ('[instance.a.model]\nref = "o/m"\nquant = "fit"\n', [], "fit: depends on one machine's"),
        ('[instance.a.model]\nref = "o/m"\nimatrix = "zeros"\n', [], "no pod has it"),
        ('[instance.a.model]\nref = "o/m"\nlora = "o/l:2"\n', [], "no pod prepares an adapter"),
    ],
)
def test_mistakes(write: Writer, text: str, more: list[str], line: str) -> None:
    (write.folder / "zeros").write_bytes(b"\xff\xfe\0")
    (write.folder / "keys").write_text("a-key\n")
    assert line in write(text, *more, status=3)
    assert not write.out.exists(), "nothing is written"


def test_the_image_has_to_be_named(write: Writer) -> None:
    file = write.folder / "chat.toml"
    file.write_text(CHAT)
    run = write.doit("kubernetes", f"config={file}", status=3)
    assert "image=: is missing" in run.out + run.err
    run = write.doit("kubernetes", status=3)
    assert "config=" in run.out + run.err


def test_names(write: Writer) -> None:
    text = "".join(
        f"[instance.{json.dumps(name, ensure_ascii=False)}.server]\n"
        f'model = "/models/a.gguf"\nport = {8080 + number}\n'
        for number, name in enumerate(
            ["Chat", "a_b", "a-b", "a b", "ünï", "模型", "-x-", "9", "y" * 64]
        )
    )
    write(text)
    deployed = [one for one in write.found() if one["kind"] == "Deployment"]
    assert len({one["metadata"]["name"] for one in deployed}) == 9
    assert {"chat", "a-b"} < {one["metadata"]["name"] for one in deployed}
    told = [one["spec"]["template"]["metadata"]["annotations"] for one in deployed]
    assert {"模型", "a b"} < {one["llama-pipeline/instance"] for one in told}


def test_two_that_would_have_one_name(write: Writer) -> None:
    other = workload.kubernetes_name("a_b")
    text = f'[instance.a_b.server]\nmodel = "/models/a"\n[instance.{other}.server]\nport = 1\n'
    assert "rename one" in write(text, status=3)


def test_the_name_of_a_service_of_the_gateways_is_taken(write: Writer) -> None:
    text = '[gateway]\nenable = true\n[instance.gateway-pods.server]\nmodel = "/models/a"\n'
    assert "gateway-pods: would have the same name as a Service" in write(text, status=3)


def test_names_alone() -> None:
    for text in ("chat", "a" * 40, "x-1"):
        assert workload.kubernetes_name(text) == text
    for text in ("a.b", "-", "ß", "1", "a" * 41, "\N{PILE OF POO}", "a--b"):
        found = workload.kubernetes_name(text)
        assert found != text and re.fullmatch(LABEL, found) and len(found) <= workload.LONGEST
        assert found[0].isalpha(), "a Service's name begins with a letter"


# The folder


def test_files_of_somebody_else_are_kept(write: Writer) -> None:
    write.out.mkdir()
    (write.out / "mine.yaml").write_text("kind: Mine\n")
    assert "mine.yaml: would be lost; not written by doit kubernetes" in write(CHAT, status=3)
    assert [path.name for path in write.out.iterdir()] == ["mine.yaml"]


def test_what_is_not_asked_for_any_more_goes(write: Writer) -> None:
    write(CHAT + '[instance.other.server]\nmodel = "/models/b.gguf"\nport = 8081\n')
    assert (write.out / "other.server.yaml").exists()
    assert "wrote" in write(CHAT)
    assert not (write.out / "other.server.yaml").exists()
    assert "nothing to do" in write(CHAT)
    there = sorted(path.name for path in write.folder.iterdir())
    assert there == [".out ü.lock", "my servers.toml", "out ü"]


def test_a_folder_that_cannot_be_written(write: Writer) -> None:
    (write.folder / "file").write_text("")
    write.out = write.folder / "file"
    assert "is not a folder" in write(CHAT, status=3)
    write.out = write.folder / "file" / "out"
    assert "cannot be written to" in write(CHAT, status=1)
    write.out = Path(write.folder.anchor)
    assert "not written by" in write(CHAT, status=3)


def test_two_at_once(write: Writer) -> None:
    file = write.folder / "chat.toml"
    file.write_text(CHAT)
    words = ("kubernetes", f"config={file}", f"out={write.out}", IMAGE)
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(write.doit.start(*words)) for _ in range(3)]
        told = [one.communicate(timeout=60) for one in running]
    assert [one.returncode for one in running] == [0, 0, 0], told
    assert sum("wrote" in out for out, _ in told) == 1
    write.found()


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm"])
@pytest.mark.parametrize("own", [False, True])
def test_the_command_that_makes_a_secret(write: Writer, engine: str, own: bool) -> None:
    (write.folder / "my key").write_text("mine\n")
    text = CHAT if engine == "llama.cpp" else '[instance.chat.server]\nmodel = "org/model"\n'
    more = 'api_key_file = "my key"\n' if own else ""
    said = write(text + more, f"engine={engine}", "namespace=llm", "format=json")
    (command,) = json.loads(said[said.index("{") : said.rindex("}") + 1])["secrets"]
    command = command.replace("kubectl", shlex.quote(kubectl()), 1)
    words = ["bash", "-o", "pipefail", "-c", f"{command} --dry-run=client -o json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    made = json.loads(done.stdout)
    key = base64.b64decode(made["data"]["api-key"]).decode()
    assert key == "mine" if own and engine == "vllm" else key == "mine\n" if own else len(key) == 64
    assert {"name": "chat-api-key", "namespace": "llm"}.items() <= made["metadata"].items()
    inside = of(write.found(), "Deployment", "chat")["spec"]["template"]["spec"]
    asked = {
        "llama.cpp": {"secretName": "chat-api-key"},
        "vllm": {"name": "chat-api-key", "key": "api-key"},
    }[engine]
    assert any(isinstance(x, dict) and asked.items() <= x.items() for x in every(inside))


def test_kustomize_takes_it(write: Writer) -> None:
    """With the overlay of the page, and a prefix."""
    write.out = write.folder / "one-chat"
    write(CHAT, "image=registry.example/llama-pipeline:1.0", "replicas=1-2")
    overlay = write.folder / "production"
    overlay.mkdir()
    told = {**page()[0], "namePrefix": "staging-"}
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
    words = [kubectl(), "kustomize", str(overlay)]
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    found = list(yaml.safe_load_all(done.stdout))
    assert len(found) == len(documents(write.out))
    for one in found:
        kubernetes_validate.validate(one, VERSIONS[-1], strict=True)
        assert one["metadata"]["namespace"] == "llm"
    inside = of(found, "Deployment", "staging-chat")["spec"]["template"]["spec"]
    assert inside["runtimeClassName"] == "nvidia"
    assert inside["containers"][0]["image"] == "registry.example/llama-pipeline:1.1"
    claim = inside["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == "staging-chat-models"
    scaler = of(found, "HorizontalPodAutoscaler", "staging-chat")
    assert scaler["spec"]["scaleTargetRef"]["name"] == "staging-chat"


# Decisions alone


@pytest.mark.parametrize(
    ("ids", "asked", "count", "is_said"),
    [
        ("none", None, 0, False),
        ("none", 4, 0, False),
        ("2,0", None, 2, True),
        ("2,0", 4, 2, True),
        ("all", None, 1, True),
        (None, None, 1, True),
        (None, 0, 0, False),
        ("all", 4, 4, False),
    ],
)
def test_gpus(ids: str | None, asked: int | None, count: int, is_said: bool) -> None:
    found, told = workload.gpus(ids, asked)
    assert (found, bool(told)) == (count, is_said)


def test_options_of_the_command_line() -> None:
    assert options({}) == Options()
    read = options({"replicas": "0-4", "gpus": "0", "port": "1", "out": "x"})
    assert read.replicas == (0, 4) and read.gpus == 0


def test_sizes_are_rounded_up() -> None:
    assert manifests.in_gib(1) == "1Gi" and manifests.in_gib(manifests.GIB + 1) == "2Gi"
    assert math.isclose(int(manifests.in_gib(1e12)[:-2]), 1e12 / manifests.GIB, rel_tol=0.01)


def test_texts_are_read_back_as_they_were() -> None:
    hard = [
        "1e10000000000000",
        "y",
        "N",
        "on",
        "a\nb\n",
        " x",
        "",
        "'",
        "\u2028",
        "0.1",
        "-1",
        "--a",
    ]
    assert yaml.safe_load(folder.text([{"data": hard}])) == {"data": hard}
