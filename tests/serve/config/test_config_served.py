"""Instances as they are read, started with the real llama-server."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from config_tools import written
from conftest import free_port, wait_for

from pipeline.core.environment import servers
from pipeline.core.process import capture
from pipeline.serve.config import checks
from pipeline.serve.config.instances import instances, write_keys
from pipeline.serve.config.llama import PreparedModel
from pipeline.serve.config.toml_form import load
from pipeline.serve.flags import parse_help

pytestmark = pytest.mark.build

# Without a comma, which would make two of it.
KEY = "s3cret!\"$%41&'()*+-./:;<=>?@[\\]^_`{|}~#"


def asked(url: str, key: str = "") -> Any:
    """What the server answers to this key."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as it:
        return json.loads(it.read()) if "json" in it.headers["Content-Type"] else it.read()


def status(url: str, key: str = "") -> int:
    """The status that it answers with, 0 where nobody does."""
    try:
        asked(url, key)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
    return 200


def test_a_server_runs_as_its_instance_says(built: Path, gguf: Path, tmp_path: Path) -> None:
    server = next(built.glob("*-cpu/llama-server*"))
    flags = parse_help(capture([server, "--help"]) or "")
    file = written(
        tmp_path / "a ü",
        f"""
        [master]
        llama_cpp_path = "{server}"
        [instance.server]
        ctx_size = 256
        parallel = 1
        [instance.tiny.control]
        gpu_ids = "none"
        [instance.tiny.model]
        ref = "{gguf}"
        [instance.tiny.server]
        port = {free_port()}
        alias = "one,two"
        api_key = {json.dumps(KEY)}
        no_warmup = true
        n_gpu_layers = 0
        api_prefix = "/pre"
        extra_args = ["--seed", 1]
        """,
    )
    configuration = load(file)
    checks.check(configuration, server=None, flags=flags, environ=os.environ)
    assert configuration.prepares() == {"tiny": {"model": str(gguf)}}
    keys, xdg = tmp_path / "keys", tmp_path / "xdg"
    (instance,) = instances(
        configuration,
        server=None,
        flags=flags,
        models={"tiny": PreparedModel(path=gguf)},
        logs=tmp_path,
        keys=keys,
        xdg=xdg,
        environ=os.environ,
    )
    write_keys(configuration, flags, keys)
    key = KEY
    assert key not in " ".join(instance.command) and instance.api_key_file is not None
    assert Path(instance.api_key_file).read_text() == f"{key}\n"
    env = {**servers(os.environ), **instance.env}
    log = (tmp_path / "log").open("wb")
    with (
        log,
        subprocess.Popen(
            instance.command, cwd=instance.folder, env=env, stdout=log, stderr=log
        ) as process,
    ):
        try:
            health = f"{instance.url}/health"
            # below a prefix this wants the key too
            wait_for(lambda: process.poll() is not None or status(health, key) == 200)
            assert process.poll() is None, (tmp_path / "log").read_text()
            for path in ("v1/models", "metrics"):
                url = f"{instance.url}/{path}"
                assert (status(url), status(url, key)) == (401, 200)
            told = asked(f"{instance.url}/v1/models", key)["data"][0]
            assert {told["id"], *told.get("aliases", [])} >= {"one", "two"}
            assert instance.aliases == ("one", "two")
        finally:
            process.terminate()
            process.wait(timeout=60)
