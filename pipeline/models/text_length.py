"""Whether a text has as many tokens as llama-perplexity and llama-imatrix need: two chunks.

A token has a byte at least, so that a very short text is known by its size. Else the model's own
tokenizer is asked, for which its header is enough: no weights have to be there.

llama-perplexity hands what it prints to a thread, which its end does not wait for: a run of some
milliseconds may print nothing. The file for its probabilities it writes itself, and begins it
before it counts the tokens.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from pipeline.core.errors import UsageError
from pipeline.core.process import outcome

from . import gguf, tools

CHUNK = 512  # tokens, unless another size is asked for
END = "tokenizer.ggml.add_eos_token"
LONGEST = 16  # bytes of a token, at most in the mean of a text
COPIES = 2  # of the weights in memory, though none is read
BEGUN = len("_logits_") + 4  # bytes of the file where the text is too short: no head follows
TOO_SHORT = re.compile(r"need at least (\d+) tokens.*?tokenizes to only (\d+) tokens", re.S)


def complaint(output: str, written: int = 0, chunk: int = CHUNK) -> str:
    """What is wrong with a text that is too short, by what a program of llama.cpp printed of it, or
    the bytes that llama-perplexity has written; empty where it is long enough."""
    if found := TOO_SHORT.search(output):
        return f"has {found[2]} tokens, and {found[1]} are needed at least"
    few = f"has too few tokens, and {2 * chunk} are needed at least"
    return few if written == BEGUN else ""


def may_be_short(text: Path, chunk: int = CHUNK) -> bool:
    """Whether a text has so few bytes that its tokens have to be counted."""
    return text.stat().st_size < LONGEST * 2 * chunk


def require_bytes(text: Path, variable: str, chunk: int = CHUNK) -> None:
    """Raise UsageError where the text, the value of a variable, is too short whatever its tokens
    are."""
    if (length := text.stat().st_size) < 2 * chunk:
        raise too_short(
            text, variable, f"has {length} bytes, and {2 * chunk} tokens are needed at least"
        )


def require(program: Path, model: Path, text: Path, variable: str, chunk: int = CHUNK) -> None:
    """Raise UsageError where the text, the value of a variable, is too short for the tokenizer of
    `model`, which may be a skeleton. `program` is llama-perplexity. Where that cannot tell, who
    reads the text will."""
    require_bytes(text, variable, chunk)
    if not may_be_short(text, chunk):
        return
    size = str(chunk)
    words = [str(program), "--model", str(model), "--file", str(text), "--chunks", "0"]
    words += ["--ctx-size", size, "--batch-size", size, "--device", "none", "--no-warmup"]
    words += without_end(model)
    probabilities = 2 * chunk * (gguf.read(model).vocabulary + 4)  # room for a chunk of them
    with tempfile.TemporaryDirectory(prefix="llama-pipeline-") as folder:
        made = Path(folder, "probabilities")
        _, out, err = outcome(
            [*words, "--save-all-logits", str(made)],
            timeout=tools.seconds("header", gguf.file_bytes(model)),
            env=tools.env(),
            sandbox=tools.sandbox(
                program,
                model=model,
                read=[text],
                write=[made],
                copies=COPIES,
                memory=tools.HEADER_MEMORY + probabilities,
            ),
        )
        why = complaint(f"{out}\n{err}", made.stat().st_size, chunk)
    if why:
        raise too_short(text, variable, why)


def without_end(model: Path) -> list[str]:
    """Options for llama-perplexity and llama-imatrix, which refuse a model that ends texts with a
    token of its own."""
    header = gguf.read(model)
    ends = header.is_encoder or header.values.get(END) is True
    return ["--override-kv", f"{END}=bool:false"] if ends else []


def too_short(text: Path, variable: str, why: str) -> UsageError:
    return UsageError(f"{variable}={text}: {why}", f"pass a longer {variable}=PATH")
