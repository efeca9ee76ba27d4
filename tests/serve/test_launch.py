"""The command line and the environment of a server, as pure values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.core.errors import UsageError
from pipeline.serve.flags import Flag
from pipeline.serve.launch import (
    Launch,
    Settings,
    batch_options,
    clean_environment,
    downloads,
    endpoint_options,
    server_arguments,
)

FLAGS = {
    name: Flag(f"--{name}", value)
    for name, value in {
        "model": "FNAME",
        "flash-attn": "[on|off|auto]",
        "cors-origins": "ORIGINS",
        "swa-full": "",
    }.items()
}


def command(settings: Settings, pooling: str = "none", flags: dict[str, Flag] = FLAGS) -> list[str]:
    return server_arguments(
        settings, flags, model=Path("/m/a b.gguf"), ctx_size=8192, alias="tiny", pooling=pooling
    )


def test_a_chat_model() -> None:
    assert command(Settings()) == [
        *("--model", "/m/a b.gguf", "--host", "127.0.0.1", "--port", "8080"),
        *("--ctx-size", "8192", "--alias", "tiny", "--cors-origins", "localhost"),
    ]


def test_everything_asked_for_under_its_own_name_and_the_rest_last() -> None:
    settings = Settings(
        host="0.0.0.0",
        port=1234,
        threads=3,
        gpu_layers="all",
        parallel=2,
        batch_size=512,
        device="CUDA0",
        alias="mine",
        api_key_file=Path("/keys"),
        server={"flash_attn": "on", "swa_full": "1"},
    )
    assert command(settings) == [
        *("--model", "/m/a b.gguf", "--host", "0.0.0.0", "--port", "1234"),
        *("--ctx-size", "8192", "--alias", "mine", "--batch-size", "512", "--threads", "3"),
        *("--gpu-layers", "all", "--parallel", "2", "--device", "CUDA0"),
        *("--api-key-file", "/keys", "--cors-origins", "localhost"),
        *("--flash-attn", "on", "--swa-full"),
    ]


@pytest.mark.parametrize(
    ("pooling", "endpoint"),
    [("mean", "--embeddings"), ("cls", "--embeddings"), ("rank", "--reranking")],
)
def test_embedding_models_and_rerankers(pooling: str, endpoint: str) -> None:
    words = command(Settings(), pooling)
    at = words.index(endpoint)
    assert words[at + 1 : at + 7] == [
        *("--pooling", pooling, "--batch-size", "8192", "--ubatch-size", "8192")
    ]
    other = {"--embeddings", "--reranking"} - {endpoint}
    assert not other & set(words)
    words = command(Settings(batch_size=64), pooling)
    assert words.count("--batch-size") == 1
    assert words[words.index("--batch-size") + 1] == words[words.index("--ubatch-size") + 1] == "64"


@pytest.mark.parametrize(
    ("pooling", "asked", "words"),
    [
        *(("none", None, []), ("none", 64, ["--batch-size", "64"])),
        ("mean", None, ["--batch-size", "8192", "--ubatch-size", "8192"]),
        ("rank", 64, ["--batch-size", "64", "--ubatch-size", "64"]),
    ],
)
def test_what_is_measured_is_what_is_served(
    pooling: str, asked: int | None, words: list[str]
) -> None:
    """llama-fit-params gets the batches alone; it knows no endpoints."""
    assert batch_options(pooling, 8192, asked) == words
    served = command(Settings(batch_size=asked), pooling)
    expected = [*endpoint_options(pooling), *words]
    at = served.index("tiny") + 1
    assert served[at : at + len(expected)] == expected
    assert served.count("--batch-size") == words.count("--batch-size")


def test_pages_of_other_origins_only_where_the_user_says_so() -> None:
    words = command(Settings(server={"cors_origins": "*"}))
    assert words.count("--cors-origins") == 1
    assert words[words.index("--cors-origins") + 1] == "*"
    older = {name: flag for name, flag in FLAGS.items() if name != "cors-origins"}
    assert "--cors-origins" not in command(Settings(), flags=older)


def test_an_unknown_option_stops_the_launch() -> None:
    with pytest.raises(UsageError, match=r"server\.flash_atn: .*did you mean flash_attn"):
        command(Settings(server={"flash_atn": "on"}))


def test_nothing_inherited_changes_a_launch() -> None:
    inherited = {
        "LLAMA_ARG_MODEL": "/evil",
        "LLAMA_API_KEY": "k",
        "LLAMA_SERVER_X": "1",
        "LLAMA_APP_CMD": "x",
        "XDG_CONFIG_HOME": "/home/u/.config",
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "2,0",
        "LLAMA_OTHER": "kept",
        "HF_TOKEN": "hf_x",
        "HTTPS_PROXY": "http://user:pw@proxy",
    }
    before = dict(inherited)
    assert clean_environment(inherited, Path("/run/empty")) == {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "2,0",
        "LLAMA_OTHER": "kept",
        "XDG_CONFIG_HOME": "/run/empty",
    }
    assert inherited == before


def test_who_downloads_learns_how_to(tmp_path: Path) -> None:
    inherited = {"HTTPS_PROXY": "http://user:pw@proxy", "SSL_CERT_FILE": "/ca", "HF_TOKEN": "x"}
    found = clean_environment(inherited, tmp_path, downloads=True)
    assert found.keys() - {"XDG_CONFIG_HOME"} == {"HTTPS_PROXY", "SSL_CERT_FILE"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--model a.gguf --port 1 --alias hf --cors-origins http://x", False),
        ("-m a.gguf --lora b.gguf --no-mmproj", False),
        ("--port 1", True),  # a router: it fetches what it is asked for
        ("--models-dir m", True),
        ("-hf org/x", True),
        ("--hf-repo org/x --hf-file y", True),
        ("-m a.gguf --model-url http://x", True),
        ("-m a.gguf -mu http://x", True),
        ("-m a.gguf --docker-repo x", True),
        ("-m a.gguf --hf-repo-draft org/x", True),
        ("-m a.gguf --spec_draft_hf org/x", True),
        ("-m a.gguf -hfd org/x", True),
        ("-m a.gguf --mmproj-url http://x", True),
        ("-m a.gguf --mmproj b.gguf", True),
        ("-m a.gguf --models-preset x.ini", True),
        ("--gpt-oss-20b-default", True),
    ],
)
def test_which_options_download(words: str, expected: bool) -> None:
    assert downloads(words.split()) == expected


LAUNCH = Launch(
    executable=Path("/b/llama-server"),
    arguments=("--model", "/m/a b.gguf"),
    env={},
    host="127.0.0.1",
    port=8080,
    log=Path("/log"),
    folder=Path("/run/server"),
)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        *(("127.0.0.1", "http://127.0.0.1:8080"), ("0.0.0.0", "http://127.0.0.1:8080")),
        *(("::", "http://[::1]:8080"), ("::1", "http://[::1]:8080")),
        *(("fe80::1", "http://[fe80::1]:8080"), ("localhost", "http://localhost:8080")),
    ],
)
def test_the_url_under_which_this_machine_reaches_it(host: str, url: str) -> None:
    assert replace(LAUNCH, host=host).url == url


def test_the_command_can_be_pasted() -> None:
    assert LAUNCH.command == ["/b/llama-server", "--model", "/m/a b.gguf"]
    assert "'/m/a b.gguf'" in LAUNCH.shown or '"/m/a b.gguf"' in LAUNCH.shown
