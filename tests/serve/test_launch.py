"""The command line and the environment of a server, as pure values."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from pipeline.commands import server_options
from pipeline.commands.request import Request
from pipeline.core.errors import UsageError
from pipeline.serve.config import checks, instances, messages
from pipeline.serve.config.llama import (
    PreparedModel,
    batch_options,
    downloads,
    endpoint_options,
)
from pipeline.serve.flags import Flag
from pipeline.serve.server import Server
from pipeline.serve.supervisor.environment import environment
from pipeline.serve.supervisor.state import Folder

FLAGS = {
    name: Flag(f"--{name}", value, (f"--{name}",))
    for name, value in {
        "model": "FNAME",
        "host": "HOST",
        "port": "PORT",
        "alias": "STRING",
        "ctx-size": "N",
        "batch-size": "N",
        "ubatch-size": "N",
        "threads": "N",
        "gpu-layers": "N",
        "parallel": "N",
        "device": "<dev1,dev2,..>",
        "api-key-file": "FNAME",
        "flash-attn": "[on|off|auto]",
        "cors-origins": "ORIGINS",
        "metrics": "",
        "swa-full": "",
    }.items()
}


DEFAULTS = Request()


def server(
    request: Request = DEFAULTS, pooling: str = "none", flags: dict[str, Flag] = FLAGS
) -> Server:
    """What `serve model=` would start."""
    spec = server_options.spec(request, "tiny")
    options = instances.resolve(spec, flags)
    messages.require_none(checks.of_server(options, Path("/")))
    model = PreparedModel(path=Path("/m/a b.gguf"), pooling=pooling, fitted=8192)
    return instances.llama_server(
        options,
        Path("/b/llama-server"),
        model,
        key=Path(request.api_key_file) if request.api_key_file else None,
        folder=Path("/work"),
        log=Path("/log"),
        xdg=Path("/xdg"),
    )


def command(request: Request, pooling: str = "none", flags: dict[str, Flag] = FLAGS) -> list[str]:
    return list(server(request, pooling, flags).cmd)


def test_a_chat_model() -> None:
    assert command(Request()) == [
        *("--model", "/m/a b.gguf", "--host", "127.0.0.1", "--port", "8080", "--alias", "tiny"),
        *("--metrics", "--cors-origins", "localhost", "--ctx-size", "8192"),
    ]


def test_everything_asked_for_under_its_own_name(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    request = Request(
        host="0.0.0.0",
        port=1234,
        threads=3,
        gpu_layers="all",
        parallel=2,
        batch_size=512,
        ctx_size=4096,
        device="CUDA0",
        alias="mine",
        api_key_file=str(keys),
        server={"flash_attn": "on", "swa_full": "1"},
    )
    assert command(request) == [
        *("--model", "/m/a b.gguf", "--host", "0.0.0.0", "--port", "1234", "--threads", "3"),
        *("--gpu-layers", "all", "--parallel", "2", "--batch-size", "512"),
        *("--ctx-size", "4096", "--device", "CUDA0", "--alias", "mine"),
        *("--api-key-file", str(keys), "--flash-attn", "on", "--swa-full"),
        *("--metrics", "--cors-origins", "localhost"),
    ]


@pytest.mark.parametrize(
    ("pooling", "endpoint"),
    [("mean", "--embeddings"), ("cls", "--embeddings"), ("rank", "--reranking")],
)
def test_embedding_models_and_rerankers(pooling: str, endpoint: str) -> None:
    words = command(Request(), pooling)
    at = words.index(endpoint)
    assert words[at + 1 : at + 3] == ["--pooling", pooling]
    assert words[at + 3 :] == [
        *("--ctx-size", "8192", "--batch-size", "8192", "--ubatch-size", "8192")
    ]
    other = {"--embeddings", "--reranking"} - {endpoint}
    assert not other & set(words)
    words = command(Request(batch_size=64), pooling)
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
    served = command(Request(batch_size=asked), pooling)
    for option, value in zip(words[::2], words[1::2], strict=True):
        assert served[served.index(option) + 1] == value
    assert served.count("--batch-size") + served.count("--ubatch-size") == len(words) / 2
    endpoint = endpoint_options(pooling)
    assert not endpoint or endpoint == served[served.index(endpoint[0]) :][: len(endpoint)]


def test_pages_of_other_origins_only_where_the_user_says_so() -> None:
    words = command(Request(server={"cors_origins": "*"}))
    assert words.count("--cors-origins") == 1
    assert words[words.index("--cors-origins") + 1] == "*"
    older = {name: flag for name, flag in FLAGS.items() if name != "cors-origins"}
    assert "--cors-origins" not in command(Request(), flags=older)


@pytest.mark.parametrize(
    ("option", "text", "why"),
    [
        ("flash_atn", "on", r"server\.flash_atn: .*did you mean flash_attn"),
        ("flash_attn", "maybe", r"server\.flash_attn=maybe: must be one of on, off, auto"),
        ("swa_full", "maybe", r"server\.swa_full=maybe: --swa-full takes no value"),
    ],
)
def test_an_option_that_cannot_be_meant_stops_the_launch(option: str, text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        command(Request(server={option: text}))


def test_nothing_inherited_changes_a_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inherited = {
        "LLAMA_ARG_MODEL": "/evil",
        "LLAMA_API_KEY": "k",
        "LLAMA_SERVER_X": "1",
        "LLAMA_APP_CMD": "x",
        "XDG_CONFIG_HOME": "/home/u/.config",
        "CUDA_VISIBLE_DEVICES": "2,0",
        "LLAMA_OTHER": "kept",
        "HF_TOKEN": "hf_x",
        "HTTPS_PROXY": "http://user:pw@proxy",
    }
    for name, value in inherited.items():
        monkeypatch.setenv(name, value)
    xdg = str(tmp_path / "xdg")
    one = replace(server(), env={"XDG_CONFIG_HOME": xdg})
    env = environment(one, Folder(tmp_path))
    assert {name: env[name] for name in env if name in inherited} == {
        "CUDA_VISIBLE_DEVICES": "2,0",
        "LLAMA_OTHER": "kept",
        "XDG_CONFIG_HOME": xdg,
    }
    env = environment(replace(one, downloads=True), Folder(tmp_path))
    assert env["HTTPS_PROXY"] == inherited["HTTPS_PROXY"], "who downloads learns how to"


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


@pytest.mark.parametrize(
    ("host", "url"),
    [
        *(("127.0.0.1", "http://127.0.0.1:8080"), ("0.0.0.0", "http://127.0.0.1:8080")),
        *(("::", "http://[::1]:8080"), ("::1", "http://[::1]:8080")),
        *(("fe80::1", "http://[fe80::1]:8080"), ("localhost", "http://localhost:8080")),
    ],
)
def test_the_url_under_which_this_machine_reaches_it(host: str, url: str) -> None:
    assert server(Request(host=host)).url == url


@pytest.mark.parametrize("word", ["{{ messages }}" * 400, "a\0b", "locked/file"])
def test_an_option_that_is_no_path(word: str, tmp_path: Path) -> None:
    """Such as a template, or the settings of a gateway that has many patterns."""
    (tmp_path / "m.gguf").touch()
    (tmp_path / "locked").write_text("no folder")
    made = replace(server(), cmd=("--model", "m.gguf", "--word", word), folder=str(tmp_path))
    assert made.named_paths == [tmp_path / "m.gguf"]
