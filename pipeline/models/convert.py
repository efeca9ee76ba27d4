"""safetensors to GGUF, with llama.cpp's own converter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.process import last_lines, run
from pipeline.core.progress import Update, bar
from pipeline.core.sandbox import strength
from pipeline.core.store import artifacts, receipts, stat_cache
from pipeline.core.store.locks import mark_used
from pipeline.core.store.publish import require_disk
from pipeline.core.store.receipts import Recipe, Status

from . import adapter, contents, converter, foreign_code, gguf, kinds, staging, tools
from .resolve import Resolved, slug

OUT_OF_MEMORY = r"MemoryError|allocate memory|std::bad_alloc"
UNREADABLE_CODE = r"(Import|ModuleNotFound|Attribute|Syntax|EOF|Unicode\w*)Error|null bytes|marshal"
WITHOUT_PROJECTOR = "mmproj=none serves the model without it"
MOST_OF_A_PROJECTOR = 2_000_000_000  # bytes; most take less than one
BASE = "base"  # of an adapter: the folder, among its staged files, with its model's config
# One of these files holds the words, whatever the tokenizer. Mamba's converter does without.
TOKENIZER = r"(?i)^(tokenizer\.jsonl?|tekken\.json|vocab\.json|.*\.(model|tiktoken|txt))$"
NO_TOKENIZER = (
    "it has no tokenizer (tokenizer.json, tokenizer.model and others): put the files of the model "
    "that it was made from beside the weights; "
)
# Which files were chosen is kept, also over an update of this project that chooses more.
NO_TOKENIZER_CHOSEN = (
    "no tokenizer (tokenizer.json, tokenizer.model and others) was chosen of its repository: "
    "refresh=1 looks there again; if it has none, download it, and put the files of the model that "
    "it was made from beside the weights; "
)
BITS = {"F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5}


class Conversion(Struct, frozen=True, kw_only=True):
    """One conversion. `script` is the converter, `llama_cpp` the recipe of the tree it is from;
    `keep` is false for an intermediate file; `projector`: it makes the projector that belongs to
    the model."""

    resolved: Resolved
    target: Path
    outtype: str
    script: Path
    llama_cpp: Recipe
    keep: bool
    projector: bool = False

    @property
    def recipe(self) -> Recipe:
        """What the result depends on."""
        requirements = converter.requirements_sha256()
        recipe: dict[str, Any] = {
            "step": "convert",
            "files": self.resolved.recipe(),
            "name": self.resolved.name,
            "outtype": self.outtype,
            "converter": {**self.llama_cpp, "requirements": requirements},
        }
        if base := self.resolved.base:
            recipe |= {"adapter": True, "base": base.recipe()}
        return recipe | {"projector": True} if self.projector else recipe

    @property
    def status(self) -> Status:
        """How the result compares with its receipt."""
        return receipts.status(self.target, self.recipe)

    @property
    def title(self) -> str:
        """What it makes, for messages."""
        return f"the projector of {self.resolved.name}" if self.projector else self.resolved.name

    @property
    def need(self) -> int:
        """About how many bytes the result takes."""
        if self.projector:
            return min(self.resolved.bytes, MOST_OF_A_PROJECTOR)
        source = BITS.get(self.resolved.precision, 16.0)
        return int(self.resolved.bytes * BITS[self.outtype] / source * 1.02)


class Unquantized(Struct, frozen=True, kw_only=True):
    """A GGUF that is quantized: the user's own file, or what `conversion` makes."""

    path: Path
    conversion: Conversion | None = None

    def digest(self, home: Home, *, hashing: bool = False) -> str:
        """The digest of the file, whether or not it still exists; empty where it is not known. The
        user's own files are hashed only with `hashing`."""
        if self.conversion is None:
            lookup = stat_cache.identity if hashing else stat_cache.recall
            digests = [lookup(home.digests, path) for path in gguf.shards(self.path)]
            return "" if None in digests else "+".join(map(str, digests))
        entry = receipts.of(self.path)
        return entry.sha256 if entry and entry.recipe == self.conversion.recipe else ""


def argv(conversion: Conversion, python: Path, folder: Path, made: Path) -> list[str]:
    """The converter's command line, with the model's name: that of the folder does not matter."""
    words = [str(python), str(converter.DRIVER), str(conversion.script), str(folder)]
    words += ["--outfile", str(made), "--outtype", conversion.outtype.lower()]
    if conversion.resolved.base:  # an adapter's
        return [*words, "--base", str(folder / BASE)]
    words.append(f"--model-name={conversion.resolved.name}")
    return [*words, "--mmproj"] if conversion.projector else words


def make(
    conversion: Conversion,
    home: Home,
    *,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Make the GGUF unless it is current; `check` looks at it before it is published. Raises
    PipelineError."""

    def maker(made: Path) -> None:
        resolved = conversion.resolved
        of = "mmproj-" if conversion.projector else ""
        log = home.logs / f"convert-{resolved.slug}-{of}{conversion.outtype.lower()}.log"
        with (
            staging.workspace(made, slug(resolved.name)) as (folder, scratch),
            bar(f"converting {conversion.title} to {conversion.outtype}") as update,
        ):
            words = argv(conversion, converter.installed(home).python, folder, made)
            watch = progress(update)
            status = run_converter(
                conversion, home, words, folder, made, scratch, log=log, on_line=watch
            )
        if status:
            require_whole_converter(home, log)
            raise failed(conversion, status, log)
        header = tools.read_made(made)
        if resolved.base:
            kinds.require_adapter(header, resolved.name)
        elif not conversion.projector:
            kinds.require_model([header], resolved.name)
        elif not kinds.is_projector(header):
            raise PipelineError(
                f"{conversion.title}: the converter made something else", WITHOUT_PROJECTOR
            )
        if check:
            check(made)

    artifacts.make(
        conversion.target,
        conversion.recipe,
        maker,
        need=conversion.need,
        source=conversion.resolved.source,
        keep=conversion.keep,
        force=force,
        sandbox=strength().name,
    )


def progress(update: Update) -> Callable[[str], None]:
    """A function that reads how far the converter is from a line of its output."""

    def watch(line: str) -> None:
        if percent := re.match(r"Writing:\s+(\d+)%", line):
            update(int(percent[1]), 100)

    return watch


def run_converter(
    conversion: Conversion,
    home: Home,
    words: Sequence[str],
    folder: Path,
    made: Path,
    scratch: Path,
    *,
    log: Path,
    on_line: Callable[[str], None],
    read: Iterable[Path] = (),
    write: Sequence[Path] = (),
    timeout: float = 0,
) -> int:
    """Lay out the converter's input in `folder` and run the command line `words`, which may write
    `made`, `write` and below `scratch`, and beside its input may read `read`. `timeout` are seconds
    beyond those of a conversion. Returns the exit status. Raises PipelineError."""
    resolved = conversion.resolved
    environment = converter.installed(home)
    python = environment.python
    mark_used(environment.folder)
    inputs = {file.name: resolved.folder / file.name for file in resolved.files}
    staging.stage(inputs, folder)
    if base := resolved.base:
        config = {file.name: base.folder / file.name for file in base.files}
        staging.stage_config(config, folder / BASE)
        adapter.scale_by_root(folder / adapter.CONFIG)
        inputs |= config
    for path in write:
        path.touch()  # the program may not
    policy = converter.sandbox(python, conversion.script, folder, inputs.values(), made, scratch)
    return run(
        words,
        log=log,
        env=converter.environment(python, scratch),
        on_line=on_line,
        timeout=tools.seconds("convert", resolved.bytes) + timeout,
        sandbox=replace(policy, read=[*policy.read, *read], write=[*policy.write, *write]),
    )


def require_whole_converter(home: Home, log: Path) -> None:
    """Raise PipelineError where Python could not read the converter's own environment, which the
    next run makes again."""
    output = log.read_text(encoding="utf-8", errors="replace")
    environment = converter.installed(home)
    if re.search(UNREADABLE_CODE, output) and (why := environment.damage(hashes=True)):
        environment.forget()
        raise PipelineError(
            f"the converter's environment is damaged: {why}",
            "run the same command again: it makes the environment anew",
        )


def failed(conversion: Conversion, status: int, log: Path) -> PipelineError:
    """The error for a conversion that ended with `status`. Raises PipelineError where the disk is
    why."""
    resolved = conversion.resolved
    output = log.read_text(encoding="utf-8", errors="replace")
    require_disk(conversion.target.parent, output)
    if re.search(OUT_OF_MEMORY, output):
        hint = "it needs more memory than its weights account for; check its config.json"
    elif conversion.projector:
        hint = WITHOUT_PROJECTOR
    else:
        has_words = any(re.search(TOKENIZER, file.name) for file in resolved.files)
        is_whole = has_words or resolved.base is not None  # an adapter has none
        why = NO_TOKENIZER_CHOSEN if resolved.source.get("type") == "hf" else NO_TOKENIZER
        hint = f"{'' if is_whole else why}the whole log is {log}"
    files = (contents.local(resolved.folder / file.name, file.name) for file in resolved.files)
    code = foreign_code.classes(files)
    message = f"{conversion.title} could not be converted (status {status}):\n{last_lines(log)}"
    return PipelineError(*foreign_code.explained(resolved.name, code, message, hint))
