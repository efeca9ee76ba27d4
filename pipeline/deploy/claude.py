"""What Claude Code is started with, so that it talks to a gateway or server of ours.

The names of the variables are those that version 2.1 of the npm package reads.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import quote, urlsplit

from pipeline.core.errors import PipelineError, UsageError, did_you_mean

PROGRAM = "claude"
KEY = "ANTHROPIC_AUTH_TOKEN"
NO_KEY = "none"  # without any it asks its user to log in
FAMILIES = ("opus", "sonnet", "haiku", "fable")  # one of them for each kind of work
# What its first request takes: 76 kB of text with its usual tools, 6.6 kB without any, as measured
# with version 2.1.197; at 4 bytes a token.
USUAL, SMALLEST = 20_000, 2_000  # tokens
MOST_OUTPUT = 32_000  # tokens; what it asks for by itself
TIMEOUT_MS = 3_600_000  # a long prompt takes its time without a graphics card
ASK_SECONDS = 30.0  # an instance that loads is waited for
LIMITS = ("API_TIMEOUT_MS", "CLAUDE_CODE_MAX_OUTPUT_TOKENS")  # a user's own are kept

# Where they are set, it would go elsewhere, or bring another key.
DROPPED = (
    *("ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN", "ANTHROPIC_CUSTOM_HEADERS"),
    *("ANTHROPIC_SMALL_FAST_MODEL", "CLAUDE_CODE_SUBAGENT_MODEL", "CLAUDE_CODE_USE_GATEWAY"),
    *("CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_USE_FOUNDRY"),
)


def choose(names: Sequence[str], patterns: Mapping[str, str], asked: str) -> dict[str, str]:
    """The model for each family, and for "" otherwise: `asked`, or what a pattern of the gateway
    leads Anthropic's own names to, or the first. Raises UsageError."""
    if asked and asked not in names:
        raise UsageError(
            f"name={asked}: there is no such chat model{did_you_mean(asked, list(names))}",
            f"there is {', '.join(names)}",
        )

    def led(family: str) -> str:
        name = f"claude-{family}-5"
        return next((to for pattern, to in patterns.items() if fnmatchcase(name, pattern)), "")

    main = asked or led("sonnet") or names[0]
    return {"": main, **{family: asked or led(family) or main for family in FAMILIES}}


def environment(
    url: str, models: Mapping[str, str], context: int | None, given: Mapping[str, str]
) -> dict[str, str]:
    """The variables, without the key. Limits that are `given` stay as they are."""
    told = {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_MODEL": models[""],
        **{f"ANTHROPIC_DEFAULT_{one.upper()}_MODEL": models[one] for one in FAMILIES},
        "API_TIMEOUT_MS": str(TIMEOUT_MS),
        # A line in the prompt that is another one each time: nothing after it could be reused.
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    host = urlsplit(url).hostname or ""
    for name in ("NO_PROXY", "no_proxy"):  # else the key would go to the proxy
        told[name] = ",".join(filter(None, (given.get(name, ""), host)))
    if context:
        told["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] = str(context)
        told["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(min(MOST_OUTPUT, context // 4))
    return {**told, **{name: given[name] for name in LIMITS if given.get(name)}}


def too_small(model: str, context: int | None) -> str:
    """What is to be said of a context in which the first request does not fit."""
    if context is None or context > USUAL:
        return ""
    return (
        f"{model} has a context of {context:,} tokens; the first request of Claude Code takes "
        f"about {USUAL:,} with its tools, {SMALLEST:,} without: give it more (ctx_size)"
    )


def shell(env: Mapping[str, str], key_file: str | None, words: Sequence[str]) -> str:
    """The lines for a POSIX shell. The key is read from its file when they are run."""
    first = r"""awk '{gsub(/^[ \t\r]+|[ \t\r]+$/, "")} NF && !/^#/ {print; exit}'"""
    key = f'"$({first} {shlex.quote(key_file)})"' if key_file else NO_KEY
    lines = [f"export {name}={shlex.quote(value)}" for name, value in env.items()]
    gone, command = " ".join(DROPPED), shlex.join([PROGRAM, *words])
    return "\n".join([f"unset {gone}", *lines, f"export {KEY}={key}", command])


def powershell(env: Mapping[str, str], key_file: str | None, words: Sequence[str]) -> str:
    """The same for PowerShell."""

    def quoted(text: str) -> str:
        return "'" + text.replace("'", "''") + "'"

    key = quoted(NO_KEY)
    if key_file:
        key = f"(Get-Content {quoted(key_file)} | Where-Object {{ $_ -match '^\\s*[^#\\s]' }})"
        key = f"@{key}[0].Trim()"
    gone = ",".join(f"Env:{name}" for name in DROPPED)
    lines = [f"$env:{name} = {quoted(value)}" for name, value in env.items()]
    command = " ".join([PROGRAM, *map(quoted, words)])
    away = f"Remove-Item -ErrorAction SilentlyContinue {gone}"
    return "\n".join([away, *lines, f"$env:{KEY} = {key}", command])


def ask(url: str, key: str, advice: str) -> list[str]:
    """The chat models that a gateway or server lists. Raises PipelineError."""
    found = _get(f"{url}/v1/models", key, advice)
    entries = found.get("data", []) if isinstance(found, dict) else []
    names = [str(one["id"]) for one in entries if one.get("kind", "chat") == "chat"]
    if not names:
        raise PipelineError(f"{url} lists no chat model", advice)
    return names


def context_of(url: str, key: str, model: str) -> int | None:
    """The context of a model in tokens, where the server tells it."""
    try:
        found = _get(f"{url}/props?model={quote(model, safe='')}", key, "")
    except PipelineError:  # another engine's, or one that does not run
        return None
    settings = found.get("default_generation_settings", {}) if isinstance(found, dict) else {}
    size = settings.get("n_ctx")
    return size if isinstance(size, int) and size > 0 else None


def _get(url: str, key: str, advice: str) -> Any:
    """The JSON at `url`. Raises PipelineError."""
    import httpx2

    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx2.get(url, headers=headers, timeout=ASK_SECONDS, trust_env=False)
    except (httpx2.TransportError, httpx2.InvalidURL) as why:
        raise PipelineError(f"nothing answers at {url}: {why}", advice) from None
    if answer.status_code == 401:
        raise PipelineError(f"{url}: the API key is missing or wrong", "api_key_file=PATH")
    try:
        return answer.raise_for_status().json()
    except (httpx2.HTTPStatusError, ValueError):
        raise PipelineError(f"{url} answers with {answer.status_code}", advice) from None
