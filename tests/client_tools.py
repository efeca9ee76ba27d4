"""Real servers behind a gateway with a key, for the clients that people use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Doit, wait_for
from gateway_tools import Site, site, status

KEY = "the-key-of-this-gateway"

# In this form a call that is asked for comes first, with no words before it: random weights can
# make one. And what the grammar begins with must be read as it is, without a space before it.
TEMPLATE = """\
{% if tools %}Functions: {{ tools | tojson }}
{% endif %}{% for message in messages %}{{ message.role }}: {{ message.content or "" }}
{% for call in message.tool_calls or [] %}<function={{ call.function.name }}>\
{{ call.function.arguments | tojson }}</function>
{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
WITHOUT_SPACE = ("--override-kv", "tokenizer.ggml.add_space_prefix=bool:false")


def serve(here: Site, program: Path, name: str, model: Path, *words: str, **more: object) -> None:
    """A llama-server as an instance; it is ready."""
    added = here.add(name, **more)
    command = [str(program), "--model", str(model), "--port", str(added.port), *words]
    here.change(name, executable=command[0], cmd=tuple(command[1:]))
    here.start(name, command)
    url = f"{added.url}/health"
    wait_for(lambda: status(url) == 200)


def chat(here: Site, program: Path, name: str, model: Path, *words: str, **more: object) -> None:
    """The tiny model, with which tools and JSON schemas work."""
    (here.path / "tools.jinja").write_text(TEMPLATE)
    template = ("--jinja", "--chat-template-file", str(here.path / "tools.jinja"))
    serve(here, program, name, model, *template, *WITHOUT_SPACE, *words, **more)


@pytest.fixture(scope="module")
def clients(
    built: Path, gguf: Path, demo: Doit, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A chat model, an embedder, and their gateway, which knows Anthropic's names too."""
    minilm = next((demo.home / "models").rglob("*.q8_0.gguf"))
    program = next(built.glob("*/llama-server*"))
    with site(tmp_path_factory.mktemp("clients")) as one:
        chat(one, program, "tiny", gguf, aliases=("chat",))
        # random weights seldom end by themselves; these do, wherever they may
        chat(one, program, "brief", gguf, "--logit-bias", "2+12")
        serve(one, program, "search", minilm, "--embeddings", kind="embedding")
        (one.path / "key").write_text(f"# for tests\n{KEY}\n")
        one.gateway(api_key_file=one.path / "key", models={"claude-*": "chat"})
        yield one
