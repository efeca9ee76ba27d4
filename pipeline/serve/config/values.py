"""The values of options: numbers, choices, lists, hosts. Units become numbers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

from pipeline.core.errors import did_you_mean
from pipeline.serve import address
from pipeline.serve.flags import Flag

Scalar = str | int | float
WHOLE = re.compile(r"[+-]?\d+", re.A)
DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.A | re.I)
UNIT = re.compile(r"(\d{1,7}) ?([km])i?", re.A | re.I)  # `32k`
VLLM_UNIT = re.compile(r"\d+(\.\d+)?[kmgtKMGT]|auto", re.A)  # vLLM: 1k is 1000, 1K is 1024
GRAMMAR = re.compile(r"^\s*root\s*::=", re.M)  # the rule that each one has
LISTED = re.compile(r"available tools: (\w+(?:,\s*\w+)*)")  # in a help; "all" is all
DECIMAL_DEFAULT = re.compile(r"default: -?\d+\.\d")
# Options of both programs whose value is JSON, for which a table may stand.
JSON_OPTION = re.compile(r".+[_-](config|kwargs|overrides|per[_-]prompt|schema|json)")
LARGEST = 2**31 - 1

# The hints by which a help says what it takes. vLLM's INT, COUNT and FLOAT are ours.
WHOLE_HINTS = ("N", "SEED", "INDEX", "PORT", "SECONDS", "INT", "COUNT", "START END")
DECIMAL_HINTS = ("P", "L", "SIMILARITY", "FLOAT")
LISTS = {"N0": False, "P0": False, "MiB0": True}  # of decimals, or of whole numbers
JSON = ("JSON", "SCHEMA")
JSON_OPTIONS = ("chat-template-kwargs",)  # whose hint does not say so
WORDS = re.compile(r"[a-z][a-z\d-]*(,[a-z][a-z\d-]*)+")  # a hint that lists what may be combined

# Forms by hint, as llama-server's parsers read them: it ends at another one, or leaves it out.
NUMBER = r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"
PROCESSOR = r"([0-9]|[1-9][0-9]|[1-4][0-9]{2}|50[0-9]|51[01])"
METADATA = rf"int:[+-]?\d+|float:[+-]?{NUMBER}|bool:(true|false)|str:.{{0,127}}"
FORMS = {
    "TOKEN_ID(+/-)BIAS": (
        rf"\d+ *[+-] *({NUMBER}|inf)",
        'the number of a token and its bias, such as "15043+1" or "15043-inf"',
    ),
    "KEY=TYPE:VALUE,...": (
        rf"([^=,]{{1,127}}=({METADATA}))(,[^=,]{{1,127}}=({METADATA}))*|.*\".*",
        "KEY=TYPE:VALUE, with int, float, bool or str as the type, such as "
        '"tokenizer.ggml.add_bos_token=bool:false"',
    ),
    "<tensor name pattern>=<buffer type>,...": (
        "[^=,]+=[^,]+(,[^=,]+=[^,]+)*",
        'PATTERN=BUFFER, with commas between them, such as "exps=CPU"',
    ),
    "lo-hi": (
        f"{PROCESSOR}?-{PROCESSOR}?",
        'the first and the last processor, from 0 to 511, such as "0-7"',
    ),
    "M": (
        "(0x)?[0-9a-fA-F]{1,128}",
        'a mask in hexadecimal, as a text in quotes, such as "ff" for the first eight processors',
    ),
    "FNAME:SCALE,...": (
        rf"[^,]+:[+-]?{NUMBER}(,[^,]+:[+-]?{NUMBER})*",
        'FILE:SCALE, with commas between them, such as "style.gguf:0.5"',
    ),
    "SEQUENCE": ("[edskypmxtia]+", 'letters that stand for samplers, such as "edskypmxt"'),
    "<user>/<model>[:quant]": ("[^/\\s]+/[^/\\s]+", "OWNER/MODEL, perhaps with :QUANT behind it"),
}
SAMPLERS = "dry top_k top_p top_n_sigma typ_p min_p temperature xtc infill penalties adaptive_p"
OTHER_SAMPLERS = ("nucleus", "temp", "typ")

# Decimals whose help shows no default that looks like one.
DECIMALS = {"rope-scale", "rope-freq-base", "rope-freq-scale", "defrag-thold"}
DECIMALS |= {"temp", "top-p", "min-p", "repeat-penalty", "presence-penalty", "frequency-penalty"}

# Counts of tokens, where `32k` can only mean 32768.
TOKENS = {"ctx-size", "batch-size", "ubatch-size", "predict", "keep", "fit-ctx", "yarn-orig-ctx"}
TOKENS |= {"kv-unified-per-slot", "checkpoint-min-step", "cache-reuse", "reasoning-budget"}
TOKENS |= {"image-min-tokens", "image-max-tokens", "mtmd-batch-max-tokens"}

# Whole numbers that the program would refuse, or abort at, if they were not from the first to the
# second, or one of the words: read from common/arg.cpp of the pinned llama.cpp, and tried.
AT_LEAST_0, AT_LEAST_1 = (0, LARGEST), (1, LARGEST)
RANGES: dict[str, tuple[int | str, ...]] = {
    "ctx-size": (2, LARGEST, "0"),
    "batch-size": (2, LARGEST),
    "parallel": (1, 256, "-1"),
    "threads": (-1, 4096),
    "threads-batch": (-1, 4096),
    "gpu-layers": (-2, LARGEST, "auto", "all"),
    "gpu-layers-draft": (-2, LARGEST, "auto", "all"),
    "port": (1, 65535),
    "prio": (-1, 3),
    "prio-batch": (0, 3),
    "prio-draft": (0, 3),
    "prio-batch-draft": (0, 3),
    "seed": (-1, 2**32 - 1),
    "mirostat": (0, 2),
    "repeat-last-n": AT_LEAST_0,
    "dry-penalty-last-n": AT_LEAST_0,
    "n-cpu-moe": (0, 4095),
    "n-cpu-ffn": (0, 4095),
    "n-cpu-moe-draft": (0, 4095),
    "threads-http": (-1, 4096),
    "checkpoint-min-step": AT_LEAST_0,
    "reasoning-budget": (-1, LARGEST),
    "sleep-idle-seconds": (1, LARGEST, "-1"),
    "spec-draft-n-max": AT_LEAST_0,
    "spec-ngram-mod-n-min": (0, 1024),
    "spec-ngram-mod-n-max": (0, 1024),
    "spec-ngram-mod-n-match": (1, 1024),
    **{
        f"spec-ngram-{kind}-size-{x}": (1, 1024)
        for kind in ("simple", "map-k", "map-k4v")
        for x in "nm"
    },
    **{f"spec-ngram-{kind}-min-hits": AT_LEAST_1 for kind in ("simple", "map-k", "map-k4v")},
    "max-model-len": (1, LARGEST, "-1"),
    "max-num-batched-tokens": AT_LEAST_1,
    "max-num-seqs": AT_LEAST_1,
    "tensor-parallel-size": AT_LEAST_1,
    "pipeline-parallel-size": AT_LEAST_1,
    "data-parallel-size": AT_LEAST_1,
}
AT_MOST = {"repeat-penalty": 1e38, "gpu-memory-utilization": 1.0}  # decimals above 0


def read(name: str, flag: Flag | None, value: Scalar) -> Scalar:
    """The value of an option as its program takes it. Without a flag only names that are listed
    here are checked. Raises ValueError with what is allowed."""
    names = {name, *(flag.plain_names if flag else ())}
    if "host" in names:
        return address.host(str(value))
    if "api-prefix" in names:
        return address.prefix(str(value))
    text = str(value)
    if flag and flag.choices and text not in flag.choices:
        near = did_you_mean(text, flag.choices)
        raise ValueError(f"one of {', '.join(flag.choices)}{near}")
    if flag and (listed := LISTED.search(flag.help)):
        _each_of(text, ["all", *re.findall(r"\w+", listed[1])])
    hint = flag.value if flag else "N" if names & RANGES.keys() else ""
    # vLLM's help has no hint for JSON.
    is_object = text.lstrip().startswith("{") and JSON_OPTION.fullmatch(name)
    if hint in JSON or names.intersection(JSON_OPTIONS) or is_object:
        _json(text)
    elif hint in DECIMAL_HINTS or (hint == "N" and _is_decimal(names, flag)):
        _decimal(text, names)
    elif hint in WHOLE_HINTS:
        return _whole(value, names, reads_units=hint == "COUNT")
    else:
        _check_form(value, hint)
    return value


def _check_form(value: Scalar, hint: str) -> None:
    """Raise ValueError where the value is not what its hint stands for."""
    text = str(value)
    if hint in FORMS:
        _formed(value, *FORMS[hint])
    elif hint == "GRAMMAR" and not GRAMMAR.search(text):
        raise ValueError("a grammar with a rule root ::= …; grammar_file names a file")
    elif hint == "SAMPLERS":
        _samplers(text)
    elif between := re.fullmatch(r"<(\d+)\.\.\.(\d+)>", hint):
        _within(text, int(between[1]), int(between[2]))
    elif WORDS.fullmatch(hint):
        _each_of(text, hint.split(","))
    elif (first := hint.partition(",")[0]) in LISTS:
        check: Callable[[str], object] = _within if LISTS[first] else _decimal
        for part in re.split("[,/]", text):
            check(part.strip())


def _each_of(text: str, words: list[str]) -> None:
    """Raise ValueError where a part between commas is none of the words."""
    for part in text.split(","):
        if part not in words:
            near = did_you_mean(part, words)
            raise ValueError(f"one or more of {', '.join(words)}, with commas between them{near}")


def _formed(value: Scalar, form: str, allowed: str) -> None:
    """Raise ValueError where the value is not of this form. A number such as 0xff was written in
    another base than that in which it would be passed on."""
    if not isinstance(value, str) or not re.fullmatch(form, value, re.A | re.S):
        raise ValueError(allowed)


def _samplers(text: str) -> None:
    """Raise ValueError where a part between semicolons is not a sampler: llama-server leaves it
    out, so that of names with commas between them none is used."""
    known = SAMPLERS.split()
    plain = {each.replace("_", "") for each in (*known, *OTHER_SAMPLERS)}
    for part in filter(None, text.split(";")):
        if part.lower().replace("-", "").replace("_", "") not in plain:
            near = did_you_mean(part, known)
            raise ValueError(f"one or more of {', '.join(known)}, with ; between them{near}")


def whole(text: str) -> int:
    """A whole number, perhaps of tokens with a unit. Raises ValueError."""
    if unit := UNIT.fullmatch(text.strip()):
        return int(unit[1]) * 1024 ** (1 if unit[2] in "kK" else 2)
    if not WHOLE.fullmatch(text.strip()) or len(text) > 20:
        raise ValueError("a whole number")
    return int(text)


def _is_decimal(names: set[str], flag: Flag | None) -> bool:
    return bool(names & DECIMALS or (flag and DECIMAL_DEFAULT.search(flag.help)))


def _whole(value: Scalar, names: set[str], *, reads_units: bool) -> Scalar:
    text = str(value).strip()
    if reads_units and VLLM_UNIT.fullmatch(text):
        return value
    low, high, *words = next(
        (RANGES[name] for name in RANGES if name in names), (-LARGEST, LARGEST)
    )
    if text in words:
        return value if str(value) == text else text
    if names & TOKENS and UNIT.fullmatch(text):
        text = str(whole(text))
    _within(text, int(low), int(high), [str(word) for word in words])
    return value if str(value) == text else int(text)


def _within(
    text: str, low: int = -LARGEST, high: int = LARGEST, words: list[str] | None = None
) -> None:
    """Raise ValueError where the text is no whole number from `low` to `high`."""
    if WHOLE.fullmatch(text) and len(text) < 20 and low <= int(text) <= high:
        return
    bounds = f" from {low} to {high}" if high != LARGEST else f", at least {low}"
    others = "".join(f", or {word}" for word in words or [])
    raise ValueError(f"a whole number{bounds if low > -LARGEST else ''}{others}")


def _decimal(text: str, names: set[str] | None = None) -> None:
    """Raise ValueError where the text is no number, or none that the option takes."""
    number = float(text) if DECIMAL.fullmatch(text) else math.nan
    limit = next((AT_MOST[name] for name in names or () if name in AT_MOST), None)
    if limit and not 0 < number <= limit:
        raise ValueError(f"a number above 0{', at most 1' if limit == 1 else ''}")
    if not abs(number) < 1e38:  # llama.cpp's are 32 bits long
        raise ValueError("a number, such as 0.8")


def _json(text: str) -> None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError('an object in JSON, such as {"key": "value"}')
