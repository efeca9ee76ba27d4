"""What the tests of configurations share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UsageError
from pipeline.serve.config import checks, messages
from pipeline.serve.config.configuration import Configuration
from pipeline.serve.config.instances import instances
from pipeline.serve.config.llama import PreparedModel
from pipeline.serve.config.toml_form import load
from pipeline.serve.flags import Flag, parse_help
from pipeline.serve.server import Server

HELP = """\
-m,    --model FNAME                    model path to load
-mu,   --model-url URL                  from there
-hff,  --hf-file FILE                   file of a repository
-c,    --ctx-size N                     size of the context
-ngl,  --gpu-layers, --n-gpu-layers N   layers
-np,   --parallel N                     slots
-b,    --batch-size N                   batch
-ub,   --ubatch-size N                  batch
-t,    --threads N                      threads
-fa,   --flash-attn [on|off|auto]       attention
-lm,   --load-mode MODE                 mode
-dev,  --device <dev1,dev2,..>          devices
--lora FNAME                            adapter
--jinja, --no-jinja                     templates
--tags STRING                           tags
-a,    --alias STRING                   names
--host HOST                             host
--port PORT                             port
--metrics                               metrics
--cors-origins ORIGINS                  origins
--api-key KEY                           key
                                        (env: LLAMA_API_KEY)
--api-key-file FNAME                    keys
-hft,  --hf-token TOKEN                 token
--api-prefix PREFIX                     prefix
                                        (env: LLAMA_ARG_API_PREFIX)
--ssl-cert-file FNAME                   certificate
--ssl-key-file FNAME                    its key
--embedding, --embeddings               endpoint
--rerank, --reranking                   endpoint
--pooling {none,mean,cls,last,rank}     pooling
-mm,   --mmproj FILE                    projector
--mmproj-auto, --no-mmproj              projector
--sleep-idle-seconds SECONDS            sleep
--temp N                                temperature (default: 0.80)
--poll <0...100>                        polling level
-s,    --seed SEED                      seed (default: -1)
-ts,   --tensor-split N0,N1,N2,...      fractions
-fitt, --fit-target MiB0,MiB1,MiB2,...
                                        margins
-ctk,  --cache-type-k TYPE              type
                                        allowed values: f32, f16
--chat-template JINJA_TEMPLATE          template
--chat-template-file JINJA_TEMPLATE_FILE
                                        template
--chat-template-kwargs JSON             parameters
--control-vector-layer-range START END
                                        layers
--lora-scaled FNAME:SCALE,...           adapters
--slot-save-path PATH                   folder
--grammar GRAMMAR                       grammar
--grammar-file FNAME                    grammar
--ui-config-file PATH                   settings
--tools TOOL1,TOOL2,...                 tools
                                        available tools: read_file, grep_search,
                                        get_info
--log-file FNAME                        log
--draft-max N                           the argument has been removed. use --spec-draft-n-max
--spec-type none,draft-simple,ngram-mod
                                        how to draft
--spec-draft-n-max N                    draft
"""
FLAGS = parse_help(HELP)


def written(folder: Path, text: str, name: str = "models.toml") -> Path:
    """A file of instances."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def server_in(folder: Path) -> Path:
    """Something that may be executed."""
    server = folder / "llama-server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    return server


def sound(configuration: Configuration) -> Configuration:
    """The same. Raises UsageError where reading it found a mistake."""
    messages.require_none(configuration.errors)
    return configuration


def read(folder: Path, text: str, **more: Any) -> Configuration:
    """A file of instances, read without a mistake."""
    return sound(load(written(folder, text), **more))


def wrong(folder: Path, text: str, **more: Any) -> list[str]:
    """Every mistake that reading the text finds."""
    with pytest.raises(UsageError) as caught:
        read(folder, text, **more)
    return caught.value.message.splitlines()


def started(
    configuration: Configuration,
    folder: Path,
    *,
    models: Mapping[str, PreparedModel] | None = None,
    flags: Mapping[str, Flag] | None = FLAGS,
    environ: Mapping[str, str] | None = None,
) -> dict[str, Server]:
    """The instances, by name."""
    found = instances(
        configuration,
        server=folder / "llama-server",
        flags=flags,
        models=models or {},
        logs=folder / "logs",
        keys=folder / "keys",
        xdg=folder / "xdg",
        environ=environ or {"PATH": ""},
    )
    return {one.name: one for one in found}


def one(folder: Path, text: str, **more: Any) -> Server:
    """The only instance of a text."""
    (found,) = started(read(folder, text), folder, **more).values()
    return found


def checked(folder: Path, text: str, *, cards: int | None = None, **more: str) -> list[str]:
    """Every mistake that `check` finds; none: the warnings. `more` goes to `read`."""
    said: list[str] = []
    configuration = load(written(folder, text), **more)
    try:
        checks.check(
            configuration,
            server=server_in(folder),
            flags=FLAGS,
            environ={"PATH": ""},
            cards=cards,
            note=said.append,
        )
    except UsageError as error:
        return error.message.splitlines()
    return [f"note: {line}" for line in said]
