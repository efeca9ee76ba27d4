"""What is written for other engines, and llama-server's router mode for real."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
import yaml
from conftest import free_port, wait_for
from gateway_tools import instance, reached, site, stop

from pipeline.core.errors import UsageError
from pipeline.serve.gateway.other_engines import litellm_config, router_arguments, router_preset
from pipeline.serve.gateway.settings import GatewaySettings, as_instance
from pipeline.serve.supervisor.state import Folder


def test_litellm_knows_every_name_and_no_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    settings = GatewaySettings(api_key_file=str(tmp_path / "key"), models={"claude-*": "GPT"})
    told = litellm_config(
        [
            instance("chat", 1, aliases=("gpt",), api_key_file="/keys/chat"),
            instance("search", 2, kind="embedding"),
            instance("order", 3, kind="rerank", tls=True),
            as_instance(Folder(tmp_path), settings),
        ],
        settings,
    )
    config = yaml.safe_load(yaml.safe_dump(told.config))
    models = {one["model_name"]: one["litellm_params"] for one in config["model_list"]}
    assert list(models) == ["chat", "gpt", "claude-*", "search", "order"]
    assert models["claude-*"] == models["gpt"] == models["chat"]
    assert models["chat"] == {
        "model": "openai/gpt",
        "api_base": "http://127.0.0.1:1/v1",
        "api_key": "os.environ/LLAMA_PIPELINE_KEY_CHAT_1",
    }
    assert models["order"]["model"] == "hosted_vllm/order"
    assert models["order"]["api_base"] == "https://127.0.0.1:3/v1"
    assert config["general_settings"] == {"master_key": "os.environ/LITELLM_MASTER_KEY"}
    assert told.key_files == {
        "LLAMA_PIPELINE_KEY_CHAT_1": "/keys/chat",
        "LITELLM_MASTER_KEY": str(tmp_path / "key"),
    }
    assert "secret" not in str(told)
    with pytest.raises(UsageError, match="does not support"):
        litellm_config([instance("a")], GatewaySettings(models={"a?": "a"}))


def test_litellm_without_a_key_has_to_be_asked_for() -> None:
    def general(**more: bool) -> object:
        return litellm_config([instance("a")], GatewaySettings(**more)).config.get(
            "general_settings"
        )

    assert general() is None
    assert general(without_key=True) == {"dangerously_permit_weak_or_unset_master_key": True}


def test_a_preset_holds_the_options() -> None:
    cmd = ("--model", "/m ü/a b.gguf", "-c", "4096", "--seed", "-1", "--no-mmap", "--port", "1")
    text = router_preset(
        [instance("a", cmd=cmd, aliases=("x", "y"), stop_timeout=2.5)], GatewaySettings()
    )
    assert text == (
        "version = 1\n\n[a]\nmodel = /m ü/a b.gguf\nc = 4096\nseed = -1\nno-mmap = true\n"
        "alias = x,y\nload-on-startup = true\nstop-timeout = 2\n"
    )


def test_all_reasons_against_a_router_are_told_at_once() -> None:
    with pytest.raises(UsageError) as why:
        router_preset(
            [
                instance("a", cmd=("--model", "x;y", "--lora", "1", "--lora", "2"), gpu_ids="0"),
                instance("default", cmd=(), host="0.0.0.0", aliases=("a",), env={"A": "1"}),
                instance("v", engine="vllm", cmd=("--model", "m"), tls=True),
            ],
            GatewaySettings(models={"gpt-*": "a"}, hold_timeout=1),
        )
    for text in (
        "different hosts: 0.0.0.0, 127.0.0.1",
        "different GPUs: 0, all",
        "different environments",
        "2 of them are called a;",
        "a: --lora is given 2 times",
        "a: --model: a preset cannot hold the value 'x;y'",
        "default: a preset cannot have this name",
        "default: its command has no --model",
        "v: it runs in vllm",
        "v: TLS",
        "gateway.models: a router has no patterns",
        "gateway.hold_timeout:",
    ):
        assert text in why.value.message
    with pytest.raises(UsageError, match="there are none"):
        router_preset([], GatewaySettings())


@pytest.mark.build
@pytest.mark.slow
def test_llama_server_understands_the_preset(built: Path, gguf: Path, tmp_path: Path) -> None:
    cmd = ("--model", str(gguf), "--ctx-size", "512", "--no-warmup", "--port", "1")
    both = [instance("one", cmd=cmd, aliases=("first",)), instance("two", cmd=cmd)]
    preset = tmp_path / "presets ü.ini"
    preset.write_text(router_preset(both, GatewaySettings()), encoding="utf-8")
    settings = GatewaySettings(port=free_port())
    program = next(built.glob("*/llama-server*"))
    url = f"http://127.0.0.1:{settings.port}"
    with site(tmp_path) as here:
        router = here.start("router", [str(program), *router_arguments(preset, 2, settings)])
        wait_for(lambda: reached(url))

        def loaded() -> bool:
            listed = httpx2.get(f"{url}/models").json()["data"]
            states = {one["id"]: one["status"]["value"] for one in listed}
            return states.get("one") == states.get("two") == "loaded"

        wait_for(loaded, 60)
        for model in ("first", "two"):
            body = {"model": model, "prompt": "hello", "max_tokens": 2}
            assert httpx2.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        assert stop(router) == 0
