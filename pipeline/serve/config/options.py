"""The options of one instance: as words of a command line, and the errors in them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from pipeline.core.errors import did_you_mean
from pipeline.core.paths import absolute
from pipeline.core.text import is_digits
from pipeline.core.variables import NO, YES
from pipeline.serve.address import is_anywhere
from pipeline.serve.flags import RPC, Flag
from pipeline.serve.server import LLAMA_CPP, VLLM

from . import synonyms, values
from .configuration import InstanceSpec, Value, beside
from .messages import shown

LLAMA_SERVER = "llama-server"
HOST = "127.0.0.1"
PORTS = {LLAMA_CPP: 8080, VLLM: 8000}
# Hints of llama-server's options that take a path, and its options that take several with commas.
PATHS = ("FNAME", "FILE", "PATH", "DIR", "JINJA_TEMPLATE_FILE")
LISTS = ("lora", "lora-scaled", "control-vector", "control-vector-scaled")
OPTIONAL = "[VALUE]"  # vLLM: the option may stand alone
# llama-server: each time that one of these is given counts, whatever it says itself.
ADDED_UP = {"api-key", "api-key-file", "alias", "tags", "lora", "lora-scaled", "spec-type"}
ADDED_UP |= {"control-vector", "control-vector-scaled", "override-kv", "override-tensor"}
ADDED_UP |= {"reverse-prompt", "logit-bias", "dry-sequence-breaker"}
NO_RPC = (
    ": this llama-server was compiled without RPC; upstream's programs have it (bins=prebuilt), or "
    "name one that was compiled with GGML_RPC in master.llama_cpp_path"
)
MODEL_KEYS = ("ref", "quant", "revision", "filename")  # of the model table; others: control
VARIABLES = {"ref": "model"}  # where the command line calls it otherwise
NAME = re.compile(r"[a-z0-9][\w-]*", re.ASCII | re.I)
TOGETHER = re.compile(r"(--?[A-Za-z][\w-]*)\s.*", re.ASCII | re.DOTALL)
SECRETS = ("--api-key", "--hf-token", "-hft")  # `api_keys` says what to write instead
SEVERAL = " ..."  # vLLM: it takes all words up to the next option


class Address(Struct, frozen=True):
    """Host and port."""

    host: str
    port: int

    def clashes(self, other: Address) -> bool:
        """Whether the two cannot be listened on at once."""
        hosts = {
            HOST if host.lower() == "localhost" else host.lower()
            for host in (self.host, other.host)
        }
        return self.port == other.port and (len(hosts) == 1 or any(map(is_anywhere, hosts)))


def words(server: Mapping[str, Value], flags: Mapping[str, Flag] | None = None) -> list[str]:
    """Text or number: `--key value`; true: `--key`; false: nothing; a list: once for each, or for
    as many as the option takes at once."""
    arguments: list[str] = []
    for name, value in server.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not False:
            items = list(map(str, value if isinstance(value, list) else [value]))
            takes = flags[name].takes if flags and name in flags else 1
            for at in range(0, len(items), takes):
                arguments += [f"--{name}", *items[at : at + takes]]
    return arguments


def resolve(
    spec: InstanceSpec,
    flags: Mapping[str, Flag],
    *,
    program: str = LLAMA_SERVER,
    others: Collection[str] | None = None,
) -> ResolvedOptions:
    """The options of a spec, with their values as the program takes them."""
    server: dict[str, Value] = {}
    for name, value in spec.server.items():
        for other in _same_option(name, server, flags):
            if spec.table_of(f"server.{other}") != spec.table_of(f"server.{name}"):
                del server[other]  # a file's default, or what an override changes
        flag, text = flags.get(name), str(value).lower()
        if name in spec.typed and flag and not flag.value and text in YES | NO:
            server[name] = text in YES  # `jinja=1`, where a file says true
        elif spec.is_typed(f"server.{name}") and _takes_path(name, flag):
            server[name] = with_paths(name, value, _from_here)
        else:
            server[name] = _read(name, value, flag)
    return ResolvedOptions(
        spec=replace(spec, server=server),
        flags=flags,
        program=program,
        others=others,
        written=spec.server,
    )


def _same_option(name: str, names: Iterable[str], flags: Mapping[str, Flag]) -> list[str]:
    """Those of `names` that are other names of one option, where its last value alone counts."""
    flag = flags.get(name)
    if flag is None or flag.plain_names & ADDED_UP:
        return []
    same = [other for other in names if other != name and f"--{other}" in flag.names]
    return [other for other in same if other.startswith("no-") == name.startswith("no-")]


def _opposite(resolved: ResolvedOptions, name: str, earlier: Iterable[str]) -> str:
    """The one of `earlier` in the same table that turns off what `name` turns on, or on what it
    turns off: the program takes the last one without a word. Empty where there is none."""
    spec, flag = resolved.spec, resolved.flags.get(name)
    if flag is None or spec.server[name] is not True:
        return ""
    for other in earlier:
        is_other_way = other.startswith("no-") != name.startswith("no-")
        is_same_table = spec.table_of(f"server.{other}") == spec.table_of(f"server.{name}")
        if is_other_way and is_same_table and f"--{other}" in flag.names:
            return other if spec.server[other] is True else ""
    return ""


def _read(name: str, value: Value, flag: Flag | None) -> Value:
    """The value as the program takes it, such as 32768 for `32k`; a wrong one is left as it is."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and flag and flag.takes > 1:
        parts = value.rsplit(maxsplit=flag.takes - 1)  # `1 5`
        value = [*parts] if len(parts) == flag.takes else value
    with contextlib.suppress(ValueError):
        if isinstance(value, list):
            return [values.read(name, flag, item) for item in value]
        return values.read(name, flag, value)
    return value


def expanded(resolved: ResolvedOptions) -> dict[str, Value]:
    """The table; `~` is the user's home where an option takes a path."""
    table: dict[str, Value] = {}
    for name, value in resolved.spec.server.items():
        flag = resolved.flags.get(name)
        if name == "model" or _takes_path(name, flag):
            value = with_paths(name, value, _home)
        table[name] = value
    return table


def _takes_path(name: str, flag: Flag | None) -> bool:
    """Whether the value is a path of this machine: `hf-file` names one of a repository."""
    return flag is not None and flag.value.startswith(PATHS) and name != "hf-file"


def _from_here(text: str) -> str:
    """A path of the command line: it starts where the user is, not where a profile's do."""
    return str(absolute(text)) if text else text


def with_paths(name: str, value: Value, change: Callable[[str], str]) -> Value:
    """The value with each path in it changed: in a list, between commas, before a scale."""
    if isinstance(value, list):
        return [_changed(name, x, change) if isinstance(x, str) else x for x in value]
    return _changed(name, value, change) if isinstance(value, str) else value


def _changed(name: str, text: str, change: Callable[[str], str]) -> str:
    if name not in LISTS:
        return change(text)
    changed = []
    for part in text.split(","):
        path, colon, scale = part.rpartition(":") if name.endswith("-scaled") else (part, "", "")
        changed.append(change(path) + colon + scale)
    return ",".join(changed)


def _home(text: str) -> str:
    return str(beside(Path(), text)) if text.startswith("~") else text


class ResolvedOptions(Struct, frozen=True):
    """The options of an instance, from its table or from extra_args, under any of their names."""

    spec: InstanceSpec
    flags: Mapping[str, Flag]
    program: str = LLAMA_SERVER  # as it is named in messages
    # vLLM, where `flags` may be another version's: llama-server's options, which are none of it.
    others: Collection[str] | None = None
    written: Mapping[str, Value] = {}  # the table before it was resolved

    @property
    def port(self) -> int:
        """The port on which it listens; 0 where what is given is none."""
        value = self.value("port")
        if value is None or isinstance(value, bool):
            return PORTS[self.spec.engine]
        text = str(value)
        port = int(text) if is_digits(text) and len(text) < 20 else 0
        return port if port <= 65535 else 0

    @property
    def address(self) -> Address:
        """Where it listens, once `errors` finds nothing."""
        return Address(self.text("host") or HOST, self.port)

    def value(self, name: str) -> Value | None:
        """The value that counts: the last one; None where it is not given."""
        flag = self.flags.get(name)
        aliases = {f"--{name}", *(flag.names if flag else ())}
        counts: Value | None = None
        for key, value in self.spec.server.items():
            if f"--{key}" in aliases:
                counts = value
        extra = self.spec.extra_args
        for at, word in enumerate(extra):
            head, equals, tail = word.partition("=")
            if self._is(normalized(head), aliases):
                takes = flag is None or bool(flag.value)
                following = extra[at + 1] if takes and at + 1 < len(extra) else True
                counts = tail if equals else following
        return counts

    def _is(self, word: str, names: set[str]) -> bool:
        """Whether a word of the command line is the option with these names. For vLLM the beginning
        of a name is enough where no other option begins so."""
        if word in names:
            return True
        is_begun = len(word.lstrip("-")) and any(name.startswith(word) for name in names)
        if self.spec.engine != VLLM or not is_begun:
            return False
        others = {name for flag in self.flags.values() for name in flag.names} - names
        return not any(other.startswith(word) for other in others)

    def text(self, *names: str) -> str:
        """The value of the first of `names` that has one, as a text; empty where none has."""
        for name in names:
            value = self.value(name)
            if isinstance(value, list):
                value = value[-1] if value else None
            if value is not None and not isinstance(value, bool):
                return str(value)
        return ""

    def number(self, name: str) -> int:
        """The value of `name` where it is a whole number above 0, else 0."""
        with contextlib.suppress(ValueError):
            return max(0, values.whole(self.text(name)))
        return 0

    def is_on(self, *names: str) -> bool:
        """Whether one of these switches is given and not false."""
        return any(self.value(name) not in (None, False) for name in names)

    def has(self, *names: str) -> bool:
        """Whether one of these is given at all, false included."""
        return any(self.value(name) is not None for name in names)


def missing(resolved: ResolvedOptions, alias: str) -> list[str]:
    """Host (vLLM's default is every interface), port and, as `alias`, name where not given."""
    at = resolved.address
    options: dict[str, Value] = {"host": at.host, "port": at.port, alias: resolved.spec.name}
    return words({name: value for name, value in options.items() if not resolved.text(name)})


def normalized(word: str) -> str:
    """A word of the command line as both servers read it: `_` in long names is `-`."""
    return word.replace("_", "-") if word.startswith("--") else word


def errors(resolved: ResolvedOptions) -> Iterator[str]:
    """What the program would refuse among the options of the table; of extra_args only that an
    option and its value are two texts is checked.
    Without flags (not known yet) only values that no program takes are found."""
    spec, flags = resolved.spec, resolved.flags
    if resolved.port == 0:
        why = f" = {shown(resolved.value('port'))}: must be a whole number from 1 to 65535"
        yield spec.line("server.port", why)
    earlier: list[str] = []
    for name, value in spec.server.items():
        why = ""
        if others := _same_option(name, earlier, flags):
            why = f" and {others[0].replace('-', '_')} are one option; write one of them"
        elif other := _opposite(resolved, name, earlier):
            why = f" and {other.replace('-', '_')} contradict each other; leave one out"
        elif flags and not is_passed_on(resolved, name):
            why = _unknown(resolved, name)
        if why := why or wrong_value(name, value, flags.get(name)):
            yield spec.line(f"server.{name}", why)
        earlier.append(name)
    for option in _together(resolved):  # else the program looks for such an option
        why = f": {option} and its value are one text; write them as two"
        yield spec.line("server.extra-args", why)


def warnings(resolved: ResolvedOptions) -> Iterator[str]:
    """What is allowed, and may not do what the user expects."""
    spec, flags = resolved.spec, resolved.flags
    for name, value in spec.server.items():
        key, written = f"server.{name}", resolved.written.get(name, value)
        is_joined = isinstance(written, str) and isinstance(value, list)
        is_same = written == value or is_joined or _takes_path(name, flags.get(name))
        if not is_same and not isinstance(value, bool):
            yield spec.line(key, f" = {shown(written)}: taken as {shown(value)}")
        if flags and is_passed_on(resolved, name):
            yield spec.line(key, f": {resolved.program} has no --{name}; passed on as it is")
        if value is False and f"no-{name}" in flags:
            off = f"no-{name}".replace("-", "_")
            yield spec.line(key, f" = false: leaves the option out; {off} = true turns it off")
        once = flags[name].takes if name in flags else 1
        if not isinstance(value, list) or len(value) <= once or name in ADDED_UP:
            continue
        if spec.engine == LLAMA_CPP:
            why = ": llama-server takes the last one alone; for all, one text with commas"
            yield spec.line(key, why)
        elif name in flags and flags[name].value.endswith(SEVERAL):
            why = f": vLLM takes the last one alone; for all, extra_args after one --{name}"
            yield spec.line(key, why)


def is_passed_on(resolved: ResolvedOptions, name: str) -> bool:
    """Whether an unknown option may be another vLLM version's: no typo, and not llama-server's."""
    name = name.partition(".")[0]
    flags, others = resolved.flags, resolved.others
    if others is None or name in flags or name in others or not NAME.fullmatch(name):
        return False
    return synonyms.option(name, VLLM) is None and not did_you_mean(name, list(flags))


def _together(resolved: ResolvedOptions) -> Iterator[str]:
    """The options of extra_args that stand in one text with their value: with a space between, or
    with `=`, which llama-server does not read and vLLM does."""
    spec = resolved.spec
    is_llama = spec.engine == LLAMA_CPP
    known = {name: flag for flag in resolved.flags.values() for name in flag.names}
    before = None
    for word in spec.extra_args:
        name, equals, _ = word.partition("=")
        is_option = normalized(name) in known and normalized(name) not in SECRETS
        is_value = before is not None and before.value
        if together := TOGETHER.fullmatch(word):
            yield together[1]
        elif is_llama and equals and is_option and not is_value:
            yield name
        before = known.get(normalized(word))


def wrong_value(name: str, value: Value, flag: Flag | None) -> str:
    """Why the option does not take this value; empty where it does."""
    if value is False or "." in name:
        return ""
    if value is True:
        if flag is None or flag.value in ("", OPTIONAL):
            return ""
        if flag.choices:
            return f" = true: must be one of {', '.join(flag.choices)}, in quotes"
        return f" = true: --{name} takes a value: {flag.value}"
    if flag and not flag.value:
        return f" = {shown(value)}: --{name} takes no value; write true, or leave it out"
    items = value if isinstance(value, list) else [value]
    if flag and len(items) % flag.takes:
        return f" = {shown(value)}: --{name} takes {flag.takes} values: {flag.value}"
    for item in items:
        try:
            values.read(name, flag, item)
        except ValueError as allowed:
            return f" = {shown(item)}: must be {allowed}"
    return ""


def _unknown(resolved: ResolvedOptions, key: str) -> str:
    """The error of an option that the program does not have; empty where it has it. What follows
    a dot is a key of vLLM's JSON."""
    name = key.partition(".")[0]
    if name in resolved.flags:
        return ""
    is_llama = resolved.spec.engine == LLAMA_CPP
    if is_llama and name == RPC:
        return NO_RPC
    new = synonyms.RENAMED.get(name, "") if is_llama else ""
    if new.replace("_", "-") in resolved.flags:
        return f": {resolved.program} has no --{name} any more; use {new}"
    is_typed = resolved.spec.is_typed(f"server.{key}")
    return f": {resolved.program} has no --{name}{_instead(resolved, name, is_typed=is_typed)}"


def _instead(resolved: ResolvedOptions, name: str, *, is_typed: bool) -> str:
    """`; did you mean X?` for what other programs call so, a short name, or a similar name."""
    flags, engine = resolved.flags, resolved.spec.engine
    short = next((option for option, flag in flags.items() if f"-{name}" in flag.names), "")
    meant = short or synonyms.option(name, engine, flags)
    if not meant and engine == LLAMA_CPP and name in synonyms.KEYS:
        key = synonyms.KEYS[name]
        table = "model" if key in MODEL_KEYS else "control"
        return f"; did you mean {f'{VARIABLES.get(key, key)}=' if is_typed else f'{table}.{key}'}?"
    if meant is None:
        return did_you_mean(name, list(flags)).replace("-", "_")
    return f"; did you mean {meant.replace('-', '_')}?" if meant else ""
