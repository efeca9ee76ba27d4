"""The environment that makes Claude Code use our gateway or server.

The variables are those that version 2.1 of the npm package reads.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar
from urllib.parse import quote, urlsplit

from msgspec import MsgspecError, Struct, json

from pipeline.core import bounded
from pipeline.core.bounded import Bound
from pipeline.core.errors import PipelineError, UsageError, did_you_mean

Answer = TypeVar("Answer")
PROGRAM = "claude"
KEY = "ANTHROPIC_AUTH_TOKEN"
NO_KEY = "none"  # without a key it asks the user to log in
FAMILIES = ("opus", "sonnet", "haiku", "fable")  # one of them for each kind of work
# The size of its first request: 76 kB of text with the default tools, 6.6 kB without tools, as
# measured with version 2.1.197; at 4 bytes per token.
WITH_TOOLS, WITHOUT_TOOLS = 20_000, 2_000  # tokens
MAX_OUTPUT = 32_000  # tokens; its own default
TIMEOUT_MS = 3_600_000  # a long prompt takes long without a GPU
REQUEST_SECONDS = 30.0  # includes the wait for a server that loads
ANSWER = Bound(bytes=4 * 1024 * 1024, seconds=2 * REQUEST_SECONDS)  # 1,000 models take some 500 kB
LIMITS = ("API_TIMEOUT_MS", "CLAUDE_CODE_MAX_OUTPUT_TOKENS")  # the user's own values win

# If set, these would make it connect elsewhere, or send another key.
DROPPED = (
    *("ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN", "ANTHROPIC_CUSTOM_HEADERS"),
    *("ANTHROPIC_SMALL_FAST_MODEL", "CLAUDE_CODE_SUBAGENT_MODEL", "CLAUDE_CODE_USE_GATEWAY"),
    *("CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_USE_FOUNDRY"),
)


def choose(names: Sequence[str], patterns: Mapping[str, str], requested: str) -> dict[str, str]:
    """The model for each family, and the default under "": the requested one, or what a pattern of
    the gateway maps Anthropic's own names to, or the first. Raises UsageError."""
    if requested and requested not in names:
        raise UsageError(
            f"name={requested}: there is no such chat model{did_you_mean(requested, list(names))}",
            f"available: {', '.join(names)}",
        )

    def mapped(family: str) -> str:
        name = f"claude-{family}-5"
        return next((to for pattern, to in patterns.items() if fnmatchcase(name, pattern)), "")

    default = requested or mapped("sonnet") or names[0]
    return {"": default, **{x: requested or mapped(x) or default for x in FAMILIES}}


def environment(
    url: str, models: Mapping[str, str], context: int | None, environ: Mapping[str, str]
) -> dict[str, str]:
    """The variables, without the key. LIMITS set in `environ` are kept."""
    env = {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_MODEL": models[""],
        **{f"ANTHROPIC_DEFAULT_{family.upper()}_MODEL": models[family] for family in FAMILIES},
        "API_TIMEOUT_MS": str(TIMEOUT_MS),
        # A line of the prompt that changes each time: the cache for all after it would be lost.
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    host = urlsplit(url).hostname or ""
    for name in ("NO_PROXY", "no_proxy"):  # otherwise the key would be sent to the proxy
        env[name] = ",".join(filter(None, (environ.get(name, ""), host)))
    if context:
        env["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] = str(context)
        env["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(min(MAX_OUTPUT, context // 4))
    return {**env, **{name: environ[name] for name in LIMITS if environ.get(name)}}


def too_small(model: str, context: int | None) -> str:
    """A warning about a context that is too small for the first request; empty for none."""
    if context is None or context > WITH_TOOLS:
        return ""
    return (
        f"{model} has a context of {context:,} tokens; Claude Code's first request takes about "
        f"{WITH_TOOLS:,} with its tools, {WITHOUT_TOOLS:,} without: increase ctx_size"
    )


def shell(env: Mapping[str, str], key_file: str | None, words: Sequence[str]) -> str:
    """The lines for a POSIX shell, which read the key from its file when they are run."""
    first = r"""awk '{gsub(/^[ \t\r]+|[ \t\r]+$/, "")} NF && !/^#/ {print; exit}'"""
    key = f'"$({first} {shlex.quote(key_file)})"' if key_file else NO_KEY
    lines = [f"export {name}={shlex.quote(value)}" for name, value in env.items()]
    dropped, command = " ".join(DROPPED), shlex.join([PROGRAM, *words])
    return "\n".join([f"unset {dropped}", *lines, f"export {KEY}={key}", command])


def powershell(env: Mapping[str, str], key_file: str | None, words: Sequence[str]) -> str:
    """The same for PowerShell."""

    def quoted(text: str) -> str:
        return "'" + text.replace("'", "''") + "'"

    key = quoted(NO_KEY)
    if key_file:
        key = f"(Get-Content {quoted(key_file)} | Where-Object {{ $_ -match '^\\s*[^#\\s]' }})"
        key = f"@{key}[0].Trim()"
    dropped = ",".join(f"Env:{name}" for name in DROPPED)
    lines = [f"$env:{name} = {quoted(value)}" for name, value in env.items()]
    command = " ".join([PROGRAM, *map(quoted, words)])
    remove = f"Remove-Item -ErrorAction SilentlyContinue {dropped}"
    return "\n".join([remove, *lines, f"$env:{KEY} = {key}", command])


class ListedModel(Struct):
    """A model in `/v1/models`; `kind` is the gateway's."""

    id: str
    kind: str = "chat"


class ModelList(Struct):
    """What `/v1/models` answers."""

    data: list[ListedModel]


class GenerationSettings(Struct):
    """The part of `/props` that is read."""

    n_ctx: int


class ServerProps(Struct):
    """What llama-server's `/props` answers."""

    default_generation_settings: GenerationSettings


def chat_models(url: str, key: str, advice: str) -> list[str]:
    """The chat models that a gateway or server lists. Raises PipelineError."""
    listed = _get(f"{url}/v1/models", key, advice, ModelList).data
    names = [model.id for model in listed if model.kind == "chat"]
    if not names:
        raise PipelineError(f"{url} lists no chat model", advice)
    return names


def context_of(url: str, key: str, model: str) -> int | None:
    """The context of a model in tokens; None where the server does not report it."""
    try:
        props = _get(f"{url}/props?model={quote(model, safe='')}", key, "", ServerProps)
    except PipelineError:  # another engine, or not running
        return None
    size = props.default_generation_settings.n_ctx
    return size if size > 0 else None


def _get(url: str, key: str, advice: str, kind: type[Answer]) -> Answer:
    """The JSON at `url`. Raises PipelineError."""
    import httpx2

    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx2.Client(timeout=REQUEST_SECONDS, trust_env=False) as client:
            answer = bounded.get(client, url, ANSWER, headers=headers)
    except (httpx2.RequestError, httpx2.InvalidURL) as error:
        raise PipelineError(f"nothing answers at {url}: {error}", advice) from None
    if answer.status_code == 401:
        raise PipelineError(f"{url}: the API key is missing or wrong", "api_key_file=PATH")
    if not answer.is_success:
        raise PipelineError(f"{url} answers with {answer.status_code}", advice)
    try:
        return json.decode(answer.content, type=kind)
    except (MsgspecError, RecursionError) as error:
        raise PipelineError(f"{url}: unexpected answer: {error}", advice) from None


def base_of(url: str) -> str:
    """A server's address, of which clients take more or less: its host alone, the base of OpenAI's
    API, or all of the endpoint. Raises UsageError for what is none."""
    base = url.strip().rstrip("/")
    for end in ("/chat/completions", "/models", "/v1"):
        base = base.removesuffix(end)
    base = base if "://" in base else f"http://{base}"
    try:
        at = urlsplit(base)
        has_host = at.hostname and not at.netloc.endswith(":") and at.port != 0
    except ValueError:  # a port that is none, a bracket without its other
        has_host = False
    if not has_host or at.scheme not in ("http", "https") or re.search(r"\s", base):
        raise UsageError(
            f"url={url}: is not an address of a server", "such as http://127.0.0.1:8080"
        )
    return base
